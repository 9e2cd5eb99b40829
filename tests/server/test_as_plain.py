"""A child is given, does and leaves behind what the plain call of its target would."""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime, timedelta, timezone
from uuid import uuid4

import pydantic
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment

from supervised import ChildCrashed, ChildFailed, supervised_flow, supervisor

pytestmark = pytest.mark.usefixtures("server")


class Order(pydantic.BaseModel):
    """A model that is read and written under different names."""

    order_id: int = pydantic.Field(serialization_alias="orderId")


@flow
def take(**anything: object) -> None:
    """Take what is given."""


@pytest.fixture
def deployment(server):
    """A deployment that nobody serves."""
    with get_client(sync_client=True) as client:
        name = f"d-{uuid4()}"
        client.create_deployment(client.create_flow(take), name)
        yield f"take/{name}"


def state_of(run_id):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state


def launched(name, parameters, *, spawned):
    """Launch a deployment in a parent of its own; return the child's run."""

    @supervised_flow(on_child_failure="ignore")
    async def parent():
        if not spawned:
            return (await run_deployment(name, parameters=parameters, timeout=0)).id
        child = supervisor.spawn(name, parameters)
        while child.flow_run_id is None:
            await asyncio.sleep(0.05)
        child.cancel()
        return child.flow_run_id

    run_id = asyncio.run(parent())
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


@pytest.mark.parametrize(
    "value",
    [
        timedelta(hours=1),
        datetime(2024, 2, 3, tzinfo=timezone.utc),
        Order(order_id=1),
        [Order(order_id=1)],
        {"nested": {"since": timedelta(seconds=1)}},
    ],
    ids=["timedelta", "datetime", "model", "models", "nested"],
)
def test_a_deployment_is_given_the_parameters_that_a_plain_run_is_given(deployment, value):
    plain = launched(deployment, {"value": value}, spawned=False)
    spawned = launched(deployment, {"value": value}, spawned=True)
    assert spawned.parameters == plain.parameters


def test_the_run_of_a_task_whose_result_is_passed_is_upstream_of_a_deployment(deployment):
    @task
    def load():
        return {"rows": [1, 2]}

    @supervised_flow
    def parent():
        rows = load()
        child = supervisor.spawn(deployment, {"rows": rows})
        run = run_deployment(deployment, parameters={"rows": rows}, timeout=0)
        while child.flow_run_id is None:
            child.wait(0.05)
        child.cancel()
        return run.id, child.flow_run_id

    with get_client(sync_client=True) as client:
        inputs = [
            client.read_task_run(client.read_flow_run(run_id).parent_task_run_id).task_inputs
            for run_id in parent()
        ]
    assert inputs[0]["rows"]
    assert inputs[1]["rows"] == inputs[0]["rows"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_child_whose_input_has_failed_has_failed_itself(is_async):
    @task
    def broken():
        raise ValueError("no rows")

    @flow
    def sync_child(rows: object) -> object:
        return rows

    @flow
    async def async_child(rows: object) -> object:
        return rows

    children = []

    @supervised_flow
    async def parent():
        target = async_child if is_async else sync_child
        children.append(supervisor.spawn(target, {"rows": broken.submit()}))

    with pytest.raises(BaseException) as caught:
        asyncio.run(parent())
    (error,) = caught.value.exceptions
    assert isinstance(error, ChildFailed)
    assert "It did not begin: Upstream task run" in str(error)
    assert children[0].outcome == "failed"
    assert state_of(children[0].flow_run_id).is_failed(), "no run stays `Pending`"


@flow
async def waits_for_what_it_has_cancelled():
    other = asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    other.cancel()
    await other


@flow
def raises_a_cancellation():
    raise asyncio.CancelledError


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks do not count cancellations")
@pytest.mark.parametrize(
    ("target", "isolation"),
    [
        (waits_for_what_it_has_cancelled, "none"),
        (waits_for_what_it_has_cancelled, "process"),
        (raises_a_cancellation, "none"),
    ],
)
def test_a_cancellation_that_a_child_has_made_itself_is_not_taken_for_its_parents(
    target, isolation
):
    children = []

    @supervised_flow
    async def parent():
        children.append(supervisor.spawn(target, isolation=isolation))

    with pytest.raises(BaseException) as caught:
        asyncio.run(parent())
    (error,) = caught.value.exceptions
    assert isinstance(error, ChildCrashed)
    assert state_of(children[0].flow_run_id).is_crashed()


def test_parameters_that_a_call_gives_by_position_are_given_by_name():
    @flow
    def by_position(a, /, *more):
        return [a, *more]

    @supervised_flow
    def parent():
        return supervisor.spawn(by_position, {"a": 1, "more": (2, 3)}).result()

    assert parent() == [1, 2, 3]
