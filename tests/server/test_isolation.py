"""Children in processes of their own."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from support.otlp import receiving
from support.world import FLOWS, eventually

sys.path.insert(0, str(FLOWS))
import isolated
import launching

from supervised import (
    ChildCancelled,
    ChildCrashed,
    ChildFailed,
    ParametersError,
    _teardown,
    supervised_flow,
    supervisor,
)
from supervised.testing import running

pytestmark = pytest.mark.usefixtures("server")
SOON = 60


def pid_in(folder: Path) -> int | None:
    path = folder / "pid"
    return int(path.read_text()) if path.exists() and path.read_text() else None


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def started(folder: Path) -> int:
    while (pid := pid_in(folder)) is None:
        await asyncio.sleep(0.05)
    return pid


@pytest.mark.parametrize("target", [isolated.pid_of, isolated.pid_of_async], ids=lambda t: t.name)
def test_its_result_and_state_arrive_as_for_any_child(target):
    @supervised_flow
    async def parent():
        child = supervisor.spawn(target, isolation="process")
        return await child, child.state.is_completed(), child.flow_run_id

    pid, is_completed, run_id = asyncio.run(parent())
    assert pid != os.getpid()
    assert is_completed
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).state.is_completed()


def test_its_logs_arrive_too():
    @supervised_flow
    def parent():
        child = supervisor.spawn(isolated.pid_of, isolation="process")
        child.result()
        return child.flow_run_id

    run_id = parent()
    found = LogFilter.model_validate({"flow_run_id": {"any_": [str(run_id)]}})
    with get_client(sync_client=True) as client:
        eventually(
            lambda: any("hello from" in log.message for log in client.read_logs(found)),
            seconds=30,
            what="the log has arrived",
        )


def test_what_it_raises_is_the_cause_of_its_failure():
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        with pytest.raises(ChildFailed) as raised:
            await supervisor.spawn(isolated.raises, isolation="process")
        return repr(raised.value.__cause__)

    assert asyncio.run(parent()) == "KeyError('no such part')"


def test_a_result_that_cannot_leave_the_process_is_said_to_be_one():
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        with pytest.raises(ChildFailed, match="cannot be pickled"):
            await supervisor.spawn(isolated.returns_what_cannot_be_pickled, isolation="process")

    asyncio.run(parent())


@pytest.mark.parametrize("target", [isolated.sleeps, isolated.sleeps_async], ids=lambda t: t.name)
def test_one_that_is_cancelled_gets_a_signal_and_says_why_it_ended(target, tmp_path):
    @supervised_flow
    async def parent():
        child = supervisor.spawn(target, {"folder": str(tmp_path)}, isolation="process")
        pid = await started(tmp_path)
        child.cancel("enough")
        with pytest.raises(ChildCancelled, match="enough"):
            await child
        assert child.state.is_cancelled()
        return pid

    assert not is_alive(asyncio.run(parent()))
    assert "enough" in (tmp_path / "cancelled").read_text()


def test_one_that_ignores_signals_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(_teardown, "_INLINE_SECONDS", 20.0)  # the server may be locked for its end

    @supervised_flow(grace_seconds=5)
    async def parent():
        child = supervisor.spawn(
            isolated.ignores_signals, {"folder": str(tmp_path)}, isolation="process"
        )
        pid = await started(tmp_path)
        began = time.monotonic()
        child.cancel()
        with pytest.raises(ChildCancelled):
            await child
        return pid, child.state.name, time.monotonic() - began

    pid, state, seconds = asyncio.run(parent())
    assert not is_alive(pid)
    assert state == "Cancelled"
    assert seconds < 15


def test_one_that_is_killed_has_crashed(tmp_path):
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        child = supervisor.spawn(isolated.sleeps, {"folder": str(tmp_path)}, isolation="process")
        os.kill(await started(tmp_path), signal.SIGKILL)
        with pytest.raises(ChildCrashed, match="exit code -9"):
            await child

    asyncio.run(parent())
    assert "exit code -9" in (tmp_path / "crashed").read_text()


def test_a_failing_parent_takes_it_along(tmp_path):
    pids = []

    @supervised_flow
    async def parent():
        supervisor.spawn(isolated.has_children, {"folder": str(tmp_path)}, isolation="process")
        pids.append(await started(tmp_path))  # of the child's own child
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        asyncio.run(parent())
    eventually(lambda: not is_alive(pids[0]), seconds=30, what="the grandchild is gone")


def test_it_does_not_outlive_a_parent_that_is_killed(server, tmp_path):
    command = [sys.executable, "isolated.py", str(tmp_path)]
    with running(command, env=server.env, log=tmp_path / "log", cwd=FLOWS) as parent:
        pid = eventually(lambda: pid_in(tmp_path), seconds=60, what="the child has started")
        parent.kill()
        parent.wait()
        eventually(lambda: not is_alive(pid), seconds=30, what="the child is gone")


# -- what it is given, and what it raises --------------------------------------------------------


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_parameters_of_a_wrong_type_are_refused_wherever_it_runs(isolation):
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        child = supervisor.spawn(launching.takes_a_number, {"number": "many"}, isolation=isolation)
        with pytest.raises(ParametersError, match="do not fit flow 'takes-a-number'") as raised:
            await child
        assert raised.value.child == "takes-a-number"
        assert child.outcome == "failed"

    asyncio.run(parent())


def test_parameters_are_converted_to_their_types_wherever_it_runs():
    @supervised_flow
    async def parent():
        return await supervisor.gather(
            supervisor.spawn(launching.takes_a_number, {"number": "1"}),
            supervisor.spawn(launching.takes_a_number, {"number": "2"}, isolation="process"),
        )

    assert asyncio.run(parent()) == [1, 2]


@pytest.mark.parametrize(
    ("target", "given"), [(isolated.sums, {"numbers": ["1", 2]}), (isolated.locks, {"model": {}})]
)
def test_what_its_types_make_of_parameters_need_not_be_picklable(target, given):
    """It is what was passed that goes into the process then."""

    @supervised_flow
    async def parent():
        return await supervisor.spawn(target, given, isolation="process")

    assert asyncio.run(parent()) == 3


def test_what_an_earlier_try_raised_is_not_the_cause_of_the_last_ones_end():
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        with pytest.raises(ChildCrashed, match="exit code 9") as raised:
            await supervisor.spawn(launching.dies_when_retried, isolation="process")
        return raised.value.__cause__

    assert asyncio.run(parent()) is None


# -- what it launches -----------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [0, 1])
def test_what_a_killed_one_had_launched_ends_and_its_restart_does_not_double_it(world, restarts):
    queue = f"queue-{uuid4()}"
    deployment = world.client.create_deployment(world.client.create_flow(launching.takes), queue)
    below = FlowRunFilter.model_validate({"deployment_id": {"any_": [str(deployment)]}})

    def launched():
        runs = world.client.read_flow_runs(flow_run_filter=below)
        return sorted(run.state_type.value for run in runs)

    def kill():
        eventually(world.pids, seconds=SOON, what="it has launched something")
        assert launched() == ["SCHEDULED"]
        os.kill(*world.pids().values(), signal.SIGKILL)
        expected = ["CANCELLED", "SCHEDULED"][: 1 + restarts]
        eventually(lambda: launched() == expected, seconds=SOON, what=expected)
        eventually(lambda: len(world.pids()) == 1 + restarts, seconds=SOON, what="marks")
        assert launched() == expected

    async def act():
        parameters = f"takes/{queue}", str(world.folder), restarts
        parent = asyncio.create_task(launching.keeps(*parameters))
        await asyncio.to_thread(kill)
        world.tell("finish")
        return await parent

    assert asyncio.run(act()) == restarts
    assert set(launched()) == {"CANCELLED"}
    assert not world.alive()


# -- being started ------------------------------------------------------------------------------


def test_one_that_is_cancelled_while_it_is_being_started_ends_and_holds_up_nobody(tmp_path):
    launching.reached.clear()
    launching.released.clear()

    @supervised_flow(grace_seconds=SOON)  # or it is given up before it is released
    async def parent():
        parameters = {"slow": launching.Slow(), "folder": str(tmp_path)}
        slow = supervisor.spawn(launching.takes, parameters, isolation="process")
        assert await asyncio.to_thread(launching.reached.wait, SOON)
        slow.cancel("enough")
        quick = supervisor.spawn(launching.takes_a_number, {"number": 1})
        assert await quick.aresult(timeout=SOON) == 1
        assert not slow.is_over
        launching.released.set()
        with pytest.raises(ChildCancelled, match="enough"):
            await slow.aresult(timeout=SOON)
        return slow.flow_run_id

    run_id = asyncio.run(parent())
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run_id).state.is_cancelled()
    assert not (tmp_path / "began").exists()
    assert not multiprocessing.active_children()


def test_one_that_is_cancelled_as_soon_as_it_has_a_process_says_why_it_ended(tmp_path):
    @supervised_flow
    async def parent():
        parameters = {"slow": None, "folder": str(tmp_path)}
        child = supervisor.spawn(launching.takes, parameters, isolation="process")
        while not multiprocessing.active_children():
            await asyncio.sleep(0.01)
        child.cancel("enough")
        with pytest.raises(ChildCancelled, match="enough"):
            await child.aresult(timeout=SOON)
        return child.flow_run_id

    run_id = asyncio.run(parent())
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    assert state.is_cancelled()
    assert "enough" in state.message


# -- its spans ----------------------------------------------------------------------------------


def test_its_spans_arrive_in_the_trace_of_its_parent(server, tmp_path):
    with receiving() as (otlp, endpoint):
        subprocess.run(
            [sys.executable, "traced_process.py", str(tmp_path)],
            env={**server.env, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
            cwd=FLOWS,
            check=True,
            timeout=150,
        )
        here, there = otlp.span("supervise dawn"), otlp.span("crunch work")
    assert (
        otlp.tree(here.trace_id)
        == textwrap.dedent(
            """
        dawn
          supervise dawn
            child crunch
              crunch
                crunch work
        """
        ).strip()
    )
    assert here.process != there.process
