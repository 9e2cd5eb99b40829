"""Children in processes of their own."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter
from support.world import FLOWS, eventually

sys.path.insert(0, str(FLOWS))
import isolated

from supervised import ChildCancelled, ChildCrashed, ChildFailed, supervised_flow, supervisor
from supervised.testing import running

pytestmark = pytest.mark.usefixtures("server")


def pid_in(folder: Path) -> int | None:
    path = folder / "pid"
    return int(path.read_text()) if path.exists() and path.read_text() else None


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


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


def test_one_that_ignores_signals_is_killed(tmp_path):
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
