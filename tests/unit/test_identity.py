"""How a run of ours is recognised with no memory of it: keys, labels, marks."""

from __future__ import annotations

import threading
from uuid import UUID

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from prefect.client.schemas.actions import FlowRunCreate
from prefect.client.schemas.objects import FlowRun

from supervised._identity import (
    DETACHED,
    PARENT,
    PATH,
    ROOT,
    TAG_PREFIX,
    Lineage,
    child_labels,
    default_key,
    idempotency_key,
    is_below,
    is_ours,
    lineage_of,
    mark_message,
    marked_by,
    occurrence_key,
    on_parent_of,
)
from supervised._types import ACTIONS, CAUSES, DEFAULT_ON_PARENT

A, B, C = (UUID(int=n) for n in (10, 11, 12))

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
parameters = st.dictionaries(st.text(min_size=1), values, max_size=4)
targets = st.text(min_size=1)
lineages = st.lists(st.uuids(), min_size=1, max_size=6, unique=True).map(
    lambda path: Lineage(path[-1], tuple(path))
)
policies = st.fixed_dictionaries(dict.fromkeys(CAUSES, st.sampled_from(ACTIONS)))
attached_policies = policies.filter(lambda policy: set(policy.values()) != {"detach"})


def backwards(value):
    """The same value, with every dict in it filled in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [backwards(item) for item in value]
    return value


def run_with(labels, key=None):
    """A run with these labels and this idempotency key."""
    return FlowRun(flow_id=A, labels=labels, idempotency_key=key)


def as_work(target, given_parameters):
    """A form in which work is equal exactly when its JSON is: 1, 1.0 and True are not."""

    def exact(value):
        if isinstance(value, dict):
            return {key: exact(item) for key, item in value.items()}
        if isinstance(value, list):
            return [exact(item) for item in value]
        return type(value).__name__, repr(value)

    return target, exact(given_parameters)


# -- keys ---------------------------------------------------------------------------------------


@given(targets, parameters)
def test_the_same_work_has_the_same_key_in_any_order_of_any_dict(target, given_parameters):
    assert default_key(target, given_parameters) == default_key(target, backwards(given_parameters))


@pytest.mark.parametrize("odd", [object, 1j, b"\xff", {1, 2, 3}, range(3)], ids=repr)
def test_the_order_does_not_matter_for_parameters_without_a_json_form_either(odd):
    one = default_key("score/gpu", {"model": odd, "part": 1})
    other = default_key("score/gpu", {"part": 1, "model": odd})
    assert one == other


@given(targets, parameters, targets, parameters)
@example("f", {"x": 1}, "f", {"x": True})
@example("f", {"x": 1}, "f", {"x": 1.0})
@example("f", {"x": "1"}, "f", {"x": 1})
@example("f", {"x": None}, "f", {})
@example("f", {}, "g", {})
def test_different_work_has_different_keys(target, given_parameters, other, other_parameters):
    assume(as_work(target, given_parameters) != as_work(other, other_parameters))
    assert default_key(target, given_parameters) != default_key(other, other_parameters)


def test_a_key_says_what_it_is_the_key_of():
    assert default_key("score/gpu", {"part": 1}).startswith("score/gpu:")


def test_work_that_cannot_be_hashed_has_a_key_all_the_same():
    assert default_key("score", {"guard": threading.Lock()}) == "score:unhashable"


works = st.tuples(targets, parameters, st.integers(1, 1000))


@given(works, works)
def test_the_nth_child_of_one_work_never_has_the_key_of_another(one, other):
    keys = [default_key(target, given_parameters) for target, given_parameters, _ in (one, other)]
    assume((keys[0], one[2]) != (keys[1], other[2]))
    assert occurrence_key(keys[0], one[2]) != occurrence_key(keys[1], other[2])


@given(targets, parameters, st.integers(1, 20))
def test_equal_children_have_as_many_keys_as_there_are_of_them(target, given_parameters, count):
    base = default_key(target, given_parameters)
    keys = [occurrence_key(base, n) for n in range(1, count + 1)]
    assert base == keys[0]
    assert count == len(set(keys))


creations = st.tuples(st.uuids(), st.text(), st.integers(0, 10**6))


@given(creations, creations)
def test_no_two_creations_share_an_idempotency_key(one, other):
    assert (one == other) == (idempotency_key(*one) == idempotency_key(*other))


# -- lineage and labels -------------------------------------------------------------------------


@given(lineages, st.uuids(), st.text(), st.integers(0, 10**6), attached_policies)
def test_labels_tell_a_stranger_where_the_child_stands(lineage, run, key, generation, policy):
    labels = child_labels(lineage, key=key, generation=generation, on_parent=policy)
    deployed = lineage_of(run, labels)
    assert lineage.nested(run).path == deployed.path
    assert deployed.host == run  # in a process of its own
    assert lineage.nested(run).host == lineage.host
    assert str(lineage.root) == labels[ROOT]
    assert str(lineage.run_id) == labels[PARENT]
    assert policy == on_parent_of(labels)


@given(lineages, st.uuids(), st.text(), st.integers(0, 10**6))
def test_a_child_that_is_detached_from_every_end_is_the_root_of_its_own_tree(
    lineage, run, key, generation
):
    policy = dict.fromkeys(CAUSES, "detach")
    labels = child_labels(lineage, key=key, generation=generation, on_parent=policy)
    assert labels[DETACHED] is True
    assert Lineage(run, (run,)) == lineage_of(run, labels)
    assert not any(is_below(labels, ancestor) for ancestor in lineage.path)


@given(lineages, st.uuids())
def test_a_run_is_below_each_of_its_ancestors_and_nobody_else(lineage, stranger):
    labels = child_labels(lineage, key="k", generation=0, on_parent=DEFAULT_ON_PARENT)
    assert all(is_below(labels, ancestor) for ancestor in lineage.path)
    assume(stranger not in lineage.path)
    assert not is_below(labels, stranger)


@given(lineages, st.uuids())
def test_a_nested_run_keeps_the_root_and_the_tag_of_its_tree(lineage, run):
    nested = lineage.nested(run)
    assert (lineage.root, lineage.tag) == (nested.root, nested.tag)
    assert (*lineage.path, run) == nested.path
    assert TAG_PREFIX + str(lineage.root) == nested.tag


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {PATH: ""},
        {PATH: "no/uuids"},
        {PATH: f"{A}/"},
        {PATH: 7},
        {PATH: None},
        {PATH: True},
        {"prefect.flow.id": str(A)},
    ],
    ids=str,
)
def test_a_run_without_a_readable_path_is_a_root(labels):
    assert Lineage(B, (B,)) == lineage_of(B, labels)


def test_labels_are_of_types_that_prefect_stores():
    labels = child_labels(
        Lineage(A, (A,)), key="k", generation=3, on_parent=dict.fromkeys(CAUSES, "detach")
    )
    sent = FlowRunCreate(flow_id=B, labels=labels).model_dump_json()
    stored = FlowRun.model_validate_json(sent)
    assert labels == stored.labels


@pytest.mark.parametrize(
    ("labels", "stated"),
    [
        ({}, {}),
        ({"supervised.on_parent": 3}, {}),
        ({"supervised.on_parent": ""}, {}),
        ({"supervised.on_parent": "failed=wait,nonsense"}, {"failed": "wait"}),
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_read_is_no_policy(labels, stated):
    assert stated == on_parent_of(labels)


# -- whose it is --------------------------------------------------------------------------------


@given(lineages, st.text(), st.integers(0, 10**6))
def test_labels_and_idempotency_key_together_prove_that_a_run_is_ours(lineage, key, generation):
    labels = child_labels(lineage, key=key, generation=generation, on_parent=DEFAULT_ON_PARENT)
    assert is_ours(run_with(labels, idempotency_key(lineage.run_id, key, generation)))


@pytest.mark.parametrize(
    ("labels", "key"),
    [
        ({}, None),
        ({}, idempotency_key(A, "k", 0)),
        ({PARENT: str(A)}, None),
        ({PARENT: str(A)}, ""),
        ({PARENT: str(A)}, "chosen by a user"),
        ({PARENT: str(A)}, idempotency_key(B, "k", 0)),
    ],
    ids=str,
)
def test_either_alone_proves_nothing(labels, key):
    assert not is_ours(run_with(labels, key))


# -- marks --------------------------------------------------------------------------------------


@given(st.text(), st.uuids())
def test_a_marked_message_names_who_asked(text, by):
    assert by == marked_by(mark_message(text, by))


@given(st.text(), st.uuids(), st.uuids())
def test_a_message_that_quotes_a_marked_one_names_who_asked_last(text, first, last):
    quoted = f"Cancelled because: {mark_message(text, first)}"
    assert last == marked_by(mark_message(quoted, last))


@given(st.none() | st.text())
@example("[supervised by nobody]")
@example("[supervised by " + "-" * 36 + "]")
def test_other_messages_name_nobody(message):
    assert marked_by(message) is None
