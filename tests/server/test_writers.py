"""Two creations go side by side on a database with several writers, and never on SQLite."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from prefect import flow
from prefect.states import Running
from support.databases import world_on
from test_bulk import request_for

from supervised._api import open_orchestrator

pytestmark = pytest.mark.server
MANY = 200  # two requests


@flow(name="writers-parent")
def parent_flow() -> None:
    """What the parents run."""


@flow(name="writers-child")
def child_flow(part: int = 0) -> None:
    """What the children run."""


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request):
    return request.param


@pytest.fixture
def world(kind, tmp_path):
    """A server of its own, on either database."""
    with world_on(kind, tmp_path) as world:
        yield world


@pytest.fixture
def seen(monkeypatch):
    """Counts requests by their last part, and how many that create were under way at a time."""
    counts, under_way = Counter(), []
    send = httpx.AsyncClient.send

    async def counted(self, request, *args, **options):
        name = request.url.path.rstrip("/").rsplit("/", 1)[-1]
        counts[f"{request.method} {name}"] += 1
        if name != "bulk":
            return await send(self, request, *args, **options)
        under_way.append(request)
        counts["most at a time"] = max(counts["most at a time"], len(under_way))
        try:
            return await send(self, request, *args, **options)
        finally:
            under_way.remove(request)

    monkeypatch.setattr(httpx.AsyncClient, "send", counted)
    return counts


def create(world):
    """Create many runs at once; return their parent."""
    world.client.create_deployment(world.client.create_flow(child_flow), "writers")
    parent = world.client.create_flow_run(parent_flow, state=Running()).id

    async def run():
        async with open_orchestrator() as api:
            found = await api.read_deployment("writers-child/writers")
            requests = [request_for(parent, part) for part in range(MANY)]
            runs = await asyncio.gather(
                *(api.create_deployment_run(found, request) for request in requests)
            )
            assert len({run.id for run in runs}) == MANY

    asyncio.run(run())
    return parent


def test_as_many_creations_go_side_by_side_as_the_database_has_writers(
    world, kind, seen, monkeypatch
):
    monkeypatch.setattr("supervised._writers._AGAIN_SECONDS", 1.0)
    monkeypatch.setattr("supervised._bulk._RECORDED_SECONDS", 60.0)
    monkeypatch.setattr("supervised._bulk._PAUSES", (0.0, *[0.3] * 20))
    writers = {"sqlite": 1, "postgresql": 2}[kind]
    # A creation that is quick tells nothing, nor does one on a server that is busy otherwise.
    for _ in range(5):
        parent = create(world)
        assert len(world.tree(parent)) == 1 + MANY
        if seen["most at a time"] == writers:
            break
    assert seen["most at a time"] == writers
    flows = {each.name for each in world.client.read_flows()}
    assert flows == {"writers-parent", "writers-child"}, "what was written has changed nothing"
