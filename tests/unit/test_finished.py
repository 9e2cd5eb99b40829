"""What a scope keeps of a child that has completed, and that nobody can tell the difference."""

from __future__ import annotations

import asyncio
import gc
import weakref
from datetime import datetime, timezone
from typing import get_args
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.results import ResultRecordMetadata
from prefect.states import Cancelled, Completed, Scheduled

from supervised import DuplicateKeyError, supervised_flow, supervisor
from supervised._finished import Finished
from supervised._registry import Registry
from supervised._types import CancelReason, Cause, Kind
from supervised.testing import FakePrefect

ASKED = CancelReason(source="explicit", message="its handle was cancelled")
TOLD = (
    "name",
    "key",
    "kind",
    "target",
    "on_parent",
    "timeout_seconds",
    "generation",
    "restarts",
    "flow_run_id",
    "task_run_id",
    "url",
    "outcome",
    "is_over",
    "is_local",
    "is_detached",
    "is_awaited",
    "cancel_reason",
    "requested_at",
    "acknowledged_at",
    "escalations",
    "exception",
    "ended_at",
    "waits_for_a_slot",
)


def a_run(**fields):
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="otter", **fields)


@pytest.fixture
def scope(make_child):
    """A registry, and a function that admits a child with a run to it."""
    registry = Registry("etl")

    def admit(work="score:1", key=None, **options):
        child, is_new = registry.admit(
            key=key,
            work=work,
            make=lambda final: make_child(
                name=f"child {final}",
                key=final,
                target=work,
                on_done=registry.finished,
                **options,
            ),
        )
        if is_new:
            child.assign_run(a_run(deployment_id=uuid4()))
        return child

    return registry, admit


# -- what stays ---------------------------------------------------------------------------------


OVER = ["completed", "failed", "crashed", "timed_out", "cancelled"]


@pytest.mark.parametrize("outcome", OVER)
def test_of_a_child_that_has_ended_and_that_nobody_holds_no_handle_stays(scope, outcome):
    registry, admit = scope
    child = admit()
    child.settle(outcome)
    handle = weakref.ref(child)
    del child
    gc.collect()
    assert handle() is None
    assert registry.kept() == []
    assert [each.name for each in registry.all()] == ["child score:1"]


def test_a_handle_that_somebody_holds_is_the_childs_handle_for_good(scope):
    registry, admit = scope
    child = admit(key="nightly")
    child.settle("completed", state=Completed())
    gc.collect()
    assert registry.all()[0] is child
    assert registry.of_run(child.flow_run_id) is child
    assert admit(key="nightly") is child
    assert registry.owns(child)


def test_a_handle_that_was_made_again_is_the_childs_as_well(scope):
    registry, admit = scope
    admit(key="nightly").settle("completed", state=Completed())
    gc.collect()
    again = registry.all()[0]
    assert registry.all()[0] is again
    assert registry.of_run(again.flow_run_id) is again
    assert admit(key="nightly") is again
    assert registry.owns(again)


def test_a_forgotten_key_is_still_taken(scope):
    _, admit = scope
    admit(key="nightly").settle("completed", state=Completed())
    gc.collect()
    with pytest.raises(DuplicateKeyError, match="'nightly' is taken in 'etl' by score:1"):
        admit("score:2", key="nightly")
    assert admit("nightly").key == "nightly#2"


def test_a_scope_that_takes_no_more_children_forgets_none(scope):
    """Its report is to name what it found, and the end is near."""
    registry, admit = scope
    child = admit()
    registry.ban("the flow has ended")
    child.settle("completed", state=Completed())
    assert registry.kept() == [child]


def whole(outcome, **state):
    return lambda child: child.settle(outcome, **state)


def after(act, then):
    def end(child):
        act(child)
        then(child)

    return end


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        *(("deployment", whole(each)) for each in ("abandoned", "detached")),
        ("deployment", whole("completed", state=Completed(data=7))),
    ],
)
def test_a_child_of_which_there_is_more_to_tell_stays_whole(scope, kind, end):
    registry, admit = scope
    child = admit(kind=kind)
    end(child)
    handle = weakref.ref(child)
    del child
    gc.collect()
    assert registry.kept() == [handle()]


def test_a_child_that_never_had_a_run_has_none_afterwards_either(make_child):
    child = make_child()
    child.mark_cancel(ASKED)
    child.settle("cancelled")
    again = Finished.of(child).child()
    assert (again.flow_run, again.last_state, again.outcome) == (None, None, "cancelled")
    for name in TOLD:
        assert getattr(again, name) == getattr(child, name), name
    assert "because its handle was cancelled" in str(again.error())


# -- the handle that is made again --------------------------------------------------------------

moments = st.floats(0, 4e9).map(lambda seconds: datetime.fromtimestamp(seconds, timezone.utc))
results = st.none() | st.builds(
    ResultRecordMetadata,
    storage_key=st.text(min_size=1, max_size=20),
    expiration=st.none() | moments,
    serializer=st.just({"type": "json"}),
)
ends = st.builds(
    State,
    type=st.sampled_from(StateType),
    name=st.sampled_from(["Completed", "Cached", "Rolled up"]),
    message=st.none() | st.text(max_size=10),
    data=results,
)
children = st.fixed_dictionaries(
    {
        "name": st.text(max_size=10),
        "kind": st.sampled_from(get_args(Kind)),
        "key": st.text(max_size=10),
        "target": st.text(max_size=10),
        "timeout_seconds": st.none() | st.floats(1, 1e6),
        "on_parent": st.sampled_from(["wait", "cancel", "detach"]).map(
            lambda action: dict.fromkeys(get_args(Cause), action)
        ),
    }
)


@given(
    options=children,
    outcome=st.sampled_from(OVER),
    exception=st.none() | st.builds(ValueError),
    end=ends,
    asked=st.none() | st.sampled_from([(), ("asked again",), ("asked again", "closed")]),
    fields=st.fixed_dictionaries(
        {},
        optional={"deployment_id": st.uuids(), "parent_task_run_id": st.uuids()},
    ),
    restarts=st.integers(0, 3),
)
def test_a_handle_that_is_made_again_tells_what_the_first_one_told(
    make_child, options, outcome, exception, end, asked, fields, restarts
):
    first = make_child(**options)
    for _ in range(restarts):
        first.begin_restart()
    first.assign_run(a_run(**fields))
    if asked is not None:
        first.mark_cancel(ASKED)
        first.mark_acknowledged()
        for step in asked:
            first.note_escalation(step)
    first.settle(outcome, state=end, value=object(), exception=exception)
    kept = Finished.of(first)
    again = kept.child()
    assert again is not first
    for name in TOLD:
        assert getattr(again, name) == getattr(first, name), name
    for name in ("id", "type", "name", "message", "timestamp"):
        assert getattr(again.state, name) == getattr(first.state, name), name
    if first.is_local:
        assert again.local_value is first.local_value
    else:
        assert again.state.data == first.state.data
    run, before = again.flow_run, first.flow_run
    for name in ("id", "name", "flow_id", "deployment_id", "parent_task_run_id"):
        assert getattr(run, name) == getattr(before, name), name


def test_a_handle_that_is_made_again_is_over_for_whoever_waits(scope):
    registry, admit = scope
    admit(kind="inline").settle("completed", state=Completed(), value=None)
    gc.collect()
    (again,) = registry.all()
    called = []
    again.add_done_callback(called.append)
    again.wait(timeout=0)
    assert called == [again]
    assert again.result(timeout=0) is None


def test_whatever_is_asked_of_a_handle_that_is_made_again_changes_nothing(scope):
    registry, admit = scope
    admit().settle("completed", state=Completed())
    gc.collect()
    (again,) = registry.all()
    again.cancel()
    again.detach()
    again.observe(State(type="RUNNING"))
    assert not again.settle("failed")
    assert not again.begin_restart()
    assert again.outcome == "completed"


# -- with and without -----------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["spawn", "complete", "cancel"]),
        st.sampled_from(["load", "score", "load#2"]),
        st.sampled_from([None, "nightly", "load"]),
    ),
    max_size=15,
)


def play(plan, make_child, held):
    """Spawn and end children; return what every step and the end have shown."""
    registry, seen = Registry("etl"), []

    def admit(key, work):
        def make(final):
            return make_child(key=final, target=work, on_done=registry.finished)

        return registry.admit(key=key, work=work, make=make)

    for step, work, key in plan:
        if step == "spawn":
            try:
                child, is_new = admit(key, work)
            except DuplicateKeyError as exc:
                seen.append(str(exc))
                continue
            seen.append((child.key, is_new))
            held.append(child)
            if is_new:
                child.assign_run(a_run())
        elif live := registry.live():
            ended = live[0]
            state = Completed() if step == "complete" else Cancelled()
            ended.settle("completed" if step == "complete" else "cancelled", state=state)
    seen.append([(each.key, each.target, each.outcome) for each in registry.all()])
    seen.append([each.key for each in registry.live()])
    return seen


class Forgets(list):
    """Holds nothing."""

    def append(self, _):
        gc.collect(0)


@given(steps)
def test_a_scope_that_forgets_is_like_one_whose_handles_are_all_held(make_child, plan):
    assert play(plan, make_child, held=[]) == play(plan, make_child, held=Forgets())


def test_of_a_scope_with_many_children_the_completed_ones_are_still_all_there():
    seen = []

    @supervised_flow
    async def root():
        for part in range(30):
            supervisor.spawn("score/gpu", {"part": part}, name=f"part {part}")
        while any(not child.is_over for child in supervisor.children):
            await asyncio.sleep(1)
        gc.collect()
        for child in supervisor.children:
            assert await child == 7
            seen.append((child.name, child.outcome, child.flow_run_id))

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=3, returns=7)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=120)
        assert run.state.is_completed()
        assert {run_id for *_, run_id in seen} == {below.flow_run.id for below in run.below}
    assert [name for name, *_ in seen] == [f"part {part}" for part in range(30)]
    assert {outcome for _, outcome, _ in seen} == {"completed"}


@pytest.mark.parametrize("policy", ["detach", {"failed": "detach"}, "cancel"])
def test_what_a_detached_child_has_left_behind_is_nobodys_to_end(policy):
    @flow(name="launcher")
    async def launcher():
        tracking = prefect.server.track(uuid4(), FlowRunContext.get().flow_run.id, "job-0")
        job = prefect.server.find_deployment("job/test")
        prefect.server.create(
            "job", state=Scheduled(), deployment_id=job.id, parent_task_run_id=tracking
        )

    @supervised_flow
    async def parent():
        supervisor.spawn("launcher/test", on_parent=policy)
        await asyncio.sleep(60)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("launcher/test", launcher)
        prefect.deploy("job/test")
        run = prefect.start(parent)
        prefect.until(lambda: not run.is_alive, within=120)
        prefect.advance(30)
        (job,) = (each for each in prefect.runs if each.flow_run.name.startswith("job"))
        assert job.state.is_running() == (policy != "cancel")


def test_the_report_names_children_that_were_cancelled_before_and_says_why():
    @supervised_flow
    async def parent():
        supervisor.spawn("score/gpu", name="early").cancel("nobody needs it")
        await asyncio.sleep(30)
        gc.collect()
        supervisor.spawn("score/gpu", {"part": 2}, name="late")
        await asyncio.sleep(30)
        raise ValueError("the night is over")

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu")
        run = prefect.start(parent)
        prefect.until(lambda: not run.is_alive, within=120)
        early, late = run.report.receipts
        assert (early.name, early.status, early.reason) == ("early", "cancelled", "nobody needs it")
        assert (late.name, late.status) == ("late", "cancelled")
        assert "the night is over" in late.reason
