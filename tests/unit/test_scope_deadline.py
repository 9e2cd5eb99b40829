"""The deadline of a scope: what it overtakes, what it is called, and whom it does not concern."""

import asyncio

import pytest

from supervised import (
    ChildFailed,
    Restart,
    ScopeTimeoutError,
    supervised_flow,
    supervisor,
)
from supervised.testing import FakePrefect


def world():
    prefect = FakePrefect()
    prefect.deploy("sleep/test", takes=1000)
    prefect.deploy("score/gpu", takes=10, fails=True)
    return prefect


def final_at(prefect, run):
    """Let time pass until a run is over; return when that was."""
    prefect.until(lambda: run.state.is_final(), within=5000)
    return prefect.seconds


# -- what it overtakes --------------------------------------------------------------------------


def test_it_overtakes_a_teardown_that_waits_for_children():
    @supervised_flow(deadline_seconds=60, on_parent={"failed": "wait"}, persist_result=True)
    async def root():
        supervisor.spawn("sleep/test")
        await asyncio.sleep(10)
        raise KeyError("the body's own")

    with world() as prefect:
        run = prefect.start(root)
        assert 60 <= final_at(prefect, run) < 70
        assert run.state.name == "TimedOut"
        assert isinstance(run.state.data, ScopeTimeoutError)
        assert isinstance(run.state.data.__cause__, KeyError)
        assert run.report.cause == "timed_out"
        prefect.until(lambda: not prefect.alive, within=5)
        assert run.below[0].state.is_cancelled()


def test_it_overtakes_a_body_that_goes_on_after_it_has_cancelled_its_children():
    @supervised_flow(deadline_seconds=60)
    async def root():
        supervisor.spawn("sleep/test")
        await asyncio.sleep(10)
        supervisor.cancel("enough")
        await asyncio.sleep(1000)

    with world() as prefect:
        run = prefect.start(root)
        assert 60 <= final_at(prefect, run) < 65
        assert run.state.name == "TimedOut"
        prefect.until(lambda: not prefect.alive, within=1)


def test_it_does_not_wait_for_a_restart():
    @supervised_flow(deadline_seconds=60)
    async def root():
        await supervisor.spawn("score/gpu", restart=Restart(backoff=3600))

    with world() as prefect:
        run = prefect.start(root)
        assert 60 <= final_at(prefect, run) < 65
        assert run.state.name == "TimedOut"
        assert len(run.below) == 1


# -- what the run ends with ---------------------------------------------------------------------


def test_a_run_that_is_too_late_has_timed_out_though_a_race_is_open():
    @supervised_flow(deadline_seconds=30, persist_result=True)
    async def root():
        await supervisor.first_success(*(supervisor.spawn("sleep/test") for _ in range(2)))

    with world() as prefect:
        run = prefect.start(root)
        assert final_at(prefect, run) < 40
        assert run.state.name == "TimedOut"
        assert isinstance(run.state.data, ScopeTimeoutError)
        assert all(child.state.is_cancelled() for child in run.below)


def test_a_run_that_is_too_late_has_timed_out_though_a_child_has_failed():
    @supervised_flow(deadline_seconds=30, on_child_failure="wait", persist_result=True)
    async def root():
        supervisor.spawn("score/gpu")
        supervisor.spawn("sleep/test")
        await asyncio.sleep(1000)

    with world() as prefect:
        run = prefect.start(root)
        assert final_at(prefect, run) < 40
        assert run.state.name == "TimedOut"
        assert isinstance(run.state.data, ScopeTimeoutError)
        assert isinstance(run.state.data.__cause__, ChildFailed)


# -- whom it does not concern -------------------------------------------------------------------


@supervised_flow
async def region():
    """Keep a leaf, for longer than the parent has."""
    supervisor.spawn("leaf/test")
    await asyncio.sleep(200)


@pytest.mark.parametrize("how", ["from the start", "later"])
def test_a_detached_child_has_its_parents_deadline_no_more(how):
    @supervised_flow(deadline_seconds=60)
    async def root():
        child = supervisor.spawn(
            "region/test", on_parent="detach" if how == "from the start" else None
        )
        await asyncio.sleep(20)
        if how == "later":
            child.detach()
        await asyncio.sleep(1)

    with world() as prefect:
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test", takes=150)
        run = prefect.start(root)
        assert final_at(prefect, run) < 30
        assert run.state.is_completed()
        prefect.until(lambda: not prefect.alive)
        assert [each.state.name for each in prefect.runs] == ["Completed"] * 3


def test_a_child_that_is_not_detached_has_its_parents_deadline():
    @supervised_flow(deadline_seconds=60)
    async def root():
        await supervisor.spawn("region/test")

    with world() as prefect:
        prefect.deploy("region/test", region, runner="region")
        prefect.deploy("leaf/test", takes=150)
        prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=80)
        assert "Completed" not in {each.state.name for each in prefect.runs}
