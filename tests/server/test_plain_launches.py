"""What was launched without `spawn` ends with the rest; the deployments here have no runner."""

import asyncio
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.states import Scheduled

from supervised import ChildFailed, _identity, supervised_flow, supervisor


@flow
async def broken() -> None:
    raise ValueError("broken part")


@flow
def nobody() -> None:
    """Its runs stay `Scheduled`, and become `Cancelled` as soon as they are asked."""


@pytest.fixture
def queue(server):
    """The name of a deployment that nobody serves."""
    with get_client(sync_client=True) as client:
        name = f"queue-{uuid4()}"
        client.create_deployment(client.create_flow(nobody), name)
        return f"nobody/{name}"


def state_of(run_id) -> str:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state_type.value


def test_a_body_that_went_on_after_a_teardown_is_torn_down_again(queue):
    launched = []

    @supervised_flow
    async def parent():
        with pytest.raises(ChildFailed):
            await supervisor.spawn(broken)
        launched.append((await run_deployment(queue, timeout=0)).id)
        raise KeyError("body")

    with pytest.raises(BaseException, match="body"):
        asyncio.run(parent())
    assert state_of(launched[0]) == "CANCELLED"


@pytest.mark.parametrize("decorate", [flow, supervised_flow], ids=["plain", "supervised"])
def test_what_a_flow_launched_that_the_body_called_goes_with_the_body(queue, decorate):
    launched = []

    @decorate
    async def inner():
        launched.append((await run_deployment(queue, timeout=0)).id)

    @supervised_flow
    async def parent():
        await inner()
        raise KeyError("body")

    with pytest.raises(KeyError):
        asyncio.run(parent())
    assert state_of(launched[0]) == "CANCELLED"


def test_a_retried_inner_flow_hides_nothing(queue):
    launched, attempts = [], []

    @supervised_flow(retries=1)
    async def unreliable():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("again")

    @flow
    async def inner():
        launched.append((await run_deployment(queue, timeout=0)).id)

    @supervised_flow
    async def parent():
        await unreliable()
        await inner()
        raise KeyError("body")

    with pytest.raises(KeyError):
        asyncio.run(parent())
    assert len(attempts) == 2
    assert state_of(launched[0]) == "CANCELLED"


def test_a_body_that_returns_leaves_what_it_launched_plainly(queue):
    launched = []

    @supervised_flow
    async def parent():
        launched.append((await run_deployment(queue, timeout=0)).id)

    asyncio.run(parent())
    assert state_of(launched[0]) == "SCHEDULED"


def test_what_a_detached_child_has_launched_is_left_alone(queue):
    """Its run still carries the path that it was launched under."""
    launched = []

    @supervised_flow
    async def parent():
        child = supervisor.spawn(queue)
        while child.flow_run_id is None:
            await asyncio.sleep(0.01)
        launched.append(launch_below(child.flow_run))
        child.detach()
        await child.wait_async()
        raise KeyError("body")

    def launch_below(run):
        lineage = _identity.lineage_of(run.id, run.labels)
        policy = dict.fromkeys(("failed", "timed_out", "cancelled", "crashed"), "cancel")
        labels = _identity.child_labels(lineage, key="k", generation=0, on_parent=policy)
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(queue)
            return client.create_flow_run_from_deployment(
                deployment.id,
                tags=[lineage.tag],
                labels=labels,
                idempotency_key=_identity.idempotency_key(run.id, "k", 0),
                state=Scheduled(),
            ).id

    with pytest.raises(KeyError):
        asyncio.run(parent())
    assert state_of(launched[0]) == "SCHEDULED"
