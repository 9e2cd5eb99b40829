"""Decisions over frozen values: who is waited for, how a child ended, what may be vouched for."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import State, StateType

from supervised._policy import (
    Budget,
    breaks_scope,
    check_budget,
    check_seconds,
    outcome_of,
    parent_reason,
    receipt_status,
    resolve_on_parent,
)
from supervised._types import ACTIONS, CAUSES, DEFAULT_ON_PARENT

actions = st.sampled_from(ACTIONS)
causes = st.sampled_from(CAUSES)
partial_policies = st.dictionaries(causes, actions)
full_policies = st.fixed_dictionaries(dict.fromkeys(CAUSES, actions))
strangers = st.one_of(st.text(), st.integers(), st.none())

# -- on_parent ----------------------------------------------------------------------------------


def test_nothing_given_is_the_default():
    assert resolve_on_parent(None) == {
        "completed": "wait",
        "failed": "cancel",
        "timed_out": "cancel",
        "cancelled": "cancel",
        "crashed": "cancel",
    }


@given(actions, full_policies)
def test_one_word_stands_for_every_cause(action, default):
    assert resolve_on_parent(action, default) == dict.fromkeys(CAUSES, action)


@given(partial_policies, full_policies)
def test_a_mapping_overrides_the_default_cause_by_cause(value, default):
    assert resolve_on_parent(value, default) == {**default, **value}


@given(st.one_of(st.none(), actions, partial_policies), full_policies)
def test_every_cause_has_an_action_and_resolving_again_changes_nothing(value, default):
    resolved = resolve_on_parent(value, default)
    assert set(resolved) == set(CAUSES)
    assert set(resolved.values()) <= set(ACTIONS)
    assert resolve_on_parent(resolved) == resolved


@given(partial_policies, full_policies)
def test_resolving_changes_neither_the_value_nor_the_default(value, default):
    value_before, default_before = dict(value), dict(default)
    resolve_on_parent(value, default)
    assert (value_before, default_before) == (value, default)


@given(st.text().filter(lambda word: word not in ACTIONS))
def test_an_unknown_action_is_refused(word):
    with pytest.raises(ValueError, match=r"is no action; use wait, cancel, detach$"):
        resolve_on_parent(word)


@given(st.dictionaries(causes, strangers.filter(lambda x: x not in ACTIONS), min_size=1))
def test_unknown_actions_in_a_mapping_are_refused(value):
    with pytest.raises(ValueError, match="is no action"):
        resolve_on_parent(value)


@given(st.dictionaries(strangers.filter(lambda x: x not in CAUSES), actions, min_size=1))
def test_unknown_causes_are_refused(value):
    with pytest.raises(ValueError, match="is no cause; use completed, failed"):
        resolve_on_parent(value)


# -- seconds ------------------------------------------------------------------------------------


@given(st.none() | st.integers(0, 10**9) | st.floats(0, allow_infinity=False, allow_nan=False))
def test_zero_or_more_finite_seconds_pass_unchanged(value):
    assert check_seconds("grace_seconds", value) == value


@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, -math.inf, math.nan])
def test_other_seconds_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^grace_seconds must be a number of seconds"):
        check_seconds("grace_seconds", value)


# -- reasons ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "source", "words"),
    [
        ("completed", "parent_completed", "parent 'etl' completed"),
        ("failed", "parent_failed", "parent 'etl' failed"),
        ("timed_out", "parent_timed_out", "parent 'etl' timed out"),
        ("cancelled", "parent_cancelled", "parent 'etl' was cancelled"),
        ("crashed", "parent_crashed", "parent 'etl' crashed"),
    ],
)
def test_a_parents_end_is_a_reason_with_its_source(cause, source, words):
    bare = parent_reason(cause, "etl")
    assert (source, words, None) == (bare.source, bare.message, bare.child)
    assert f"{words}: ValueError: bad" == str(parent_reason(cause, "etl", "ValueError: bad"))


# -- outcomes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "unasked", "asked"),
    [
        (StateType.SCHEDULED, "Scheduled", None, None),
        (StateType.SCHEDULED, "AwaitingRetry", None, None),
        (StateType.PENDING, "Pending", None, None),
        (StateType.RUNNING, "Running", None, None),
        (StateType.PAUSED, "Suspended", None, None),
        (StateType.CANCELLING, "Cancelling", None, None),
        (StateType.COMPLETED, "Completed", "completed", "completed"),
        (StateType.COMPLETED, "Cached", "completed", "completed"),
        (StateType.FAILED, "Failed", "failed", "failed"),
        (StateType.FAILED, "TimedOut", "timed_out", "timed_out"),
        (StateType.CANCELLED, "Cancelled", "cancelled", "cancelled"),
        (StateType.CRASHED, "Crashed", "crashed", "cancelled"),
    ],
)
def test_the_outcome_follows_from_the_state_and_whether_we_had_asked(kind, name, unasked, asked):
    state = State(type=kind, name=name)
    assert unasked == outcome_of(state, asked=False)
    assert asked == outcome_of(state, asked=True)


@given(st.sampled_from(StateType), st.booleans())
def test_a_child_has_an_outcome_exactly_when_prefect_calls_its_state_final(kind, asked):
    state = State(type=kind)
    assert state.is_final() == (outcome_of(state, asked=asked) is not None)


@pytest.mark.parametrize(
    ("outcome", "status", "forced_status", "breaks"),
    [
        ("completed", "completed", "completed", False),
        ("failed", "failed", "failed", True),
        ("crashed", "failed", "failed", True),
        ("timed_out", "failed", "failed", True),
        ("cancelled", "cancelled", "forced", False),
        ("abandoned", "unverified", "unverified", False),
        ("detached", "detached", "detached", False),
    ],
)
def test_each_outcome_has_its_receipt_and_its_weight(outcome, status, forced_status, breaks):
    assert status == receipt_status(outcome, forced=False)
    assert forced_status == receipt_status(outcome, forced=True)
    assert breaks is breaks_scope(outcome)


# -- time ---------------------------------------------------------------------------------------


@given(st.floats(0, 1e6))
def test_a_budget_nudges_then_asks_again_then_closes_all_before_its_end(total):
    budget = Budget(total)
    assert 0 <= budget.nudge_after <= budget.request_again_after <= budget.close_after <= total


@given(st.floats(10, 1e6))
def test_a_nudged_runner_gets_the_time_it_needs_to_see_a_dead_process(total):
    budget = Budget(total)
    assert budget.close_after - budget.nudge_after >= 3.3


def test_values_are_frozen():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Budget(20.0).total = 30.0
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        parent_reason("failed", "etl").message = "other"


def test_the_default_policy_is_what_resolving_a_full_copy_of_it_gives():
    assert resolve_on_parent(dict(DEFAULT_ON_PARENT)) == DEFAULT_ON_PARENT


@pytest.mark.parametrize(("budget", "lease"), [(None, 1.0), (8, 30.0), (240, 1.0), (4, 60.0)])
def test_a_budget_that_leaves_room_for_signs_of_life_is_taken(budget, lease):
    check_budget(budget, lease)


@pytest.mark.parametrize(
    ("budget", "lease", "needed"), [(7, 30.0, 35), (60, 1.0, 4), (1, 30.0, 240)]
)
def test_a_budget_that_leaves_none_is_refused_with_a_lease_that_would_do(budget, lease, needed):
    with pytest.raises(ValueError, match=f"lease_seconds={needed} or more"):
        check_budget(budget, lease)
    check_budget(budget, needed)


@pytest.mark.parametrize("value", [5, ["wait"], 1.5])
def test_what_is_no_policy_at_all_is_refused(value):
    with pytest.raises(ValueError, match="neither an action nor a mapping"):
        resolve_on_parent(value)
