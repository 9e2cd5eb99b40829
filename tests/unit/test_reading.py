"""What a teardown reads while hundreds end, and how soon it knows that all are over."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from prefect.states import Cancelled, Pending, Running

from supervised import supervised_flow, supervisor
from supervised._reading import seconds_between_reads
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

SECONDS_OF_A_RUN = 0.0015  # 0.3 s a page of 200


@supervised_flow(grace_seconds=120)
async def parent(children):
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(10**6)


@pytest.fixture
def reads(monkeypatch):
    """The sizes of the reads by id; each takes its time."""
    sizes = []
    read_runs = FakeOrchestrator.read_runs

    async def slowly(self, run_ids):
        run_ids = list(run_ids)
        sizes.append(len(run_ids))
        await anyio.sleep(SECONDS_OF_A_RUN * len(run_ids))
        return await read_runs(self, run_ids)

    monkeypatch.setattr(FakeOrchestrator, "read_runs", slowly)
    return sizes


def play(children, seconds, reads):
    """Cancel a parent whose children end over so many seconds.

    Returns:
        How long after the last of them all was known to be over, and the report.
    """
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu", runner="nobody")
        prefect.runners["nobody"].kill()
        root = prefect.start("root/test", {"children": children})
        prefect.until(lambda: len(root.below) == children, within=10**4)
        for child in root.below:
            for each in (Pending(), Running()):
                prefect.server.propose(child.id, each)
        prefect.advance(30)
        reads.clear()
        for number, child in enumerate(root.below):
            after = 3 + seconds * (number + 1) / children
            prefect.loop.call_unowned(after, prefect.server.propose, child.id, Cancelled())
        root.cancel()
        prefect.until(lambda: root.report is not None, within=200)
        return root.report.seconds - 3 - seconds, root.report


def test_each_end_is_read_and_everything_only_at_times(reads):
    _, report = play(1000, 20.0, reads)
    assert report.ok
    assert sum(reads) < 6 * 1000, "it was fifteen times as many, and all of the server's time"


def test_the_last_end_in_a_small_tree_is_noticed_at_once(reads):
    late, report = play(8, 5.0, reads)
    assert report.ok
    assert late < 0.3


def test_ends_further_down_are_heard_of_too(reads):
    @supervised_flow
    async def middle():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(10**6)

    @supervised_flow
    async def top():
        supervisor.spawn("middle/test")
        await asyncio.sleep(10**6)

    with FakePrefect() as prefect:
        prefect.deploy("middle/test", middle)
        prefect.deploy("score/gpu", runner="nobody")
        prefect.runners["nobody"].kill()
        root = prefect.start(top)
        prefect.until(lambda: len(root.below) == 2, within=60)
        leaf = root.below[1]
        for each in (Pending(), Running()):
            prefect.server.propose(leaf.id, each)
        prefect.advance(10)
        root.cancel()
        prefect.advance(5.1)
        assert root.has_process
        prefect.server.propose(leaf.id, Cancelled())
        prefect.until(lambda: root.report is not None, within=0.5)
        assert root.report.ok


def test_hundreds_that_never_began_are_told_apart_by_one_read_and_closed_in_time(reads):
    """Nothing ends, so nothing is heard of: it has to be read, before it is too late to close."""
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu", runner="nobody")
        prefect.runners["nobody"].kill()
        root = prefect.start("root/test", {"children": 250})
        prefect.until(lambda: len(root.below) == 250, within=10**4)
        for child in root.below:
            prefect.server.propose(child.id, Pending())
            prefect.server.runs[child.id].infrastructure_pid = "host:1"
        prefect.advance(30)
        reads.clear()
        root.cancel()
        prefect.until(lambda: not root.is_alive, within=25)
        assert root.report.ok
        assert sum(reads) < 5 * 250


@pytest.mark.parametrize(
    ("taken", "hears", "rest"),
    [
        (0.0, False, 0.4),
        (0.0, True, 2.0),
        (0.5, False, 2.5),
        (0.5, True, 5.0),
        (3.0, False, 10.0),
        (3.0, True, 10.0),
        (8.0, True, 16.0),
    ],
)
def test_everything_is_read_the_more_seldom_the_longer_that_takes(taken, hears, rest):
    assert seconds_between_reads(taken, hears=hears) == pytest.approx(rest)
