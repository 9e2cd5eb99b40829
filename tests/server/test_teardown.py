"""Whatever ends a parent under a runner, all that it launched ends with it."""

import os
import signal
from uuid import UUID

import pytest
from support.world import World, eventually

# It takes about 5 s; this much where two cores have many other things to do. Plain Prefect needs
# 101 s for four cancelled leaves, and never ends them for other causes.
SOON = 60


def assert_all_gone(world: World, root: UUID) -> None:
    eventually(lambda: not world.alive(), seconds=SOON, what="all processes are gone")
    eventually(lambda: world.is_over(root), seconds=SOON, what="all runs are terminal")


def states_below(world: World, root: UUID) -> set[str]:
    return {str(run.state_name) for run in world.tree(root)[1:]}


def assert_cancelled_below(world: World, root: UUID) -> None:
    """Under load a runner may record `Crashed` first: its notice to the child took over 1 s."""
    eventually(
        lambda: states_below(world, root) <= {"Cancelled"}, seconds=SOON, what="all are Cancelled"
    )


LEAVES = ["leaf/test"] * 4


@pytest.mark.parametrize("kind", ["root", "root-sync"])
def test_cancelling_a_parent_cancels_its_children(deployed: World, kind: str) -> None:
    root = deployed.start(f"{kind}/test", children=LEAVES)
    deployed.wait_for_start(5)
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)
    eventually(
        lambda: deployed.run(root.id).state_name == "Cancelled",
        seconds=SOON,
        what="it is Cancelled, also if its runner came late and it took that for a crash",
    )
    assert_cancelled_below(deployed, root.id)


@pytest.mark.parametrize("kind", ["root", "root-sync"])
def test_a_body_that_raises_takes_its_children_along(deployed: World, kind: str) -> None:
    root = deployed.start(f"{kind}/test", children=LEAVES)
    deployed.wait_for_start(5)
    deployed.tell("raise")
    assert_all_gone(deployed, root.id)
    state = deployed.run(root.id).state
    assert state.is_failed()
    assert "ValueError: the body failed" in state.message
    assert_cancelled_below(deployed, root.id)


@pytest.mark.parametrize("kind", ["root", "root-sync"])
def test_a_terminated_parent_takes_its_children_along(deployed: World, kind: str) -> None:
    root = deployed.start(f"{kind}/test", children=LEAVES)
    deployed.wait_for_start(5)
    os.kill(deployed.pids()[str(root.id)], signal.SIGTERM)
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_crashed()
    assert_cancelled_below(deployed, root.id)


@pytest.mark.parametrize("kind", ["root-timeout", "root-sync-timeout"])
def test_a_parent_that_times_out_takes_its_children_along(deployed: World, kind: str) -> None:
    root = deployed.start(f"{kind}/test", children=LEAVES)
    deployed.wait_for_start(5)
    eventually(lambda: not deployed.alive(), seconds=45 + SOON, what="all processes are gone")
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state_name == "TimedOut"
    assert_cancelled_below(deployed, root.id)


def test_a_failed_child_takes_its_siblings_and_its_parent_along(deployed: World) -> None:
    root = deployed.start("root/test", children=LEAVES)
    deployed.wait_for_start(5)
    deployed.tell("fail-2")
    assert_all_gone(deployed, root.id)
    state = deployed.run(root.id).state
    assert state.is_failed()
    eventually(
        lambda: (
            sorted(str(run.state_name) for run in deployed.tree(root.id)[1:])
            == ["Cancelled", "Cancelled", "Cancelled", "Failed"]
        ),
        seconds=SOON,
        what="one has failed, and the others are Cancelled",
    )


def test_two_levels_go_at_once(deployed: World) -> None:
    root = deployed.start("root/test", children=["mid/test", "mid-sync/test"])
    deployed.wait_for_start(9)
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)
    assert_cancelled_below(deployed, root.id)


def test_three_levels_go_at_once(deployed: World) -> None:
    root = deployed.start("top/test")
    deployed.wait_for_start(6)
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)
    assert_cancelled_below(deployed, root.id)


def test_a_mixed_tree_goes_whole(deployed: World) -> None:
    """Supervised and plain, inline and deployed, spawned by body, by task and by plain calls."""
    children = ["mid-plain/test", "mid/test", "inline", "task", "plain"]
    root = deployed.start("root/test", children=children)
    deployed.wait_for_start(1 + 3 + 4 + 1 + 1)
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)
    assert_cancelled_below(deployed, root.id)


@pytest.mark.parametrize("kind", ["root", "root-sync"])
def test_what_was_launched_without_a_supervisor_goes_too(deployed: World, kind: str) -> None:
    """Nothing but plain calls, one of them within a plain flow that has returned."""
    root = deployed.start(f"{kind}/test", children=["plain", "within-plain"])
    deployed.wait_for_start(3)
    deployed.tell("raise")
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_failed()


@pytest.mark.parametrize("kind", ["root", "root-sync"])
def test_a_child_within_a_plain_flow_alone_goes_too(deployed: World, kind: str) -> None:
    root = deployed.start(f"{kind}/test", children=["within-plain"])
    deployed.wait_for_start(2)
    deployed.tell("raise")
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_failed()


def test_a_detached_child_is_left_alone(deployed: World) -> None:
    root = deployed.start("root/test", children=["detached", "leaf/test"])
    deployed.wait_for_start(3)
    (attached,) = deployed.tree(root.id)[1:]  # no link, or the server's cascade would end it
    deployed.cancel(root.id)
    eventually(lambda: deployed.is_over(root.id), seconds=SOON, what="the tree is over")
    eventually(lambda: len(deployed.alive()) == 1, seconds=SOON, what="one process is left")
    (detached,) = (deployed.run(run_id) for run_id in deployed.alive())
    assert detached.id != attached.id
    assert detached.state.is_running()
    assert detached.labels["supervised.parent"] == str(root.id)
    deployed.tell("finish-0")
    eventually(lambda: not deployed.alive(), seconds=SOON, what="it ends by itself")
    assert deployed.run(detached.id).state.is_completed()


@pytest.mark.parametrize("way", ["cancelled", "failed"])
def test_a_detached_mid_keeps_its_own_subtree_and_another_takes_its_own_along(
    deployed: World, way: str
) -> None:
    root = deployed.start("root/test", children=["detached mid", "mid/test"])
    deployed.wait_for_start(8)
    deployed.cancel(root.id) if way == "cancelled" else deployed.tell("raise")
    eventually(lambda: deployed.is_over(root.id), seconds=SOON, what="the tree is over")
    eventually(lambda: len(deployed.alive()) == 3, seconds=SOON, what="one subtree is left")
    kept = [deployed.run(run_id) for run_id in deployed.alive()]
    assert all(run.state.is_running() for run in kept)
    (middle,) = [run for run in kept if run.labels.get("supervised.detached")]
    below = {run.id for run in deployed.tree(middle.id)[1:]}
    assert below == {run.id for run in kept} - {middle.id}
    for part in range(3):
        deployed.tell(f"finish-{part}")
    eventually(lambda: not deployed.alive(), seconds=SOON, what="it ends by itself")
    assert deployed.run(middle.id).state.is_completed()


def test_children_that_were_starting_are_closed(deployed: World) -> None:
    """A run that is cancelled while its process starts is left in `Cancelling` by Prefect."""
    root = deployed.start("root/test", children=LEAVES)
    eventually(lambda: len(deployed.tree(root.id)) == 5, seconds=60, what="the leaves have runs")
    eventually(
        lambda: any(run.state.is_pending() for run in deployed.tree(root.id)[1:]),
        seconds=60,
        what="a leaf is being started",
    )
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)
    assert_cancelled_below(deployed, root.id)


def test_a_completed_body_waits_for_its_children(deployed: World) -> None:
    root = deployed.start("mid/test", leaves=2)
    deployed.wait_for_start(3)
    deployed.tell("finish-0")
    eventually(lambda: len(deployed.alive()) == 2, seconds=SOON, what="one leaf is done")
    assert deployed.run(root.id).state.is_running()
    deployed.tell("finish-1")
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_completed()


def test_what_lies_below_a_child_that_is_waited_for_is_waited_for_too(deployed: World) -> None:
    root = deployed.start("root/test", children=["waited", "leaf/test"])
    deployed.wait_for_start(6)
    sibling = next(run for run in deployed.tree(root.id)[1:3] if run.parameters.get("part") == 1)
    deployed.tell("raise")
    eventually(
        lambda: deployed.run(sibling.id).state.is_cancelled(), seconds=SOON, what="one is cancelled"
    )
    assert len(deployed.alive()) == 5
    for part in range(3):
        deployed.tell(f"finish-{part}")
    assert_all_gone(deployed, root.id)
    states = [run.state.name for run in deployed.tree(root.id)]
    assert sorted(states) == ["Cancelled", *["Completed"] * 4, "Failed"]
