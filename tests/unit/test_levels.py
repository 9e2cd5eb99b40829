"""What a run further down leaves to the ancestor that ends the whole tree."""

from __future__ import annotations

import asyncio
from typing import get_args
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Pending, Running, Scheduled

from supervised import supervised_flow, supervisor
from supervised._host import current_host
from supervised._identity import Lineage
from supervised._policy import Budget, parent_reason
from supervised._supervisor import Supervisor
from supervised._teardown import Teardown
from supervised._types import DEFAULT_ON_PARENT, Cause
from supervised._watch import Watcher
from supervised.testing import FakePrefect, _runner
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


@pytest.mark.parametrize("heard_within", [0.5, 4.0])
def test_a_body_that_its_runner_has_signalled_is_not_interrupted_once_more(
    monkeypatch, heard_within
):
    """Its cleanup may take as long as the runner lets it, however late that has signalled."""
    monkeypatch.setattr(_runner, "_HEAR_SECONDS", heard_within)
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


@pytest.mark.parametrize("child", ["is scheduled", "is queued for a slot", "runs"])
@pytest.mark.parametrize("top", ["root", "region"])
def test_a_body_hears_of_no_childs_end_before_its_runners_signal(monkeypatch, top, child):
    """It would be cut off in its cleanup, though whoever ended the child was quicker than that."""
    monkeypatch.setattr(_runner, "_HEAR_SECONDS", 4.0)
    ends = []

    @supervised_flow(max_concurrent=1)
    async def region():
        if child == "is queued for a slot":
            supervisor.spawn("leaf/test")
        waited_for = supervisor.spawn("leaf/test")
        try:
            await waited_for
        except BaseException as exc:  # what it is told, whatever that is
            ends.append(type(exc))
            await asyncio.sleep(6)
            ends.append("tidy")
            raise

    with FakePrefect() as prefect:
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test", runner="leaf")
        if child == "is scheduled":
            prefect.runners["leaf"].kill()
        run = prefect.start(root if top == "root" else "region/test")
        prefect.advance(30)
        run.cancel()
        if child == "runs":
            leaf = prefect.runs[-1]
            prefect.until(lambda: leaf.state.is_cancelling(), within=1)
            prefect.server.propose(leaf.id, Cancelled(message="by a runner that was quicker"))
        prefect.until(lambda: not any(each.has_process for each in prefect.runs), within=100)
    assert ends == [asyncio.CancelledError, "tidy"]


def test_ending_a_tree_of_three_levels_takes_four_requests_a_run(monkeypatch):
    """Each has its own state to read and to write; nobody looks at what is above it any more."""
    call, requests = FakeOrchestrator.call, []

    async def counted(self, *given, **named):
        requests.append(given)
        return await call(self, *given, **named)

    @supervised_flow
    async def leaf(number: int):
        await asyncio.sleep(3600)

    @supervised_flow
    async def region(number: int):
        await supervisor.map("leaf/test", [{"number": number} for number in range(3)])

    @supervised_flow
    async def country():
        await supervisor.map("region/test", [{"number": number} for number in range(3)])

    with FakePrefect() as prefect:
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test", leaf, runner="leaf")
        prefect.deploy("country/test", country, runner="country")
        run = prefect.start("country/test")
        prefect.until(
            lambda: sum(each.state.is_running() for each in prefect.runs) == 13, within=60
        )
        prefect.advance(20)
        monkeypatch.setattr(FakeOrchestrator, "call", counted)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=60)
    assert len(requests) <= 4 * 13 + 5


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


@pytest.mark.parametrize("ends", ["returns", "raises", "is cancelled"])
def test_a_leaf_that_has_called_a_flow_which_launched_nothing_ends(ends, monkeypatch):
    """It ended again and again, and let nobody else do anything meanwhile."""
    begin, begun, helped = Supervisor.begin_teardown, [], []

    def begin_a_few_times(*given):
        begun.append(given)
        if len(begun) > 10:
            raise RuntimeError("again and again")
        return begin(*given)

    monkeypatch.setattr(Supervisor, "begin_teardown", begin_a_few_times)

    @supervised_flow
    async def helper():
        helped.append(1)

    async def call_as_prefect_does(flow):
        context = FlowRunContext.get()
        context.task_run_dynamic_keys[flow.name] = 0
        tracking = prefect.server.track(uuid4(), context.flow_run.id, flow.name)
        run = prefect.server.create(flow.name, state=Pending(), parent_task_run_id=tracking)
        await current_host.get().run_flow(flow, run, {})

    @supervised_flow
    async def leaf():
        await call_as_prefect_does(helper)
        await asyncio.sleep(3600 if ends == "is cancelled" else 30)
        if ends == "raises":
            raise ValueError("bad")

    @supervised_flow(on_child_failure="ignore")
    async def parent():
        child = supervisor.spawn("leaf/test")
        while not helped:
            await asyncio.sleep(1)
        await asyncio.sleep(10)
        if ends == "is cancelled":
            child.cancel()
        await child.wait_async(40)
        return child.outcome

    with FakePrefect() as prefect:
        prefect.deploy("leaf/test", leaf)
        run = prefect.start(parent)
        prefect.until(lambda: not prefect.alive, within=60)
        assert run.state.is_completed()
        leaf_state = {"returns": "Completed", "raises": "Failed", "is cancelled": "Cancelled"}[ends]
        assert [each.state.name for each in run.below] == [leaf_state, "Completed"]
    assert len(begun) < 10
