"""What is done for runs that do not end when they are asked: many of them in few requests."""

from __future__ import annotations

from collections import Counter
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Pending, Running

from supervised._identity import Lineage
from supervised._policy import Budget, parent_reason
from supervised._targets import Target
from supervised._teardown import Teardown
from supervised._watch import Watcher
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

MANY = 120  # of a hundred and more a request each would take longer than the grace


async def end(prefect, *, children=(), runs=(), watcher=None, **options):
    """Tear children down, and runs below them; return the report."""
    run_id, api = uuid4(), prefect.connect()
    teardown = Teardown(
        api,
        watcher or Watcher(api),
        flow_name="parent",
        lineage=Lineage(run_id, (run_id,)),
        cause="cancelled",
        reason=parent_reason("cancelled", "parent"),
        children=lambda: children,
        in_body=set,
        budget=Budget(30.0),
        **options,
    )
    for run in runs:
        teardown._targets.add(Target(name=run.name, depth=1, run=run, state=run.state))
    return await teardown.run()


def end_what_never_begins(prefect, make_child, count, **options):
    """Tear down children that are waiting for their processes; return the report."""
    deployment_id = uuid4()
    children = [make_child(key=str(number)) for number in range(count)]
    for child in children:
        child.assign_run(
            prefect.server.create("leaf", state=Pending(), deployment_id=deployment_id)
        )
    return end(prefect, children=children, **options)


@pytest.fixture
def calls(monkeypatch):
    """Count the requests to announce and to close runs, and the runs."""
    made = Counter()

    def count(name):
        call = getattr(FakeOrchestrator, name)

        def counted(self, run_ids, *rest):
            made[name] += 1
            made[f"{name}, runs"] += len(run_ids)
            return call(self, run_ids, *rest)

        monkeypatch.setattr(FakeOrchestrator, name, counted)

    count("nudge")
    count("close_runs")
    return made


def states(prefect):
    return Counter(run.state.type for run in prefect.runs)


def test_many_runs_that_never_began_are_announced_and_closed_in_few_requests(make_child, calls):
    with FakePrefect() as prefect:
        report = prefect.call(end_what_never_begins(prefect, make_child, MANY))
        assert states(prefect) == {StateType.CANCELLED: MANY}
    assert {receipt.status for receipt in report.receipts} == {"forced"}
    assert {receipt.escalations for receipt in report.receipts} == {("nudged", "closed")}
    assert calls["nudge, runs"] == calls["close_runs, runs"] == MANY
    assert calls["nudge"] == calls["close_runs"] == 3


@pytest.mark.parametrize("failure", ["is refused", "is half refused", "goes unheard"])
def test_a_run_that_could_not_be_closed_is_closed_a_moment_later(
    make_child, monkeypatch, calls, failure
):
    close_runs, failed = FakeOrchestrator.close_runs, []

    async def fail_once(self, run_ids, message):
        if failed:
            return await close_runs(self, run_ids, message)
        failed.append(run_ids)
        if failure == "is refused":
            raise OSError("database is locked")
        acks = await close_runs(self, run_ids[: len(run_ids) // 2], message)
        if failure == "goes unheard":
            raise OSError("the connection was reset")
        return acks

    monkeypatch.setattr(FakeOrchestrator, "close_runs", fail_once)
    with FakePrefect() as prefect:
        report = prefect.call(end_what_never_begins(prefect, make_child, 10))
        assert states(prefect) == {StateType.CANCELLED: 10}
    assert report.ok
    assert {receipt.status for receipt in report.receipts} == {"forced"}


def test_runs_that_a_later_attempt_has_taken_over_are_not_closed(make_child, calls):
    asked = []

    async def is_superseded():
        asked.append(1)
        return len(asked) > 1  # after the request

    with FakePrefect() as prefect:
        prefect.call(end_what_never_begins(prefect, make_child, 10, is_superseded=is_superseded))
        assert states(prefect) == {StateType.CANCELLING: 10}
    assert not calls


def test_a_request_to_announce_runs_that_fails_keeps_no_others_from_being_announced(
    make_child, monkeypatch
):
    """Nor is it made again: the runners look for themselves some time."""
    nudge, requests, told = FakeOrchestrator.nudge, [], []

    async def fail_once(self, run_ids):
        requests.append(len(run_ids))
        if len(requests) == 1:
            raise OSError("the connection was reset")
        told.extend(run_ids)
        await nudge(self, run_ids)

    monkeypatch.setattr(FakeOrchestrator, "nudge", fail_once)
    with FakePrefect() as prefect:
        report = prefect.call(end_what_never_begins(prefect, make_child, MANY))
    assert requests == [50, 50, 20]
    assert len(told) == 70
    assert report.ok


def test_what_is_over_by_its_turn_is_not_closed(monkeypatch):
    """Inline flows of a dead process had completed; that is read while others are closed."""
    close_runs, closed = FakeOrchestrator.close_runs, []

    async def slowly(self, run_ids, message):
        if not closed:
            await anyio.sleep(1)
            for run in had_completed:
                watcher.apply(prefect.server.read(run.id))
        closed.extend(run_ids)
        return await close_runs(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "close_runs", slowly)
    with FakePrefect() as prefect:
        watcher = Watcher(prefect.connect())
        runs = [prefect.server.create("leaf", state=Running()) for _ in range(MANY)]
        had_completed = runs[50:]
        stale = [prefect.server.read(run.id) for run in runs]
        for run in had_completed:
            prefect.server.propose(run.id, Completed())
        options = {"top_is_gone": True, "can_wait": False}
        report = prefect.call(end(prefect, runs=stale, watcher=watcher, **options))
        assert states(prefect) == {StateType.CANCELLED: 50, StateType.COMPLETED: 70}
    assert closed == [run.id for run in runs[:50]]
    assert Counter(receipt.status for receipt in report.receipts) == {"forced": 50, "completed": 70}


def test_a_child_here_whose_interrupt_raises_does_not_keep_others_from_being_ended(make_child):
    """The second time, that is: the first is a request, and what it raises is told of as such."""
    interrupted = []

    def interrupt(*, hard=False):
        interrupted.append(hard)
        if len(interrupted) > 1:
            raise RuntimeError("its loop is closed")

    with FakePrefect() as prefect:
        bad, other = make_child(key="bad", kind="inline"), make_child(key="other")
        bad.assign_run(prefect.server.create("bad", state=Running()))
        bad.attempt.interrupt = interrupt
        other.assign_run(prefect.server.create("leaf", state=Pending(), deployment_id=uuid4()))
        report = prefect.call(end(prefect, children=[bad, other]))
    statuses = {receipt.flow_run_id: receipt.status for receipt in report.receipts}
    assert statuses == {bad.flow_run_id: "unverified", other.flow_run_id: "forced"}
    assert "its loop is closed" in report.unverified[0].reason
    assert interrupted == [False, False, True]
