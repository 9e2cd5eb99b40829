"""Many children in few requests, on a real server; and what happens where that is not offered."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from uuid import uuid4

import attrs
import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.states import Running

from supervised import ParametersError
from supervised._api import RunRequest, open_orchestrator

pytestmark = pytest.mark.server
MANY = 25


@flow(name="bulk-parent")
def parent_flow() -> None:
    """What the parents run."""


@flow(name="bulk-child")
def child_flow(part: int = 0) -> None:
    """What the children run."""


class Refusal(httpx.AsyncBaseTransport):
    """Answers some paths itself, as a server that does not offer them, or fails."""

    def __init__(self, transport, path, status, times=1000, detail="not here"):
        self.transport = transport
        self.path = path
        self.status = status
        self.times = times
        self.detail = detail

    async def handle_async_request(self, request):
        if request.url.path.endswith(self.path) and self.times:
            self.times -= 1
            await request.aread()
            return httpx.Response(self.status, json={"detail": self.detail}, request=request)
        return await self.transport.handle_async_request(request)


@pytest.fixture
def deployment(world):
    """A deployment that nobody serves and that enforces the types of its parameters."""
    flow_id = world.client.create_flow(child_flow)
    schema = {"title": "Parameters", "properties": {"part": {"type": "integer"}}}
    world.client.create_deployment(
        flow_id, "bulk", parameter_openapi_schema=schema, enforce_parameter_schema=True
    )
    return "bulk-child/bulk"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy server records late, and SQLite throws out: what comes of that is told elsewhere."""
    monkeypatch.setattr("supervised._bulk._RECORDED_SECONDS", 60.0)
    monkeypatch.setattr("supervised._bulk._PAUSES", (0.0, *[0.3] * 20))


@pytest.fixture
def requested(monkeypatch):
    """Counts requests by their last part."""
    counts = Counter()
    send = httpx.AsyncClient.send

    async def counted(self, request, *args, **options):
        response = await send(self, request, *args, **options)
        # What SQLite has refused for another writer's sake is asked again.
        if response.status_code != 503 and "database is locked" not in response.text:
            counts[f"{request.method} {request.url.path.rsplit('/', 1)[-1]}"] += 1
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", counted)
    return counts


def request_for(parent, part):
    """Return the request for one child of a run."""
    return RunRequest(
        name=f"part-{part}",
        parameters={"part": part},
        tags=["bulk"],
        labels={"part": part},
        idempotency_key=f"bulk:{parent}:{part}",
        parent_run_id=parent,
        tracking_key=f"part-{part}:0",
        tracking_id=uuid4(),
        task_inputs={},
    )


def create(world, deployment, *, parameters=lambda part: {"part": part}, refuse=None):
    """Create many runs at once; return the parent and the runs, or what they led to."""
    parent = world.client.create_flow_run(parent_flow, state=Running()).id

    async def run():
        async with open_orchestrator() as api:
            if refuse is not None:
                http = api._client._client
                http._transport = Refusal(http._transport, *refuse)
            found = await api.read_deployment(deployment)
            requests = [
                attrs.evolve(request_for(parent, part), parameters=parameters(part))
                for part in range(MANY)
            ]
            return await asyncio.gather(
                *(api.create_deployment_run(found, request) for request in requests),
                return_exceptions=True,
            )

    return parent, asyncio.run(run())


def children_of(world, parent):
    return {run.id: run for run in world.tree(parent)[1:]}


def test_many_children_take_few_requests(world, deployment, requested):
    parent, runs = create(world, deployment)
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert [run.parameters["part"] for run in runs] == list(range(MANY))
    assert requested["POST bulk"] <= 2
    assert requested["POST create_flow_run"] == 0
    assert requested.total() - requested["POST count"] < MANY, requested  # looks take their time


def test_a_tracking_task_run_in_bulk_is_like_one_that_is_made_alone(world, deployment):
    async def tracking_of(runs):
        ids = TaskRunFilterId(any_=[run.parent_task_run_id for run in runs])
        async with get_client() as client:
            return await client.read_task_runs(task_run_filter=TaskRunFilter(id=ids))

    _, bulk = create(world, deployment)
    _, alone = create(world, deployment, refuse=("/create_flow_run/bulk", 404))
    seen = [
        {
            (each.task_key, each.task_version, each.state_type, str(each.empirical_policy))
            for each in asyncio.run(tracking_of(runs))
        }
        for runs in (bulk, alone)
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1


@pytest.mark.parametrize(
    "refuse",
    [("/create_flow_run/bulk", 404), ("/create_flow_run/bulk", 403), ("/events", 404)],
    ids=str,
)
def test_where_that_is_not_offered_each_is_created_by_itself(world, deployment, refuse, requested):
    parent, runs = create(world, deployment, refuse=refuse)
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert requested[f"POST {refuse[0].rsplit('/', 1)[-1]}"] == 1, "it is not tried again"


@pytest.mark.parametrize(
    "path", ["/events", "/task_runs/count", "/create_flow_run/bulk", "/flow_runs/filter"]
)
def test_a_server_that_fails_on_the_way_fails_nothing(world, deployment, path, requested):
    parent, runs = create(world, deployment, refuse=(path, 500, 1))
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert [run.parameters["part"] for run in runs] == list(range(MANY))


def test_a_deployment_that_is_gone_says_nothing_about_others(world, deployment, requested):
    refuse = ("/create_flow_run/bulk", 404, 1, "Deployment not found")
    parent, runs = create(world, deployment, refuse=refuse)
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert requested["POST bulk"] >= 2, "it is tried again"


def test_a_bulk_that_the_database_has_thrown_out_is_repeated(
    world, deployment, requested, monkeypatch
):
    send, thrown_out = httpx.AsyncClient.send, []

    async def throw_out_once(self, request, *args, **options):
        if request.url.path.endswith("/create_flow_run/bulk") and not thrown_out:
            thrown_out.append(request)
            lost = {"flow_run_id": str(uuid4()), "status": "CREATED", "error": None}
            locked = {"flow_run_id": None, "status": "FAILED", "error": "database is locked"}
            results = [lost, *[locked] * (MANY - 1)]
            return httpx.Response(200, json={"results": results}, request=request)
        return await send(self, request, *args, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", throw_out_once)
    parent, runs = create(world, deployment)
    assert thrown_out
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert requested["POST create_flow_run"] == 0, "none is asked for by itself"


def test_task_runs_that_are_not_recorded_are_created_by_themselves(
    world, deployment, monkeypatch, requested
):
    monkeypatch.setattr("supervised._bulk._RECORDED_SECONDS", 0.2)
    monkeypatch.setattr("supervised._bulk._RECORDED_SECONDS_EACH", 0.0)
    monkeypatch.setattr("supervised._compat.task_run_event", _of_nobody)
    parent, runs = create(world, deployment)
    assert {run.id for run in runs} == set(children_of(world, parent))
    assert requested["POST events"] == 1, "it is not tried again"


def _of_nobody(task_run):
    occurred = task_run.state.timestamp.isoformat()
    resource = {"prefect.resource.id": f"nobody.{task_run.id}"}
    return {"id": str(uuid4()), "occurred": occurred, "event": "nobody", "resource": resource}


def test_one_that_is_refused_does_not_take_its_neighbours_along(world, deployment):
    wrong = MANY // 2
    parent, results = create(
        world, deployment, parameters=lambda part: {"part": "none" if part == wrong else part}
    )
    assert isinstance(results[wrong], ParametersError)
    others = {run.id for part, run in enumerate(results) if part != wrong}
    assert others == set(children_of(world, parent))


def test_what_fits_is_not_checked_again_and_a_template_is_the_servers_to_fill_in(
    world, deployment, monkeypatch
):
    send, sent = httpx.AsyncClient.send, {}

    async def noted(self, request, *args, **options):
        if request.url.path.endswith("/create_flow_run/bulk"):
            sent.update((body["name"], body) for body in json.loads(request.content))
        return await send(self, request, *args, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", noted)
    template = {"__prefect_kind": "json", "value": "70"}
    _, runs = create(
        world, deployment, parameters=lambda part: {"part": template if part == 7 else part}
    )
    assert [run.parameters["part"] for run in runs] == [*range(7), 70, *range(8, MANY)]
    checked = [name for name, body in sent.items() if body.get("enforce_parameter_schema", True)]
    assert checked == ["part-7"]


def test_a_template_that_does_not_fit_once_it_is_filled_in_is_refused_alone(world, deployment):
    template = {"__prefect_kind": "json", "value": '"many"'}
    parent, results = create(
        world, deployment, parameters=lambda part: {"part": template if part == 7 else part}
    )
    assert isinstance(results[7], ParametersError)
    assert "'many' is not valid" in str(results[7])  # what a template has become
    others = {run.id for part, run in enumerate(results) if part != 7}
    assert others == set(children_of(world, parent))
