"""What becomes of a run that the server has under a child's key: a table, and its laws."""

from __future__ import annotations

import contextvars
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun, State, StateType

from supervised._identity import DETACHED, SPAWN, WORK, Lineage
from supervised._launch import LaunchSpec, meet

ROOT = UUID(int=1)


def spec(work="score:1", reuse="never"):
    return LaunchSpec(
        target="score/gpu",
        parameters={},
        lineage=Lineage(ROOT, (ROOT,)),
        run_name=None,
        tags=(),
        task_inputs={},
        context=contextvars.Context(),
        home_loop=None,
        lease_seconds=30,
        work=work,
        reuse=reuse,
    )


def run(state, *, work="score:1", spawn="another", inline=False, detached=False, data=None):
    labels = {WORK: work, SPAWN: spawn, **({DETACHED: True} if detached else {})}
    return FlowRun(
        flow_id=uuid4(),
        name="run",
        deployment_id=None if inline else uuid4(),
        state=State(type=state, data=data),
        labels=labels,
    )


runs = st.builds(
    run,
    st.sampled_from(list(StateType)),
    work=st.sampled_from(["score:1", "score:2", "score:unhashable"]),
    inline=st.booleans(),
    detached=st.booleans(),
    data=st.sampled_from([None, 5]),
)
specs = st.builds(
    spec,
    work=st.sampled_from(["score:1", "score:unhashable"]),
    reuse=st.sampled_from(["never", "completed"]),
)


@pytest.mark.parametrize(
    ("found", "wanted", "met"),
    [
        (run(StateType.RUNNING), spec(), "take"),
        (run(StateType.SCHEDULED), spec(), "take"),
        (run(StateType.RUNNING, detached=True), spec(), "take"),
        (run(StateType.RUNNING, work="score:2"), spec(), "end"),
        (run(StateType.RUNNING, work="score:2", detached=True), spec(), "pass"),
        (run(StateType.CANCELLING), spec(), "end"),
        (run(StateType.RUNNING, inline=True), spec(), "pass"),
        (run(StateType.COMPLETED), spec(), "pass"),
        (run(StateType.COMPLETED), spec(reuse="completed"), "take"),
        (run(StateType.COMPLETED, work="score:2"), spec(reuse="completed"), "pass"),
        (run(StateType.COMPLETED, inline=True), spec(reuse="completed"), "pass"),
        (run(StateType.COMPLETED, inline=True, data=5), spec(reuse="completed"), "take"),
        (run(StateType.FAILED), spec(reuse="completed"), "pass"),
    ],
)
def test_the_table(found, wanted, met):
    assert meet(found, wanted) == met


@given(runs, specs)
def test_no_other_work_is_ever_handed_out(found, wanted):
    is_same = found.labels[WORK] == wanted.work and wanted.work != "score:unhashable"
    assert is_same or meet(found, wanted) != "take"


@given(runs, specs)
def test_what_was_let_go_is_never_ended(found, wanted):
    assert not found.labels.get(DETACHED) or meet(found, wanted) != "end"


@given(runs, specs)
def test_only_what_is_over_let_go_or_inline_is_left_beside_a_new_run(found, wanted):
    may_stay = found.state.is_final() or found.labels.get(DETACHED) or not found.deployment_id
    assert meet(found, wanted) != "pass" or may_stay


@given(runs, specs)
def test_a_run_of_its_own_launch_is_always_taken(found, wanted):
    own = found.model_copy(update={"labels": {**found.labels, SPAWN: wanted.id}})
    assert meet(own, wanted) == "take"
