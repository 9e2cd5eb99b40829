"""No orphan where the parent's own code can no longer act."""

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from uuid import UUID, uuid4

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled
from support.world import FLOWS, World, eventually
from test_runners import RUNNER, names_of_deployments
from test_teardown import LEAVES, SOON, assert_all_gone, assert_cancelled_below

from supervised import cli
from supervised.testing import running
from supervised.testing._local import free_port

LEASE = 10  # seconds; of tests/flows/tree.py, root_brief


def kill(world: World, run_id: UUID) -> None:
    os.kill(world.pids()[str(run_id)], signal.SIGKILL)


@pytest.fixture
def second_runner(deployed: World) -> Iterator[psutil.Process]:
    """Another runner, which a test may kill; it serves everything as *name/second*."""
    env = {**deployed.server.env, **RUNNER}
    log = deployed.folder / "second.log"
    with running([sys.executable, "serve.py", "second"], env=env, log=log, cwd=FLOWS) as process:
        eventually(
            lambda: "root-brief/second" in names_of_deployments(deployed),
            seconds=120,
            what="served",
        )
        yield psutil.Process(process.pid)


# -- the runner's hooks -------------------------------------------------------------------------


@pytest.mark.parametrize("children", [[*LEAVES, "inline"], ["mid/test", "mid-plain/test"]])
def test_a_killed_parent_takes_its_tree_along(deployed: World, children: list[str]) -> None:
    root = deployed.start("root/test", children=children)
    deployed.wait_for_start(5)
    kill(deployed, root.id)
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_crashed()
    assert_cancelled_below(deployed, root.id)


def test_a_killed_child_takes_what_it_launched_along(deployed: World) -> None:
    """Its runs are plain; the parent hears of its end and lives on."""
    root = deployed.start("lenient/test", children=["mid-plain/test"])
    deployed.wait_for_start(4)
    (mid,) = deployed.tree(root.id)[1:2]
    kill(deployed, mid.id)
    eventually(lambda: len(deployed.alive()) == 1, seconds=SOON, what="only the root is left")
    deployed.tell("finish")
    assert_all_gone(deployed, root.id)
    assert deployed.run(root.id).state.is_completed()


# -- the link -----------------------------------------------------------------------------------


def test_children_end_themselves_when_parent_and_runner_are_gone(
    deployed: World, second_runner: psutil.Process
) -> None:
    root = deployed.start("root-brief/second", children=["mid/test", "mid-sync/test"])
    deployed.wait_for_start(9)
    second_runner.kill()
    kill(deployed, root.id)
    below = {str(run.id) for run in deployed.tree(root.id)[1:]}
    eventually(lambda: not below & set(deployed.alive()), seconds=LEASE + SOON, what="all are gone")
    eventually(
        lambda: all(deployed.run(UUID(run_id)).state.is_final() for run_id in below),
        seconds=SOON,
        what="all are over",
    )
    assert_cancelled_below(deployed, root.id)


def test_children_whose_own_runner_is_gone_too_end_themselves(
    deployed: World, second_runner: psutil.Process
) -> None:
    """Nobody reads what they log any more, which must not keep them from acting."""
    root = deployed.start("root-brief/second", children=["mid/second"])
    deployed.wait_for_start(5)
    second_runner.kill()
    kill(deployed, root.id)
    eventually(lambda: not deployed.alive(), seconds=LEASE + SOON, what="all are gone")
    assert_cancelled_below(deployed, root.id)


# -- the guard ----------------------------------------------------------------------------------


def test_the_guard_ends_plain_children_of_a_lost_parent(
    deployed: World, second_runner: psutil.Process
) -> None:
    root = deployed.start("root-brief/second", children=LEAVES[:2])
    deployed.wait_for_start(3)
    copy = copied(deployed, deployed.tree(root.id)[1].id)
    second_runner.kill()
    kill(deployed, root.id)
    port = free_port()
    command = [sys.executable, "-m", "supervised.cli", "guard", "--interval", "1"]
    command += ["--health-port", str(port)]
    log = deployed.folder / "guard.log"
    with running(command, env=deployed.server.env, log=log) as guard:
        below = {run.id for run in deployed.tree(root.id)[1:]}
        eventually(
            lambda: all(deployed.run(run_id).state.is_final() for run_id in below),
            seconds=LEASE + SOON,
            what="the guard has ended them",
        )
        assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {
            "healthy": True,
            "unverified": 0,
        }
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(30) == 0
    assert "has not been heard of" in log.read_text()
    assert not deployed.run(copy).state.is_final(), "a copied tag proves nothing"


def copied(world: World, run_id: UUID) -> UUID:
    """Copy a run as people do: its deployment, tags and parameters, and here its labels too."""
    run = world.run(run_id)
    return world.client.create_flow_run_from_deployment(
        run.deployment_id,
        parameters={**run.parameters, "part": 9},
        tags=run.tags,
        labels=run.labels,
        state=Scheduled(),
    ).id


# -- by hand ------------------------------------------------------------------------------------


def supervised(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, object]:
    code = cli.run([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_tree_can_be_shown_and_cancelled_by_hand(deployed: World, capsys) -> None:
    root = deployed.start("mid-plain/test")
    deployed.wait_for_start(3)
    code, tree = supervised(capsys, "tree", str(root.id))
    assert (code, tree["state"], len(tree["below"])) == (0, "Running", 2)
    code, listed = supervised(capsys, "cancel", str(root.id), "--dry-run")
    assert (code, len(listed)) == (0, 3)
    assert len(deployed.alive()) == 3
    code, receipts = supervised(capsys, "cancel", str(root.id), "--grace-seconds", str(SOON))
    assert (code, {receipt["status"] for receipt in receipts}) == (0, {"cancelled"})
    assert_all_gone(deployed, root.id)


def test_what_a_terminal_root_has_left_can_be_cancelled(deployed: World, capsys) -> None:
    root = deployed.start("mid-plain/test")
    deployed.wait_for_start(3)
    kill(deployed, root.id)
    eventually(lambda: deployed.run(root.id).end_time, seconds=SOON, what="it is over")
    code, receipts = supervised(
        capsys, "cancel", str(root.id), "--subtree", "--grace-seconds", str(SOON)
    )
    assert (code, len(receipts)) == (0, 2)
    assert_all_gone(deployed, root.id)


def test_there_is_nothing_to_reap_where_all_is_well(deployed: World, capsys) -> None:
    root = deployed.start("root/test", children=LEAVES[:1])
    deployed.wait_for_start(2)
    assert supervised(capsys, "orphans") == (0, [])
    assert supervised(capsys, "reap") == (0, [])
    assert len(deployed.alive()) == 2
    deployed.cancel(root.id)
    assert_all_gone(deployed, root.id)


def test_a_run_that_does_not_exist_is_one_clear_line(server, capsys) -> None:
    missing = uuid4()
    assert cli.run(["tree", str(missing)]) == cli.WRONG
    assert f"There is no flow run {missing}" in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_taken_is_one_clear_line(server, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.run(["guard", "--health-port", str(port)]) == cli.WRONG
    assert f"Cannot answer on 127.0.0.1:{port}" in " ".join(capsys.readouterr().err.split())


def test_no_server_is_one_clear_line(capsys) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}):
            assert cli.run(["orphans"]) == cli.UNREACHABLE
    assert "does not answer" in capsys.readouterr().err
