"""Runs that nobody has: each is ended, or told of, whatever the server makes of the request."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Scheduled

from supervised import Restart, SpawnError, supervised_flow, supervisor
from supervised._api import Ack
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

LOCKED = "database is locked"


def unanswered(what="no answer"):
    return httpx.ReadTimeout(what, request=httpx.Request("POST", "http://fake"))


def told_of(left, caplog, words):
    return [record for record in caplog.records if words in record.getMessage()] or not left


@pytest.fixture
def locked(monkeypatch):
    """The first request for each run's cancellation fails, as it does while SQLite is locked."""
    request_cancel, refused = FakeOrchestrator.request_cancel, []

    async def request(self, run_ids, message):
        fresh = [run_id for run_id in run_ids if run_id not in refused]
        refused.extend(fresh)
        others = [run_id for run_id in run_ids if run_id not in fresh]
        acks = await request_cancel(self, others, message) if others else []
        return [*(Ack(run_id, None, LOCKED) for run_id in fresh), *acks]

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", request)
    return refused


def lose_answers(monkeypatch, count=1000):
    """Create runs, and answer that only when nobody asks any more."""
    create, lost = FakeOrchestrator.create_deployment_run, []

    async def give_no_answer(*given):
        run = await create(*given)
        if run is not None and len(lost) < count:
            lost.append(run)
            await asyncio.sleep(5)
            raise unanswered()
        return run

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", give_no_answer)


def start_and_give_up(prefect):
    """Start a parent, and give its child up before it is known that the run exists."""
    handles = []

    @supervised_flow(on_child_failure="ignore")
    async def root():
        handles.append(supervisor.spawn("score/gpu", key="late"))
        await asyncio.sleep(60)

    prefect.deploy("score/gpu", takes=7200)
    run = prefect.start(root)
    prefect.until(lambda: run.below)
    (late,) = handles
    late.settle("abandoned", of=late.attempt)
    return run


def test_the_run_of_a_launch_that_was_given_up_is_ended_though_the_server_was_locked(
    locked, monkeypatch, caplog
):
    lose_answers(monkeypatch)

    @supervised_flow(on_child_failure="ignore")
    async def root():
        with pytest.raises(SpawnError):
            await supervisor.spawn("score/gpu")
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start(root)
        prefect.until(lambda: not run.is_alive, within=300)
        assert run.state.is_completed()
        assert locked, "it was asked once"
        prefect.advance(120)
        left = [each for each in run.below if each.is_alive]
        assert told_of(left, caplog, LOCKED), f"alive, and nobody says so: {left}"


@pytest.mark.usefixtures("answers_late")
def test_a_run_that_is_answered_too_late_is_ended_though_the_server_was_locked(locked, caplog):
    with FakePrefect() as prefect:
        run = start_and_give_up(prefect)
        prefect.until(lambda: not run.is_alive, within=300)
        assert run.state.is_completed()
        assert locked, "it was asked once"
        prefect.advance(120)
        left = [each for each in run.below if each.is_alive]
        assert told_of(left, caplog, LOCKED), f"alive, and nobody says so: {left}"


def test_a_run_of_an_earlier_attempt_that_is_in_the_way_is_asked_again(locked):
    attempts = []

    @supervised_flow(retries=1, retry_delay_seconds=1, on_parent={"failed": "detach"})
    async def root():
        attempts.append(1)
        await asyncio.sleep(1)
        child = supervisor.spawn(
            "score/gpu", {"part": len(attempts)}, key="part", on_parent="cancel"
        )
        if len(attempts) == 1:
            await asyncio.sleep(20)
            prefect.process_of(run.id).kill()
            await asyncio.sleep(1)
        await asyncio.sleep(60)
        return child.outcome

    with FakePrefect() as prefect:
        prefect.has_hooks = False
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start("root/test")
        prefect.until(lambda: len(attempts) == 1 and run.below and run.below[0].state.is_running())
        prefect.runners["root"].kill()
        run.kill()
        prefect.replace_runner("root")
        prefect.server.propose(run.id, Scheduled())
        prefect.until(lambda: len(attempts) == 2, within=60)
        prefect.advance(50)
        assert [each.state.name for each in run.below] == ["Cancelled", "Running"]


def most_alive(prefect, run, seconds):
    most = Counter()
    for _ in range(int(seconds)):
        prefect.advance(1)
        live = Counter(
            each.flow_run.labels["supervised.key"] for each in run.below if each.is_alive
        )
        most |= live
    return most


def test_a_restart_that_overtakes_the_adoption_of_an_earlier_run_leaves_one_run(monkeypatch):
    read, attempts = FakeOrchestrator.read_runs, []

    async def read_slowly(self, run_ids):
        wanted = list(run_ids)
        if wanted == [leaf.id]:
            await asyncio.sleep(9)
        return await read(self, wanted)

    @supervised_flow
    async def flaky(attempt):
        await asyncio.sleep(5)
        if len(attempts) == 2 and len(tries) == 0:
            tries.append(1)
            raise ValueError("not yet")
        await asyncio.sleep(600)

    tries = []

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        attempts.append(1)
        if len(attempts) == 2:
            supervisor.spawn(flaky, {"attempt": 2})
            await asyncio.sleep(3)
        supervisor.spawn("score/gpu", key="late")
        await asyncio.sleep(600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        prefect.runners["root"].kill()
        run.kill()
        prefect.replace_runner("root")
        leaf = run.below[0]
        monkeypatch.setattr(FakeOrchestrator, "read_runs", read_slowly)
        prefect.server.propose(run.id, Scheduled())
        prefect.until(lambda: len(attempts) == 2, within=60)
        most = most_alive(prefect, run, 120)
        assert most["late"] == 1


def test_a_restart_after_a_launch_that_was_never_answered_leaves_one_run(monkeypatch):
    create = FakeOrchestrator.create_deployment_run

    async def give_no_answer(*given):
        run = await create(*given)
        if prefect.seconds < 90:
            await asyncio.sleep(5)
            raise unanswered()
        return run

    monkeypatch.setattr(FakeOrchestrator, "create_deployment_run", give_no_answer)
    tries = []

    @supervised_flow
    async def flaky():
        tries.append(1)
        await asyncio.sleep(60)
        if len(tries) == 1:
            raise ValueError("not yet")
        await asyncio.sleep(600)

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        supervisor.spawn(flaky)
        await asyncio.sleep(57)
        supervisor.spawn("score/gpu", key="late")
        await asyncio.sleep(600)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start(root)
        prefect.advance(56)
        most = most_alive(prefect, run, 120)
        assert most["late"] == 1


@pytest.mark.usefixtures("answers_late")
def test_a_late_run_that_could_not_be_ended_is_told_of(monkeypatch, caplog):

    async def refuse(self, run_ids, message):
        raise unanswered("no answer at all")

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", refuse)

    with FakePrefect() as prefect:
        run = start_and_give_up(prefect)
        prefect.until(lambda: not run.is_alive, within=300)
        told = [r for r in caplog.records if "no answer at all" in r.getMessage() or r.exc_info]
        assert told, [r.getMessage() for r in caplog.records]


def refused(status):
    request = httpx.Request("POST", "http://fake")
    response = httpx.Response(status, request=request, json={"detail": "no"})
    return PrefectHTTPStatusError(f"status {status}", request=request, response=response)


@pytest.mark.usefixtures("answers_late")
@pytest.mark.parametrize(("status", "gives_up"), [(401, True), (403, True), (429, False)])
def test_of_a_late_run_the_server_is_asked_again_only_if_that_may_help(
    monkeypatch, caplog, status, gives_up
):
    request_cancel, asked = FakeOrchestrator.request_cancel, []

    async def refuse(self, run_ids, message):
        asked.append(run_ids)
        if len(asked) < 5:
            raise refused(status)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", refuse)

    with FakePrefect() as prefect:
        run = start_and_give_up(prefect)
        prefect.advance(40)
        assert len(asked) == (1 if gives_up else 5)
        (below,) = run.below
        assert below.is_alive == gives_up
        told = [record for record in caplog.records if "by hand" in record.getMessage()]
        assert len(told) == gives_up


@pytest.mark.usefixtures("answers_late")
def test_a_run_that_is_answered_too_late_is_ended_though_there_is_no_grace():
    @supervised_flow(grace_seconds=0, on_child_failure="ignore")
    async def root():
        late = supervisor.spawn("score/gpu")
        await asyncio.sleep(3)
        late.settle("abandoned", of=late.attempt)
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start(root)
        prefect.until(lambda: not run.is_alive, within=300)
        assert [below.state.name for below in run.below] == ["Cancelled"]


def test_what_many_children_have_left_that_crashed_together_is_ended_by_few_searches(monkeypatch):
    read, searches = FakeOrchestrator.read_tagged, []
    request_cancel, told = FakeOrchestrator.request_cancel, {}

    async def ask(self, run_ids, message):
        told.update(dict.fromkeys(run_ids, message.partition(" [")[0]))
        return await request_cancel(self, run_ids, message)

    async def noted(self, tag, **options):
        searches.append(self)
        return await read(self, tag, **options)

    @supervised_flow
    async def mid():
        for key in "ab":
            supervisor.spawn("score/gpu", key=key)
        await asyncio.sleep(600)

    @supervised_flow(on_child_failure="ignore")
    async def root():
        for part in range(20):
            supervisor.spawn("mid/test", key=f"mid-{part}", name=f"mid-{part % 3}")
        await asyncio.sleep(600)

    with FakePrefect() as prefect:
        prefect.has_hooks = False
        prefect.deploy("mid/test", mid, runner="mids")
        prefect.deploy("score/gpu", takes=7200)
        run = prefect.start(root)
        prefect.until(lambda: sum(each.state.is_running() for each in prefect.runs) == 61)
        prefect.advance(5)
        monkeypatch.setattr(FakeOrchestrator, "read_tagged", noted)
        monkeypatch.setattr(FakeOrchestrator, "request_cancel", ask)
        mids = [each for each in run.below if each.flow_run.name.startswith("mid")]
        leaves = [each for each in run.below if each.id not in {mid.id for mid in mids}]
        assert (len(mids), len(leaves)) == (20, 40)
        for each in mids:
            each.kill()
        prefect.until(lambda: not any(leaf.is_alive for leaf in leaves), within=30)
        assert not run.state.is_final()
    above = {leaf.id: mid.flow_run.name for mid in mids for leaf in mid.below}
    assert told == {
        run_id: f"Cancelled because parent '{name}' crashed" for run_id, name in above.items()
    }
    assert len(searches) <= 20  # 80 when each of them had a teardown of its own
