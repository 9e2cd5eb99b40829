"""What users can see of a teardown in milliseconds, on a fake Prefect with a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect, Faults

LEASE = 20.0
BAD = Faults(refused=0.2, lost_answer=0.1, repeated=0.1, dropped_events=0.3, closed_streams=0.05)


@supervised_flow(lease_seconds=LEASE)
async def region(parts: int = 3):
    """Spawn leaves and wait for them."""
    spawned = [supervisor.spawn("score/gpu", {"part": part}) for part in range(parts)]
    return [await child for child in spawned]


@supervised_flow(lease_seconds=LEASE)
async def nightly():
    """Spawn two regions and a leaf."""
    spawned = [supervisor.spawn("region/test", key=name) for name in ("north", "south")]
    spawned.append(supervisor.spawn("score/gpu"))
    return [await child for child in spawned]


@supervised_flow(lease_seconds=LEASE)
def sync_region(parts: int = 2):
    """Spawn leaves from sync code."""
    return [child.result() for child in [supervisor.spawn("score/gpu") for _ in range(parts)]]


def world(takes=3600.0, **options):
    """A fake Prefect in which the root's runner serves nothing else."""
    prefect = FakePrefect(**options)
    prefect.deploy("nightly/test", nightly, runner="root")
    prefect.deploy("region/test", region)
    prefect.deploy("score/gpu", takes=takes, returns=3)
    return prefect


def all_running(prefect, count=10):
    """Let the whole tree start."""
    prefect.until(lambda: sum(run.state.is_running() for run in prefect.runs) >= count)


def test_results_come_back_through_the_tree():
    with world(takes=30) as prefect:
        run = prefect.start(nightly)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert prefect.seconds > 30


@pytest.mark.parametrize("faults", [Faults(), BAD], ids=["quiet", "bad"])
@pytest.mark.parametrize("how", ["cancel", "kill", "terminate"])
def test_a_tree_goes_with_its_root(how, faults):
    with world() as prefect:
        run = prefect.start("nightly/test")
        all_running(prefect)
        prefect.faults = faults
        getattr(run, how)()
        prefect.until(lambda: not prefect.alive, within=90)
        assert all(one.state.is_final() for one in prefect.runs)


def test_the_report_names_every_child():
    with world() as prefect:
        run = prefect.start("nightly/test")
        all_running(prefect)
        run.cancel()
        prefect.until(lambda: not prefect.alive)
        assert {receipt.status for receipt in run.report.receipts} == {"cancelled"}
        assert {receipt.flow_run_id for receipt in run.report.receipts} == {
            one.id for one in run.below
        }
        assert run.report.seconds == pytest.approx(3.5, abs=2)


def test_a_failure_ends_the_siblings():
    with world() as prefect:
        prefect.deploy("broken/test", takes=5, fails=True)

        @supervised_flow
        async def fragile():
            supervisor.spawn("score/gpu")
            await supervisor.spawn("broken/test")

        run = prefect.start(fragile)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_failed()
        assert {one.state.name for one in run.below} == {"Cancelled", "Failed"}


def test_a_timeout_ends_the_children():
    with world() as prefect:

        @supervised_flow(timeout_seconds=20)
        async def slow():
            await supervisor.spawn("score/gpu")

        run = prefect.start(slow)
        prefect.until(lambda: not prefect.alive)
        assert run.state.name == "TimedOut"
        assert run.below[0].state.is_cancelled()


def test_inline_children_are_cancelled_in_their_loop():
    seen = []

    @supervised_flow
    async def inner():
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("cleaned up")

    @supervised_flow
    async def outer():
        await supervisor.spawn(inner)

    with world() as prefect:
        run = prefect.start(outer)
        all_running(prefect, 2)
        run.cancel()
        prefect.until(lambda: not prefect.alive)
        assert [one.state.name for one in prefect.runs] == ["Cancelled", "Cancelled"]
        assert seen == ["cleaned up"]


def test_nothing_of_a_killed_process_runs_on():
    seen = []

    @supervised_flow
    async def outer():
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("cleaned up")

    with world() as prefect:
        run = prefect.start(outer)
        prefect.advance(5)
        run.kill()
        prefect.advance(100)
        assert seen == []
        assert not run.has_process


def test_sync_flows_run_too():
    with world(takes=10) as prefect:
        run = prefect.start(sync_region)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()


def test_children_whose_parent_and_runner_are_gone_end_themselves():
    with world() as prefect:
        run = prefect.start("nightly/test")
        all_running(prefect)
        supervised = [one for one in run.below if one.flow_run.name.startswith("region")]
        leaf = next(one for one in run.below if one.flow_run.name.startswith("score"))
        prefect.runners["root"].kill()
        run.kill()
        prefect.until(lambda: not any(one.is_alive for one in supervised), within=60)
        assert leaf.is_alive, "it carries no code of ours, and nobody guards it"
        prefect.guard(20)
        prefect.until(lambda: not leaf.is_alive, within=60)


def test_a_parent_that_is_slow_keeps_its_children():
    with world() as prefect:
        prefect.faults = Faults(latency_seconds=4.0)
        prefect.guard(10)
        run = prefect.start("nightly/test")
        all_running(prefect)
        prefect.advance(300)
        assert len(prefect.alive) == 10
        assert run.state.is_running()


def test_a_server_that_was_away_costs_nobody_his_life():
    with world() as prefect:
        prefect.guard(10)
        run = prefect.start("nightly/test")
        all_running(prefect)
        prefect.restart(10 * LEASE)
        prefect.advance(20 * LEASE)
        assert run.state.is_running()
        assert len(prefect.alive) == 10


def test_a_server_that_restarts_in_the_middle_of_a_teardown_costs_time():
    with world() as prefect:
        run = prefect.start("nightly/test")
        all_running(prefect)
        run.cancel()
        prefect.advance(1)
        prefect.restart(5)
        prefect.until(lambda: not prefect.alive, within=90)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_is_the_same_story(seed):
    def tell():
        with world(seed=seed, faults=BAD) as prefect:
            story = []
            prefect.server.on_change.append(
                lambda change: story.append(
                    (round(prefect.seconds, 6), str(change.event.run_id), change.event.state_name)
                )
            )
            run = prefect.start("nightly/test")
            prefect.advance(20)
            run.cancel()
            prefect.advance(60)
            return story

    assert tell() == tell()


def test_a_wait_for_what_never_comes_is_an_error():
    with world() as prefect:
        prefect.start("nightly/test")
        with pytest.raises(TimeoutError):
            prefect.until(lambda: False, within=50)
