"""What the server has done, and what was heard of it."""

import asyncio

import httpx
import pytest
from prefect.states import Crashed, Running, Scheduled

from supervised import ChildCrashed, ChildFailed, supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator


def test_a_run_that_has_failed_before_its_creation_was_answered_is_a_failure(monkeypatch):
    create, caught = FakeOrchestrator.create_deployment_run, []
    answers = iter([httpx.ReadTimeout("no answer", request=httpx.Request("POST", "http://fake"))])

    async def unanswered(*given):
        run = await create(*given)
        for lost in answers:
            await asyncio.sleep(15)
            raise lost
        return run

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", unanswered)

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu")
        try:
            await child
        except ChildFailed as exc:
            caught.append((child.outcome, child.state.name, str(exc.__cause__)))

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=60)
        assert run.state.is_completed()
        assert len(run.below) == 1
    assert caught == [("failed", "Failed", "it was made to fail")]


@supervised_flow
async def keeper():
    return await supervisor.spawn("score/gpu")


def keeping(prefect):
    """Start a run that awaits a child, and see that one run."""
    prefect.deploy("score/gpu", takes=20, returns="done")
    run = prefect.start(keeper)
    prefect.until(lambda: run.below and run.below[0].state.is_running())
    return run, run.below[0]


@pytest.mark.parametrize("again", [Scheduled, Running])
def test_a_run_that_is_taken_up_again_soon_has_not_crashed(again):
    with FakePrefect() as prefect:
        run, leaf = keeping(prefect)
        prefect.server.propose(leaf.id, Crashed(message="evicted"))
        prefect.advance(1)
        assert prefect.server.propose(leaf.id, again()).accepted
        prefect.until(lambda: not prefect.alive, within=60)
        assert leaf.state.is_completed()
        assert run.state.is_completed()


def test_a_run_whose_process_was_lost_goes_on_in_another_if_it_is_rescheduled_soon():
    with FakePrefect() as prefect:
        run, leaf = keeping(prefect)
        leaf.kill()
        prefect.until(lambda: leaf.state.is_crashed(), within=5)
        prefect.advance(1)
        prefect.server.propose(leaf.id, Scheduled())
        prefect.until(lambda: not prefect.alive, within=60)
        assert leaf.flow_run.run_count == 2
        assert run.state.is_completed()


def test_a_run_that_nobody_reschedules_has_crashed():
    crashed = []

    @supervised_flow
    async def root():
        try:
            await supervisor.spawn("score/gpu")
        except ChildCrashed as exc:
            crashed.append(exc)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=3600)
        run = prefect.start(root)
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        run.below[0].kill()
        prefect.until(lambda: run.below[0].state.is_crashed(), within=5)
        prefect.advance(2)
        assert not crashed, "it may yet be rescheduled"
        prefect.until(lambda: not prefect.alive, within=3)
        assert len(crashed) == 1
        assert run.state.is_completed()
