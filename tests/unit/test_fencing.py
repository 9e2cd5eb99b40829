"""An attempt that a later one has replaced: what it may no longer do, and what it ends."""

import asyncio

import anyio
import pytest
from prefect import flow
from prefect.states import AwaitingRetry, Running

from supervised import _identity, supervised_flow, supervisor
from supervised._own_run import OwnRun
from supervised.testing import FakePrefect, Faults


def replace(prefect, run):
    """Have a later attempt of a run begin, as far as the server tells."""
    attempt = run.flow_run.run_count
    prefect.server.propose(run.id, AwaitingRetry())
    prefect.server.propose(run.id, Running())
    assert run.flow_run.run_count == attempt + 1


def lose_runner(prefect, run, name):
    """Have another runner take a run, whose process lives on."""
    prefect.runners[name].kill()
    prefect.replace_runner(name)
    prefect.server.propose(run.id, AwaitingRetry())


def world():
    prefect = FakePrefect()
    prefect.deploy("score/gpu", takes=3600)
    return prefect


def test_a_teardown_under_way_leaves_the_children_of_a_later_attempt_alone():
    attempts = []

    @flow
    async def slow():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(15)

    @supervised_flow
    async def root():
        attempts.append(1)
        if len(attempts) == 1:
            supervisor.spawn("slow/test")
            await asyncio.sleep(20)
            raise RuntimeError("bad")
        supervisor.spawn("score/gpu")
        await asyncio.sleep(3600)

    with world() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("slow/test", slow)
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_cancelling())
        lose_runner(prefect, run, "root")
        prefect.until(lambda: len(run.below) == 2, within=30)
        assert run.below[0].state.is_cancelling()
        prefect.advance(60)
        assert [child.state.name for child in run.below] == ["Cancelled", "Running"]


@pytest.mark.parametrize("what", ["launch", "cancel"])
def test_a_slow_server_does_not_let_a_replaced_attempt_go_on(what):
    go = []

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu", key="first")
        while not go:
            await asyncio.sleep(0.1)
        if what == "launch":
            supervisor.spawn("score/gpu", key="second")
        else:
            child.cancel()
        await asyncio.sleep(3600)

    with world() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        prefect.faults = Faults(latency_seconds=12.0, dropped_events=1.0)
        replace(prefect, run)
        go.append(True)
        prefect.advance(100)
        assert [child.state.name for child in run.below] == ["Running"]


def test_a_small_budget_does_not_let_a_replaced_attempt_launch():
    go = []

    @supervised_flow(requests_per_minute=6, lease_seconds=40)
    async def root():
        supervisor.spawn("score/gpu", key="first")
        while not go:
            await asyncio.sleep(0.1)
        supervisor.spawn("score/gpu", key="second")
        await asyncio.sleep(3600)

    with world() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        replace(prefect, run)
        go.append(True)
        prefect.advance(200)
        assert len(run.below) == 1


@pytest.mark.parametrize("seconds", [0, 15])
def test_a_replaced_attempt_detaches_nothing(seconds):
    """It belongs to the later attempt, which may yet cancel it."""
    go = []

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu")
        while not go:
            await asyncio.sleep(0.1)
        child.detach()
        await asyncio.sleep(3600)

    with world() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        replace(prefect, run)
        prefect.advance(seconds)
        go.append(True)
        prefect.advance(30)
        assert not run.below[0].flow_run.labels.get(_identity.DETACHED)
        assert run.below[0].state.is_running()


def test_inline_children_of_a_replaced_attempt_end():
    """The later attempt runs their code anew."""
    live = []

    @supervised_flow
    async def part():
        live.append(1)
        try:
            await asyncio.sleep(3600)
        finally:
            live.pop()

    @supervised_flow
    async def root():
        supervisor.spawn(part, key="the one")
        await asyncio.sleep(3600)

    with world() as prefect:
        prefect.deploy("root/test", root, runner="root")
        run = prefect.start("root/test")
        prefect.until(lambda: live)
        lose_runner(prefect, run, "root")
        prefect.until(lambda: len(run.below) == 2, within=60)
        prefect.advance(20)
        assert [child.state.name for child in run.below] == ["Cancelled", "Running"]
        assert len(live) == 1


def test_inline_children_of_a_replaced_attempt_end_with_what_they_launched():
    @supervised_flow
    async def inner():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(30)
        supervisor.spawn("score/gpu", key="one more")
        await asyncio.sleep(3600)

    @supervised_flow
    async def root():
        supervisor.spawn(inner)
        await asyncio.sleep(3600)

    with world() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: len(run.below) == 2 and run.below[1].state.is_running())
        replace(prefect, run)
        prefect.advance(60)
        assert [child.state.name for child in run.below] == ["Cancelled", "Cancelled"]


def test_a_replaced_attempt_that_fails_waits_for_nothing_that_is_not_its_own():
    """What runs elsewhere is the later attempt's, whatever the policy says of the earlier one's."""
    go = []

    @supervised_flow
    async def part():
        try:
            await asyncio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(3)

    @supervised_flow
    async def root():
        supervisor.spawn(part)
        supervisor.spawn("score/gpu", key="waited for", on_parent={"failed": "wait"})
        supervisor.spawn("score/gpu", key="ended")
        while not go:
            await asyncio.sleep(0.1)
        raise RuntimeError("bad")

    with world() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: sum(each.state.is_running() for each in run.below) == 3)
        prefect.faults = Faults(dropped_events=1.0)
        replace(prefect, run)
        go.append(True)
        prefect.until(lambda: not run.has_process, within=30)
        states = sorted(child.state.name for child in run.below)
        assert states == ["Cancelled", "Running", "Running"]


def test_children_that_ask_together_share_a_failure_that_took_a_minute():
    """And do not ask one after the other, a minute each."""
    reads = []

    class Api:
        async def read_runs(self, run_ids):
            reads.append(run_ids)
            await asyncio.sleep(60)
            raise ConnectionError("the server is away")

    async def ask(prefect):
        run = prefect.server.create("root", state=Running())
        own = OwnRun(run, _identity.Lineage(run.id, (run.id,)), "root", list, list)
        checks = [own.check_superseded(Api()) for _ in range(6)]
        return await asyncio.gather(*checks, return_exceptions=True)

    with world() as prefect:
        began = prefect.seconds
        answers = prefect.call(ask(prefect))
        assert prefect.seconds - began < 70
    assert [type(answer) for answer in answers] == [ConnectionError] * 6
    assert len(reads) == 1


@pytest.mark.parametrize("ends", ["raises", "returns"])
def test_the_end_of_a_replaced_attempt_is_nothing_to_the_run_and_its_children(ends):
    """Its state would end the children of the later attempt, which watch the run."""
    attempts = []

    @supervised_flow
    async def child():
        await asyncio.sleep(200)

    @supervised_flow
    async def root():
        attempts.append(len(attempts) + 1)
        mine = attempts[-1]
        the_one = supervisor.spawn("child/test", key="the one")
        await asyncio.sleep(60)
        if mine == 1 and ends == "raises":
            await supervisor.spawn("child/test", key="another")
        if mine == 2:
            await the_one

    with world() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("child/test", child)
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        lose_runner(prefect, run, "root")
        prefect.until(lambda: len(attempts) == 2, within=60)
        prefect.advance(90)
        assert run.state.is_running()
        assert [each.state.name for each in run.below] == ["Running"]
        prefect.until(lambda: not prefect.alive, within=300)
        assert run.state.is_completed()
        assert run.below[0].state.is_completed()
