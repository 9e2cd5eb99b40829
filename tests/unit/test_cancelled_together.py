"""Children that are cancelled in the same instant are one wave, however that is asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from uuid import uuid4

import anyio
import attrs
import pytest
from prefect.states import AwaitingRetry, Cancelled, Completed, Pending, Running

from supervised import _identity, supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

MANY = 200
LONG = 3600
GRACE = 12.0
SEARCHES = 4  # what is live below the children: before, meanwhile, and when all are over
READS = 40


class Bad(Exception):
    """What ends a body."""


def spawn_all(children, **options):
    """Launch so many children."""
    return [supervisor.spawn("score/gpu", {"part": part}, **options) for part in range(children)]


@supervised_flow
async def raises(children):
    """Fail after a minute."""
    spawn_all(children)
    await asyncio.sleep(60)
    raise Bad


@supervised_flow
async def completes(children):
    """Return after a minute, without waiting."""
    spawn_all(children, on_parent={"completed": "cancel"})
    await asyncio.sleep(60)


@supervised_flow
async def races(children):
    """Wait for the first of children."""
    quick = supervisor.spawn("quick/gpu")
    await supervisor.first_success(quick, *spawn_all(children))
    await asyncio.sleep(LONG)


@supervised_flow
async def loses_patience(children):
    """Cancel children one after the other after a minute."""
    spawned = spawn_all(children)
    await asyncio.sleep(60)
    for child in spawned:
        child.cancel("enough")
    await asyncio.sleep(LONG)


@supervised_flow
async def cancels_slowly(children):
    """Cancel children, 50 in a second, whose runner does not end them."""
    spawned = spawn_all(children)
    await asyncio.sleep(60)
    for child in spawned:
        child.cancel("enough")
        await asyncio.sleep(0.02)
    await asyncio.sleep(LONG)


@supervised_flow(on_child_failure="ignore")
async def limits_the_time(children):
    """Give each child a deadline of its own."""
    spawn_all(children, timeout_seconds=60)
    await asyncio.sleep(LONG)


@attrs.define
class Seam:
    """What is asked of the server: how often, how much at once, and whom to end, and why."""

    calls: Counter[str] = attrs.field(factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    asked: dict = attrs.field(factory=dict)
    """When the runs were first asked to end, and with which message."""

    def note(self, prefect, run_ids, message):
        """Take note of a request for cancellation by the root, whose own run comes first."""
        if _identity.marked_by(message) == prefect.runs[0].id:
            for run_id in run_ids:
                self.asked.setdefault(run_id, (prefect.seconds, message))

    def because(self, run_id):
        """Why the root asked a run to end."""
        message = self.asked[run_id][1].partition(" [")[0]
        return message.partition("Cancelled because ")[2]


@pytest.fixture
def seam(monkeypatch):
    """What is asked of the server."""
    seam = Seam()

    def counted(name):
        call = getattr(FakeOrchestrator, name)

        async def count(self, *given, **options):
            seam.calls[name] += 1
            seam.at_once += 1
            seam.most_at_once = max(seam.most_at_once, seam.at_once)
            try:
                return await call(self, *given, **options)
            finally:
                seam.at_once -= 1

        monkeypatch.setattr(FakeOrchestrator, name, count)

    for name in ("request_cancel", "read_tagged", "read_children", "read_runs"):
        counted(name)
    return seam


@pytest.fixture
def prefect(monkeypatch, seam):
    """A world in which it is noted who is asked to end; who is stubborn has a dead runner."""
    prefect = FakePrefect()
    request_cancel = FakeOrchestrator.request_cancel

    async def noted(self, run_ids, message):
        seam.note(prefect, run_ids, message)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", noted)
    with prefect:
        prefect.deploy("score/gpu", takes=LONG)
        prefect.deploy("quick/gpu", takes=60, runner="quick")
        prefect.deploy("stubborn/gpu", takes=LONG, runner="stubborn")
        yield prefect


def running(prefect, parent, count, **parameters):
    """Start a parent, and let it run until so many of its children do."""
    prefect.deploy("root/test", parent, runner="root")
    root = prefect.start("root/test", parameters)
    prefect.until(lambda: len(root.below) == count, within=50)
    prefect.until(lambda: all(run.state.is_running() for run in root.below), within=50)
    return root


def running_far_away(prefect, parent):
    """Start a parent, and have its many children run without the cost of that many processes."""
    prefect.runners["runner"].kill()
    prefect.deploy("root/test", parent, runner="root")
    root = prefect.start("root/test", {"children": MANY})
    prefect.until(lambda: len(far(root)) == MANY, within=50)
    for run in far(root):
        prefect.server.propose(run.id, Pending())
        prefect.server.propose(run.id, Running())
    return root


def far(root):
    """Return the runs of that many children."""
    return [run for run in root.below if run.flow_run.name.startswith("score")]


def end(prefect, root):
    """Have all of them end."""
    for run in far(root):
        prefect.server.propose(run.id, Cancelled())


@pytest.mark.parametrize(
    "parent", [raises, completes, races, loses_patience], ids=lambda flow: flow.name
)
def test_who_ends_two_hundred_children_together_asks_for_them_together(prefect, seam, parent):
    root = running_far_away(prefect, parent)
    prefect.until(lambda: prefect.seconds > 50)
    seam.calls.clear()
    prefect.until(lambda: len(seam.asked) == MANY, within=30)
    prefect.advance(3)
    end(prefect, root)
    prefect.advance(10)
    assert seam.calls["request_cancel"] == MANY / 50
    assert seam.calls["read_tagged"] <= SEARCHES
    assert seam.calls["read_children"] <= SEARCHES
    assert seam.calls["read_runs"] <= READS
    assert seam.most_at_once <= 3


@pytest.mark.parametrize("parent", [cancels_slowly, limits_the_time], ids=lambda flow: flow.name)
def test_children_that_are_cancelled_shortly_after_one_another_are_a_few_groups(
    prefect, seam, parent
):
    root = running_far_away(prefect, parent)
    prefect.until(lambda: seam.asked)
    seam.calls.clear()
    prefect.until(lambda: len(seam.asked) == MANY, within=10)
    assert seam.calls["request_cancel"] < MANY / 5
    assert seam.calls["read_tagged"] < MANY / 5
    assert seam.most_at_once < MANY / 20
    end(prefect, root)
    prefect.advance(10)


def test_each_of_a_group_has_its_own_reason_and_so_has_what_is_below_it(prefect, seam):
    spawned = []

    @supervised_flow
    async def middle():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(LONG)

    @supervised_flow
    async def root():
        spawned.extend(supervisor.spawn(name) for name in ("middle/test", "score/gpu", "quick/gpu"))
        await asyncio.sleep(30)
        for number, child in enumerate(spawned):
            child.cancel(f"reason {number}")
        await asyncio.sleep(LONG)

    prefect.deploy("middle/test", middle)
    run = running(prefect, root, 4)
    leaf = next(each for each in run.below if each.id not in {c.flow_run_id for c in spawned})
    plain = prefect.server.create(
        "plain",
        state=Running(),
        deployment_id=uuid4(),
        parent_task_run_id=prefect.server.track(uuid4(), spawned[1].flow_run_id, "plain-0"),
    )
    prefect.until(lambda: seam.asked, within=30)
    seam.calls.clear()
    prefect.until(lambda: all(child.is_over for child in spawned), within=60)
    reasons = [f"reason {number}" for number in range(3)]
    assert [seam.because(child.flow_run_id) for child in spawned] == reasons
    assert [str(child.cancel_reason) for child in spawned] == reasons
    assert seam.because(leaf.id) == "reason 0"
    assert seam.because(plain.id) == "reason 1"
    assert seam.calls["read_tagged"] <= 2 * SEARCHES  # the child's own teardown is one, too


def test_a_scope_that_overtakes_a_group_leaves_each_child_its_reason(prefect, seam):
    spawned = []

    @supervised_flow
    async def root():
        spawned.extend(spawn_all(3))
        await asyncio.sleep(30)
        for child in spawned[:2]:
            child.cancel("enough")
        raise Bad

    run = running(prefect, root, 3)
    prefect.until(lambda: not run.is_alive, within=90)
    reasons = ["enough", "enough", "parent 'root' failed: Bad"]
    assert [seam.because(child.flow_run_id) for child in spawned] == reasons
    assert sorted(receipt.reason for receipt in run.report.receipts) == reasons


def test_a_stubborn_child_delays_nobody_in_its_group_and_is_given_up_alone(prefect, caplog):
    over, spawned = {}, []

    @supervised_flow(grace_seconds=GRACE)
    async def root():
        spawned.extend([*spawn_all(3), supervisor.spawn("stubborn/gpu")])
        for child in spawned:
            child.add_done_callback(lambda child: over.update({child: prefect.seconds}))
        await asyncio.sleep(30)
        over["asked"] = prefect.seconds
        for child in spawned:
            child.cancel("enough")
        await asyncio.sleep(LONG)

    running(prefect, root, 4)
    prefect.runners["stubborn"].kill()
    with caplog.at_level(logging.ERROR):
        prefect.until(lambda: len(over) == 5, within=90)
    began = over.pop("asked")
    seconds = [over[child] - began for child in spawned]
    assert max(seconds[:3]) < 6
    assert GRACE <= seconds[3] < GRACE + 4
    assert [child.outcome for child in spawned] == [*["cancelled"] * 3, "abandoned"]
    (told,) = (each.message for each in caplog.records if "Teardown of" in each.message)
    assert "1 unverified" in told
    assert "cancelled: enough" in told
    assert len(told.splitlines()) == 2


def test_who_is_cancelled_beside_a_group_is_asked_at_once_and_has_its_whole_grace(prefect, seam):
    over, when, spawned = {}, [], []

    @supervised_flow(grace_seconds=GRACE)
    async def root():
        spawned.extend(supervisor.spawn("stubborn/gpu", {"part": part}) for part in range(2))
        for child in spawned:
            child.add_done_callback(lambda child: over.update({child: prefect.seconds}))
        await asyncio.sleep(30)
        for child in spawned:
            when.append(prefect.seconds)
            child.cancel("enough")
            await asyncio.sleep(GRACE / 2)
        await asyncio.sleep(LONG)

    running(prefect, root, 2)
    prefect.runners["stubborn"].kill()
    prefect.until(lambda: len(over) == 2, within=90)
    for child, began in zip(spawned, when, strict=True):
        assert seam.asked[child.flow_run_id][0] - began < 0.1
        assert GRACE <= over[child] - began < GRACE + 4


def test_a_child_that_is_cancelled_again_is_torn_down_once(prefect, seam):
    @supervised_flow(grace_seconds=GRACE)
    async def root():
        child = supervisor.spawn("stubborn/gpu")
        await asyncio.sleep(30)
        for _ in range(20):
            child.cancel("enough")
            await asyncio.sleep(0.1)
        await asyncio.sleep(LONG)

    run = running(prefect, root, 1)
    prefect.runners["stubborn"].kill()
    prefect.until(lambda: seam.asked, within=60)
    prefect.advance(10)
    assert run.below[0].state.is_cancelling()
    assert seam.calls["request_cancel"] == 1


def test_of_a_group_only_what_runs_here_is_ended_by_an_attempt_that_was_replaced(prefect):
    go, live = anyio.Event(), []

    @supervised_flow(name="inner")
    async def inner():
        supervisor.spawn("quick/gpu")
        live.append(1)
        try:
            await asyncio.sleep(LONG)
        finally:
            live.pop()

    @supervised_flow
    async def root():
        spawned = [supervisor.spawn("score/gpu"), supervisor.spawn(inner)]
        await go.wait()
        for child in spawned:
            child.cancel("enough")
        await asyncio.sleep(LONG)

    run = prefect.start(root)
    prefect.until(lambda: len(run.below) == 3 and live, within=20)
    prefect.until(lambda: all(each.state.is_running() for each in run.below), within=20)
    prefect.server.propose(run.id, AwaitingRetry())
    prefect.server.propose(run.id, Running())
    prefect.call(asyncio.sleep(2))
    go.set()
    prefect.advance(20)
    states = {each.flow_run.name.split("-")[0]: each.state.name for each in run.below}
    assert not live
    assert states["score"] == "Running"
    assert states["quick"] == "Cancelled"


def test_a_child_that_completes_before_it_is_asked_has_completed(prefect):
    spawned = []

    @supervised_flow
    async def root():
        spawned.extend(spawn_all(2))
        await asyncio.sleep(30)
        for child in spawned:
            child.cancel("enough")
        prefect.server.propose(spawned[0].flow_run_id, Completed())
        await asyncio.sleep(LONG)

    running(prefect, root, 2)
    prefect.until(lambda: all(child.is_over for child in spawned), within=60)
    assert [child.outcome for child in spawned] == ["completed", "cancelled"]


@supervised_flow(grace_seconds=GRACE)
async def gives_reasons(children):
    """Cancel each child for a reason of its own."""
    spawned = spawn_all(children)
    await asyncio.sleep(60)
    for part, child in enumerate(spawned):
        child.cancel(f"part {part} is not needed")
    await asyncio.gather(*spawned, return_exceptions=True)
    assert [str(child.cancel_reason) for child in spawned] == [
        f"part {part} is not needed" for part in range(children)
    ]


def test_as_many_reasons_as_children_are_not_as_many_requests(monkeypatch):
    request_cancel, asked = FakeOrchestrator.request_cancel, []

    async def request_slowly(self, run_ids, message):
        asked.append(len(run_ids))
        await asyncio.sleep(0.5)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", request_slowly)
    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=LONG)
        run = prefect.start(gives_reasons, {"children": MANY})
        prefect.until(lambda: not run.is_alive, within=300)
        assert run.state.is_completed(), run.state.message
        assert len(asked) < MANY / 10
        assert {below.state.name for below in run.below} == {"Cancelled"}
