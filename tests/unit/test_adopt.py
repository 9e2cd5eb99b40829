"""Adoption: a run that somebody else has launched becomes a child like any other."""

import asyncio
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.futures import PrefectFlowRunFuture
from prefect.states import Running, Scheduled

from supervised import (
    DuplicateKeyError,
    InvalidTargetError,
    RunNotFoundError,
    SpawnError,
    _identity,
    _launch,
    supervised_flow,
    supervisor,
)
from supervised.testing import FakePrefect


@supervised_flow
async def keeper(run_id):
    child = supervisor.adopt(UUID(run_id), name="found")
    return await child


def world():
    prefect = FakePrefect()
    prefect.deploy("keeper/test", keeper)
    prefect.deploy("score/gpu", takes=300, returns="done")
    return prefect


def adopted(prefect, flow="keeper/test"):
    """Start a run, and a keeper that adopts it."""
    run = prefect.start("score/gpu")
    prefect.until(lambda: run.state.is_running())
    root = prefect.start(flow, {"run_id": str(run.id)})
    prefect.until(lambda: _identity.COMMON_TAG in run.flow_run.tags)  # after the labels
    return run, root


def test_its_result_is_awaited_like_any_childs():
    with world() as prefect:
        run, root = adopted(prefect)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert root.state.is_completed()


def test_it_ends_with_its_new_parent():
    with world() as prefect:
        run, root = adopted(prefect)
        root.cancel()
        prefect.until(lambda: not prefect.alive, within=20)
        assert run.state.is_cancelled()


def test_it_ends_with_a_parent_that_was_killed():
    with world() as prefect:
        run, root = adopted(prefect)
        root.kill()
        prefect.until(lambda: not run.is_alive, within=30)


def test_one_that_is_over_is_over_at_once():
    with world() as prefect:
        run = prefect.start("score/gpu")
        prefect.until(lambda: not prefect.alive)
        root = prefect.start("keeper/test", {"run_id": str(run.id)})
        prefect.until(lambda: not prefect.alive, within=30)
        assert root.state.is_completed()
        assert _identity.ADOPTED not in run.flow_run.labels


def test_a_copy_of_it_is_left_alone():
    with world() as prefect:
        run, root = adopted(prefect)
        copy = prefect.copy(run)
        prefect.until(lambda: copy.state.is_running())
        root.cancel()
        prefect.until(lambda: not run.is_alive, within=20)
        prefect.advance(10)
        assert copy.is_alive


def test_somebody_elses_child_is_refused():
    @supervised_flow
    async def owner():
        await supervisor.spawn("score/gpu")

    with world() as prefect:
        prefect.deploy("owner/test", owner)
        first = prefect.start("owner/test")
        prefect.until(lambda: first.below and first.below[0].state.is_running())
        root = prefect.start("keeper/test", {"run_id": str(first.below[0].id)})
        prefect.until(lambda: not root.is_alive, within=30)
        assert root.state.is_failed()
        assert "looks after it" in root.state.message
        assert first.below[0].is_alive


def test_a_run_that_does_not_exist_is_the_childs_outcome():
    with world() as prefect:
        root = prefect.start("keeper/test", {"run_id": str(uuid4())})
        prefect.until(lambda: not prefect.alive, within=30)
        assert root.state.is_failed()
        assert "no flow run" in root.state.message
    assert issubclass(RunNotFoundError, SpawnError)


def test_a_child_of_the_scope_stays_the_same_child():
    @supervised_flow
    async def owner():
        child = supervisor.spawn("score/gpu")
        while child.flow_run_id is None:
            await asyncio.sleep(1)
        assert supervisor.adopt(child.flow_run_id) is child
        assert supervisor.adopt(child.flow_run_id, key=child.key) is child
        assert await child == "done"

    with world() as prefect:
        prefect.deploy("owner/test", owner)
        root = prefect.start("owner/test")
        prefect.until(lambda: not prefect.alive)
        assert root.state.is_completed(), root.state.message
        assert _identity.ADOPTED not in root.below[0].flow_run.labels


def test_adopting_it_twice_makes_one_child():
    @supervised_flow
    async def eager(run_id):
        child = supervisor.adopt(run_id)
        assert supervisor.adopt(run_id) is child
        assert await child == "done"
        assert supervisor.adopt(run_id) is child

    with world() as prefect:
        prefect.deploy("eager/test", eager)
        _, root = adopted(prefect, "eager/test")
        prefect.until(lambda: not prefect.alive)
        assert root.state.is_completed(), root.state.message


@pytest.mark.parametrize("how", ["spawned", "adopted"])
def test_a_child_is_not_adopted_under_another_key(how):
    @supervised_flow
    async def owner(run_id):
        child = supervisor.spawn("score/gpu") if how == "spawned" else supervisor.adopt(run_id)
        while child.flow_run_id is None:
            await asyncio.sleep(1)
        with pytest.raises(DuplicateKeyError, match="is child .* already"):
            supervisor.adopt(child.flow_run_id, key="another")
        assert await child == "done"

    with world() as prefect:
        prefect.deploy("owner/test", owner)
        run = prefect.start("score/gpu")
        root = prefect.start("owner/test", {"run_id": str(run.id)})
        prefect.until(lambda: not prefect.alive)
        assert root.state.is_completed(), root.state.message


def test_one_whose_keeper_is_over_can_be_adopted():
    @supervised_flow
    async def lenient(run_id):
        await supervisor.adopt(run_id, on_parent={"crashed": "wait"})

    with world() as prefect:
        prefect.deploy("lenient/test", lenient)
        run, first = adopted(prefect, "lenient/test")
        prefect.advance(10)
        first.kill()
        prefect.advance(60)
        assert run.is_alive
        second = prefect.start("lenient/test", {"run_id": str(run.id)})
        prefect.until(lambda: run.flow_run.labels[_identity.PARENT] == str(second.id))
        second.cancel()
        prefect.until(lambda: not prefect.alive, within=20)
        assert run.state.is_cancelled()


def test_a_detached_one_goes_on():
    @supervised_flow
    async def lets_go(run_id):
        child = supervisor.adopt(run_id)
        await asyncio.sleep(30)
        child.detach()

    with world() as prefect:
        prefect.deploy("lets-go/test", lets_go)
        run, root = adopted(prefect, "lets-go/test")
        prefect.until(lambda: not root.is_alive, within=60)
        assert root.state.is_completed()
        assert run.is_alive


def test_a_run_cannot_adopt_itself():
    refused = []

    @supervised_flow
    async def alone():
        with pytest.raises(InvalidTargetError, match="itself"):
            supervisor.adopt(supervisor.flow_run_id)
        refused.append(True)

    with FakePrefect() as prefect:
        prefect.start(alone)
        prefect.until(lambda: not prefect.alive)
    assert refused


RUN_ID = uuid4()


@pytest.mark.parametrize(
    "target",
    [RUN_ID, str(RUN_ID), FlowRun(id=RUN_ID, flow_id=uuid4()), PrefectFlowRunFuture(RUN_ID)],
    ids=["id", "text", "run", "future"],
)
def test_what_can_be_adopted(target):
    assert _launch.check_run(target) == RUN_ID


@pytest.mark.parametrize(
    "target",
    ["score/gpu", 7, None, keeper, TaskRun(task_key="t", dynamic_key="0"), Running()],
    ids=["text", "number", "none", "flow", "task-run", "state"],
)
def test_what_cannot_be_adopted(target):
    with pytest.raises(InvalidTargetError, match="Cannot adopt"):
        _launch.check_run(target)


@pytest.mark.parametrize("seed", [0, 4, 22, 40])
def test_of_two_that_adopt_it_at_once_one_looks_after_it(seed):
    with FakePrefect(seed=seed) as prefect:
        prefect.deploy("score/gpu", takes=3600)
        run = prefect.start("score/gpu")
        prefect.until(lambda: run.state.is_running())
        keepers = [prefect.start(keeper, {"run_id": str(run.id)}) for _ in range(2)]
        prefect.advance(60)
        assert sorted(k.state.name for k in keepers) == ["Failed", "Running"]
        next(k for k in keepers if k.state.is_running()).cancel()
        prefect.until(lambda: run.state.is_cancelled(), within=60)


def test_it_is_not_adopted_under_two_keys_at_once():
    refused = []

    @supervised_flow
    async def greedy(run_id):
        first = supervisor.adopt(run_id, key="one")
        with pytest.raises(DuplicateKeyError, match="already"):
            supervisor.adopt(run_id, key="two")
        refused.append(await first)

    with world() as prefect:
        run = prefect.start("score/gpu")
        prefect.until(lambda: run.state.is_running())
        prefect.start(greedy, {"run_id": str(run.id)})
        prefect.until(lambda: not prefect.alive, within=600)
    assert refused == ["done"]


def test_the_plain_run_that_called_it_is_above_a_run():
    ended = []

    @supervised_flow(on_child_failure="ignore")
    async def inner(run_id):
        child = supervisor.adopt(UUID(run_id))
        await child.wait_async()
        ended.append(child.exception)

    with world() as prefect:
        caller = prefect.start("score/gpu")
        prefect.until(lambda: caller.state.is_running())
        prefect.deploy("inner/test", inner)
        tracking = prefect.server.track(uuid4(), caller.id, "inner-0")
        deployment = prefect.server.find_deployment("inner/test")
        prefect.server.create(
            "inner",
            state=Scheduled(),
            deployment_id=deployment.id,
            parent_task_run_id=tracking,
            parameters={"run_id": str(caller.id)},
        )
        prefect.until(lambda: ended, within=60)
        assert isinstance(ended[0], InvalidTargetError)
        assert "above this one" in str(ended[0])
        assert _identity.ADOPTED not in caller.flow_run.labels


def test_of_two_that_adopt_each_other_the_second_is_refused():
    found = []

    @supervised_flow(on_child_failure="ignore")
    async def one():
        await asyncio.sleep(30)
        child = supervisor.adopt(second.id)
        await child.wait_async()
        found.append(type(child.exception))

    with world() as prefect:
        prefect.deploy("one/test", one)
        first = prefect.start("one/test")
        prefect.until(lambda: first.state.is_running())
        second = prefect.start("keeper/test", {"run_id": str(first.id)})
        prefect.until(lambda: not prefect.alive, within=90)
        assert found == [InvalidTargetError]
        assert second.state.is_completed()


@pytest.mark.parametrize("option", [{"key": ""}, {"key": 5}, {"name": 5}, {"name": ""}])
def test_a_name_or_key_that_is_none_is_refused_at_the_call(option):
    refused = []

    @supervised_flow
    async def root():
        with pytest.raises(SpawnError):
            supervisor.adopt(uuid4(), **option)
        refused.append(option)

    with world() as prefect:
        prefect.start(root)
        prefect.until(lambda: refused)
