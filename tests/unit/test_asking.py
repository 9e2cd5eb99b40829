"""Requests for cancellation that are slow, cut off or never sent, and what receipts say of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import anyio
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from supervised import _identity, supervised_flow, supervisor
from supervised._api import Ack
from supervised._asking import by_message, seconds_for_all, seconds_for_one
from supervised._mandate import Mandate
from supervised._pace import Pace
from supervised._policy import Budget, parent_reason
from supervised._targets import Target, Targets
from supervised._teardown import Teardown
from supervised._types import CancelReason
from supervised._watch import Watcher
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator

GRACE = 20.0


class Enough(Exception):
    """What ends the parent."""


@supervised_flow(grace_seconds=GRACE)
async def parent(children):
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(60)
    raise Enough


class Slow:
    """A server with one writer: what it was sent, and what of that it carried out in time."""

    def __init__(self, seconds_each):
        self.seconds_each = seconds_each
        self.sent, self.answered, self.asked = [], [], Counter()


@pytest.fixture
def slow(monkeypatch):
    """A server that needs 0.3 s to ask a run; the tests change that."""
    server, writer = Slow(0.3), anyio.Lock()
    request_cancel = FakeOrchestrator.request_cancel

    async def slowly(self, run_ids, message):
        server.sent.append(len(run_ids))
        async with writer:
            await anyio.sleep(server.seconds_each * len(run_ids))
        server.answered.append(len(run_ids))
        server.asked.update(run_ids)
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", slowly)
    return server


def play(children, **options):
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu", takes=3600, **options)
        root = prefect.start("root/test", {"children": children})
        prefect.until(
            lambda: sum(run.state.is_running() for run in prefect.runs) == children + 1, within=50
        )
        prefect.until(lambda: root.report is not None, within=600)
        return root.report


def test_a_server_slower_than_was_thought_is_asked_for_less_at_first_and_for_everything(slow):
    report = play(210)
    assert slow.sent[:3] == [50, 12, 24], "the first was given up"
    assert max(slow.asked.values()) == 1
    assert slow.asked.total() == 210
    assert len(slow.sent) < 10
    assert report.ok


def test_what_was_never_asked_is_told_of_as_such(slow):
    slow.seconds_each = 3.0
    report = play(210)
    never = [each for each in report.unverified if "never asked" in each.reason]
    assert never
    assert all(each.requested_at is None for each in never)
    assert not slow.asked.keys() & {each.flow_run_id for each in never}
    in_vain = [each for each in report.unverified if "request" in each.reason]
    assert all(each.requested_at is not None for each in in_vain)
    assert not any("after the request" in each.reason for each in never)


def test_children_here_are_told_at_once_however_long_the_server_takes(slow):
    seen = {}

    @supervised_flow
    async def inline():
        try:
            await asyncio.sleep(3600)
        finally:
            seen["interrupted"] = prefect.seconds

    @supervised_flow(grace_seconds=GRACE)
    async def mixed():
        for part in range(100):
            supervisor.spawn("score/gpu", {"part": part})
        supervisor.spawn(inline)
        await asyncio.sleep(60)
        seen["failed"] = prefect.seconds
        raise Enough

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=3600)
        root = prefect.start(mixed)
        prefect.until(lambda: "interrupted" in seen, within=200)
        assert seen["interrupted"] - seen["failed"] < 1
        assert not slow.answered
        prefect.until(lambda: root.report is not None, within=600)
        assert root.report.ok


def test_a_request_that_is_cut_off_is_made_again(monkeypatch):
    """One that the server carries out though nobody waits any more is repeated in vain."""
    sent = []
    request_cancel = FakeOrchestrator.request_cancel

    async def hang_once(self, run_ids, message):
        sent.append(len(run_ids))
        acks = await request_cancel(self, run_ids, message)
        if len(sent) == 1:
            await anyio.sleep(3600)
        return acks

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", hang_once)
    report = play(4)
    assert sent[0] == 4
    assert sum(sent[1:]) <= 4, "and with fewer runs"
    assert report.ok


def test_what_has_not_agreed_is_asked_again_together(monkeypatch):
    sizes, refused = [], Running()
    request_cancel = FakeOrchestrator.request_cancel

    async def disagree(self, run_ids, message):
        sizes.append(len(run_ids))
        if sum(sizes) <= 120:
            return [Ack(run_id, refused, "not yet") for run_id in run_ids]
        return await request_cancel(self, run_ids, message)

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", disagree)
    report = play(120)
    assert sizes == [50, 50, 20] * 2
    assert report.ok
    assert all("asked again" in each.escalations for each in report.receipts)


def test_of_what_is_not_asked_again_the_receipt_does_not_say_that_it_was_never_asked(
    monkeypatch, make_child
):
    """Whose it is by now, nobody could tell after the first request."""
    asked, refused = [], Running()

    async def disagree(self, run_ids, message):
        asked.append(list(run_ids))
        return [Ack(run_id, refused, "not yet") for run_id in run_ids]

    async def is_superseded():
        if asked:
            raise OSError("no answer")
        return False

    async def tear_down(child):
        api, run_id = prefect.connect(), uuid4()
        teardown = Teardown(
            api,
            Watcher(api),
            flow_name="parent",
            lineage=_identity.Lineage(run_id, (run_id,)),
            cause="cancelled",
            reason=parent_reason("cancelled", "parent"),
            children=lambda: [child],
            in_body=set,
            budget=Budget(GRACE),
            is_superseded=is_superseded,
        )
        return await teardown.run()

    monkeypatch.setattr(FakeOrchestrator, "request_cancel", disagree)
    with FakePrefect() as prefect:
        child = make_child()
        child.assign_run(prefect.server.create("leaf", state=Running(), deployment_id=uuid4()))
        (receipt,) = prefect.call(tear_down(child)).receipts
    assert asked == [[child.flow_run_id]]
    assert receipt.requested_at is not None
    assert receipt.reason.startswith("still Running; not asked (again): the server does not tell")


def a_reason(message):
    return CancelReason(source="explicit", message=message)


@pytest.fixture
def mandate():
    run_id = uuid4()
    return Mandate(
        lineage=_identity.Lineage(run_id, (run_id,)),
        cause="cancelled",
        reason=a_reason("the night is over"),
        tops={run_id: None},
    )


def with_reasons(make_child, *messages):
    """Children that were cancelled for these reasons, as targets."""
    targets = Targets()
    for number, message in enumerate(messages):
        child = make_child(key=str(number))
        child.mark_cancel(a_reason(message))
        run = FlowRun(id=uuid4(), flow_id=uuid4())
        targets.add(Target(name=child.name, depth=1, child=child, run=run))
    return targets


def told(grouped):
    """What each message says after its first words, and to how many."""
    words = (message.partition(" [")[0].partition("because ")[2] for message in grouped)
    return list(zip(words, map(len, grouped.values()), strict=True))


def test_who_is_asked_for_the_same_reason_is_asked_together_and_told_who_asks(make_child, mandate):
    targets = with_reasons(make_child, "late", "broken", "late")
    grouped = by_message(list(targets), targets, mandate)
    assert told(grouped) == [("late", 2), ("broken", 1)]
    assert {_identity.marked_by(message) for message in grouped} == {mandate.lineage.run_id}


def test_there_is_one_message_to_all_if_there_were_too_many(make_child, mandate):
    targets = with_reasons(make_child, *"abcd")
    assert len(by_message(list(targets), targets, mandate)) == 4
    targets = with_reasons(make_child, *"abcde")
    assert told(by_message(list(targets), targets, mandate)) == [("the night is over", 5)]


def test_who_has_agreed_before_is_told_the_reason_of_this_teardown(make_child, mandate):
    targets = with_reasons(make_child, "late", "late")
    first, _ = targets
    first.child.mark_acknowledged()
    assert told(by_message(list(targets), targets, mandate)) == [
        ("the night is over", 1),
        ("late", 1),
    ]


@pytest.mark.parametrize(
    ("seconds_each", "one", "every"),
    [(None, 8 + 5, 5), (0.01, 8 + 5, 5), (0.1, 8 + 20, 7.5), (10.0, 8 + 25, 25)],
    ids=["unknown", "quick", "slow", "hardly answers"],
)
def test_requests_may_take_a_few_times_what_others_have_taken_within_bounds(
    monkeypatch, seconds_each, one, every
):
    monkeypatch.setattr(Pace, "seconds_each", seconds_each or 0.0)
    assert seconds_for_one(50, Pace()) == pytest.approx(one)
    assert seconds_for_all(50, Pace()) == pytest.approx(every)


def test_one_of_several_requests_at_a_time_may_take_as_many_times_longer(monkeypatch):
    pace = Pace()
    monkeypatch.setattr(Pace, "seconds_each", 0.03)
    pace.width = 4
    assert seconds_for_one(50, pace) == pytest.approx(8 + 50 * 0.48)
    assert seconds_for_all(50, pace) == pytest.approx(50 * 0.1)
