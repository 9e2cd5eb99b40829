"""What each end of a parent means to a child, on a real server: every cause, every action.

Nobody serves the deployments here: what a runner would do is done by the test, so that the end of
each child is the test's to choose.
"""

import asyncio
import contextvars
import threading
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelling, Completed, Pending, Running
from support.world import eventually

from supervised import supervised_flow, supervisor

CAUSES = ("completed", "failed", "timed_out", "cancelled", "crashed")


@flow
def nobody() -> None:
    """Its runs do what the test says."""


@pytest.fixture
def deployment(server):
    """The name of a deployment that nobody serves."""
    with get_client(sync_client=True) as client:
        name = f"policies-{uuid4()}"
        client.create_deployment(client.create_flow(nobody), name)
        return f"nobody/{name}"


class Runner:
    """Does for some runs what a runner would, from a thread of its own."""

    def __init__(self, act):
        self._act = act
        self._over = threading.Event()
        self._errors = []
        context = contextvars.copy_context()  # which names the server
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        assert not self._errors

    def _work(self):
        with get_client(sync_client=True) as client:
            while not self._over.wait(0.2):
                try:
                    self._act(client)
                except Exception as exc:
                    self._errors.append(exc)


def end_parent(cause, children, policy, name):
    """Run a parent that ends in a way, with a child that runs; return the ids of both."""
    timeout = 10 if cause == "timed_out" else None  # in which a launch may be refused once

    @supervised_flow(timeout_seconds=timeout, grace_seconds=30)
    async def parent():
        child = supervisor.spawn(name, on_parent={cause: policy})
        while child.flow_run_id is None:
            await asyncio.sleep(0.05)
        children.append((supervisor.flow_run_id, child.flow_run_id))
        async with get_client() as client:
            for state in (Pending(), Running()):
                await client.set_flow_run_state(child.flow_run_id, state)
            if cause == "cancelled":
                await client.set_flow_run_state(supervisor.flow_run_id, Cancelling())
        if cause == "failed":
            raise ValueError("the body's own")
        if cause == "crashed":
            raise KeyboardInterrupt
        if cause in {"timed_out", "cancelled"}:
            await asyncio.sleep(60)

    try:
        asyncio.run(parent(return_state=True))
    except BaseException as exc:
        assert isinstance(exc, KeyboardInterrupt) == (cause == "crashed"), exc


def state_of(client, run_id):
    return client.read_flow_run(run_id).state


@pytest.mark.parametrize("cause", CAUSES)
def test_a_child_that_is_to_be_cancelled_is(deployment, cause):
    children = []

    def act(client):
        for _, child in children:
            if state_of(client, child).is_cancelling():
                client.set_flow_run_state(child, Completed(), force=True)

    with Runner(act), get_client(sync_client=True) as client:
        end_parent(cause, children, "cancel", deployment)
        states = client.read_flow_run_states(children[0][1])
        assert any(state.is_cancelling() for state in states)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_child_that_is_to_be_waited_for_is_and_is_not_asked(deployment, cause):
    children = []
    ended = threading.Event()

    def act(client):
        for parent, child in children:
            if state_of(client, child).is_running() and not ended.is_set():
                assert not state_of(client, parent).is_final()
                ended.set()  # first: the parent may be over before the answer is here
                client.set_flow_run_state(child, Completed())

    with Runner(act), get_client(sync_client=True) as client:
        end_parent(cause, children, "wait", deployment)
        assert ended.is_set()
        states = client.read_flow_run_states(children[0][1])
        assert not any(state.is_cancelling() for state in states)
        assert state_of(client, children[0][1]).is_completed()


@pytest.mark.parametrize("cause", CAUSES)
def test_a_detached_child_is_never_touched(deployment, cause):
    children = []
    end_parent(cause, children, "detach", deployment)
    with get_client(sync_client=True) as client:
        ((parent, child),) = children
        assert state_of(client, parent).is_final()
        assert state_of(client, child).is_running()
        eventually(
            lambda: client.read_flow_run(child).labels.get("supervised.detached") is True,
            seconds=30,
            what="it is known",
        )
        client.set_flow_run_state(child, Completed())


def test_the_decorators_policy_is_that_of_every_child(deployment):
    children = []

    @supervised_flow(on_parent="detach")
    async def parent():
        child = supervisor.spawn(deployment)
        while child.flow_run_id is None:
            await asyncio.sleep(0.05)
        children.append(child)
        raise ValueError("the body's own")

    with pytest.raises(ValueError, match="the body's own"):
        asyncio.run(parent())
    with get_client(sync_client=True) as client:
        assert state_of(client, children[0].flow_run_id).is_scheduled()
        assert children[0].outcome == "detached"


def test_a_child_that_is_let_go_by_hand_before_it_has_a_run_is_launched_and_left_alone(
    deployment, monkeypatch
):
    monkeypatch.setattr("supervised._control._CLOSE_SECONDS", 60)  # a launch may be refused
    children = []

    @supervised_flow
    async def parent():
        children.append(supervisor.spawn(deployment))
        children[0].detach()
        raise ValueError("the body's own")

    with pytest.raises(ValueError, match="the body's own"):
        asyncio.run(parent())
    with get_client(sync_client=True) as client:
        eventually(lambda: children[0].flow_run_id, seconds=30, what="the child has a run")
        assert state_of(client, children[0].flow_run_id).is_scheduled()
