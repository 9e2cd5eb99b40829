"""Whose end a teardown follows, and what that is to whom."""

from __future__ import annotations

from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from supervised import _identity
from supervised._mandate import Mandate
from supervised._policy import parent_reason
from supervised._targets import Target, Targets
from supervised._types import DEFAULT_ON_PARENT, CancelReason

POLICY = {**DEFAULT_ON_PARENT, "failed": "wait"}
LABELS = {_identity.ON_PARENT: ",".join(f"{cause}={POLICY[cause]}" for cause in POLICY)}
ENOUGH = CancelReason(source="explicit", message="enough")


def a_mandate(cause="failed", **options):
    run_id = uuid4()
    return Mandate(
        lineage=_identity.Lineage(run_id, (run_id,)),
        cause=cause,
        reason=parent_reason(cause, "nightly"),
        **{"tops": {run_id: None}, **options},
    )


def a_run(labels=LABELS):
    return FlowRun(id=uuid4(), flow_id=uuid4(), labels=labels)


@pytest.mark.parametrize(
    ("before", "after", "hardens"),
    [
        ("failed", "cancelled", True),
        ("completed", "failed", True),
        ("failed", "failed", False),
        ("cancelled", "failed", False),
        ("crashed", "cancelled", False),
    ],
)
def test_only_a_harder_end_overtakes(before, after, hardens):
    mandate = a_mandate(before)
    assert mandate.harden(after, parent_reason(after, "nightly")) is hardens
    assert mandate.cause == (after if hardens else before)
    assert mandate.reason == parent_reason(mandate.cause, "nightly")


def test_nobody_is_waited_for_when_the_process_may_be_killed():
    mandate = a_mandate("failed")
    assert mandate.is_patient
    mandate.harden("cancelled", ENOUGH)
    assert not mandate.is_patient


def test_a_policy_is_asked_what_the_end_of_the_parent_means_and_that_is_cancelled_further_down():
    mandate, run = a_mandate("failed"), a_run()
    assert [mandate.action_for_run(run, depth) for depth in (1, 2)] == ["wait", "cancel"]
    assert mandate.action_for_run(a_run({}), 1) == "cancel", "what is not ours goes with it"


def test_a_command_to_cancel_everything_overrides_policies():
    assert a_mandate("failed", spares=False).action_for_run(a_run(), 1) == "cancel"


def test_a_harder_end_means_to_each_what_its_own_policy_says(make_child):
    mandate = a_mandate("failed")
    child = Target(name="child", depth=1, child=make_child(on_parent=POLICY))
    found = Target(name="found", depth=1, run=a_run())
    assert [mandate.action_for(each) for each in (child, found)] == ["wait"] * 2
    mandate.harden("cancelled", ENOUGH)
    assert [mandate.action_for(each) for each in (child, found)] == ["cancel"] * 2


def test_each_is_cancelled_for_its_own_reason_or_for_that_of_the_top_it_is_below(make_child):
    run, child, targets = a_run(), make_child(), Targets()
    child.mark_cancel(ENOUGH)
    mandate = a_mandate(tops={run.id: None})
    top = Target(name="top", depth=1, child=child, run=run)
    targets.add(top)
    below = Target(name="leaf", depth=2, run=a_run(), above=frozenset({run.id}))
    beside = Target(name="leaf", depth=2, run=a_run())
    assert mandate.reason_for(top, targets) == ENOUGH
    assert mandate.reason_for(below, targets) == ENOUGH
    assert mandate.reason_for(beside, targets) == mandate.reason


def test_what_is_below_a_top_that_was_given_a_reason_is_cancelled_for_that():
    top, targets = a_run(), Targets()
    mandate = a_mandate(tops={top.id: ENOUGH, uuid4(): None})
    below = Target(name="leaf", depth=2, run=a_run(), above=frozenset({top.id}))
    beside = Target(name="leaf", depth=2, run=a_run())
    assert mandate.reason_for(below, targets) == ENOUGH
    assert mandate.reason_for(beside, targets) == mandate.reason


def test_what_is_handed_over_is_left_to_a_later_attempt_of_the_same_run():
    mandate = a_mandate()
    mandate.hand_over()
    assert mandate.is_handed_over
    assert mandate.delegate_to == mandate.lineage.run_id
