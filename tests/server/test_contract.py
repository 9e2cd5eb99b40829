"""What a child is promised, on a real server: joins, restarts, retries, adoption, limits."""

import asyncio
import gc
import os
import signal
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import prefect.futures
import psutil
import pytest
from prefect import flow, pause_flow_run, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import LogFilter
from prefect.deployments import arun_deployment, run_deployment
from prefect.exceptions import Abort
from prefect.futures import PrefectFlowRunFuture
from support.world import World, eventually

from supervised import (
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    Restart,
    RunNotFoundError,
    ScopeTimeoutError,
    supervised_flow,
    supervisor,
)

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

SOON = 60.0


@flow
async def double(x: int) -> int:
    await asyncio.sleep(0.01)
    return 2 * x


@flow
def triple(x: int) -> int:
    return 3 * x


@flow
async def broken(x: int = 0) -> int:
    raise ValueError(f"part {x} is bad")


@flow
async def forever() -> None:
    await asyncio.sleep(3600)


def leaf(world: World, part: int = 0) -> dict[str, object]:
    return {"folder": str(world.folder), "part": part}


def read(run_id):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


# -- all of them --------------------------------------------------------------------------------


def test_children_that_nobody_held_give_their_results_when_they_are_asked(deployed: World):
    @supervised_flow
    async def parent():
        for part in range(3):
            supervisor.spawn("persisted/test", leaf(deployed, part), name=f"part {part}")
        supervisor.spawn(double, {"x": 7}, name="inline")
        while not all(child.is_over for child in supervisor.children):
            await asyncio.sleep(0.1)
        gc.collect()
        return {child.name: await child for child in supervisor.children}

    assert asyncio.run(parent()) == {"part 0": 0, "part 1": 10, "part 2": 20, "inline": 14}


# -- joins --------------------------------------------------------------------------------------


def test_results_are_gathered_in_async_and_in_sync_bodies(server):
    @supervised_flow
    async def parent():
        return await supervisor.gather(
            supervisor.spawn(double, {"x": 1}), supervisor.spawn(triple, {"x": 1})
        )

    @supervised_flow
    def sync_parent():
        return supervisor.map(triple, [{"x": 1}, {"x": 2}]).result()

    assert asyncio.run(parent()) == [2, 3]
    assert sync_parent() == [3, 6]


def test_losers_are_cancelled_remotely(deployed: World):
    @supervised_flow
    async def parent():
        slow = supervisor.spawn("leaf/test", leaf(deployed))
        while not deployed.started(1):
            await asyncio.sleep(0.05)
        fast = supervisor.spawn(double, {"x": 2})
        answer = await supervisor.first_success(slow, fast)
        with pytest.raises(ChildCancelled, match="lost the race"):
            await slow
        return answer, slow.flow_run_id

    answer, loser = asyncio.run(parent())
    assert answer == 4
    assert read(loser).state.is_final()
    eventually(lambda: read(loser).state.is_cancelled(), seconds=SOON, what="it is Cancelled")
    eventually(lambda: not deployed.alive(), seconds=SOON, what="its process is gone")


def test_a_race_has_its_failures_to_itself(server):
    @supervised_flow
    async def parent():
        first = await supervisor.first_success(
            supervisor.spawn(broken), supervisor.spawn(double, {"x": 1})
        )
        with pytest.raises(ExceptionGroup) as raised:
            await supervisor.quorum(
                2, supervisor.spawn(broken, {"x": 1}), supervisor.spawn(broken, {"x": 2})
            )
        return first, len(raised.value.exceptions)

    assert asyncio.run(parent()) == (2, 1)


def test_a_race_that_nobody_asks_about_is_not_lost_in_silence(server):
    @supervised_flow
    async def parent():
        supervisor.first_success(supervisor.spawn(broken))
        await asyncio.sleep(0.5)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(parent())
    assert "part 0 is bad" in str(raised.value.exceptions[0].__cause__ or raised.value.exceptions)


def test_every_way_to_join_works_in_sync_and_in_async_bodies(server):
    @supervised_flow
    def sync_parent():
        def spawn(x):
            return supervisor.spawn(triple, {"x": x})

        first = supervisor.first_success(supervisor.spawn(broken), spawn(1)).result()
        some = supervisor.quorum(2, spawn(2), spawn(3), supervisor.spawn(broken)).result()
        return first, sorted(some)

    @supervised_flow
    async def parent():
        slow = supervisor.spawn(forever)
        fast = await supervisor.first_completed(slow, supervisor.spawn(double, {"x": 4}))
        late = supervisor.spawn(forever)
        while late.flow_run_id is None:  # one that was not requested is over at once
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError, match="still going on: forever"):
            await supervisor.first_success(late, timeout=0.5)
        with pytest.raises(ChildCancelled, match="was not decided within"):
            await late
        return fast, slow.cancel_reason.source

    assert sync_parent() == (3, [6, 9])
    assert asyncio.run(parent()) == (8, "lost_race")


def test_children_come_as_they_complete(server):
    @supervised_flow
    async def parent():
        children = supervisor.map(double, [{"x": x} for x in range(5)])
        return sorted([await child async for child in supervisor.as_completed(children)])

    @supervised_flow
    def sync_parent():
        children = supervisor.map(triple, [{"x": x} for x in range(3)])
        return sorted(child.result() for child in supervisor.as_completed(children))

    assert asyncio.run(parent()) == [0, 2, 4, 6, 8]
    assert sync_parent() == [0, 3, 6]


def test_prefects_own_functions_take_children(server):
    @task
    def add(x: int, y: int) -> int:
        return x + y

    @flow
    def takes(x: int) -> int:
        return x + 1

    @supervised_flow
    def parent():
        children = [supervisor.spawn(triple, {"x": x}) for x in (1, 2)]
        done, not_done = prefect.futures.wait(children)
        order = [child.result() for child in prefect.futures.as_completed(children)]
        total = add.submit(*children, wait_for=[children[0]]).result()
        return len(done), len(not_done), sorted(order), total, takes(children[0])

    assert parent() == (2, 0, [3, 6], 9, 4)


# -- restarts -----------------------------------------------------------------------------------


def test_a_child_whose_process_dies_is_a_new_run_under_its_old_handle(deployed: World):
    @supervised_flow
    async def parent():
        child = supervisor.spawn("leaf/test", leaf(deployed), restart=Restart(max=1))
        while child.flow_run_id is None or not deployed.started(1):
            await asyncio.sleep(0.05)
        first = child.flow_run_id
        os.kill(deployed.pids()[str(first)], signal.SIGKILL)
        while child.flow_run_id in {first, None} or not deployed.started(1):
            await asyncio.sleep(0.05)
        deployed.tell("finish-0")
        await child
        return first, child.flow_run_id, child.generation

    first, second, generation = asyncio.run(parent())
    assert read(first).state.is_crashed()
    assert read(second).state.is_completed()
    assert generation == 1


def test_one_restart_too_many_is_the_scopes_failure(server):
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        supervisor.spawn(broken, restart=Restart(max=2))
        await asyncio.sleep(60)

    with pytest.raises((ChildFailed, ExceptionGroup), match=r"after 2 restart|1 failure"):
        asyncio.run(parent())


@pytest.mark.parametrize(
    ("strategy", "again"),
    [
        ("one_for_one", ["flaky"]),
        ("rest_for_one", ["flaky", "later"]),
        ("one_for_all", ["earlier", "flaky", "later"]),
    ],
)
def test_who_is_restarted_with_a_child(server, strategy: str, again: list[str]):
    begun = []

    @flow
    async def part(name: str):
        begun.append(name)
        if name == "flaky" and begun.count(name) == 1:
            while len(begun) < 3:
                await asyncio.sleep(0.01)
            raise ValueError("not yet")
        while begun.count("flaky") < 2 or len(begun) < 3 + len(again):
            await asyncio.sleep(0.01)

    @supervised_flow(restart=Restart(max=1, strategy=strategy))
    async def parent():
        names = ["earlier", "flaky", "later"]
        await supervisor.gather(*(supervisor.spawn(part, {"name": name}) for name in names))

    asyncio.run(parent())
    assert sorted(begun[3:]) == again


# -- retries ------------------------------------------------------------------------------------


def test_a_parent_that_was_suspended_finds_its_children(deployed: World):
    """The one elsewhere goes on meanwhile; the one in a process of its own begins anew."""
    run = deployed.start("suspends/test")
    eventually(
        lambda: deployed.run(run.id).state_name == "Suspended", seconds=90, what="it is suspended"
    )
    first = int((deployed.folder / "local").read_text())
    eventually(lambda: not psutil.pid_exists(first), seconds=60, what="its process is gone")
    (deployed.folder / "local").unlink()
    deployed.tell("resumed")
    deployed.client.resume_flow_run(run.id)
    found = deployed.folder / "children"
    children = eventually(
        lambda: len(ids := found.read_text().split()) == 2 and ids, seconds=90, what="it goes on"
    )
    assert children[0] == children[1]
    deployed.tell("finish-3")
    eventually(lambda: deployed.is_over(run.id), seconds=90, what="all is over")
    assert deployed.run(run.id).state.is_completed()


def test_a_parent_that_was_paused_keeps_its_children(deployed: World):
    """Resumed in its own process, which the server counts as one more attempt."""

    def resume(run_id):
        eventually(lambda: deployed.run(run_id).state_name == "Paused", seconds=60, what="paused")
        deployed.client.resume_flow_run(run_id)

    @supervised_flow
    async def parent():
        child = supervisor.spawn("persisted/test", {**leaf(deployed, 3), "waits": True})
        while not deployed.started(1):
            await asyncio.sleep(0.05)
        resuming = asyncio.create_task(asyncio.to_thread(resume, supervisor.flow_run_id))
        await pause_flow_run(timeout=60, poll_interval=1)
        await resuming
        await asyncio.sleep(1.5)  # so that the run is read again before anything is launched
        deployed.tell("finish-3")
        return await child, await supervisor.spawn(double, {"x": 1})

    assert asyncio.run(parent()) == (30, 2)


def test_a_retry_reuses_what_has_completed_if_it_is_told_to(server):
    runs = []

    @flow(persist_result=True)
    async def counted(x: int) -> int:
        runs.append(x)
        return 2 * x

    @supervised_flow(retries=1)
    async def parent():
        results = [await supervisor.spawn(counted, {"x": x}, reuse="completed") for x in (1, 2)]
        results.append(await supervisor.spawn(counted, {"x": 3}))
        if len(runs) == 3:
            raise RuntimeError("once more")
        return results

    assert asyncio.run(parent()) == [2, 4, 6]
    assert runs == [1, 2, 3, 3]


def test_a_key_that_stands_for_other_work_after_a_retry_gives_no_wrong_result(
    deployed: World, monkeypatch
):
    """The first attempt's child was let go, and stays so: nobody touches it any more."""
    for module in ("_scope", "_control"):  # until that is written
        monkeypatch.setattr(f"supervised.{module}._CLOSE_SECONDS", 60)
    found = []
    later = datetime.now(timezone.utc) + timedelta(hours=1)

    @supervised_flow(retries=1)
    async def parent():
        child = supervisor.spawn(
            "leaf/test",
            leaf(deployed, len(found)),
            key="one",
            scheduled_time=later,
            on_parent={"failed": "detach"},
        )
        while child.flow_run_id is None:
            await asyncio.sleep(0.01)
        found.append(child.flow_run_id)
        if len(found) == 1:
            raise RuntimeError("once more")
        child.cancel()

    asyncio.run(parent())
    first, second = (read(run_id) for run_id in found)
    assert first.id != second.id
    assert first.state.is_scheduled()
    assert second.state.is_cancelled()
    assert second.parameters["part"] == 1
    deployed.client.delete_flow_run(first.id)


def test_an_attempt_that_was_replaced_launches_and_cancels_nothing(deployed: World):
    """Somebody runs the same run again elsewhere: what the first attempt has is the second's."""
    refused, kept_runs = [], []

    @supervised_flow
    async def parent():
        kept = supervisor.spawn("leaf/test", leaf(deployed))
        while not deployed.started(1):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(begin_again, supervisor.flow_run_id)
        await asyncio.sleep(1.5)
        kept.cancel()
        try:  # `spawn` itself refuses if the run was read meanwhile
            await supervisor.spawn("leaf/test", leaf(deployed, 1))
        except Exception as exc:
            refused.append(str(exc))
        kept_runs.append(kept.flow_run_id)

    def begin_again(run_id):
        from prefect.states import AwaitingRetry, Running

        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
            client.set_flow_run_state(run_id, Running(), force=True)

    with pytest.raises(Abort):
        asyncio.run(parent())
    assert "later attempt" in refused[0]
    (kept,) = kept_runs
    assert list(deployed.alive()) == [str(kept)], "what it had launched goes on, and nothing else"


# -- adoption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_what", ["id", "run", "future"])
def test_a_plain_run_is_adopted_and_ends_with_its_new_parent(deployed: World, as_what: str):
    run = run_deployment("leaf/test", parameters=leaf(deployed), timeout=0, as_subflow=False)
    targets = {"id": run.id, "run": run, "future": PrefectFlowRunFuture(run.id)}
    deployed.wait_for_start(1)

    @supervised_flow
    async def parent():
        child = supervisor.adopt(targets[as_what])
        while child.flow_run_id is None:
            await asyncio.sleep(0.01)
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        asyncio.run(parent())
    assert read(run.id).state.is_final()
    eventually(lambda: read(run.id).state.is_cancelled(), seconds=SOON, what="it is Cancelled")
    eventually(lambda: not deployed.alive(), seconds=SOON, what="its process is gone")


def test_an_adopted_runs_result_is_awaited(deployed: World):
    @supervised_flow
    async def parent():
        run = await arun_deployment(
            "persisted/test", parameters=leaf(deployed, 4), timeout=0, as_subflow=False
        )
        return await supervisor.adopt(run)

    assert asyncio.run(parent()) == 40


def test_there_must_be_a_run_to_adopt(server):
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        with pytest.raises(RunNotFoundError, match="no flow run"):
            await supervisor.adopt("00000000-0000-4000-8000-000000000000")

    asyncio.run(parent())


# -- limits and order ---------------------------------------------------------------------------


def test_no_more_children_at_once_than_a_map_allows(server):
    running, most, met = set(), [], []

    @flow
    async def part(number: int):
        running.add(number)
        most.append(len(running))
        if len(running) == 2:
            met[0].set()
        await asyncio.wait_for(met[0].wait(), 60)  # a slow server may be seconds about a launch
        await asyncio.sleep(0.2)  # in which a third would be seen
        running.remove(number)

    @supervised_flow
    async def parent():
        met.append(asyncio.Event())
        await supervisor.map(part, [{"number": n} for n in range(6)], max_concurrent=2)

    asyncio.run(parent())
    assert max(most) == 2


def test_an_inline_child_begins_at_its_time(server):
    began = []

    @flow
    def note():
        began.append(datetime.now(timezone.utc))

    soon = datetime.now(timezone.utc) + timedelta(seconds=2)

    @supervised_flow
    def parent():
        supervisor.spawn(note, scheduled_time=soon)

    parent()
    assert began[0] >= soon


def test_a_budget_of_requests_is_kept_and_the_tree_is_ended_all_the_same(deployed: World):
    @supervised_flow(requests_per_minute=120)
    async def parent():
        children = [supervisor.spawn("leaf/test", leaf(deployed, part)) for part in range(3)]
        while any(child.flow_run_id is None for child in children):
            await asyncio.sleep(0.05)
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        asyncio.run(parent())
    eventually(lambda: not deployed.alive(), seconds=SOON, what="their processes are gone")


def test_a_run_says_so_if_its_children_wait_for_a_slot_that_it_holds(deployed: World):
    limited = deployed.client.read_deployment_by_name("nests/test")
    update = DeploymentUpdate.model_validate({"concurrency_limit": 1})
    deployed.client.update_deployment(limited.id, update)
    run = deployed.start("nests/test")
    found = LogFilter.model_validate({"flow_run_id": {"any_": [str(run.id)]}})
    said = "waits for a slot of deployment 'test' (limit 1)"
    eventually(
        lambda: any(said in log.message for log in deployed.client.read_logs(found)),
        seconds=90,
        what="it says so",
    )
    deployed.cancel(run.id)
    eventually(lambda: deployed.is_over(run.id), seconds=SOON, what="all is over")


def test_a_child_begins_after_others_have_completed(server):
    order = []

    @flow
    def note(name: str, seconds: float = 0):
        time.sleep(seconds)
        order.append(name)

    @supervised_flow
    def parent():
        slow = supervisor.spawn(note, {"name": "slow", "seconds": 0.5})
        supervisor.spawn(note, {"name": "after"}, after=[slow])

    parent()
    assert order == ["slow", "after"]


def test_a_scope_whose_time_is_over_times_out_with_all_below(deployed: World, monkeypatch):
    ids = []
    # To write how the inline run has ended, however late a busy server answers.
    monkeypatch.setattr("supervised._escalation._ENGINE_SECONDS", 20.0)

    @supervised_flow(deadline_seconds=12)
    async def parent():
        ids.append(supervisor.flow_run_id)
        child = supervisor.spawn("leaf/test", leaf(deployed))
        inner = supervisor.spawn(nested)
        await supervisor.gather(child, inner)

    @supervised_flow
    async def nested():
        left = supervisor.seconds_left
        assert left is not None
        assert 0 < left <= 12
        supervisor.spawn("leaf/test", leaf(deployed, 1))
        await asyncio.sleep(600)

    with pytest.raises(ScopeTimeoutError, match="12 s after it began"):
        asyncio.run(parent())
    run = read(ids[0])
    assert run.state_name == "TimedOut"
    below = deployed.tree(ids[0])[1:]
    assert below
    assert all(child.state.is_final() for child in below), deployed.states(ids[0])
    eventually(
        lambda: all(run.state.is_cancelled() for run in deployed.tree(ids[0])[1:]),
        seconds=SOON,
        what="all are Cancelled",
    )


def test_a_supervised_child_elsewhere_inherits_what_is_left(deployed: World):
    @supervised_flow(deadline_seconds=1000)
    async def parent():
        child = supervisor.spawn("root/test", {"folder": str(deployed.folder), "children": []})
        while child.flow_run_id is None:
            await asyncio.sleep(0.01)
        child.cancel()
        return read(child.flow_run_id).labels["supervised.deadline_seconds"]

    assert 900 < asyncio.run(parent()) <= 1000


def test_a_child_that_takes_too_long_has_timed_out(server):
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        with pytest.raises(ChildTimedOut, match="deadline of 0.5 s"):
            await supervisor.spawn(forever, timeout_seconds=0.5)

    asyncio.run(parent())


# -- finalizers ---------------------------------------------------------------------------------


def test_what_prefect_does_not_own_is_ended_by_finalizers(server, tmp_path: Path):
    def drop(name: str) -> None:
        with (tmp_path / "dropped").open("a") as log:
            log.write(f"{name} ")

    @supervised_flow
    def parent():
        for name in ("cluster", "query"):
            supervisor.on_teardown(drop, name)
        raise ValueError("the body failed")

    with pytest.raises(ValueError, match="the body failed"):
        parent()
    assert (tmp_path / "dropped").read_text() == "query cluster "
