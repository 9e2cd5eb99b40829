"""The same run begins again: what becomes of the children that it has under the same keys.

Nobody serves most of the deployments here: what a runner would do is done by the tests, so that
what an attempt finds is theirs to choose.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from uuid import UUID, uuid4

import prefect.client.base
import prefect.runtime
import prefect.states
import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun
from prefect.filesystems import LocalFileSystem
from prefect.flows import load_flow_from_entrypoint
from prefect.results import ResultStore
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
)
from support.world import FLOWS, World, eventually
from test_policies import Runner

from supervised import Child, ChildFailed, supervised_flow, supervisor
from supervised.testing import running

BEGINS = 120  # seconds in which a process has begun, on a busy machine
SOON = 60
STREAMS = 2  # seconds until a copy hears events: it reads its own run whenever it connects
BEGUN = ["Pending", "Running"]
NAMES = ["ada", "bea", "cleo", "dora", "edda", "fay", "gina", "hedy"]


@flow
def nobody(x: int = 0, names: object = None, nested: object = None) -> int:
    """What the runs of the deployment would run."""


@flow(persist_result=True)
async def kept(x: int) -> str:
    return f"kept {x} {uuid4()}"


@pytest.fixture
def queue(world: World):
    """The name of a deployment that nobody serves."""
    name = f"queue-{uuid4()}"
    world.client.create_deployment(world.client.create_flow(nobody), name)
    return f"nobody/{name}"


class Attempts:
    """A run of tests/flows/generations.py, begun as often as the test likes."""

    def __init__(self, world: World, name: str, **parameters: object) -> None:
        self._world = world
        self._name = name
        self._begun = 0
        loaded = load_flow_from_entrypoint(
            f"{FLOWS / 'generations.py'}:{name}", use_placeholder_flow=False
        )
        given = {"folder": str(world.folder), **parameters}
        self.id = world.client.create_flow_run(loaded, parameters=given, state=Pending()).id

    def begin(self, **env: str):
        """Execute the run in one more process, and wait until it has its children."""
        self._begun += 1
        command = [sys.executable, "-m", "prefect.engine", str(self.id)]
        entrypoint = f"generations.py:{self._name}"
        env = {**self._world.server.env, "PREFECT__FLOW_ENTRYPOINT": entrypoint, **env}
        return running(command, env=env, log=self._log(self._begun), cwd=FLOWS)

    def children(self, number: int) -> list[UUID]:
        """Return the runs that an attempt has, once it has them."""
        return [UUID(text) for text in told(self._world, f"attempt-{number}")]

    def declare_dead(self) -> None:
        """Schedule the run again, as somebody does who takes its process for dead."""
        set_state(self._world, self.id, AwaitingRetry(), Pending())

    def log(self, number: int) -> str:
        return self._log(number).read_text()

    def states(self) -> list[str]:
        return [state.name for state in self._world.client.read_flow_run_states(self.id)]

    def result(self) -> object:
        return self._world.run(self.id).state.result()

    def _log(self, number: int) -> Path:
        return self._world.folder / f"attempt-{number}.log"


def told(world: World, what: str):
    """Return what a flow has written down, once it is there."""
    file = world.folder / what
    eventually(file.exists, seconds=BEGINS, what=f"there is {what!r}")
    return json.loads(file.read_text())


def set_state(world: World, run_id: UUID, *states) -> None:
    for state in states:
        world.client.set_flow_run_state(run_id, state, force=True)


def complete(world: World, run_id: UUID, value: object) -> None:
    """Complete a run as its process would, with a result that is kept."""
    store = ResultStore(result_storage=LocalFileSystem(basepath=str(world.folder / "results")))
    record = store.create_result_record(value)
    store.persist_result_record(record)
    set_state(world, run_id, Completed(data=record))


def generations(world: World, queue: str) -> dict[str, list[FlowRun]]:
    """Return the runs of a deployment by their keys, in the order of their generations."""
    deployment = world.client.read_deployment_by_name(queue)
    chosen = FlowRunFilter.model_validate({"deployment_id": {"any_": [str(deployment.id)]}})
    return by_generation(world.client.read_flow_runs(flow_run_filter=chosen))


def by_generation(found: list[FlowRun]) -> dict[str, list[FlowRun]]:
    """Return runs by their keys, in the order of their generations: one for each number."""
    by_key = defaultdict(list)
    for run in sorted(found, key=generation):
        by_key[run.labels["supervised.key"]].append(run)
    for key, runs in by_key.items():
        assert [generation(run) for run in runs] == list(range(len(runs))), key
    return by_key


def generation(run: FlowRun) -> int:
    return run.labels["supervised.generation"]


# -- two copies of one run ----------------------------------------------------------------------


def replaced(world: World, queue: str, older: str, *, more: bool = True) -> None:
    """Begin a run anew while it lives; the older copy ends in one way, and leaves no trace."""
    parent = Attempts(world, "copies", queue=queue, older=older, more=more)
    with parent.begin() as first:
        (shared,) = parent.children(1)
        set_state(world, shared, Running())
        if not more or "returns" in older:
            time.sleep(STREAMS)
        parent.declare_dead()
        with parent.begin() as second:
            found, *own = parent.children(2)
            assert found == shared
            for run_id in own:
                set_state(world, run_id, Running())
            world.tell("replaced")
            if "awaits" in older:
                complete(world, shared, 10)
            assert first.wait(SOON) == 0
            live = own if "awaits" in older else [shared, *own]
            assert all(world.run(run_id).state.is_running() for run_id in live)
            assert parent.states() == [*BEGUN, "AwaitingRetry", *BEGUN]
            assert "aborted by orchestrator" in parent.log(1)
            for run_id in live:
                complete(world, run_id, 20 if run_id in own else 10)
            world.tell("go")
            assert second.wait(SOON) == 0
    assert parent.states() == [*BEGUN, "AwaitingRetry", *BEGUN, "Completed"]
    assert parent.result() == ([10, 20] if more else [10])
    runs = generations(world, queue)
    assert {key: len(each) for key, each in runs.items()} == dict.fromkeys(runs, 1)
    assert set(runs) == ({"shared", "own"} if more else {"shared"})


def test_what_a_copy_that_was_replaced_spawns_is_refused(world: World, queue: str):
    replaced(world, queue, "spawns")
    assert "later attempt" in told(world, "refused")


@pytest.mark.parametrize("older", ["raises", "awaits, raises"])
def test_the_failure_of_a_copy_that_was_replaced_is_neither_written_nor_retried(
    world: World, queue: str, older: str
):
    replaced(world, queue, older)


@pytest.mark.parametrize("older", ["awaits, raises", "awaits, returns"])
def test_nor_is_any_end_of_it_if_there_was_nothing_left_to_end(
    world: World, queue: str, older: str
):
    replaced(world, queue, older, more=False)


# -- other processes ----------------------------------------------------------------------------


def finish(world: World, run_ids: list[UUID]) -> None:
    for number, run_id in enumerate(run_ids):
        complete(world, run_id, number)


def test_a_parent_whose_process_was_killed_finds_its_children_from_another(
    world: World, queue: str
):
    """A set of strings has another order there."""
    parent = Attempts(world, "resumed", queue=queue, names=NAMES)
    with parent.begin(PYTHONHASHSEED="1") as process:
        first = parent.children(1)
        set_state(world, first[0], Running())
        process.kill()
        process.wait()
    parent.declare_dead()
    with parent.begin(PYTHONHASHSEED="2") as process:
        assert parent.children(2) == first
        assert told(world, "order-1") != told(world, "order-2")
        finish(world, first)
        assert process.wait(SOON) == 0
    assert parent.result() == [0, 1]
    assert all(len(runs) == 1 for runs in generations(world, queue).values())


def test_a_parent_whose_runner_was_killed_finds_its_children_under_another(
    deployed: World, queue: str
):
    """Of one child the process lives through it."""
    name, log = f"of-{uuid4()}", deployed.folder / "runners.log"
    command = [sys.executable, "generations.py", name]

    def serving(seed: str):
        env = {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PYTHONHASHSEED": seed}
        return running(command, env={**deployed.server.env, **env}, log=log, cwd=FLOWS)

    def children(number: int) -> list[UUID]:
        return [UUID(text) for text in told(deployed, f"attempt-{number}")]

    deployed.tell("served")
    with serving("1") as runner:
        eventually(lambda: "being served" in log.read_text(), seconds=BEGINS, what="it is served")
        run = deployed.start(f"resumed/{name}", queue=queue, names=NAMES)
        first = children(1)
        deployed.wait_for_start(1)
        os.killpg(runner.pid, signal.SIGKILL)
        end_processes_of(run.id)
    alive = deployed.alive()
    assert list(alive) == [str(first[2])]
    set_state(deployed, run.id, AwaitingRetry())
    with serving("2"):
        assert children(2) == first
        assert told(deployed, "order-1") != told(deployed, "order-2")
        assert deployed.alive() == alive
        finish(deployed, first[:2])
        deployed.tell("finish-3")
        # While the runner is there: one that is ended cancels what has just completed.
        eventually(lambda: deployed.run(run.id).state.is_final(), seconds=SOON, what="it is over")
        assert deployed.run(run.id).state.result() == [0, 1, 30]
    assert all(len(runs) == 1 for runs in generations(deployed, queue).values())


def end_processes_of(run_id: UUID) -> None:
    """End the process of a run whose runner was killed: it has a group of its own."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id):
                process.kill()
                process.wait(SOON)


# -- what is in the way -------------------------------------------------------------------------


def is_ending(world: World, run_id: UUID) -> bool:
    """Whether a run has told that it ends what an earlier attempt has left."""
    chosen = LogFilter.model_validate({"flow_run_id": {"any_": [str(run_id)]}})
    return any("of an earlier attempt" in log.message for log in world.client.read_logs(chosen))


def test_what_is_over_gets_a_new_generation_on_retry(world: World, queue: str):
    ends = {"completed": Completed, "failed": Failed, "cancelled": Cancelled, "crashed": Crashed}
    began = []

    @supervised_flow(retries=1, on_child_failure="ignore")
    async def parent():
        children = {key: supervisor.spawn(queue, key=key) for key in ends}
        children["derived"] = supervisor.spawn(queue, {"x": 1})
        while any(child.flow_run_id is None for child in children.values()):
            await asyncio.sleep(0.02)
        began.append({key: child.flow_run_id for key, child in children.items()})
        for key, child in children.items():
            await asyncio.to_thread(
                set_state, world, child.flow_run_id, Running(), ends.get(key, Completed)()
            )
        if len(began) == 1:
            raise RuntimeError("once more")

    asyncio.run(parent())
    runs = generations(world, queue)
    assert sorted(len(each) for each in runs.values()) == [2] * 5
    for number, ids in enumerate(began):
        assert set(ids.values()) == {each[number].id for each in runs.values()}


def test_a_live_run_of_other_work_is_ended_first(world: World, queue: str):
    parent = Attempts(world, "changed", queue=queue)
    with parent.begin() as process:
        (old,) = parent.children(1)
        set_state(world, old, Running())
        process.kill()
        process.wait()
    parent.declare_dead()
    with parent.begin() as process:
        eventually(lambda: is_ending(world, parent.id), seconds=BEGINS, what="it is in the way")
        # It tells before it asks, and the log may be there first.
        eventually(lambda: world.run(old).state.is_cancelling(), seconds=SOON, what="it is asked")
        assert [run.id for run in generations(world, queue)["one"]] == [old]
        set_state(world, old, Cancelled())
        (new,) = parent.children(2)
        complete(world, new, 7)
        assert process.wait(SOON) == 0
    assert parent.result() == 7
    was, run = generations(world, queue)["one"]
    assert (was.id, run.id) == (old, new)
    assert was.state.is_cancelled()
    assert was.state.timestamp < run.created
    assert run.parameters["x"] == 2


def test_a_run_that_is_still_being_cancelled_is_ended_first(world: World, queue: str, caplog):
    """Though it is of the same work: it gives no result any more."""
    began = []

    def end(run_id):
        # Heard here: the server has the log seconds later, and the grace is short.
        eventually(
            lambda: "of an earlier attempt" in caplog.text, seconds=SOON, what="it is in the way"
        )
        assert world.run(run_id).state.is_cancelling()
        assert len(generations(world, queue)["one"]) == 1
        set_state(world, run_id, Cancelled())

    @supervised_flow(retries=1, grace_seconds=5)
    async def parent():
        child = supervisor.spawn(queue, {"x": 1}, key="one")
        if began:
            await asyncio.to_thread(end, began[0])
        while child.flow_run_id is None:
            await asyncio.sleep(0.02)
        began.append(child.flow_run_id)
        await asyncio.to_thread(set_state, world, child.flow_run_id, Running())
        if len(began) == 1:
            raise RuntimeError("once more")
        await asyncio.to_thread(complete, world, child.flow_run_id, 7)
        return await child

    assert asyncio.run(parent()) == 7
    was, run = generations(world, queue)["one"]
    assert [was.id, run.id] == began
    assert was.state.timestamp < run.created


# -- reuse --------------------------------------------------------------------------------------


def complete_new(world: World, children: dict[int, Child[str]]) -> None:
    for number, child in children.items():
        run = world.run(child.flow_run_id)
        if run.deployment_id is not None and not run.state.is_final():
            complete(world, run.id, f"kept {number} {uuid4()}")


def lose(world: World, run_ids: list[UUID]) -> None:
    for run_id in run_ids:
        Path(world.run(run_id).state.data.storage_key).unlink()


def test_results_are_reused_in_any_order_and_never_another_childs(world: World, queue: str):
    """Of twelve children, four of them here; the results of three are lost meanwhile."""
    dice, order, lost = random.Random(5), list(range(12)), {1, 6, 8}
    runs, results = [], []

    def spawn(number: int):
        key = f"key {number}" if number % 2 else None
        target = queue if number < 8 else kept
        return supervisor.spawn(target, {"x": number}, key=key, reuse="completed")

    @supervised_flow(retries=1)
    async def parent():
        dice.shuffle(order)
        children = {number: spawn(number) for number in order}
        while any(child.flow_run_id is None for child in children.values()):
            await asyncio.sleep(0.02)
        await asyncio.to_thread(complete_new, world, children)
        results.append({number: await child for number, child in children.items()})
        runs.append({number: child.flow_run_id for number, child in children.items()})
        if len(runs) == 1:
            await asyncio.to_thread(lose, world, [runs[0][number] for number in lost])
            raise RuntimeError("once more")

    asyncio.run(parent())
    for number in order:
        was, now = (each[number] for each in results)
        assert {was[:7], now[:7]} == {f"kept {number} "[:7]}
        assert (now == was) is (number not in lost)
        old, new = (world.run(each[number]) for each in runs)
        assert (new.id == old.id) is (number not in lost)
        assert [generation(old), generation(new)] == [0, int(number in lost)]
        assert old.labels["supervised.key"] == new.labels["supervised.key"]


def test_a_live_run_that_was_detached_comes_before_the_result_of_an_older_one(
    world: World, queue: str
):
    runs = []

    @supervised_flow(retries=2)
    async def parent():
        reuse = "never" if len(runs) < 2 else "completed"
        child = supervisor.spawn(queue, {"x": 1}, reuse=reuse, on_parent={"failed": "detach"})
        while child.flow_run_id is None:
            await asyncio.sleep(0.02)
        runs.append(child.flow_run_id)
        if len(runs) == 2:
            await asyncio.to_thread(set_state, world, runs[1], Running())
        else:
            await asyncio.to_thread(complete, world, child.flow_run_id, len(runs))
        if len(runs) < 3:
            await asyncio.wait({asyncio.ensure_future(child.wait_async())}, timeout=1)
            raise RuntimeError("once more")
        return await child

    result = asyncio.run(parent())
    assert runs[2] == runs[1]
    assert result == 3


# -- fifty attempts -----------------------------------------------------------------------------

ATTEMPTS = 50
THERE, HERE, REUSED = range(6), range(6, 10), {0, 1, 2, 3, 4, 6, 7, 8}
FATES = [*["running", "scheduled", "completed"] * 3, "failed", "cancelled"]
STATES = {"running": [Running], "failed": [Failed], "cancelled": [Cancelled]}


class OnceMore(Exception):
    """What ends an attempt."""


class Story:
    """A parent that is tried again and again, and what becomes of its children, by the dice.

    Some are runs of a deployment that nobody serves, the others run inline.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.dice = random.Random(seed)
        self.name = f"part-{uuid4()}"
        self.attempts = 0
        self.is_ending = False
        self.keys: dict[int, str] = {}
        self.failing: set[int] = set()
        self.seen: set[tuple[int, str]] = set()

        @flow(name=self.name, persist_result=True)
        async def part(x: int) -> str:
            if x in self.failing:
                raise ValueError("not this time")
            return f"{x} of {prefect.runtime.flow_run.id}"

        self.inline = part
        world.client.create_deployment(world.client.create_flow(part), "test")

    async def attempt(self) -> None:
        """What the parent does once."""
        self.attempts += 1
        self.is_ending = False
        is_last = self.attempts == ATTEMPTS
        parts = [*THERE, *HERE]
        self.dice.shuffle(parts)
        # All of the dice is asked for in this order, so that a seed tells the same story again.
        lost = {part for part in parts if self.dice.random() < 0.1}
        self.failing = {part for part in parts if self.dice.random() < 0.3}
        fates = {part: "completed" if is_last else self.dice.choice(FATES) for part in parts}
        before = await asyncio.to_thread(self.runs, lost)
        children = {part: self.spawn(part) for part in parts}
        while any(child.flow_run_id is None and not child.is_over for child in children.values()):
            await asyncio.sleep(0.01)
        for part, child in children.items():
            self.compare(part, child, before.get(child.key, []))
        completed = await asyncio.to_thread(self.decide, children, fates)
        for part in [*completed, *HERE]:
            with contextlib.suppress(ChildFailed) if part in HERE else contextlib.nullcontext():
                assert await children[part] == f"{part} of {children[part].flow_run_id}"
        self.is_ending = True
        if not is_last:
            raise OnceMore

    def runs(self, lost: Collection[int] = ()) -> dict[str, list[FlowRun]]:
        """Return the runs of each key in the order of their generations, having checked them."""
        named = FlowFilter.model_validate({"name": {"any_": [self.name]}})
        found: list[FlowRun] = []
        while page := self.world.client.read_flow_runs(
            flow_filter=named, limit=200, offset=len(found)
        ):
            found += page
        by_key = by_generation(found)
        for key, runs in by_key.items():
            live = [run for run in runs if not run.state.is_final()]
            assert live in ([], runs[-1:]), f"{key}: {[run.state_name for run in runs]}"
            (part,) = {run.parameters["x"] for run in runs}
            if part in lost and runs[-1].state.is_completed():
                Path(runs[-1].state.data.storage_key).unlink(missing_ok=True)
        return by_key

    def spawn(self, part: int) -> Child[str]:
        key = f"key {part}" if part % 3 == 0 else None
        reuse = "completed" if part in REUSED else "never"
        if part in HERE:
            return supervisor.spawn(self.inline, {"x": part}, key=key, reuse=reuse)
        policy = {"failed": self.dice.choice(["detach", "cancel"])}
        target = f"{self.name}/test"
        return supervisor.spawn(target, {"x": part}, key=key, reuse=reuse, on_parent=policy)

    def compare(self, part: int, child: Child[str], earlier: list[FlowRun]) -> None:
        """See that a child has the run that it is to have."""
        assert self.keys.setdefault(part, child.key) == child.key
        became = what_becomes_of(earlier[-1], part) if earlier else "first"
        self.seen.add((part, became))
        if became in {"adopted", "reused"}:
            assert child.flow_run_id == earlier[-1].id, f"part {part} was to be {became}"
        else:
            assert child.flow_run_id not in {run.id for run in earlier}, f"part {part}: {became}"
            assert child.generation == len(earlier)

    def decide(self, children: dict[int, Child[str]], fates: dict[int, str]) -> list[int]:
        """Do what the runners of the children would; return the parts that have completed."""
        completed, runs = [], self.runs()
        for part in THERE:
            run = runs[self.keys[part]][-1]
            assert run.id == children[part].flow_run_id
            if not run.state.is_final():
                set_state(self.world, run.id, *(state() for state in STATES.get(fates[part], ())))
                if fates[part] == "completed":
                    complete(self.world, run.id, f"{part} of {run.id}")
                    completed.append(part)
            elif run.state.is_completed():
                completed.append(part)
        return completed

    def finish_cancelled(self, client: SyncPrefectClient) -> None:
        if not self.is_ending:
            return
        named = FlowFilter.model_validate({"name": {"any_": [self.name]}})
        ending = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CANCELLING"]}}})
        for run in client.read_flow_runs(flow_filter=named, flow_run_filter=ending):
            client.set_flow_run_state(run.id, Cancelled(), force=True)


def what_becomes_of(run: FlowRun, part: int) -> str:
    """Return what the next attempt is to make of the last run of a key."""
    state = run.state
    if not state.is_final():
        return "renewed" if run.deployment_id is None or state.is_cancelling() else "adopted"
    has_result = state.is_completed() and Path(state.data.storage_key).exists()
    return "reused" if part in REUSED and has_result else "renewed"


@pytest.fixture
def impatient(monkeypatch):
    """Prefect waits 2 s after each write that SQLite refuses, and as long for a lost result."""
    monkeypatch.setattr(
        prefect.client.base, "clamped_poisson_interval", lambda seconds, _: seconds / 4
    )
    monkeypatch.setattr(prefect.states, "RESULT_READ_RETRY_DELAY", 0.01)


@pytest.mark.timeout(600)
def test_fifty_attempts_in_any_order_never_double_a_child_or_mix_results_up(
    world: World, impatient: None
):
    """What each has left of a key decides what the next one gets; the server is asked."""
    seed = int(os.environ.get("SEED", "7"))
    story, wrong = Story(world, seed), []

    @supervised_flow(retries=ATTEMPTS - 1, on_child_failure="ignore")
    async def parent():
        try:
            await story.attempt()
        except OnceMore:
            raise
        except Exception as exc:  # or it would be one more failure to try again after
            wrong.append(exc)
            supervisor.cancel()

    with Runner(story.finish_cancelled):
        asyncio.run(parent())
    assert not wrong, f"SEED={seed}, attempt {story.attempts}: {wrong[0]!r}"
    story.runs()
    assert story.attempts == ATTEMPTS
    for part in [*THERE, *HERE]:
        kinds = {"adopted"} if part in THERE else set()
        kinds |= {"reused"} if part in REUSED else set()
        seen = {became for each, became in story.seen if each == part}
        assert seen == {"first", "renewed", *kinds}, f"SEED={seed}, part {part}"
