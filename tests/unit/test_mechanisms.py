"""Each mechanism against orphans, alone: where nothing else helps, and that the test would notice.

The second half switches the mechanisms off, one by one; whoever adds one adds its switch.
"""

from __future__ import annotations

import asyncio
import gc
from uuid import uuid4

import anyio
import httpx
import pytest
from prefect.exceptions import Pause
from prefect.states import AwaitingRetry, Scheduled, Suspended

from supervised import (
    ScopeClosedError,
    _identity,
    _lease,
    _orphans,
    _reap,
    guard,
    supervised_flow,
    supervisor,
)
from supervised._asking import Asking
from supervised._discovery import Discovery
from supervised._escalation import Escalation
from supervised._lease import LeaseHolder
from supervised._lifecycle import Lifecycle
from supervised._link import Link
from supervised._own_run import OwnRun
from supervised._registry import Registry
from supervised._supervisor import Supervisor
from supervised._teardown import Teardown
from supervised.testing import FakePrefect, Faults
from supervised.testing._client import FakeOrchestrator

LEASE = 20.0
SOON = 15.0  # after the end of the parent
LATER = LEASE + 2 * SOON  # after nobody has seen it end


@supervised_flow(lease_seconds=LEASE)
async def region():
    """Keep a leaf."""
    await supervisor.spawn("score/gpu")


@supervised_flow(lease_seconds=LEASE)
async def nightly():
    """Keep a leaf, and a region with one."""
    supervisor.spawn("region/test")
    await supervisor.spawn("score/gpu")


@supervised_flow(lease_seconds=LEASE)
async def plain_night():
    """Keep a leaf that knows nothing of us."""
    await supervisor.spawn("score/gpu")


@supervised_flow(lease_seconds=LEASE)
async def plain_stuck():
    """Keep a leaf whose runner is about to be lost."""
    await supervisor.spawn("score/stuck")


@supervised_flow(lease_seconds=LEASE)
async def lets_go():
    """Detach a region on the way."""
    child = supervisor.spawn("region/test")
    await asyncio.sleep(30)
    child.detach()
    await asyncio.sleep(3600)


@supervised_flow(lease_seconds=LEASE)
async def lets_go_late():
    """Detach a leaf when all is being torn down."""
    child = supervisor.spawn("score/gpu", on_parent={"cancelled": "wait"})
    try:
        await child
    except asyncio.CancelledError:
        child.detach()
        raise


@supervised_flow(lease_seconds=LEASE)
async def keeps_who_lets_go():
    """Keep such a flow."""
    await supervisor.spawn("mid/test")


def world(root=nightly, **options):
    """A fake Prefect; the root has a runner of its own."""
    prefect = FakePrefect(**options)
    prefect.deploy("root/test", root, runner="root")
    prefect.deploy("region/test", region)
    prefect.deploy("score/gpu", takes=7200)
    return prefect


def started(prefect, count):
    """Start the root, and see it and everything below it run."""
    root = prefect.start("root/test")
    prefect.until(lambda: sum(run.state.is_running() for run in prefect.runs) == count, within=60)
    return root


def below(root):
    """Whether anything lives below a run."""
    return any(run.is_alive for run in root.below)


# -- what ends a tree ---------------------------------------------------------------------------


def test_a_runner_ends_what_a_killed_run_has_left():
    with world(plain_night) as prefect:
        root = started(prefect, 2)
        root.kill()
        prefect.until(lambda: not below(root), within=SOON)


def test_a_child_ends_with_a_parent_that_is_over():
    with world() as prefect:
        prefect.has_hooks = False
        root = started(prefect, 4)
        region_run = next(run for run in root.below if run.flow_run.name.startswith("region"))
        root.kill()
        prefect.until(lambda: not region_run.is_alive and not below(region_run), within=SOON)


def test_a_child_ends_with_a_parent_of_which_nothing_is_heard():
    with world() as prefect:
        root = started(prefect, 4)
        region_run = next(run for run in root.below if run.flow_run.name.startswith("region"))
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not region_run.is_alive and not below(region_run), within=LATER)


def test_a_parent_that_lives_keeps_its_child_whoever_looks():
    with world() as prefect:
        prefect.guard(5)
        started(prefect, 4)
        prefect.advance(10 * LEASE)
        assert len(prefect.alive) == 4


def test_a_leaf_that_is_let_go_while_it_is_waited_for_goes_on():
    with world(keeps_who_lets_go) as prefect:
        prefect.deploy("mid/test", lets_go_late)
        root = started(prefect, 3)
        leaf = root.below[-1]
        root.cancel()
        prefect.advance(SOON)
        assert leaf.flow_run.labels[_identity.DETACHED]
        prefect.advance(LATER)
        assert [run.id for run in prefect.alive] == [leaf.id]
        mid = root.below[0]
        assert [(r.flow_run_id, r.status) for r in mid.report.receipts] == [(leaf.id, "detached")]


def test_a_guard_ends_what_nobody_else_can():
    with world(plain_night) as prefect:
        prefect.guard(10)
        root = started(prefect, 2)
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not below(root), within=LATER)


def test_a_guard_that_cannot_look_remembers_what_it_could_not_end(monkeypatch):
    """Or it would report it in full again, and answer meanwhile that nothing is left."""
    looks = []

    async def fail(*_):
        looks.append(1)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(guard, "find_orphans", fail)
    with FakePrefect() as prefect:
        service = guard.Guard(prefect.connect(), interval_seconds=5)
        service._unverified[uuid4()] = guard._Patience.after(None)

        async def watch():
            with anyio.move_on_after(30):
                await service.run()

        prefect.call(watch())
    assert len(looks) > 3
    assert service.unverified == 1


def test_several_guards_do_what_one_does(caplog):
    gc.collect()  # what others have left may complain when it is collected
    caplog.clear()
    with world(plain_night) as prefect:
        for interval in (5, 7, 10):
            prefect.guard(interval)
        root = started(prefect, 2)
        copy = prefect.copy(root.below[0])
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not below(root), within=LATER)
        prefect.advance(LATER)
        assert root.below[0].state.is_cancelled()
        assert copy.state.is_running()
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == []


@pytest.mark.parametrize("idle", [0, 7, 20, 29])
def test_with_the_defaults_nothing_outlives_a_lost_host_by_a_minute(idle):
    @supervised_flow
    async def inner():
        await supervisor.spawn("score/gpu")

    @supervised_flow
    async def outer():
        supervisor.spawn("region/test")
        await supervisor.spawn("score/gpu")

    with FakePrefect() as prefect:
        prefect.deploy("root/test", outer, runner="root")
        prefect.deploy("region/test", inner)
        prefect.deploy("score/gpu", takes=7200)
        prefect.guard()
        prefect.advance(idle)  # the guard has looked at nothing before
        root = started(prefect, 4)
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not below(root), within=60)


def test_a_run_that_cannot_be_ended_does_not_hold_up_the_others():
    with world(plain_night) as prefect:
        prefect.deploy("stuck/test", plain_stuck, runner="root")
        prefect.deploy("score/stuck", takes=7200, runner="gone")
        prefect.guard(10)
        stuck = prefect.start("stuck/test")
        prefect.until(lambda: below(stuck) and stuck.below[0].state.is_running(), within=60)
        prefect.runners["gone"].kill()
        prefect.runners["root"].kill()
        stuck.kill()
        prefect.replace_runner("root")
        prefect.until(lambda: stuck.below[0].state.is_cancelling(), within=LATER)
        root = prefect.start("root/test")
        prefect.until(lambda: below(root) and root.below[0].state.is_running(), within=60)
        prefect.advance(LEASE)
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not below(root), within=LATER)


def test_a_guard_leaves_a_copy_alone():
    with world(plain_night) as prefect:
        prefect.guard(10)
        root = started(prefect, 2)
        copy = prefect.copy(root.below[0])
        root.kill()
        prefect.until(lambda: not below(root), within=SOON)
        prefect.advance(LATER)
        assert copy.is_alive


def test_a_run_hears_that_it_is_being_cancelled_though_no_runner_watches_it():
    with world() as prefect:
        root = prefect.start(plain_night)
        prefect.until(lambda: prefect.runs[-1].state.is_running(), within=60)
        root.cancel()
        prefect.until(lambda: not prefect.alive, within=SOON)
        assert root.state.is_cancelled()


def test_a_cancelled_run_ends_its_tree_before_its_runner_has_told_it():
    """The cascade of plain Prefect would take 20 s for each child."""
    with world() as prefect:
        root = started(prefect, 4)
        root.cancel()
        prefect.until(lambda: not prefect.alive, within=SOON)


# -- what a teardown does about the unexpected --------------------------------------------------


def test_a_child_that_is_cancelled_while_its_process_starts_is_closed():
    """Its server would leave it `Cancelling` for 300 s."""
    with world(plain_night) as prefect:
        root = prefect.start("root/test")
        prefect.until(lambda: any(run.state.is_pending() for run in root.below), within=60)
        root.cancel()
        prefect.until(lambda: not prefect.alive, within=2 * SOON)


def test_a_child_whose_parent_dies_while_it_is_created_is_found():
    @supervised_flow
    async def in_time():
        await asyncio.sleep(10)
        await supervisor.spawn("score/gpu")

    with world(in_time) as prefect:
        root = started(prefect, 1)
        prefect.server.on_change.append(lambda change: root.kill())
        prefect.until(lambda: len(prefect.runs) == 2, within=60)
        prefect.until(lambda: not prefect.runs[1].is_alive, within=2 * SOON)


def test_nothing_is_launched_by_a_scope_that_has_ended():
    refused = []

    @supervised_flow
    async def stubborn():
        try:
            await supervisor.spawn("score/gpu")
        finally:
            try:
                supervisor.spawn("score/gpu", key="one more")
            except ScopeClosedError as exc:
                refused.append(exc)

    with world(stubborn) as prefect:
        root = started(prefect, 2)
        root.cancel()
        prefect.until(lambda: not prefect.alive, within=SOON)
        assert len(root.below) == 1
        assert refused


def test_a_child_that_is_launched_in_the_instant_of_the_teardown_is_ended():
    """By a run that has not heard of it yet, and that dies before it does."""
    told = []

    @supervised_flow
    async def busy():
        supervisor.spawn("score/gpu")
        while not told:
            await asyncio.sleep(0.1)
        supervisor.spawn("score/gpu")
        await asyncio.sleep(3600)

    @supervised_flow
    async def root_of_busy():
        await supervisor.spawn("busy/test")

    with world(root_of_busy) as prefect:
        prefect.has_hooks = False
        prefect.deploy("busy/test", busy)
        root = started(prefect, 3)
        prefect.faults = Faults(dropped_events=1.0)
        root.terminate()
        prefect.until(lambda: root.below[0].state.is_cancelling(), within=5)
        told.append("go")
        prefect.until(lambda: len(prefect.runs) == 4, within=5)
        root.below[0].kill()
        prefect.until(lambda: prefect.runs[3].state.is_cancelled(), within=2 * SOON)


def test_a_detached_child_outlives_its_parent():
    with world(lets_go) as prefect:
        prefect.guard(10)
        root = started(prefect, 3)
        prefect.advance(40)
        root.cancel()
        prefect.advance(LATER)
        assert not root.is_alive
        assert len(prefect.alive) == 2


def test_a_detached_child_outlives_a_parent_that_is_killed():
    with world(lets_go) as prefect:
        prefect.guard(10)
        root = started(prefect, 3)
        prefect.advance(40)
        root.kill()
        prefect.advance(LATER)
        assert not root.is_alive
        assert len(prefect.alive) == 2


def test_a_child_that_was_detached_while_the_server_was_away_outlives_its_parent():
    with world(lets_go) as prefect:
        root = started(prefect, 3)
        prefect.until(lambda: prefect.seconds > 25, within=60)
        prefect.restart(20)
        prefect.advance(40)
        root.kill()
        prefect.advance(LATER)
        assert len(prefect.alive) == 2


def test_a_detached_run_takes_its_own_tree_along():
    with world(lets_go) as prefect:
        root = started(prefect, 3)
        prefect.advance(40)
        region_run = next(run for run in root.below or prefect.runs if "region" in repr(run))
        prefect.runners["runner"].kill()
        region_run.kill()
        prefect.guard(10)
        leaf = prefect.runs[-1]
        prefect.until(lambda: leaf.state.is_cancelling(), within=LATER)


def test_a_teardown_that_breaks_down_is_told_and_nobody_waits_for_it(monkeypatch, caplog):
    async def broken(_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Teardown, "run", broken)
    with world(plain_night) as prefect:
        root = started(prefect, 2)
        root.cancel()
        prefect.until(lambda: not root.is_alive, within=60)
    told = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "The teardown itself failed" in told
    assert any("may still be alive: score/gpu" in line for line in told)


# -- what a teardown leaves alone, and what it must not ------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_a_child_whose_policy_is_to_be_waited_for_outlives_the_failure_of_a_sibling(waits):
    """The scope interrupts the body for that failure, and the body's end is no crash."""

    @supervised_flow
    async def patient():
        kept = supervisor.spawn("score/gpu", on_parent={"failed": "wait"})
        supervisor.spawn("bad/test")
        await (kept if waits else asyncio.sleep(600))

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=100)
        prefect.deploy("bad/test", takes=5, fails=True)
        root = prefect.start(patient)
        prefect.until(lambda: not prefect.alive, within=200)
        assert sorted(run.state.name for run in root.below) == ["Completed", "Failed"]
        assert root.report.cause == "failed"


@pytest.mark.parametrize(
    ("policy", "how"),
    [({"failed": "wait"}, "raise"), ({"crashed": "detach"}, "kill"), ({"crashed": "wait"}, "kill")],
    ids=lambda given: str(given),
)
@pytest.mark.parametrize("order", [1, -1], ids=["parents first", "children first"])
def test_what_lies_below_a_child_that_may_go_on_goes_on(policy, how, order):
    @supervised_flow(on_parent=policy)
    async def parent():
        supervisor.spawn("region/test")
        await asyncio.sleep(20)
        if how == "raise":
            raise RuntimeError("told to")
        await asyncio.sleep(3600)

    with world(parent) as prefect:
        tagged = prefect.server.tagged
        prefect.server.tagged = lambda *args, **options: tagged(*args, **options)[::order]
        root = started(prefect, 3)
        if how == "kill":
            root.kill()
        prefect.advance(30 + SOON)
        assert [run.state.name for run in prefect.runs[1:]] == ["Running", "Running"]


def test_what_a_copy_launches_is_not_of_the_original_tree():
    with world() as prefect:
        root = started(prefect, 4)
        copy = prefect.copy(next(run for run in root.below if "region" in repr(run)))
        prefect.until(lambda: len(prefect.alive) == 6 and prefect.runs[-1].state.is_running())
        root.cancel()
        prefect.advance(LATER)
        assert not below(root)
        assert copy.is_alive
        assert len(prefect.alive) == 2


def test_a_lost_process_ends_what_its_inline_flows_have_launched():
    @supervised_flow(lease_seconds=LEASE)
    async def inline():
        await supervisor.spawn("region/test")

    @supervised_flow(lease_seconds=LEASE)
    async def outer():
        await supervisor.spawn(inline)

    with world(outer) as prefect:
        root = started(prefect, 4)
        region_run = next(run for run in root.below if "region" in repr(run))
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not region_run.is_alive and not below(region_run), within=LATER)


def test_a_parent_that_was_suspended_keeps_its_children_when_it_goes_on():
    """Nobody gives a sign of life meanwhile, nor before it launches something again."""
    attempts = []

    @supervised_flow(lease_seconds=LEASE)
    async def pauses():
        attempts.append(1)
        if len(attempts) == 2:
            await asyncio.sleep(3 * LEASE)
        child = supervisor.spawn("region/test", key="the region")
        if len(attempts) == 1:
            await asyncio.sleep(20)
            raise Pause
        await child

    with world(pauses) as prefect:
        prefect.guard(5)
        root = started(prefect, 3)
        prefect.until(lambda: not root.has_process, within=60)
        prefect.server.propose(root.id, Suspended())
        prefect.advance(10 * LEASE)
        prefect.server.propose(root.id, AwaitingRetry())
        prefect.until(lambda: root.state.is_running(), within=60)
        prefect.advance(5 * LEASE)
        assert len(attempts) == 2
        assert len(prefect.alive) == 3


def test_a_child_that_is_cancelled_while_its_creation_is_not_answered_is_ended(monkeypatch):
    create = FakeOrchestrator.create_deployment_run
    answers = iter([httpx.ReadTimeout("no answer", request=httpx.Request("POST", "http://fake"))])

    async def unanswered(*args):
        run = await create(*args)
        for lost in answers:
            await asyncio.sleep(2)
            raise lost
        return run

    @supervised_flow
    async def hasty():
        child = supervisor.spawn("score/gpu")
        await asyncio.sleep(1)
        child.cancel("not needed")
        await asyncio.sleep(30)

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", unanswered)
    with world(hasty) as prefect:
        root = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive, within=60)
        assert root.state.is_completed()
        assert root.below[0].state.is_cancelled()


@pytest.mark.parametrize("parent", ["no id", "0a8f1c52-0000-4000-8000-000000000000"])
def test_a_guard_survives_labels_that_make_no_sense(parent):
    labels = {_identity.PARENT: parent, _identity.ON_PARENT: "crashed=cancel"}
    with world(plain_night) as prefect:
        prefect.server.create(
            "senseless",
            state=Scheduled(),
            tags=[_identity.COMMON_TAG],
            labels=labels,
            idempotency_key=f"supervised:{parent}:key:0",
        )
        prefect.guard(10)
        root = started(prefect, 2)
        prefect.runners["root"].kill()
        root.kill()
        prefect.until(lambda: not below(root), within=LATER)


def test_a_child_that_may_outlive_a_cancelled_parent_is_not_linked_to_it():
    """Or Prefect's own cascade would cancel it, whoever does not."""

    @supervised_flow(on_parent={"cancelled": "detach"})
    async def lenient():
        await supervisor.spawn("score/gpu")

    with world(lenient) as prefect:
        root = started(prefect, 2)
        root.cancel()
        prefect.advance(10 * LEASE)
        assert root.state.is_cancelled()
        assert [run.state.name for run in prefect.runs] == ["Cancelled", "Running"]


# -- that the tests would notice ----------------------------------------------------------------


def nothing(*args, **kwargs):
    """Do nothing, in place of a mechanism."""


async def nothing_async(*args, **kwargs):
    """Do nothing, in place of a mechanism that can be awaited."""


async def no_reports(*args, **kwargs):
    """Find nothing to report."""
    return []


SWITCHES = [
    (test_a_runner_ends_what_a_killed_run_has_left, _reap, "reap_below", nothing_async),
    (test_a_child_ends_with_a_parent_that_is_over, Link, "_on_change", nothing),
    (test_a_child_ends_with_a_parent_of_which_nothing_is_heard, Link, "_is_silent", nothing),
    (
        test_a_child_ends_with_a_parent_of_which_nothing_is_heard,
        Supervisor,
        "_follow",
        nothing_async,
    ),
    (test_a_parent_that_lives_keeps_its_child_whoever_looks, LeaseHolder, "hold", nothing_async),
    (test_a_guard_ends_what_nobody_else_can, guard.Guard, "_reap", no_reports),
    (
        test_a_guard_ends_what_nobody_else_can,
        _lease.LeaseReader,
        "standstill",
        lambda *_, **__: 0.0,
    ),
    (test_a_guard_ends_what_nobody_else_can, _orphans, "is_silent", lambda *_: False),
    (test_a_guard_leaves_a_copy_alone, _identity, "is_ours", lambda *_: True),
    (
        test_a_run_hears_that_it_is_being_cancelled_though_no_runner_watches_it,
        OwnRun,
        "_on_change",
        nothing,
    ),
    (
        test_a_cancelled_run_ends_its_tree_before_its_runner_has_told_it,
        Asking,
        "ask_server",
        nothing_async,
    ),
    (
        test_a_child_that_is_cancelled_while_its_process_starts_is_closed,
        Escalation,
        "_close",
        nothing_async,
    ),
    (
        test_a_child_whose_parent_dies_while_it_is_created_is_found,
        Discovery,
        "search",
        nothing_async,
    ),
    (
        test_nothing_is_launched_by_a_scope_that_has_ended,
        Registry,
        "ban",
        nothing,
    ),
    (
        test_a_child_that_is_launched_in_the_instant_of_the_teardown_is_ended,
        Teardown,
        "_sweep",
        nothing_async,
    ),
    (test_a_detached_child_outlives_its_parent, Lifecycle, "_cut_loose", nothing_async),
    (
        test_a_detached_child_outlives_a_parent_that_is_killed,
        Lifecycle,
        "_cut_loose",
        nothing_async,
    ),
    (test_a_detached_run_takes_its_own_tree_along, guard.Guard, "_reap", no_reports),
]


@pytest.mark.parametrize(
    ("test", "owner", "name", "off"),
    SWITCHES,
    ids=[f"{test.__name__}-{name}" for test, _, name, _ in SWITCHES],
)
def test_without_its_mechanism_the_test_fails(test, owner, name, off, monkeypatch):
    assert hasattr(owner, name)
    monkeypatch.setattr(owner, name, off)
    with pytest.raises((AssertionError, TimeoutError)):
        test()
