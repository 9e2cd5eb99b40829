"""A parent of hundreds of children is torn down without a request for each, and none too soon."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

import anyio
from prefect.states import Completed, Pending, Running

from supervised import _clock, supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator, Stream

MANY = 400
KILL_CHECK_SECONDS = 3.3  # after which a runner that was told of a run has finished it


@supervised_flow
async def parent(children: int, live: int = 0):
    """Launch many children that end, and later a few that do not."""
    for part in range(children):
        supervisor.spawn("quick/cpu", {"part": part})
    await asyncio.sleep(60)
    for part in range(live):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(3600)


def called(monkeypatch, name, note):
    """Call *note* with what each call of the seam is given."""
    call = getattr(FakeOrchestrator, name)

    async def noted(self, *given, **options):
        await note(*given, **options)
        return await call(self, *given, **options)

    monkeypatch.setattr(FakeOrchestrator, name, noted)


def end_all(prefect, root):
    for run_id in [run_id for run_id in prefect.server.runs if run_id != root.id]:
        for state in (Pending(), Running(), Completed()):
            prefect.server.propose(run_id, state)


def test_below_children_that_are_long_over_is_searched_once(monkeypatch):
    asked, full = Counter(), Counter()

    async def note(parents, *, live_only=False):
        asked.update(parents)
        full.update([] if live_only else parents)

    called(monkeypatch, "read_children", note)
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu")
        prefect.deploy("quick/cpu", runner="nobody")
        prefect.runners["nobody"].kill()
        root = prefect.start("root/test", {"children": MANY, "live": 3})
        prefect.until(lambda: len(prefect.server.runs) == MANY + 1, within=60)
        finished = [run_id for run_id in prefect.server.runs if run_id != root.id]
        end_all(prefect, root)
        prefect.advance(90)
        asked.clear()
        root.cancel()
        prefect.until(lambda: not root.is_alive, within=60)
        assert root.report.ok
        assert asked[root.id] >= 2, "the tree is searched again"
    assert {asked[run_id] for run_id in finished} == {1}
    assert full[root.id] == 1, "what is over of its own children is read once"


def test_a_run_that_was_asked_late_has_as_long_to_end_as_the_first(monkeypatch):
    """Each request takes six seconds, so the last children are asked after as many."""
    nudged, closed = {}, {}

    async def be_slow(run_ids, message):
        await anyio.sleep(6.0)

    async def note_nudge(run_id):
        nudged[run_id] = _clock.monotonic()

    async def note_close(run_id, *_, **__):
        closed[run_id] = _clock.monotonic()

    called(monkeypatch, "request_cancel", be_slow)
    called(monkeypatch, "nudge", note_nudge)
    called(monkeypatch, "close_run", note_close)
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("quick/cpu", runner="nobody")
        prefect.runners["nobody"].kill()
        root = prefect.start("root/test", {"children": 52})
        prefect.until(lambda: len(prefect.server.runs) == 52 + 1, within=60)
        below = [run_id for run_id in prefect.server.runs if run_id != root.id]
        for run_id in below:
            prefect.server.propose(run_id, Pending())
        root.cancel()
        prefect.until(lambda: not root.is_alive, within=300)
        assert root.report.ok
    assert set(nudged) == set(closed) == set(below)
    assert min(closed[run_id] - nudged[run_id] for run_id in below) > KILL_CHECK_SECONDS


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
