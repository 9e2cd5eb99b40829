"""A parent that is cancelled while hundreds of its children wait for their creation."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from supervised import supervised_flow, supervisor
from supervised._batch import Batches
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

CHILDREN = 500
SECONDS_OF_A_RUN = 0.02


@supervised_flow
async def parent():
    """Launch more than can be created at once."""
    for part in range(CHILDREN):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(3600)


@pytest.fixture
def reads(monkeypatch):
    """Creates runs a hundred at a time; keeps what the tree was read by."""
    create, made, reads = FakeOrchestrator.create_deployment_run, {}, []

    def batches(api):
        turn = anyio.Lock()  # of two batches, one is being created

        async def send(items):
            async with turn:
                wanted = [request for _, request in items if request.begin()]
                await anyio.sleep(SECONDS_OF_A_RUN * len(wanted))
                return [await create(api, *item) for item in items]

        return Batches(send, limit=100)

    async def submit(self, deployment, request):
        if self not in made:
            made[self] = batches(self)
        return await made[self].submit(deployment.id, (deployment, request))

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", submit)
    for name in ("read_tagged", "visit_children", "request_cancel"):
        monkeypatch.setattr(FakeOrchestrator, name, _kept(name, reads))
    return reads


def _kept(name, calls):
    call = getattr(FakeOrchestrator, name)

    async def kept(self, *given, **options):
        calls.append(name)
        return await call(self, *given, **options)

    return kept


def test_no_run_is_created_that_nobody_wants_and_what_exists_is_ended_in_bulk(reads):
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu")
        root = prefect.start("root/test")
        prefect.until(lambda: len(root.below) >= 100, within=60)
        reads.clear()
        before = len(root.below)
        root.cancel()
        prefect.until(lambda: not root.is_alive, within=60)
        assert len(root.below) <= before + 100, "one request was under way"
        assert not any(run.is_alive for run in root.below)
        assert root.report.ok
        assert len(root.report.receipts) == CHILDREN
    assert len(reads) < 40


@pytest.mark.parametrize(("count", "most"), [(1, 1), (3, 3), (40, 12)])
def test_children_that_are_created_together_are_told_of_together(count, most, caplog):
    @supervised_flow
    async def parent():
        for part in range(count):
            supervisor.spawn("score/gpu", {"part": part}, name=f"part {part}")

    with FakePrefect() as prefect, caplog.at_level("INFO"):
        prefect.deploy("score/gpu", takes=1)
        run = prefect.start(parent)
        prefect.until(lambda: not run.is_alive, within=60)
        told = [each.getMessage() for each in caplog.records if "Spawned" in each.getMessage()]
        assert len(told) <= most
        for below in run.below:
            assert str(below.flow_run.id) in "\n".join(told)
