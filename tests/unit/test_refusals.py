"""Teardowns and scopes where the server cannot do what it is asked, or has forgotten a run."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from prefect.states import Cancelled, Crashed, Failed

from supervised import supervised_flow, supervisor
from supervised._api import Ack
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

LONG = 10**6


@supervised_flow(on_child_failure="ignore")
async def root(children: int):
    spawned = [supervisor.spawn("score/gpu", {"part": part}) for part in range(children)]
    await asyncio.gather(*(each.aresult(raise_on_failure=False) for each in spawned))


def running(prefect, children):
    """Start a root whose children all run, and return it."""
    prefect.deploy("root/test", root, runner="root")
    prefect.deploy("score/gpu", takes=LONG)
    run = prefect.start("root/test", {"children": children})
    prefect.until(
        lambda: len(run.below) == children and all(each.state.is_running() for each in run.below),
        within=LONG,
    )
    prefect.advance(15)
    return run


def test_what_the_server_could_not_do_at_once_is_asked_again_until_it_can(monkeypatch):
    asked = Counter()
    request_cancel = FakeOrchestrator.request_cancel

    async def request(self, run_ids, message):
        locked = [each for each in run_ids if each == stubborn and asked[each] < 3]
        asked.update(run_ids)
        done = await request_cancel(self, [each for each in run_ids if each not in locked], message)
        return done + [Ack(each, None, "database is locked") for each in locked]

    with FakePrefect() as prefect:
        run = running(prefect, 5)
        stubborn = run.below[2].id
        monkeypatch.setattr(FakeOrchestrator, "request_cancel", request)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=20)
        assert asked[stubborn] == 4
        assert run.report.ok


def test_a_run_that_is_deleted_below_a_child_is_told_of_and_not_waited_for():
    @supervised_flow
    async def middle():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(LONG)

    @supervised_flow
    async def top():
        supervisor.spawn("middle/test")
        await asyncio.sleep(LONG)

    with FakePrefect() as prefect:
        prefect.deploy("top/test", top, runner="top")
        prefect.deploy("middle/test", middle)
        prefect.deploy("score/gpu", takes=LONG, runner="gpu")
        run = prefect.start("top/test")
        prefect.until(lambda: run.below and run.below[0].below, within=60)
        leaf = run.below[0].below[0]
        prefect.until(lambda: leaf.state.is_running(), within=60)
        prefect.advance(10)
        prefect.runners["gpu"].kill()
        began = prefect.seconds
        run.cancel()
        prefect.advance(1)
        prefect.server.delete(leaf.id)
        prefect.until(lambda: run.report is not None, within=60)
        assert prefect.seconds - began < 12
        (told,) = run.report.unverified
        assert (told.flow_run_id, "deleted" in told.reason) == (leaf.id, True)


@pytest.mark.parametrize("state", [Crashed, Failed, Cancelled])
def test_of_many_children_that_end_badly_together_what_they_left_is_looked_for_together(
    monkeypatch, state
):
    requests = Counter()
    for name in ("read_children", "read_tagged", "read_parents"):
        call = getattr(FakeOrchestrator, name)

        def counted(self, *given, call=call, **options):
            requests[call.__name__] += 1
            return call(self, *given, **options)

        monkeypatch.setattr(FakeOrchestrator, name, counted)
    with FakePrefect() as prefect:
        run = running(prefect, 100)
        requests.clear()
        for child in run.below:
            prefect.server.propose(child.id, state(message="by itself"))
        prefect.until(lambda: not run.is_alive, within=120)
        assert requests.total() < 40
