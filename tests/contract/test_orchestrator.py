"""The fake server and the real one answer alike: what a test learns from the fake is true."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.schemas.objects import StateType
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
)
from prefect.types._datetime import now

from supervised import DeploymentNotFoundError
from supervised._api import RunRequest, open_orchestrator
from supervised.testing import FakePrefect

SECONDS = 20  # of a real server, for an event


@flow(name="contract-parent")
def parent_flow() -> None:
    """What the parents run."""


@flow(name="contract-child")
def child_flow(part: int = 0) -> None:
    """What the children run."""


class FakeStage:
    """The fake server."""

    def __init__(self):
        self.prefect = FakePrefect()
        self.api = self.prefect.connect()
        self.prefect.deploy("contract-child/test", runner="nobody")
        self.prefect.runners["nobody"].kill()

    def act(self, test):
        with self.prefect:
            return self.prefect.call(test(self))

    def new_parent(self):
        run = self.prefect.server.create("contract-parent", state=Pending())
        self.prefect.server.propose(run.id, Running())
        return run.id

    def propose(self, run_id, state):
        self.prefect.server.propose(run_id, state)

    def now(self):
        return self.prefect.loop.utc_now()


class RealStage:
    """A real server, on SQLite."""

    def __init__(self, client):
        self.client = client
        flow_id = client.create_flow(child_flow)
        schema = {"title": "Parameters", "properties": {"part": {"type": "integer"}}}
        client.create_deployment(
            flow_id, name="test", parameter_openapi_schema=schema, enforce_parameter_schema=False
        )

    def act(self, test):
        async def run():
            async with open_orchestrator() as self.api:
                return await test(self)

        return asyncio.run(run())

    def new_parent(self):
        return self.client.create_flow_run(parent_flow, state=Running()).id

    def propose(self, run_id, state):
        self.client.set_flow_run_state(run_id, state)

    def now(self):
        return now("UTC")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.server)])
def stage(request):
    """Either server, with one deployment that nobody serves."""
    if request.param == "fake":
        return FakeStage()
    return RealStage(request.getfixturevalue("world").client)


def a_request(parent, **changes):
    key = changes.pop("key", str(uuid4()))
    given = {
        "name": None,
        "parameters": {"part": 1},
        "tags": ["contract", f"tree:{parent}"],
        "labels": {"supervised.parent": str(parent)},
        "idempotency_key": f"supervised:{parent}:{key}",
        "parent_run_id": parent,
        "tracking_key": key,
        "tracking_id": uuid4(),
        "task_inputs": {},
    }
    return RunRequest(**{**given, **changes})


async def a_child(stage, parent, state=None, **changes):
    deployment = await stage.api.read_deployment("contract-child/test")
    run = await stage.api.create_deployment_run(deployment, a_request(parent, **changes))
    if state is not None:
        for step in (Pending(), Running(), state) if not state.is_pending() else (state,):
            stage.propose(run.id, step)
    return run.id


async def state_of(stage, run_id):
    (run,) = await stage.api.read_runs([run_id])
    return run.state.type


def test_a_deployments_run_is_created_once_for_a_key(stage):
    async def test(stage):
        parent = stage.new_parent()
        deployment = await stage.api.read_deployment("contract-child/test")
        request = a_request(parent)
        first = await stage.api.create_deployment_run(deployment, request)
        again = await stage.api.create_deployment_run(deployment, request)
        assert first.id == again.id
        assert len(await stage.api.read_children([parent])) == 1

    stage.act(test)


def test_a_deployments_run_has_all_it_was_asked_for_from_the_beginning(stage):
    async def test(stage):
        parent = stage.new_parent()
        request = a_request(parent)
        deployment = await stage.api.read_deployment("contract-child/test")
        run = await stage.api.create_deployment_run(deployment, request)
        assert run.state.is_scheduled()
        assert run.deployment_id == deployment.id
        assert run.idempotency_key == request.idempotency_key
        assert set(request.tags) <= set(run.tags)
        assert request.labels.items() <= run.labels.items()
        assert run.parameters == {"part": 1}
        assert await stage.api.read_parents([run]) == {run.id: parent}

    stage.act(test)


def test_an_inline_run_is_created_once_and_waits_for_its_code(stage):
    async def test(stage):
        parent = stage.new_parent()
        request = a_request(parent)
        run = await stage.api.create_inline_run(child_flow, request)
        again = await stage.api.create_inline_run(child_flow, request)
        assert run.id == again.id
        assert run.state.is_pending()
        assert run.deployment_id is None
        assert [child.id for child in await stage.api.read_children([parent])] == [run.id]

    stage.act(test)


def test_children_are_chosen_by_whether_they_are_over_and_since_when_and_are_counted(stage):
    async def test(stage):
        parent = stage.new_parent()
        lives = await a_child(stage, parent, Running())
        ended = [await a_child(stage, parent, Completed()) for _ in range(2)]
        minute = timedelta(minutes=1)

        async def chosen(*parents, **how):
            found = set()

            async def visit(page):
                found.update(run.id for run in page)

            await stage.api.visit_children(parents, visit, **how)
            return found

        assert await chosen(parent, *(uuid4() for _ in range(999))) == {lives, *ended}
        assert await chosen(parent, only="live") == {lives}
        assert await chosen(parent, only="over") == set(ended)
        assert await chosen(parent, since=stage.now() - minute) == set(ended)
        assert await chosen(parent, only="over", since=stage.now() + minute) == set()
        assert await stage.api.count_ended(parent) == 2
        others = [uuid4() for _ in range(2_000)]
        assert await stage.api.count_ended(parent, [ended[0], lives, *others]) == 1

    stage.act(test)


def test_a_detached_run_is_created_without_a_parent(stage):
    async def test(stage):
        parent = stage.new_parent()
        await a_child(stage, parent, is_linked=False)
        assert await stage.api.read_children([parent]) == []

    stage.act(test)


def test_an_unknown_deployment_is_an_error_of_ours(stage):
    async def test(stage):
        with pytest.raises(DeploymentNotFoundError):
            await stage.api.read_deployment("contract-child/nobody")

    stage.act(test)


def test_a_deployment_is_found_by_its_id_too(stage):
    async def test(stage):
        by_name = await stage.api.read_deployment("contract-child/test")
        by_id = await stage.api.read_deployment(by_name.id)
        assert by_id.id == by_name.id
        assert by_id.name == by_name.name == "contract-child/test"

    stage.act(test)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, StateType.CANCELLED),
        (Pending(), StateType.CANCELLING),
        (Running(), StateType.CANCELLING),
        (Cancelling(), StateType.CANCELLING),
        (AwaitingRetry(), StateType.CANCELLED),
    ],
    ids=["scheduled", "pending", "running", "cancelling", "awaiting retry"],
)
def test_a_live_run_accepts_the_request_to_cancel(stage, before, after):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), before)
        (ack,) = await stage.api.request_cancel([run_id], "because")
        assert ack.accepted
        assert ack.state.type == after
        assert await state_of(stage, run_id) == after

    stage.act(test)


def test_a_message_that_is_no_unicode_cannot_be_sent(stage):
    """Nobody must try: a lone surrogate stands in what Python makes of a file's odd name."""

    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), Running())
        with pytest.raises(UnicodeEncodeError):
            await stage.api.request_cancel([run_id], "no such file: \udce9t\udce9.csv")
        with pytest.raises(UnicodeEncodeError):
            await stage.api.close_run(run_id, "no such file: \udce9t\udce9.csv")
        assert (await state_of(stage, run_id)) == StateType.RUNNING

    stage.act(test)


@pytest.mark.parametrize(
    "end", [Completed(), Failed(), Crashed(), Cancelled()], ids=lambda state: state.name
)
def test_a_run_that_is_over_stays_as_it_is(stage, end):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), end)
        (ack,) = await stage.api.request_cancel([run_id], "because")
        assert await state_of(stage, run_id) == end.type
        (run,) = await stage.api.read_runs([run_id])
        assert ack.accepted
        assert run.end_time is not None

    stage.act(test)


def test_a_request_for_many_is_answered_one_by_one(stage):
    async def test(stage):
        parent = stage.new_parent()
        scheduled = await a_child(stage, parent)
        running = await a_child(stage, parent, Running())
        missing = uuid4()
        acks = await stage.api.request_cancel([scheduled, running, missing], "because")
        by_id = {ack.run_id: ack for ack in acks}
        assert by_id[scheduled].state.is_cancelled()
        assert by_id[running].state.is_cancelling()
        assert by_id[running].state.message == "because"
        assert not by_id[missing].accepted

    stage.act(test)


@pytest.mark.parametrize(
    "proposed",
    [Pending(), Running(), Completed(), Failed(), Crashed()],
    ids=lambda state: state.name,
)
def test_a_run_that_is_being_cancelled_can_only_become_cancelled(stage, proposed):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), Cancelling())
        stage.propose(run_id, proposed)
        assert await state_of(stage, run_id) == StateType.CANCELLING

    stage.act(test)


def test_a_run_can_be_closed(stage):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), Cancelling())
        state = await stage.api.close_run(run_id, "it never began")
        assert state.is_cancelled()
        assert await state_of(stage, run_id) == StateType.CANCELLED

    stage.act(test)


def test_many_runs_can_be_closed_at_once_even_one_that_is_over(stage):
    """So only what has just been read, and has no process, may be closed."""

    async def test(stage):
        parent, missing = stage.new_parent(), uuid4()
        known = [await a_child(stage, parent, state) for state in (Cancelling(), Completed())]
        acks = await stage.api.close_runs([*known, missing], "they never began")
        assert [ack.run_id for ack in acks] == [*known, missing]
        assert [ack.state and ack.state.name for ack in acks] == ["Cancelled", "Cancelled", None]
        for run_id in known:
            assert await state_of(stage, run_id) == StateType.CANCELLED

    stage.act(test)


def test_a_running_run_has_a_start_and_a_count(stage):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent())
        (run,) = await stage.api.read_runs([run_id])
        assert (run.start_time, run.run_count) == (None, 0)
        stage.propose(run_id, Pending())
        stage.propose(run_id, Running())
        (run,) = await stage.api.read_runs([run_id])
        assert run.start_time is not None
        assert run.run_count == 1

    stage.act(test)


def test_many_runs_that_are_created_at_once_are_like_one_that_is_created_alone(stage):
    async def test(stage):
        parent = stage.new_parent()
        alone = await a_child(stage, parent, name="alone")
        many = await asyncio.gather(*(a_child(stage, parent, name=f"n-{i}") for i in range(15)))
        runs = {run.name: run for run in await stage.api.read_runs([alone, *many])}
        assert set(runs) == {"alone", *(f"n-{i}" for i in range(15))}
        model = runs["alone"]
        for run in runs.values():
            assert run.state.type == StateType.SCHEDULED
            assert run.parameters == model.parameters == {"part": 1}
            assert set(run.tags) == set(model.tags)
            assert run.deployment_id == model.deployment_id
            assert run.labels["supervised.parent"] == str(parent)
        assert await stage.api.read_parents(runs.values()) == dict.fromkeys([alone, *many], parent)

    stage.act(test)


def test_of_many_runs_that_are_created_at_once_each_is_made_once_for_its_key(stage):
    async def test(stage):
        parent = stage.new_parent()
        keys = [f"k-{i % 12}" for i in range(24)]
        first = await asyncio.gather(*(a_child(stage, parent, key=key) for key in keys))
        again = await asyncio.gather(*(a_child(stage, parent, key=key) for key in keys))
        assert first[:12] == first[12:] == again[:12] == again[12:]
        assert len(await stage.api.read_children([parent])) == 12

    stage.act(test)


def test_a_run_that_is_not_linked_has_no_parent_though_its_neighbours_have(stage):
    async def test(stage):
        parent = stage.new_parent()
        many = [a_child(stage, parent, is_linked=i != 2) for i in range(15)]
        made = await asyncio.gather(*many)
        assert len(await stage.api.read_children([parent])) == 14
        (alone,) = await stage.api.read_runs([made[2]])
        assert alone.parent_task_run_id is None

    stage.act(test)


def test_labels_are_added_to_those_that_are_there(stage):
    async def test(stage):
        parent = stage.new_parent()
        run_id = await a_child(stage, parent)
        await stage.api.label(run_id, {"more": "yes"})
        await stage.api.label(run_id, {"more": "still"})
        (run,) = await stage.api.read_runs([run_id])
        assert run.labels["more"] == "still"
        assert run.labels["supervised.parent"] == str(parent)

    stage.act(test)


def test_labels_and_tags_can_be_given_to_a_run_for_good(stage):
    async def test(stage):
        parent = stage.new_parent()
        run_id = await a_child(stage, parent)
        await stage.api.label_for_good(run_id, {"more": "yes"})
        await stage.api.tag(run_id, ["one", "two"])
        (run,) = await stage.api.read_runs([run_id])
        assert run.labels["more"] == "yes"
        assert set(run.tags) == {"one", "two"}

    stage.act(test)


def test_a_run_without_limits_has_none_and_is_due_at_once(stage):
    async def test(stage):
        second, began = timedelta(seconds=1), stage.now()
        (run,) = await stage.api.read_runs([await a_child(stage, stage.new_parent())])
        assert await stage.api.read_limits(run) == []
        assert began - second <= run.expected_start_time <= stage.now() + second

    stage.act(test)


def test_a_run_that_is_cut_loose_has_no_parent(stage):
    async def test(stage):
        parent = stage.new_parent()
        run_id = await a_child(stage, parent)
        (run,) = await stage.api.read_runs([run_id])
        await stage.api.cut_loose(run, {"supervised.detached": True})
        assert await stage.api.read_children([parent]) == []
        (run,) = await stage.api.read_runs([run_id])
        assert run.labels["supervised.detached"]

    stage.act(test)


def test_runs_are_found_by_tag_while_they_live(stage):
    async def test(stage):
        parent = stage.new_parent()
        tag = f"tree:{parent}"
        live = {
            await a_child(stage, parent),
            await a_child(stage, parent, Running()),
            await a_child(stage, parent, Cancelling()),
        }
        over = await a_child(stage, parent, Completed())
        found = await stage.api.read_tagged(tag, live_only=True)
        assert {run.id for run in found} == live
        found = await stage.api.read_tagged(tag, live_only=False)
        assert {run.id for run in found} == live | {over}

    stage.act(test)


def test_only_runs_that_exist_are_read(stage):
    async def test(stage):
        parent = stage.new_parent()
        assert [run.id for run in await stage.api.read_runs([parent, uuid4()])] == [parent]

    stage.act(test)


def test_the_server_tells_its_time(stage):
    async def test(stage):
        assert abs(await stage.api.server_time() - stage.now()) < timedelta(seconds=SECONDS)

    stage.act(test)


async def heard(stage, events, run_id: UUID) -> None:
    """Wait for one event; real streams need a moment to be subscribed, so there are many."""

    async def listen():
        async for event in events:
            if (event.run_id, event.state_type) == (run_id, StateType.RUNNING):
                return

    listening = asyncio.create_task(listen())
    for _ in range(SECONDS):
        await stage.api.nudge([run_id])  # for runners; here it must do no harm
        stage.propose(run_id, AwaitingRetry())
        stage.propose(run_id, Running())
        done, _ = await asyncio.wait([listening], timeout=1)
        if done:
            return
    listening.cancel()
    raise AssertionError("nothing was heard")


@pytest.mark.parametrize("by", ["run", "all"])
def test_who_has_subscribed_hears_of_a_run(stage, by):
    async def test(stage):
        run_id = await a_child(stage, stage.new_parent(), Running())
        resource = f"prefect.flow-run.{run_id}"
        subscribed = stage.api.subscribe([resource]) if by == "run" else stage.api.subscribe_all()
        async with subscribed as events:
            await heard(stage, events, run_id)

    stage.act(test)


def test_who_has_subscribed_to_a_tag_hears_of_changes(stage):
    async def test(stage):
        parent = stage.new_parent()
        async with stage.api.subscribe([f"prefect.tag.tree:{parent}"]) as events:
            seen = set()

            async def listen():
                async for event in events:
                    seen.add((event.run_id, event.state_type))

            listening, changes = asyncio.create_task(listen()), set()
            for _ in range(SECONDS):
                changes.add((await a_child(stage, parent, Running()), StateType.RUNNING))
                await asyncio.sleep(1)
                if changes & seen:
                    break
            listening.cancel()
            assert changes & seen

    stage.act(test)
