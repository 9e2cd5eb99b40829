"""What a run further down leaves to the ancestor that ends the whole tree."""

from __future__ import annotations

import asyncio
from typing import get_args
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running, Scheduled

from supervised import supervised_flow, supervisor
from supervised._identity import Lineage
from supervised._policy import Budget, parent_reason
from supervised._teardown import Teardown
from supervised._types import DEFAULT_ON_PARENT, Cause
from supervised._watch import Watcher
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

SLOW = 8.0


@supervised_flow
async def slow():
    """Take a while to end."""
    try:
        await asyncio.sleep(3600)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(SLOW)


@supervised_flow
async def root():
    """Keep a region."""
    await supervisor.spawn("region/test")


def keeps(**options):
    """Return a flow that keeps a leaf."""

    @supervised_flow
    async def region():
        await supervisor.spawn("slow/test", **options)

    return region


def running(prefect, region, leaf=slow):
    """Start a tree of three levels, and see that it runs."""
    prefect.deploy("region/test", region, runner="region")
    prefect.deploy("slow/test", leaf, runner="slow")
    run = prefect.start(root)
    prefect.until(lambda: sum(each.has_process for each in prefect.runs) == 3, within=60)
    prefect.advance(5)
    middle, leaf = run.below
    return run, middle, leaf


def test_a_run_further_down_leaves_at_once_when_its_children_have_been_asked():
    with FakePrefect() as prefect:
        run, middle, leaf = running(prefect, keeps())
        run.cancel()
        prefect.until(lambda: not middle.has_process, within=SLOW / 2)
        assert leaf.state.is_cancelling()
        assert leaf.has_process
        prefect.until(lambda: not prefect.alive, within=60)
        assert run.report.ok
        assert {receipt.flow_run_id for receipt in run.report.receipts} >= {middle.id, leaf.id}
        assert middle.report.delegated_to == run.id


def test_a_body_that_its_runner_has_signalled_is_not_interrupted_once_more():
    """Its cleanup may take as long as the runner lets it."""
    ends = []

    @supervised_flow
    async def tidy():
        child = supervisor.spawn("slow/test")
        try:
            await child
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2 * SLOW)
            ends.append("tidy")

    with FakePrefect() as prefect:
        run, *_ = running(prefect, tidy)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=60)
    assert ends == ["tidy"]


@pytest.mark.parametrize("seconds", [4.0, 12.0])
def test_a_run_further_down_stays_for_the_answer_to_a_launch(monkeypatch, seconds):
    """Nobody else can know of that run: the server creates it whether or not anybody waits."""
    create, sent = FakeOrchestrator.create_deployment_run, []

    async def slowly(self, deployment, request):
        if deployment.name != "leaf/test":
            return await create(self, deployment, request)
        assert request.begin()
        sent.append(deployment)
        made = []

        def carry_out():
            labels, key = request.labels, request.idempotency_key
            tracking = (request.tracking_id, request.parent_run_id, request.tracking_key)
            made.append(
                self._server.create(
                    "leaf",
                    state=Scheduled(),
                    deployment_id=deployment.id,
                    tags=request.tags,
                    labels=labels,
                    idempotency_key=key,
                    parent_task_run_id=self._server.track(*tracking),
                )
            )

        prefect.loop.call_unowned(seconds, carry_out)
        while not made:
            await anyio.sleep(0.05)
        return made[0]

    @supervised_flow
    async def region():
        await supervisor.spawn("leaf/test")

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", slowly)
    with FakePrefect() as prefect:
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test", runner="leaf")
        run = prefect.start(root)
        prefect.until(lambda: sent, within=60)
        run.cancel()
        prefect.advance(90)
        _, leaf = run.below
        assert leaf.state.is_cancelled()
        assert not leaf.has_started


def test_a_run_further_down_stays_for_a_child_that_is_to_be_waited_for():
    said = []

    @supervised_flow
    async def brief():
        while not said:
            await asyncio.sleep(0.1)

    with FakePrefect() as prefect:
        waits = keeps(on_parent={"cancelled": "wait"})
        run, middle, leaf = running(prefect, waits, leaf=brief)
        run.cancel()
        prefect.advance(3)
        assert leaf.state.is_running()
        assert middle.has_process
        said.append("that will do")
        prefect.until(lambda: not prefect.alive, within=10)
        assert leaf.state.is_completed()


def test_a_run_that_fails_while_its_tree_is_cancelled_waits_for_one_child_and_not_for_the_other():
    """It waits for the one by its policy; the other is verified by the ancestor."""

    @supervised_flow
    async def fails():
        supervisor.spawn("slow/test", on_parent={"failed": "wait", "cancelled": "wait"})
        supervisor.spawn("slow/test")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise ValueError("not like this") from None

    with FakePrefect() as prefect:
        prefect.deploy("region/test", fails, runner="region")
        prefect.deploy("slow/test", slow, runner="slow")
        run = prefect.start(root)
        prefect.until(lambda: sum(each.has_process for each in prefect.runs) == 4, within=60)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=60)


def test_a_harder_end_reaches_a_teardown_that_waits_beside_a_child_that_is_being_launched(
    make_child,
):
    """Neither child gives it anything to ask the server for."""
    run_id, ancestor = uuid4(), uuid4()
    waited = make_child(key="waited", on_parent=dict.fromkeys(get_args(Cause), "wait"))
    waited.assign_run(FlowRun(id=uuid4(), flow_id=uuid4(), state=Running()))
    launching = make_child(key="launching")
    launching.attempt.was_requested = False

    async def play(api):
        teardown = Teardown(
            api,
            Watcher(api),
            flow_name="region",
            lineage=Lineage(run_id, (ancestor, run_id)),
            cause="failed",
            reason=parent_reason("failed", "region"),
            children=lambda: [waited, launching],
            in_body=set,
            budget=Budget(20.0),
            delegate_to=ancestor,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(teardown.run)
            await anyio.sleep(1)
            assert teardown.is_waiting
            teardown.hurry("cancelled", parent_reason("cancelled", "region"))
            await anyio.sleep(1)
            assert not teardown.is_waiting
            launching.settle("cancelled")
            waited.settle("cancelled")

    with FakePrefect() as prefect:
        prefect.call(play(prefect.connect()))


def test_a_delegated_teardown_that_is_overtaken_asks_what_it_had_waited_for(make_child):
    """Its report is true: an ancestor ends the child too, but this run has asked for it."""
    run_id, ancestor = uuid4(), uuid4()
    reports = []

    async def play(prefect):
        api = prefect.connect()
        waited = make_child(key="waited", on_parent={**DEFAULT_ON_PARENT, "failed": "wait"})
        waited.assign_run(prefect.server.create("leaf", state=Running(), deployment_id=uuid4()))

        async def tear_down():
            reports.append(await teardown.run())

        teardown = Teardown(
            api,
            Watcher(api),
            flow_name="region",
            lineage=Lineage(run_id, (ancestor, run_id)),
            cause="failed",
            reason=parent_reason("failed", "region"),
            children=lambda: [waited],
            in_body=set,
            budget=Budget(20.0),
            delegate_to=ancestor,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tear_down)
            await anyio.sleep(1)
            teardown.hurry("cancelled", parent_reason("cancelled", "region"))

    with FakePrefect() as prefect:
        prefect.call(play(prefect))
        assert [run.state.is_cancelling() for run in prefect.runs] == [True]
    assert [report.ok for report in reports] == [True]


def test_detached_children_are_made_known_one_after_the_other(monkeypatch):
    """SQLite refuses some of many writes at once, and each is repeated seconds later."""
    count = 9
    cut_loose, at_once, most = FakeOrchestrator.cut_loose, [], []

    async def counted(self, run, labels):
        at_once.append(run)
        most.append(len(at_once))
        await cut_loose(self, run, labels)
        at_once.pop()

    monkeypatch.setattr(FakeOrchestrator, "cut_loose", counted)

    @supervised_flow
    async def parent():
        for _ in range(count):
            supervisor.spawn("slow/test", on_parent={"failed": "detach"})
        await asyncio.sleep(20)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("slow/test", slow)
        run = prefect.start(parent)
        prefect.until(lambda: not run.has_process, within=60)
        assert [each.state.is_running() for each in prefect.alive] == [True] * count
    assert len(most) == count
    assert set(most) == {1}
