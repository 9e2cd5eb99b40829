"""When nothing moves because the tree waits for itself."""

import asyncio
import logging
from logging.handlers import BufferingHandler
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun

from supervised import supervised_flow, supervisor
from supervised._stall import Limit, find_stall
from supervised.testing import FakePrefect


def run(pool="gpu", name="run"):
    return FlowRun(id=uuid4(), flow_id=uuid4(), name=name, work_pool_name=pool)


POOL = Limit("work pool", "gpu", 1)


def test_children_that_wait_for_their_parents_slot_never_begin():
    parent, children = run(name="nightly"), [run(), run()]
    stall = find_stall(children, [parent], {child.id: [POOL] for child in children})
    assert stall is not None
    assert str(stall).startswith("All 2 children wait for a slot of work pool 'gpu' (limit 1)")
    assert "'nightly'" in str(stall)


def test_one_that_waits_elsewhere_may_begin():
    parent, children = run(), [run(), run(pool="cpu")]
    limits = {children[0].id: [POOL], children[1].id: [Limit("work pool", "cpu", 1)]}
    assert find_stall(children, [parent], limits) is None


@pytest.mark.parametrize(("slots", "stalls"), [(0, True), (1, True), (2, True), (3, False)])
def test_those_above_hold_slots_too(slots, stalls):
    child = run()
    limits = {child.id: [Limit("work pool", "gpu", slots)]}
    assert (find_stall([child], [run(), run()], limits) is not None) is stalls


def test_without_children_nothing_waits():
    assert find_stall([], [run()], {}) is None


@pytest.mark.parametrize("names", [["sibling"], ["nightly", "sibling"]])
def test_whoever_of_the_tree_holds_the_slots_is_named(names):
    child, holders = run(), [run(name=name) for name in names]
    stall = find_stall([child], [*holders, run(pool="cpu", name="other")], {child.id: [POOL]})
    assert f"runs of the same tree hold the slots: {', '.join(map(repr, names))}." in str(stall)
    assert str(stall).startswith("The only child waits for a slot")
    assert "'other'" not in str(stall)


def test_a_limit_without_slots_is_told_as_such():
    child = run()
    limits = {child.id: [Limit("work pool", "gpu", 0)]}
    assert str(find_stall([child], [run(pool="cpu")], limits)) == (
        "The only child waits for a slot of work pool 'gpu' (limit 0), which has none. "
        "Raise the limit."
    )


@given(count=st.integers(1, 5), slots=st.integers(0, 5), holders=st.integers(0, 5))
def test_nothing_moves_just_when_the_holders_have_all_slots(count, slots, holders):
    children = [run() for _ in range(count)]
    limits = {child.id: [Limit("work pool", "gpu", slots)] for child in children}
    stall = find_stall(children, [run() for _ in range(holders)], limits)
    assert (stall is not None) == (holders >= slots)


# -- what a scope says --------------------------------------------------------------------------


@supervised_flow
async def nightly(depth=0):
    """Call another run of the same deployment, and wait for it."""
    if depth == 0:
        await supervisor.spawn("nightly/test", {"depth": 1})


def warnings_of(prefect, slots):
    """Return what a scope says whose only child waits for a slot of its own deployment."""
    logger, handler = logging.getLogger("prefect.flow_runs"), BufferingHandler(1000)
    logger.addHandler(handler)
    try:
        prefect.deploy("nightly/test", nightly)
        deployment = prefect.server.find_deployment("nightly/test")
        prefect.server.limits[deployment.id] = [Limit("deployment", "nightly/test", slots)]
        root = prefect.start("nightly/test")
        prefect.until(lambda: root.state.is_running())
        prefect.runners["runner"].kill()  # its processes live on; nobody begins the child
        prefect.until(lambda: root.below)
        prefect.advance(200)
        assert root.below[0].state.is_scheduled()
    finally:
        logger.removeHandler(handler)
    return [r.getMessage() for r in handler.buffer if "slot" in r.getMessage()]


def test_a_scope_says_once_that_its_child_waits_for_its_own_slot():
    with FakePrefect() as prefect:
        (said,) = warnings_of(prefect, slots=1)
    assert said.startswith(
        "The only child waits for a slot of deployment 'nightly/test' (limit 1), "
        "and runs of the same tree hold the slots: 'nightly-"
    )


def test_a_scope_says_nothing_while_there_are_slots():
    with FakePrefect() as prefect:
        assert warnings_of(prefect, slots=2) == []


# -- processes of their own ---------------------------------------------------------------------


def test_a_child_with_a_process_of_its_own_runs_in_the_simulation():
    results = []

    @supervised_flow
    async def part(n):
        await asyncio.sleep(3600)
        return 2 * n

    @supervised_flow
    async def root():
        results.append(await supervisor.spawn(part, {"n": 21}, isolation="process"))

    with FakePrefect() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=7200)
        assert run.state.is_completed(), run.state.message
        assert prefect.seconds >= 3600
    assert results == [42]
