"""What the unit tests share: children without a supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from supervised._child import Child
from supervised._types import DEFAULT_ON_PARENT
from supervised.testing._client import FakeOrchestrator


def _make_child(**overrides):
    options = {
        "name": "part",
        "kind": "deployment",
        "key": "score/gpu:1",
        "target": "score/gpu",
        "on_parent": DEFAULT_ON_PARENT,
        "on_done": lambda child: None,
        "ask_cancel": lambda child, reason: None,
        "ask_detach": lambda child: None,
    }
    child = Child(**{**options, **overrides})
    child.attempt.is_queued, child.attempt.was_requested = False, True
    return child


async def _until(question):
    while not question():
        await asyncio.sleep(0)


@pytest.fixture(scope="session")
def until():
    """A coroutine function that lets other tasks run until the answer is true."""
    return _until


@pytest.fixture(scope="session")
def make_child():
    """A function that builds a launched child which answers to nobody; keywords override."""
    return _make_child


@pytest.fixture
def answers_late(monkeypatch):
    """The first run of a deployment is created at once, and that is answered 9 s later."""
    create, slow = FakeOrchestrator.create_deployment_run, [True]

    async def create_and_answer_late(*given):
        run = await create(*given)
        if slow:
            slow.clear()
            await asyncio.sleep(9)
        return run

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", create_and_answer_late)


@pytest.fixture(autouse=True, scope="module")
def _no_server() -> Iterator[None]:
    """Tests that ran before may have started a server; nothing here may know of it."""
    with temporary_settings(restore_defaults={PREFECT_API_URL, PREFECT_UI_URL}):
        yield
