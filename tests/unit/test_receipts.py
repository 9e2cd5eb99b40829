"""What a receipt says of a run, by what is known of it: no server, no clock."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Running

from supervised import _clock, _identity
from supervised._mandate import Mandate
from supervised._receipts import detached_receipt, receipt_for, unsearched_receipt
from supervised._targets import Target
from supervised._types import CancelReason

ENOUGH = CancelReason(source="explicit", message="enough")


@pytest.fixture(autouse=True)
def _ten_seconds_later(monkeypatch):
    """A clock that stands still, ten seconds after the teardown began."""
    monkeypatch.setattr(_clock, "monotonic", lambda: 10.0)


def a_target(state=None, *, deployed=True, **known):
    run = FlowRun(id=uuid4(), flow_id=uuid4(), deployment_id=uuid4() if deployed else None)
    return Target(**{"name": "leaf", "depth": 2, "run": run, "state": state, **known})


def receipt(target, **options):
    run_id = uuid4()
    mandate = Mandate(
        lineage=_identity.Lineage(run_id, (run_id,)),
        cause="cancelled",
        reason=ENOUGH,
        tops=frozenset({run_id}),
        **options,
    )
    return receipt_for(target, mandate, reason=ENOUGH, started=0.0)


@pytest.mark.parametrize(
    ("state", "steps", "status"),
    [
        (Completed(), [], "completed"),
        (Cancelled(), ["nudged"], "cancelled"),
        (Cancelled(), ["nudged", "closed"], "forced"),
        (Crashed(), [], "cancelled"),
        (Failed(), [], "failed"),
        (Cancelling(), [], "unverified"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_its_status_is_what_can_be_vouched_for(state, steps, status):
    told = receipt(a_target(state, escalations=steps))
    assert told.status == status
    assert told.escalations == tuple(steps)
    assert (told.reason == str(ENOUGH)) is (status != "unverified")


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ({"error": "its run was deleted"}, "still Running; its run was deleted"),
        (
            {"action": "wait"},
            "still Running; its policy is to be waited for, and the grace ran out",
        ),
        (
            {"deployed": False},
            "still Running; it runs inline in code that this scope did not start",
        ),
        ({}, "still Running; it was never asked: there was no time for that"),
        (
            {"requested_at": _clock.utc_now(), "requested": 6.0},
            "still Running 4 s after the request; its runner or process may be dead",
        ),
        (
            {"requested_at": _clock.utc_now()},
            "still Running 10 s after the request; its runner or process may be dead",
        ),
    ],
)
def test_of_what_may_be_alive_it_says_why(known, why):
    assert receipt(a_target(Running(), **known)).reason == why


def test_of_what_runs_in_a_process_that_nobody_here_can_wait_for_it_says_so():
    told = receipt(a_target(Running(), deployed=False), can_wait=False)
    assert told.reason == (
        "still Running; it runs inside another run's process, which may be alive"
    )


def test_of_a_child_here_it_says_that_its_code_ignores_the_request(make_child):
    child = make_child(kind="inline")
    target = a_target(Running(), child=child, attempt=child.attempt)
    assert receipt(target).reason == (
        "still Running; its code in this process ignores the cancellation"
    )


def test_of_a_child_that_was_given_up_before_it_says_why_nobody_can_vouch_for_it(make_child):
    child = make_child()
    child.settle("abandoned")
    told = receipt(a_target(Running(), child=child, attempt=child.attempt, requested=6.0))
    assert told.status == "unverified"
    assert told.reason.startswith("still Running")


def test_of_a_child_that_was_given_up_before_it_says_how_long_ago_that_one_was_asked(
    make_child, monkeypatch
):
    """This teardown did not ask it once more, and began later."""
    child = make_child()
    child.mark_cancel(ENOUGH)
    child.settle("abandoned")
    later = child.requested_at + timedelta(seconds=25)
    monkeypatch.setattr(_clock, "utc_now", lambda: later)
    asked = {"requested_at": child.requested_at}
    told = receipt(a_target(Cancelling(), child=child, attempt=child.attempt, **asked))
    assert told.reason == (
        "still Cancelling 25 s after the request; its runner or process may be dead"
    )


def test_of_a_child_that_was_given_up_before_it_says_so_though_an_ancestor_verifies_it(make_child):
    child = make_child()
    child.settle("abandoned")
    target = a_target(
        Cancelling(), child=child, attempt=child.attempt, acknowledged_at=_clock.utc_now()
    )
    told = receipt(target, delegate_to=uuid4())
    assert told.status == "unverified"
    assert told.reason.startswith("still Cancelling")


def test_of_a_launch_that_was_not_answered_it_says_so(make_child):
    child = make_child()
    target = Target(name="part", depth=1, child=child, attempt=child.attempt)
    told = receipt(target)
    assert told.flow_run_id is None
    assert told.reason == "no state known; the request that creates it was not answered"


def test_who_has_agreed_is_vouched_for_if_an_ancestor_verifies_it():
    target = a_target(Cancelling(), acknowledged_at=_clock.utc_now())
    assert receipt(target).status == "unverified"
    assert receipt(target, delegate_to=uuid4()).status == "cancelled"


def test_a_child_says_when_it_was_asked_for_the_first_time_unless_this_one_never_was(make_child):
    child = make_child()
    child.mark_cancel(ENOUGH)
    assert child.requested_at is not None
    assert receipt(a_target(Cancelled(), child=child)).requested_at == child.requested_at
    assert receipt(a_target(Running(), child=child)).requested_at is None


def test_steps_that_the_child_and_the_teardown_both_know_are_told_once(make_child):
    child = make_child()
    child.note_escalation("waited")
    target = a_target(Cancelled(), child=child)
    target.note_step("nudged")
    assert receipt(target).escalations == ("nudged", "waited")


def test_what_goes_on_and_what_was_not_searched_have_receipts_of_their_own(make_child):
    assert detached_receipt(make_child()).status == "detached"
    told = unsearched_receipt(uuid4(), "TimeoutError()")
    assert (told.status, told.depth) == ("unverified", 0)
    assert "TimeoutError()" in told.reason
