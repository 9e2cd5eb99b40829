"""What makes a run an orphan: a pure decision over runs, proofs and silences."""

from uuid import uuid4

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Pending,
    Running,
    Scheduled,
    Suspended,
)

from supervised import _identity
from supervised._identity import Lineage
from supervised._lease import LeaseReader
from supervised._orphans import judge
from supervised._policy import resolve_on_parent

LEASE = 10.0


def a_run(state, **fields):
    return FlowRun(**{"id": uuid4(), "flow_id": uuid4(), "name": "run", "state": state, **fields})


def a_parent(state, *, lease="1:1"):
    return a_run(state, name="parent", labels={_identity.LEASE: lease} if lease else {})


def a_child(parent_id, *, on_parent=None, key=True, host=None, **labels):
    lineage = attrs.evolve(Lineage(parent_id, (parent_id,)), host=host or parent_id)
    stated = _identity.child_labels(
        lineage,
        key="k",
        generation=0,
        on_parent=resolve_on_parent(on_parent),
        lease_seconds=LEASE,
    )
    proof = _identity.idempotency_key(parent_id, "k", 0) if key else None
    return a_run(Running(), labels={**stated, **labels}, idempotency_key=proof)


def judged(child, *above, silence=0.0):
    return judge(child, {run.id: run for run in above}, lambda _: silence)


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (Failed(), "failed"),
        (Failed(name="TimedOut"), "timed_out"),
        (Crashed(), "crashed"),
        (Cancelled(), "cancelled"),
    ],
)
def test_a_live_child_of_a_run_that_ended_badly_is_an_orphan(state, cause):
    parent = a_parent(state)
    found = judged(a_child(parent.id), parent)
    assert (found.cause, found.host_is_gone) == (cause, True)
    assert state.name in found.why


@pytest.mark.parametrize("state", [Running(), Pending(), Scheduled(), AwaitingRetry(), Suspended()])
def test_a_child_of_a_live_parent_is_none(state):
    parent = a_parent(state)
    assert judged(a_child(parent.id), parent) is None


def test_a_child_that_a_completed_parent_is_to_wait_for_is_none():
    parent = a_parent(Completed())
    assert judged(a_child(parent.id), parent) is None


def test_a_child_of_a_deleted_parent_is_an_orphan():
    assert "no longer exists" in judged(a_child(uuid4())).why


@pytest.mark.parametrize("action", ["wait", "detach"])
def test_the_childs_policy_decides(action):
    parent = a_parent(Crashed())
    assert judged(a_child(parent.id, on_parent={"crashed": action}), parent) is None


def test_a_detached_child_is_never_touched():
    parent = a_parent(Crashed())
    assert judged(a_child(parent.id, **{_identity.DETACHED: True}), parent) is None


def test_labels_without_the_key_prove_nothing():
    parent = a_parent(Crashed())
    assert judged(a_child(parent.id, key=False), parent) is None


def test_a_key_of_another_parent_proves_nothing():
    parent, other = a_parent(Crashed()), uuid4()
    child = a_child(other, **{_identity.PARENT: str(parent.id)})
    assert judged(child, parent) is None


@pytest.mark.parametrize(("state", "cause"), [(Running(), "crashed"), (Cancelling(), "cancelled")])
def test_a_silent_parent_has_lost_its_children_but_may_live(state, cause):
    parent = a_parent(state)
    assert judged(a_child(parent.id), parent, silence=LEASE) is None
    found = judged(a_child(parent.id), parent, silence=LEASE + 1)
    assert (found.cause, found.host_is_gone) == (cause, False)


@pytest.mark.parametrize("state", [Pending(), Scheduled(), AwaitingRetry(), Suspended()])
def test_a_parent_without_a_process_is_not_silent(state):
    parent = a_parent(state)
    assert judged(a_child(parent.id), parent, silence=LEASE + 1) is None


def test_a_parent_that_never_held_a_lease_is_not_silent():
    parent = a_parent(Running(), lease=None)
    assert judged(a_child(parent.id), parent, silence=LEASE + 1) is None


def test_the_end_of_the_parents_process_counts_for_a_nested_parent():
    host, parent = a_parent(Crashed()), a_parent(Running(), lease=None)
    found = judged(a_child(parent.id, host=host.id), host, parent)
    assert found.cause == "crashed"


def test_silence_is_what_the_reader_has_seen_itself():
    time = [100.0]
    reader = LeaseReader(lambda: time[0])
    run = a_parent(Running())
    assert reader.standstill(run, LEASE) == 0
    time[0] += 2
    assert reader.standstill(run, LEASE) == 2
    run.labels[_identity.LEASE] = "1:2"
    assert reader.standstill(run, LEASE) == 0


def test_a_reader_may_count_what_the_server_says_of_the_time_before():
    time = [100.0]
    reader = LeaseReader(lambda: time[0])
    run = a_parent(Running())
    assert reader.standstill(run, LEASE, before=5) == 5
    time[0] += 2
    assert reader.standstill(run, LEASE, before=5) == 7
    run.labels[_identity.LEASE] = "1:2"
    assert reader.standstill(run, LEASE, before=5) == 0


@given(st.lists(st.floats(0, 1000), max_size=20))
def test_a_time_without_reads_counts_for_one_renewal_at_most(gaps):
    time = [100.0]
    reader = LeaseReader(lambda: time[0])
    run = a_parent(Running())
    still = reader.standstill(run, LEASE)
    for gap in gaps:
        time[0] += gap
        before, still = still, reader.standstill(run, LEASE)
        assert still - before == pytest.approx(min(gap, LEASE / 4), abs=1e-6)


def test_a_new_attempt_of_the_run_is_a_sign_of_life():
    time = [100.0]
    reader = LeaseReader(lambda: time[0])
    run = a_parent(Running())
    reader.standstill(run, LEASE)
    time[0] += 60
    run.run_count += 1
    assert reader.standstill(run, LEASE) == 0
