"""A large tree is asked in chunks; a slow server is given time, a silent one is not waited for."""

import asyncio
from collections import Counter

import anyio
import pytest

from supervised import Supervisor, supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

MANY = 420
GRACE = 10.0
SECONDS_OF_A_RUN = 0.025  # of SQLite on two cores


class Enough(Exception):
    """What ends the parent."""


@supervised_flow(grace_seconds=GRACE)
async def parent(children):
    """Launch children, and fail when they have run for a while."""
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(60)
    raise Enough


class Asked(list):
    """The sizes of the requests for cancellation."""

    seconds_of_a_run = SECONDS_OF_A_RUN


@pytest.fixture
def asked(monkeypatch):
    """The sizes of the requests for cancellation; each takes its time."""
    sizes, one_writer = Asked(), anyio.Lock()
    request_cancel = FakeOrchestrator.request_cancel

    async def slowly(self, run_ids, message):
        sizes.append(len(run_ids))
        async with one_writer:
            await anyio.sleep(sizes.seconds_of_a_run * len(run_ids))
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", slowly)
    return sizes


def play(children):
    """Let a parent of so many fail; return its report and the seconds that it took to end."""
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu", takes=3600)
        root = prefect.start("root/test", {"children": children})
        prefect.until(
            lambda: sum(run.state.is_running() for run in prefect.runs) == children + 1, within=50
        )
        prefect.until(lambda: root.report is not None, within=300)
        return root.report


def test_a_tree_of_hundreds_is_asked_once_by_requests_that_a_slow_server_can_answer(asked):
    report = play(MANY)
    assert report.ok
    assert max(asked) <= 50
    assert sum(asked) == MANY, "nobody is asked twice"


def test_what_asking_takes_is_not_taken_from_the_grace(asked, monkeypatch):
    given_up = []
    monkeypatch.setattr(Supervisor, "log_given_up", given_up.append)
    asked.seconds_of_a_run = 2 * SECONDS_OF_A_RUN
    report = play(MANY)
    assert not given_up
    assert report.seconds > GRACE
    assert report.ok


def test_a_server_that_does_not_answer_holds_up_nobody_beyond_the_grace(monkeypatch):
    async def never(self, run_ids, message):
        await asyncio.sleep(3600)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", never)
    report = play(4)
    assert not report.ok
    assert report.seconds < GRACE + 5


def test_searches_that_take_long_leave_the_server_time_for_what_is_to_end(monkeypatch):
    read, searches = FakeOrchestrator.read_tagged, []

    async def slowly(self, tag, **options):
        searches.append(tag)
        await anyio.sleep(3.0)
        return await read(self, tag, **options)

    @supervised_flow(grace_seconds=60)
    async def patient():
        supervisor.spawn("score/gpu")
        await asyncio.sleep(30)
        raise Enough

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", runner="gone")
        root = prefect.start(patient)
        prefect.until(lambda: sum(run.state.is_running() for run in prefect.runs) == 2, within=25)
        prefect.runners["gone"].kill()  # so that nothing ends
        monkeypatch.setattr(FakeOrchestrator, "read_tagged", slowly)
        prefect.until(lambda: root.report is not None, within=300)
    assert not root.report.ok
    assert 3 <= len(searches) <= 6  # nine without a rest


@pytest.mark.parametrize("children", [50, 200, 800])
def test_a_teardown_makes_a_request_for_each_fifty_runs_and_few_others(monkeypatch, children):
    call, request_cancel = FakeOrchestrator.call, FakeOrchestrator.request_cancel
    requests, asking = Counter(), set()

    async def counted(self, act):
        if self in asking:
            requests[self] += 1
        return await call(self, act)

    async def ask(self, run_ids, message):
        asking.add(self)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "call", counted)
    monkeypatch.setattr(FakeOrchestrator, "request_cancel", ask)
    report = play(children)
    assert report.ok
    assert requests.total() <= 2 * children / 50 + 25  # 26 for 200, and 43 for 800
