"""The same holds without a runner, under a process worker, and under `flow.serve()`."""

import logging
import os
import signal
import sys

import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import LogFilter
from support.world import FLOWS, World, eventually
from test_teardown import LEAVES, SOON, assert_all_gone, assert_cancelled_below

from supervised.testing import running

RUNNER = {"PREFECT_RUNNER_POLL_FREQUENCY": "2", "PREFECT_WORKER_QUERY_SECONDS": "2"}


def run_id_of_the_only_root(world: World):
    children = set()
    for run_id in world.pids():
        children |= {str(run.id) for run in world.tree(run_id)[1:]}
    (root,) = set(world.pids()) - children
    return world.run(root).id


@pytest.fixture
def alone(deployed: World):
    """Start tests/flows/alone.py; yields a function that returns the process and the run's id."""
    stack = []

    def start(kind: str):
        command = [sys.executable, "alone.py", kind, str(deployed.folder)]
        log = deployed.folder / "alone.log"
        context = running(command, env=deployed.server.env, log=log, cwd=FLOWS)
        process = context.__enter__()
        stack.append(context)
        deployed.wait_for_start(3)
        return process, run_id_of_the_only_root(deployed)

    yield start
    for context in stack:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["async", "sync", "busy"])
def test_cancelling_a_run_that_no_runner_watches_ends_it_and_its_tree(
    deployed: World, alone, kind: str
) -> None:
    """Plain Prefect never notices: the run goes on to its end."""
    process, root = alone(kind)
    deployed.cancel(root)
    assert_all_gone(deployed, root)
    assert process.wait(30) == 0
    assert deployed.run(root).state_name == "Cancelled"
    assert_cancelled_below(deployed, root)
    assert "ended as CancelledRun" in (deployed.folder / "alone.log").read_text()


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_tree_along(
    deployed: World, alone, kind: str, signum: signal.Signals
) -> None:
    process, root = alone(kind)
    os.kill(process.pid, signum)
    assert_all_gone(deployed, root)
    assert process.wait(30) != 0
    assert deployed.run(root).state.is_crashed()
    assert_cancelled_below(deployed, root)


def test_a_signal_that_another_task_of_the_loop_swallows_is_not_lost(
    deployed: World, alone
) -> None:
    """Under plain Prefect the process lives on, and so do its children."""
    process, root = alone("crowded")
    os.kill(process.pid, signal.SIGTERM)
    assert_all_gone(deployed, root)
    assert process.wait(30) != 0
    assert deployed.run(root).state.is_crashed()
    assert_cancelled_below(deployed, root)


def test_cancelling_under_flow_serve_takes_the_tree_along(deployed: World) -> None:
    env = {**deployed.server.env, **RUNNER}
    log = deployed.folder / "pickled.log"
    with running([sys.executable, "pickled.py"], env=env, log=log, cwd=FLOWS):
        eventually(
            lambda: "root/pickled" in names_of_deployments(deployed), seconds=60, what="served"
        )
        root = deployed.start("root/pickled", children=["leaf/test", "inline", "mid/test"])
        deployed.wait_for_start(6)
        deployed.cancel(root.id)
        assert_all_gone(deployed, root.id)
        eventually(
            lambda: deployed.run(root.id).state_name == "Cancelled", seconds=SOON, what="Cancelled"
        )
        assert_cancelled_below(deployed, root.id)


def names_of_deployments(world: World) -> set[str]:
    """Those of which `serve` has not ended: it pauses them then."""
    deployments = world.client.read_deployments()  # first: each has its flow by then
    flows = {flow.id: flow.name for flow in world.client.read_flows()}
    return {f"{flows[each.flow_id]}/{each.name}" for each in deployments if not each.paused}


def test_a_body_that_is_cancelled_may_clean_up_for_longer_than_its_children(
    deployed: World,
) -> None:
    """Its runner signals it once, and so does nobody else before the runner kills it."""
    roots = [deployed.start("tidies/test").id, deployed.start("tidies-sync/test").id]
    deployed.wait_for_start(4)
    for root in roots:
        deployed.cancel(root)
    eventually(lambda: not deployed.alive(), seconds=SOON + 10, what="all processes are gone")
    assert {each.name for each in deployed.folder.glob("tidied*")} == {"tidied", "tidied-sync"}


def test_a_run_that_is_cancelled_logs_no_error(deployed: World) -> None:
    """Errors in logs wake people: a plain run, cancelled, logs none either."""
    root = deployed.start("mid-sync/test", leaves=1)
    deployed.wait_for_start(2)
    deployed.cancel(root.id)
    eventually(lambda: not deployed.alive(), seconds=SOON, what="its process is gone")
    chosen = LogFilter.model_validate({"flow_run_id": {"any_": [root.id]}})

    def told() -> list[str]:
        logs = deployed.client.read_logs(chosen)
        return [f"{logging.getLevelName(log.level)} {log.message}" for log in logs]

    eventually(
        lambda: any("Finished in state Cancelled" in each for each in told()),
        seconds=SOON,
        what="its log has arrived",
    )
    assert not [each for each in told() if each.startswith(("ERROR", "CRITICAL"))]


def test_cancelling_under_a_process_worker_takes_the_tree_along(deployed: World) -> None:
    pool = WorkPoolCreate(name="processes", type="process")
    deployed.client.create_work_pool(pool)
    for name in ("root", "leaf"):
        flow_id = deployed.client.create_flow_from_name(name)
        deployed.client.create_deployment(
            flow_id,
            "worker",
            work_pool_name="processes",
            path=str(FLOWS),
            entrypoint=f"tree.py:{name}",
        )
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "processes"]
    env = {**deployed.server.env, **RUNNER}
    with running(command, env=env, log=deployed.folder / "worker.log"):
        root = deployed.start("root/worker", children=["leaf/worker", "leaf/worker", *LEAVES[:1]])
        deployed.wait_for_start(4)
        deployed.cancel(root.id)
        eventually(lambda: not deployed.alive(), seconds=SOON, what="all processes are gone")
        assert_all_gone(deployed, root.id)
        eventually(
            lambda: deployed.run(root.id).state_name == "Cancelled", seconds=SOON, what="Cancelled"
        )
        assert_cancelled_below(deployed, root.id)
