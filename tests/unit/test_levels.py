"""What a run further down leaves to the ancestor that ends the whole tree."""

from __future__ import annotations

import asyncio

import anyio

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

SLOW = 8.0


@supervised_flow
async def slow():
    """Take a while to end."""
    try:
        await asyncio.sleep(3600)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(SLOW)


@supervised_flow
async def root():
    """Keep a region."""
    await supervisor.spawn("region/test")


def keeps(**options):
    """Return a flow that keeps a leaf."""

    @supervised_flow
    async def region():
        await supervisor.spawn("slow/test", **options)

    return region


def running(prefect, region, leaf=slow):
    """Start a tree of three levels, and see that it runs."""
    prefect.deploy("region/test", region, runner="region")
    prefect.deploy("slow/test", leaf, runner="slow")
    run = prefect.start(root)
    prefect.until(lambda: sum(each.has_process for each in prefect.runs) == 3, within=60)
    prefect.advance(5)
    middle, leaf = run.below
    return run, middle, leaf


def test_a_run_further_down_leaves_at_once_when_its_children_have_been_asked():
    with FakePrefect() as prefect:
        run, middle, leaf = running(prefect, keeps())
        run.cancel()
        prefect.until(lambda: not middle.has_process, within=SLOW / 2)
        assert leaf.state.is_cancelling()
        assert leaf.has_process
        prefect.until(lambda: not prefect.alive, within=60)
        assert run.report.ok
        assert {receipt.flow_run_id for receipt in run.report.receipts} >= {middle.id, leaf.id}
        assert middle.report.delegated_to == run.id


def test_a_run_further_down_stays_for_a_child_that_is_to_be_waited_for():
    said = []

    @supervised_flow
    async def brief():
        while not said:
            await asyncio.sleep(0.1)

    with FakePrefect() as prefect:
        waits = keeps(on_parent={"cancelled": "wait"})
        run, middle, leaf = running(prefect, waits, leaf=brief)
        run.cancel()
        prefect.advance(3)
        assert leaf.state.is_running()
        assert middle.has_process
        said.append("that will do")
        prefect.until(lambda: not prefect.alive, within=10)
        assert leaf.state.is_completed()


def test_detached_children_are_made_known_one_after_the_other(monkeypatch):
    """SQLite refuses some of many writes at once, and each is repeated seconds later."""
    count = 9
    cut_loose, at_once, most = FakeOrchestrator.cut_loose, [], []

    async def counted(self, run, labels):
        at_once.append(run)
        most.append(len(at_once))
        await cut_loose(self, run, labels)
        at_once.pop()

    monkeypatch.setattr(FakeOrchestrator, "cut_loose", counted)

    @supervised_flow
    async def parent():
        for _ in range(count):
            supervisor.spawn("slow/test", on_parent={"failed": "detach"})
        await asyncio.sleep(20)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("slow/test", slow)
        run = prefect.start(parent)
        prefect.until(lambda: not run.has_process, within=60)
        assert [each.state.is_running() for each in prefect.alive] == [True] * count
    assert len(most) == count
    assert set(most) == {1}
