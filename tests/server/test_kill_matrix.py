"""Every way in which a parent ends, for children in every state, at every depth.

Real processes, on SQLite under `serve` and on PostgreSQL under a process worker. The summary of the
tests shows, for each way, how long each child has outlived its parent.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from support.databases import settings_for
from support.world import FLOWS, World, eventually
from test_runners import RUNNER, names_of_deployments

from supervised.testing import LocalServer, local_server, running

STATES = ("starting", "queued", "running", "cancelling")
DEPTHS = (1, 2, 3)
STARTED = 9  # root, two nodes, and a running and a soon cancelling leaf at three depths
BOUND = 60.0
LOOK_SECONDS = 0.2
# What serves a run and is refused by the server in three polls in a row never watches it again, nor
# any later one (3.9.1, utilities/services.py, `critical_service_loop`): with `RUNNER`, after 3 to
# 5 s. A worker watches each run by itself, every 10 s.
PATIENT = {**RUNNER, "PREFECT_RUNNER_POLL_FREQUENCY": "15"}
TIMEOUT_SECONDS = 45  # of tests/flows/matrix.py, root_timeout


class Stage:
    """A server that can be restarted, a runner for the children, and one for the roots.

    Args:
        home: The server's home.
        settings: What its database is, among others.
        kind: What starts the processes: *serve*, or a process *worker*.
    """

    def __init__(self, home: Path, settings: dict[str, str], kind: str) -> None:
        self.kind = kind
        self._home = home
        self._settings = settings
        self._server = contextlib.ExitStack()
        self._runners = contextlib.ExitStack()
        self._port: int | None = None
        self._roots: psutil.Process | None = None
        self._poll = RUNNER
        self.server: LocalServer

    def start_server(self) -> LocalServer:
        context = local_server(home=self._home, settings=self._settings, port=self._port)
        self.server = self._server.enter_context(context)
        self._port = int(self.server.url.split(":")[2].split("/")[0])
        return self.server

    def stop_server(self) -> None:
        self._server.close()

    def stop(self) -> None:
        self._runners.close()
        self.stop_server()

    def start_runner(self, name: str) -> psutil.Process:
        """Start what serves *name*: the children's `matrix`, or the roots'."""
        if self.kind == "serve":
            command = [sys.executable, "matrix.py", name]
        else:
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", name]
        log = self._home / f"{name}.log"
        context = running(command, env={**self.server.env, **self._poll}, log=log, cwd=FLOWS)
        return psutil.Process(self._runners.enter_context(context).pid)

    def start_patient_runners(self) -> None:
        """Replace the runners by such as still watch their runs after a restart of the server."""
        self._runners.close()
        self._roots = None
        self._poll = PATIENT
        self.start_runner("matrix")

    def runner_of_roots(self) -> psutil.Process:
        """Return the runner that the roots need, a new one if the last was killed."""
        if self._roots is None or self._roots.status() == psutil.STATUS_ZOMBIE:
            self._roots = self.start_runner("roots")
        return self._roots

    @contextlib.contextmanager
    def guard(self, log: Path) -> Iterator[None]:
        command = [sys.executable, "-m", "supervised.cli", "guard", "--interval", "2"]
        with running(command, env=self.server.env, log=log):
            yield

    def deploy(self, world: World, name: str) -> None:
        flows = ["leaf", "mid"] if name == "matrix" else ["root", "root_timeout"]
        names = {f"matrix-{flow.replace('_', '-')}/{name}" for flow in flows}
        if self.kind == "serve":
            eventually(
                lambda: names <= names_of_deployments(world), seconds=90, what="it is served"
            )
            return
        if names <= names_of_deployments(world):
            return
        world.client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        for flow in flows:
            flow_id = world.client.create_flow_from_name(f"matrix-{flow.replace('_', '-')}")
            world.client.create_deployment(
                flow_id,
                name,
                work_pool_name=name,
                path=str(FLOWS),
                entrypoint=f"matrix.py:{flow}",
            )


@pytest.fixture(scope="module", params=["sqlite-serve", "postgresql-worker"])
def stage(request, tmp_path_factory) -> Iterator[Stage]:
    """Both databases, and both kinds of runners."""
    database, kind = request.param.split("-")
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(settings_for(database))
        home = tmp_path_factory.mktemp(request.param)
        made = Stage(home, settings, kind)
        stack.callback(made.stop)
        made.start_server()
        stack.enter_context(
            temporary_settings({PREFECT_API_URL: made.server.url, PREFECT_HOME: home})
        )
        made.start_runner("matrix")
        yield made


@pytest.fixture
def world(stage: Stage, tmp_path: Path) -> Iterator[World]:
    """The stage's server, with a folder for this test's marks."""
    with get_client(sync_client=True) as client:
        world = World(stage.server, tmp_path, client)
        stage.deploy(world, "matrix")
        yield world
        world.end_all()


# -- the ways in which a root ends --------------------------------------------------------------


def pid_of(world: World, root: UUID) -> int:
    return world.pids()[str(root)]


def cancel(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    world.cancel(root)


def fail(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    world.tell("raise")


def time_out(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    deadline = world.run(root).start_time + timedelta(seconds=TIMEOUT_SECONDS)
    eventually(lambda: datetime.now(timezone.utc) >= deadline, seconds=60, what="its time is over")


def terminate(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    os.kill(pid_of(world, root), signal.SIGTERM)


def kill(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    os.kill(pid_of(world, root), signal.SIGKILL)


def kill_with_runner(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    runner.kill()
    os.kill(pid_of(world, root), signal.SIGKILL)


def restart_server(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    world.cancel(root)
    eventually(
        lambda: any(is_torn_down(run) for run in world.tree(root)[1:]),
        seconds=30,
        what="the teardown has begun",
    )
    stage.stop_server()
    stage.start_server()


def is_torn_down(run: FlowRun) -> bool:
    """Whether the teardown has asked it to end; the tree itself, and runners, say otherwise."""
    told = run.state.message if run.state is not None else None
    return (told or "").startswith("Cancelled because parent")


def suspend_and_resume(stage: Stage, world: World, root: UUID, runner: psutil.Process) -> None:
    before = set(world.alive()) - {str(root)}
    world.tell("suspend")
    eventually(lambda: world.run(root).state_name == "Suspended", seconds=60, what="suspended")
    eventually(lambda: str(root) not in world.alive(), seconds=60, what="its process is gone")
    assert before - set(world.alive()) <= {
        str(run.id) for run in world.tree(root) if run.name.startswith("cancelling")
    }, "the children stay"
    (world.folder / "suspend").unlink()
    world.client.resume_flow_run(root)
    eventually(lambda: str(root) in world.alive(), seconds=60, what="it goes on")
    world.cancel(root)


WAYS: dict[str, Callable[[Stage, World, UUID, psutil.Process], None]] = {
    "cancelled": cancel,
    "raises": fail,
    "times out": time_out,
    "SIGTERM": terminate,
    "SIGKILL": kill,
    "SIGKILL with its runner": kill_with_runner,
    "suspended, resumed, cancelled": suspend_and_resume,
    "cancelled, the server restarts": restart_server,  # the last: its runners start runs slowly
}
GUARDED = {"SIGKILL with its runner"}  # who else would end plain children?
# A worker reads a run again before it cancels it. If there is no server in that instant, the error
# ends what watches the run: its process is killed, and nobody writes `Cancelled` to it (3.9.1,
# runner/_cancellation_manager.py, `cancel_by_id` in the task group of `FlowRunExecutorContext`).
WITHOUT_SERVER = {"cancelled, the server restarts"}


@pytest.mark.server
@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: re.sub(r"\W+", "-", way))
def test_no_child_outlives_its_root(stage: Stage, world: World, way: str, record_property) -> None:
    guard = stage.guard(world.folder / "guard.log") if way in GUARDED else contextlib.nullcontext()
    with guard:
        if way in WITHOUT_SERVER and stage.kind == "serve":
            stage.start_patient_runners()
        runner = stage.runner_of_roots()
        stage.deploy(world, "roots")
        name = "matrix-root-timeout" if way == "times out" else "matrix-root"
        root = world.start(f"{name}/roots")
        world.wait_for_start(STARTED, seconds=240)  # a patient runner takes a minute more
        world.tell("go")
        eventually(
            lambda: len(world.tree(root.id)) == 1 + 2 + len(STATES) * len(DEPTHS),
            seconds=60,
            what="every child has a run",
        )
        WAYS[way](stage, world, root.id, runner)
        seconds = outlived(world, root.id, may_be_left=way in WITHOUT_SERVER)
        record_property("kill matrix", (stage.kind, way, seconds))
        assert set(seconds) >= {f"{state}-{depth}" for state in STATES for depth in DEPTHS}
        assert max(seconds.values()) < BOUND


def is_final(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_final()


def is_reported(world: World, root: UUID, run: FlowRun) -> bool:
    """Whether a message of the root has said that this run may still be alive."""
    told = [state.message or "" for state in world.client.read_flow_run_states(root)]
    return any("may still be alive" in message and str(run.id) in message for message in told)


def outlived(world: World, root: UUID, *, may_be_left: bool) -> dict[str, float]:
    """Return for how many seconds each child was not over, or its process not gone.

    Args:
        world: The server, and the folder of the marks.
        root: The run at the top.
        may_be_left: A run without a process may stay `Cancelling` if the root's report names it.
    """
    began = time.monotonic()
    seconds: dict[str, float] = {}
    while time.monotonic() - began < BOUND:
        alive = world.alive()
        live = {
            run.name
            for run in world.tree(root)[1:]
            if str(run.id) in alive
            or not (is_final(run) or (may_be_left and is_reported(world, root, run)))
        }
        now = round(time.monotonic() - began, 1)
        for run in world.tree(root)[1:]:
            if run.name in live:
                seconds.pop(run.name, None)
            else:
                seconds.setdefault(run.name, now)
        if not live and str(root) not in alive:
            return seconds
        time.sleep(LOOK_SECONDS)  # asking costs CPU that the processes need to end with
    raise AssertionError(f"Not over after {BOUND:.0f} s: {world.states(root)}, {world.alive()}")
