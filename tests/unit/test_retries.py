"""A later attempt of a run, and what the earlier ones have left."""

import asyncio

import pytest
from prefect.exceptions import Pause
from prefect.states import Scheduled, Suspended

from supervised import Restart, _identity, supervised_flow, supervisor
from supervised.testing import FakePrefect


def world(root):
    prefect = FakePrefect()
    prefect.deploy("root/test", root, runner="root")
    prefect.deploy("score/gpu", takes=7200)
    return prefect


def scores(prefect):
    """Return the runs of *score*, whoever keeps them."""
    return [run for run in prefect.runs if run.flow_run.name.startswith("score")]


def resume(prefect, run):
    """Suspend a run whose body ends in a pause, and have it go on in another process."""
    prefect.until(lambda: run.state.is_running())
    prefect.server.propose(run.id, Suspended())
    prefect.until(lambda: not run.has_process, within=60)
    prefect.advance(5)
    prefect.server.propose(run.id, Scheduled())


async def launched(*children):
    """Wait until children have their runs."""
    while any(child.flow_run_id is None for child in children):
        await asyncio.sleep(1)


def test_a_restart_takes_over_nothing_that_an_earlier_attempt_has_left():
    attempts = []

    @supervised_flow(on_child_failure="ignore")
    async def root():
        attempts.append(1)
        restart = Restart(max=1)
        await launched(
            *(supervisor.spawn("score/gpu", {"i": i}, restart=restart) for i in range(2))
        )
        await asyncio.sleep(30)
        if len(attempts) == 1:
            raise Pause
        await asyncio.sleep(3600)

    with world(root) as prefect:
        run = prefect.start("root/test")
        resume(prefect, run)
        prefect.until(lambda: len(attempts) == 2)
        prefect.advance(20)
        assert len(scores(prefect)) == 2
        scores(prefect)[0].kill()
        prefect.until(lambda: len(scores(prefect)) == 3, within=30)
        prefect.advance(30)
        assert [score.state.name for score in scores(prefect)] == ["Crashed", "Running", "Running"]
        assert scores(prefect)[2].flow_run.labels[_identity.GENERATION] == 1
        assert run.state.is_running()


def test_a_key_that_is_spawned_late_meets_its_run_as_it_is_then():
    attempts, outcomes = [], []

    @supervised_flow(on_child_failure="ignore")
    async def root():
        attempts.append(1)
        if len(attempts) == 1:
            await launched(supervisor.spawn("score/short"))
            raise Pause
        await supervisor.spawn("quick/test")
        assert scores(prefect)[0].is_alive
        await asyncio.sleep(120)
        assert scores(prefect)[0].state.is_failed()
        child = supervisor.spawn("score/short")
        await child.wait_async()
        outcomes.append(child.outcome)

    with world(root) as prefect:
        prefect.deploy("score/short", takes=60, fails=True)
        prefect.deploy("quick/test", takes=1)
        run = prefect.start("root/test")
        resume(prefect, run)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed(), run.state.message
        assert len(scores(prefect)) == 2
        assert outcomes == ["failed"]
        assert scores(prefect)[1].flow_run.labels[_identity.GENERATION] == 1


@pytest.mark.parametrize("end", ["kill", "cancel"])
def test_a_detached_run_stays_detached_when_a_retry_takes_it_over(end):
    attempts = []

    @supervised_flow(retries=1, on_parent={"failed": "detach"})
    async def root():
        attempts.append(1)
        child = supervisor.spawn("score/gpu")
        await launched(child)
        assert child.is_detached == (len(attempts) == 2)
        await asyncio.sleep(30)
        if len(attempts) == 1:
            raise RuntimeError("again")
        await child

    with world(root) as prefect:
        prefect.guard()
        run = prefect.start("root/test")
        prefect.until(lambda: len(attempts) == 2)
        prefect.advance(40)
        assert run.state.is_running()
        getattr(run, end)()
        prefect.until(lambda: not run.is_alive, within=60)
        prefect.advance(120)
        (score,) = scores(prefect)
        assert score.state.is_running()
        assert score.flow_run.labels[_identity.DETACHED]


def test_a_detached_run_goes_on_beside_other_work_under_its_key():
    attempts = []

    @supervised_flow(retries=1)
    async def root():
        attempts.append(1)
        child = supervisor.spawn("score/gpu", {"n": len(attempts)}, key="the one")
        await launched(child)
        if len(attempts) == 1:
            child.detach()
            await asyncio.sleep(5)
            raise RuntimeError("again")
        await asyncio.sleep(30)
        child.cancel()

    with world(root) as prefect:
        run = prefect.start("root/test")
        prefect.until(lambda: not run.is_alive)
        assert [score.state.name for score in scores(prefect)] == ["Running", "Cancelled"]
