"""When a body is interrupted, and when it is left alone because it is cleaning up."""

from __future__ import annotations

import asyncio
import contextlib

from prefect.states import Cancelling

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator
from supervised.testing._processes import FakeProcess

GRACE = 20.0


def test_a_body_whose_scope_never_reaches_the_server_is_interrupted_all_the_same(monkeypatch):
    """Nothing could be launched, and nobody else is there to tell it."""
    ends = []

    @contextlib.asynccontextmanager
    async def unreachable(self):
        raise OSError("no server")
        yield

    @supervised_flow
    async def parent():
        supervisor.spawn("leaf/test")
        try:
            await asyncio.sleep(3600)
        finally:
            ends.append(prefect.seconds)

    monkeypatch.setattr(FakeProcess, "open_orchestrator", unreachable)
    with FakePrefect() as prefect:
        prefect.deploy("leaf/test")
        run = prefect.start(parent)
        prefect.until(lambda: not run.has_process, within=60)
        assert run.state.is_failed()
    assert [seconds < 1 for seconds in ends] == [True]


def test_a_body_that_its_runner_has_signalled_is_not_interrupted_by_a_childs_failure():
    """Its process has not heard yet that its run is being cancelled: the signal tells enough."""
    ends = []

    @supervised_flow
    async def parent():
        supervisor.spawn("bad/test")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ends.append("interrupted")
            await asyncio.sleep(10)
            ends.append("tidy")
            raise

    with FakePrefect() as prefect:
        prefect.deploy("parent/test", parent, runner="parent")
        prefect.deploy("bad/test", takes=20, fails=True)
        run = prefect.start("parent/test")
        prefect.until(lambda: [each.state.is_running() for each in run.below] == [True], within=60)
        prefect.advance(19)
        (bad,) = run.below
        assert bad.state.is_running()
        prefect.process_of(run.id).terminate("cancel")
        prefect.until(lambda: not run.has_process, within=60)
        assert bad.state.is_failed()
    assert ends == ["interrupted", "tidy"]


def test_a_lost_run_above_counts_no_more_when_the_own_run_is_being_cancelled(monkeypatch):
    """That may be heard while somebody is asked whether the run was detached from the lost one."""
    read_runs, request_cancel = FakeOrchestrator.read_runs, FakeOrchestrator.request_cancel
    cancelled, messages = [], []

    async def cancel_meanwhile(self, run_ids):
        if not cancelled and region_ids == list(run_ids):
            cancelled.append(run_ids)
            prefect.server.propose(region_ids[0], enough)
            await asyncio.sleep(1)
        return await read_runs(self, run_ids)

    async def noted(self, run_ids, message):
        if region_ids == list(run_ids):
            messages.append(message)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", noted)

    @supervised_flow(lease_seconds=10)
    async def region():
        await supervisor.spawn("leaf/test")

    @supervised_flow(lease_seconds=10)
    async def root():
        await supervisor.spawn("region/test")

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test")
        run = prefect.start("root/test")
        prefect.until(lambda: sum(each.has_process for each in prefect.runs) == 3, within=60)
        middle, _ = run.below
        region_ids = [middle.id]
        enough = Cancelling(message="enough")
        monkeypatch.setattr(FakeOrchestrator, "read_runs", cancel_meanwhile)
        prefect.runners["root"].kill()
        run.kill()
        prefect.until(lambda: not middle.has_process, within=120)
        assert cancelled
        assert "enough" in middle.report.reason
    assert messages == []
