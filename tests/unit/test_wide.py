"""What each of many supervised children costs the server does not grow with their number."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator, Stream


def called(monkeypatch, name, note):
    """Call *note* with what each call of the seam is given."""
    call = getattr(FakeOrchestrator, name)

    async def noted(self, *given, **options):
        await note(*given, **options)
        return await call(self, *given, **options)

    monkeypatch.setattr(FakeOrchestrator, name, noted)


@supervised_flow
async def launches_nothing(part: int = 0):
    """Be a supervised child without children."""
    await asyncio.sleep(3600)


@supervised_flow
async def of_supervised(children: int):
    """Launch supervised children."""
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(3600)


@contextlib.contextmanager
def supervised_children(count):
    """A tree of supervised children, all of which run."""
    with FakePrefect() as prefect:
        prefect.deploy("root/test", of_supervised, runner="root")
        prefect.deploy("score/gpu", launches_nothing)
        root = prefect.start("root/test", {"children": count})
        prefect.until(lambda: len(root.below) == count, within=60)
        prefect.until(lambda: all(run.state.is_running() for run in root.below), within=60)
        prefect.advance(20)
        yield prefect, root


def test_a_supervised_child_that_waits_makes_one_request_for_all_it_watches(monkeypatch):
    reads = Counter()

    async def note(run_ids):
        reads["runs"] += 1

    with supervised_children(10) as (prefect, _):
        called(monkeypatch, "read_runs", note)
        prefect.advance(600)
    of_the_parent = 600 / 10
    assert reads["runs"] <= of_the_parent + 10 * 600 / 7.5 + 20


def test_who_has_no_children_is_not_told_of_the_whole_tree(monkeypatch):
    """Or a tree of a thousand would mean a million messages."""

    put, told = Stream.put, Counter()

    def counted(self, event):
        told[count] += 1
        return put(self, event)

    monkeypatch.setattr(Stream, "put", counted)
    for count in (10, 40):
        with supervised_children(count) as (prefect, root):
            told[count] = 0  # only what the end takes
            root.cancel()
            prefect.until(lambda: not prefect.alive, within=120)
    assert told[40] <= 5 * told[10]


@supervised_flow
async def inner(children: int):
    """Be a scope of its own in its parent's process."""
    for part in range(children):
        supervisor.spawn("score/plain", {"part": part})


@supervised_flow
async def of_scopes(scopes: int, children: int):
    """Launch children by several scopes of one process."""
    for _ in range(scopes):
        supervisor.spawn(inner, {"children": children})
    await asyncio.sleep(3600)


def test_one_stream_serves_all_scopes_and_children_of_a_process(monkeypatch):
    open_now, most = Counter(), Counter()
    stream = FakeOrchestrator._stream

    @contextlib.asynccontextmanager
    async def counted(self, resources):
        open_now[self] += 1
        most[self] = max(most[self], open_now[self])
        try:
            async with stream(self, resources) as events:
                yield events
        finally:
            open_now[self] -= 1

    monkeypatch.setattr(FakeOrchestrator, "_stream", counted)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", of_scopes, runner="root")
        prefect.deploy("score/plain")
        root = prefect.start("root/test", {"scopes": 4, "children": 50})
        prefect.until(lambda: len(prefect.runs) == 1 + 4 + 200, within=120)
        prefect.advance(60)
        assert not root.state.is_final()
        of_runners = 2  # which hear of everything
        assert list(most.values()) == [1] * (of_runners + 1)
