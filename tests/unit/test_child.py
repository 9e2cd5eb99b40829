"""The handle of one child: settled once, awaitable from any loop or thread."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import get_args
from uuid import uuid4

import prefect.futures
import prefect.states
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import CancelledRun, CrashedRun, FailedRun
from prefect.results import ResultRecordMetadata
from prefect.settings import PREFECT_UI_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from supervised import (
    ChildCancelled,
    ChildCrashed,
    ChildFailed,
    ChildTimedOut,
    DeploymentNotFoundError,
)
from supervised._types import CancelReason, Outcome

BOOM = ValueError("boom")
ASKED = CancelReason(source="explicit", message="its handle was cancelled")
DEADLINE = CancelReason(source="deadline", message="its deadline of 3 s was exceeded")
LOST = ResultRecordMetadata(storage_key="/no/such/folder/result")
outcomes = st.sampled_from(get_args(Outcome))


def a_run(**fields):
    return FlowRun(id=uuid4(), flow_id=uuid4(), name="otter", **fields)


def from_a_thread(function, *args, **kwargs):
    """Call a function in another thread and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args, **kwargs).result(timeout=10)


def spin_until(question):
    """Let other threads run until the answer is true; the test's time limit bounds it."""
    while not question():
        os.sched_yield()


def sync_result(child, **kwargs):
    return child.result(**kwargs)


def async_result(child, **kwargs):
    async def ask():
        return await child.aresult(**kwargs)

    return asyncio.run(ask())


both_ways = pytest.mark.parametrize("result_of", [sync_result, async_result])

# -- what it is ---------------------------------------------------------------------------------


def test_a_child_without_a_run_is_pending(make_child):
    child = make_child()
    assert (child.state.type, child.outcome, child.is_over) == (StateType.PENDING, None, False)
    assert (child.flow_run, child.flow_run_id, child.url) == (None,) * 3
    assert child.task_run_id is not None  # Prefect asks for it when the child is a dependency
    assert repr(child) == "<Child 'part' deployment Pending>"


def test_a_child_with_a_run_has_its_ids_and_its_state(make_child):
    run = a_run(state=Running(), parent_task_run_id=uuid4())
    child = make_child(kind="inline")
    child.assign_run(run)
    assert run == child.flow_run
    assert (run.id, run.parent_task_run_id) == (child.flow_run_id, child.task_run_id)
    assert run.state == child.state
    assert f"<Child 'part' inline Running {run.id}>" == repr(child)


def test_a_child_has_a_page_where_a_ui_is_configured(make_child):
    child = make_child()
    child.assign_run(a_run())
    with temporary_settings({PREFECT_UI_URL: "http://ui.test"}):
        assert f"http://ui.test/runs/flow-run/{child.flow_run_id}" == child.url


def test_a_run_that_is_assigned_late_does_not_turn_back_an_observed_state(make_child):
    child = make_child()
    running = Running()
    child.observe(running)
    child.assign_run(a_run(state=Pending()))
    assert child.state == running


def test_nothing_is_observed_of_a_child_that_is_over(make_child):
    child = make_child()
    done = Completed()
    child.settle("completed", state=done)
    child.observe(Running())
    assert child.state is done


# -- the end, once ------------------------------------------------------------------------------


@given(st.lists(outcomes, min_size=1, max_size=5))
def test_the_first_end_is_the_end(make_child, ends):
    told = []
    child = make_child(on_done=told.append)
    child.add_done_callback(told.append)
    assert [child.settle(end) for end in ends] == [True] + [False] * (len(ends) - 1)
    assert (ends[0], True) == (child.outcome, child.is_over)
    assert told == [child, child]


@given(st.lists(outcomes, min_size=2, max_size=8))
def test_of_threads_that_end_a_child_at_once_exactly_one_does(make_child, ends):
    told = []
    child = make_child(on_done=told.append)
    start = threading.Barrier(len(ends))

    def end(outcome):
        start.wait(timeout=10)
        return child.settle(outcome, value=outcome), outcome

    with ThreadPoolExecutor(len(ends)) as pool:
        settled = [outcome for won, outcome in pool.map(end, ends) if won]
    assert [child.outcome] == settled
    assert told == [child]


def test_a_child_that_ended_at_its_deadline_timed_out(make_child):
    child = make_child()
    child.mark_cancel(DEADLINE)
    child.settle("cancelled")
    assert child.outcome == "timed_out"


@pytest.mark.parametrize("end", ["completed", "failed", "crashed", "abandoned"])
def test_a_deadline_renames_nothing_but_a_cancellation(make_child, end):
    child = make_child()
    child.mark_cancel(DEADLINE)
    child.settle(end)
    assert end == child.outcome


def test_the_last_state_stays_where_the_end_brings_none(make_child):
    child = make_child()
    running = Running()
    child.observe(running)
    child.settle("abandoned")
    assert child.state == running
    assert isinstance(child.ended_at, datetime)


# -- callbacks ----------------------------------------------------------------------------------


def test_the_scope_hears_of_the_end_before_any_callback(make_child):
    order = []
    child = make_child(on_done=lambda _: order.append("scope"))
    child.add_done_callback(lambda _: order.append("first"))
    child.when_over(lambda: order.append("second"))
    child.settle("completed")
    assert order == ["scope", "first", "second"]


def test_the_scope_has_heard_of_the_end_when_a_waiting_thread_wakes(make_child):
    woken = threading.Event()
    seen_by_scope = []
    # A woken thread needs microseconds; one that sleeps on costs this test 0.2 s.
    child = make_child(on_done=lambda _: seen_by_scope.append(woken.wait(0.2)))

    def wait():
        child.result(timeout=10, raise_on_failure=False)
        woken.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    spin_until(lambda: child.is_awaited)
    child.settle("failed")
    waiter.join(timeout=10)
    assert seen_by_scope == [False]
    assert woken.is_set()


def test_a_callback_on_a_child_that_is_over_is_called_at_once(make_child):
    child = make_child()
    child.settle("failed")
    told = []
    child.add_done_callback(told.append)
    child.when_over(lambda: told.append("over"))
    assert told == [child, "over"]


def test_a_callback_may_use_the_child(make_child):
    child = make_child()
    told = []
    child.add_done_callback(lambda over: over.add_done_callback(told.append))
    child.add_done_callback(lambda over: told.append(over.result()))
    child.settle("completed", value=7)
    assert told == [child, 7]


def test_a_callback_that_raises_is_logged_and_the_others_are_called(make_child, caplog):
    def fail(_):
        raise BOOM

    child = make_child(name="score")
    told = []
    child.add_done_callback(fail)
    child.add_done_callback(told.append)
    logger = logging.getLogger("prefect.supervised.child")
    logger.addHandler(caplog.handler)
    try:
        assert child.settle("completed")
    finally:
        logger.removeHandler(caplog.handler)
    assert told == [child]
    assert "A done callback of child 'score' raised" in caplog.text


# -- results ------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("value", [7, None, [], BOOM], ids=repr)
def test_a_completed_child_gives_what_its_flow_returned(make_child, result_of, value):
    child = make_child()
    child.settle("completed", value=value)
    assert value is result_of(child)


@both_ways
def test_a_result_that_only_the_state_holds_is_read_from_it(make_child, result_of):
    child = make_child()
    child.settle("completed", state=State(type=StateType.COMPLETED, data={"rows": 3}))
    assert result_of(child) == {"rows": 3}
    assert result_of(child) is result_of(child)


@both_ways
def test_a_deployment_that_persisted_no_result_gives_none(make_child, result_of):
    child = make_child()
    child.settle("completed", state=Completed())
    assert result_of(child) is None


FAILURES = pytest.mark.parametrize(
    ("outcome", "state", "kind", "text"),
    [
        ("failed", Failed(message="bad"), ChildFailed, "failed: bad"),
        ("failed", None, ChildFailed, "failed: The run is being created."),
        ("crashed", Crashed(message="SIGKILL"), ChildCrashed, "crashed: SIGKILL"),
        (
            "timed_out",
            Failed(name="TimedOut", message="exceeded 3 s"),
            ChildTimedOut,
            "timed out: exceeded 3 s",
        ),
        ("cancelled", Cancelled(), ChildCancelled, "was cancelled."),
        ("abandoned", Running(), ChildCancelled, "was cancelled and may still be alive."),
    ],
)


@both_ways
@FAILURES
def test_a_child_that_did_not_complete_raises_how_it_ended(
    make_child, result_of, *, outcome, state, kind, text
):
    child = make_child(name="score")
    run = a_run()
    child.assign_run(run)
    child.settle(outcome, state=state)
    with pytest.raises(kind) as caught:
        result_of(child)
    error = caught.value
    assert type(error) is kind
    assert f"Child 'score' (flow run {run.id}) {text}" == str(error)
    assert ("score", run.id, None) == (error.child, error.flow_run_id, error.reason)
    assert state is None or error.state is state


@both_ways
@FAILURES
def test_the_error_can_be_had_without_raising_it(
    make_child, result_of, *, outcome, state, kind, text
):
    child = make_child()
    child.settle(outcome, state=state)
    error = result_of(child, raise_on_failure=False)
    assert type(error) is kind
    assert str(error).endswith(text)


@both_ways
def test_the_error_says_who_asked_and_where_to_look(make_child, result_of):
    child = make_child(name="score")
    child.assign_run(a_run())
    child.mark_cancel(ASKED)
    child.settle("cancelled", state=Cancelled())
    with temporary_settings({PREFECT_UI_URL: "http://ui.test"}):
        error = result_of(child, raise_on_failure=False)
    assert error.reason is ASKED
    assert "was cancelled because its handle was cancelled." in str(error)
    assert str(error).endswith(f"See http://ui.test/runs/flow-run/{child.flow_run_id}")


@both_ways
@pytest.mark.parametrize("where", ["in memory", "in the state"])
def test_the_childs_own_exception_is_the_cause(make_child, result_of, where):
    child = make_child()
    if where == "in memory":
        child.settle("failed", state=Failed(message="bad"), exception=BOOM)
    else:
        child.settle("failed", state=State(type=StateType.FAILED, message="bad", data=BOOM))
    error = result_of(child, raise_on_failure=False)
    assert error.__cause__ is BOOM
    assert "failed: ValueError: boom" in str(error)


@both_ways
@pytest.mark.parametrize("stand_in", [FailedRun("x"), CrashedRun("x"), CancelledRun("x")], ids=repr)
def test_prefects_stand_ins_for_an_exception_are_no_cause(make_child, result_of, stand_in):
    child = make_child()
    child.settle("failed", state=State(type=StateType.FAILED, message="bad", data=stand_in))
    error = result_of(child, raise_on_failure=False)
    assert error.__cause__ is None
    assert "failed: bad" in str(error)


@both_ways
def test_a_failure_whose_stored_exception_is_out_of_reach_is_a_failure_all_the_same(
    make_child, result_of, monkeypatch
):
    monkeypatch.setattr(prefect.states, "RESULT_READ_RETRY_DELAY", 0)
    child = make_child()
    child.settle("failed", state=State(type=StateType.FAILED, message="bad", data=LOST))
    with pytest.raises(ChildFailed, match="failed: bad"):
        result_of(child)


@both_ways
def test_a_child_that_could_not_be_launched_raises_why(make_child, result_of):
    missing = DeploymentNotFoundError("No deployment 'score/gpu'.", child="score")
    child = make_child()
    child.settle("failed", exception=missing)
    with pytest.raises(DeploymentNotFoundError) as caught:
        result_of(child)
    assert caught.value is missing


# -- waiting ------------------------------------------------------------------------------------


@both_ways
def test_patience_ends_but_the_child_goes_on(make_child, result_of):
    child = make_child(name="score")
    with pytest.raises(TimeoutError, match=r"Child 'score' is not over after 0\.01 s"):
        result_of(child, timeout=0.01)
    assert not child.is_over
    child.settle("completed", value=7)
    assert result_of(child, timeout=0) == 7


def test_waiting_with_a_limit_just_returns(make_child):
    child = make_child()
    child.wait(timeout=0)
    asyncio.run(child.wait_async(timeout=0))
    assert not child.is_over


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_waiting_raises_nothing_whatever_the_outcome(make_child, outcome):
    child = make_child()
    child.settle(outcome)
    child.wait()
    asyncio.run(child.wait_async())


def test_coroutines_of_many_loops_and_threads_hear_of_one_end(make_child):
    child = make_child()

    async def ask():
        return await child

    with ThreadPoolExecutor(4) as pool:
        results = [
            pool.submit(asyncio.run, ask()),
            pool.submit(asyncio.run, ask()),
            pool.submit(child.result, timeout=10),
            pool.submit(child.result, timeout=10),
        ]
        spin_until(lambda: child.is_awaited)
        child.settle("completed", value=7)
        assert [future.result(timeout=10) for future in results] == [7, 7, 7, 7]


def test_a_waiter_that_is_cancelled_leaves_nothing_behind(make_child, until):
    child = make_child()

    async def give_up():
        waiter = asyncio.ensure_future(child.aresult())
        await until(lambda: child._callbacks)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(give_up())
    assert (child.is_awaited, child._callbacks, child.is_over) == (False, None, False)


def test_the_end_may_come_after_the_loop_of_a_waiter_is_gone(make_child, until):
    child = make_child()
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(child.wait_async())
    loop.run_until_complete(until(lambda: child._callbacks))
    loop.close()
    assert child.settle("completed")
    waiter._log_destroy_pending = False


def test_waiting_without_await_in_the_loop_that_the_child_needs_is_refused(make_child):
    child = make_child(name="score")

    async def body():
        child.home_loop = asyncio.get_running_loop()
        with pytest.raises(RuntimeError, match=r"'score' runs in this event loop.*`await child`"):
            child.result()
        with pytest.raises(RuntimeError, match="would never end"):
            child.wait(timeout=1)
        await asyncio.get_running_loop().run_in_executor(None, child.wait, 0)
        child.settle("completed", value=7)
        assert child.result() == 7

    asyncio.run(body())


def test_waiting_without_await_in_another_loop_is_allowed(make_child):
    child = make_child()
    child.home_loop = asyncio.new_event_loop()

    async def elsewhere():
        child.wait(timeout=0)

    asyncio.run(elsewhere())
    child.home_loop.close()


# -- who hears of it ----------------------------------------------------------------------------


def test_a_failure_that_somebody_waits_for_is_delivered(make_child, until):
    child = make_child()

    async def body():
        waiter = asyncio.ensure_future(child.aresult(raise_on_failure=False))
        await until(lambda: child.is_awaited)
        child.settle("failed")
        assert child.delivered
        await waiter

    asyncio.run(body())
    assert not child.is_awaited


@both_ways
def test_a_failure_is_delivered_to_whoever_asks_for_it_later(make_child, result_of):
    child = make_child()
    child.settle("failed")
    assert not child.delivered
    result_of(child, raise_on_failure=False)
    assert child.delivered


@both_ways
def test_patience_that_ended_in_vain_delivers_nothing(make_child, result_of):
    child = make_child()
    with pytest.raises(TimeoutError):
        result_of(child, timeout=0)
    child.settle("failed")
    assert not child.delivered


# -- cancelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_reason", "message"),
    [(None, "its handle was cancelled"), ("no longer needed", "no longer needed")],
)
def test_a_handle_passes_its_cancellation_on(make_child, given_reason, message):
    asked = []
    child = make_child(ask_cancel=lambda *args: asked.append(args))
    child.cancel(given_reason)
    assert asked == [(child, CancelReason(source="explicit", message=message))]
    assert not child.is_over


def test_a_handle_passes_its_detachment_on(make_child):
    asked = []
    child = make_child(ask_detach=asked.append)
    child.detach()
    assert asked == [child]


def test_who_asked_first_is_remembered(make_child):
    child = make_child()
    assert child.mark_cancel(ASKED)
    first_time = child.requested_at
    assert child.mark_cancel(DEADLINE)
    assert child.cancel_reason is ASKED
    assert first_time is child.requested_at


def test_a_child_that_is_over_cannot_be_cancelled(make_child):
    child = make_child()
    child.settle("completed")
    assert not child.mark_cancel(ASKED)
    assert child.cancel_reason is None


def test_a_child_that_waits_for_its_slot_is_cancelled_at_once(make_child):
    child = make_child()
    child.attempt.is_queued = True
    assert child.mark_cancel(ASKED)
    assert child.outcome == "cancelled"


def test_an_acknowledgement_is_recorded_once(make_child):
    child = make_child()
    child.mark_acknowledged()
    first_time = child.acknowledged_at
    child.mark_acknowledged()
    assert first_time is child.acknowledged_at


# -- as a future of Prefect ---------------------------------------------------------------------


def test_prefect_waits_for_children_as_for_its_own_futures(make_child):
    over, failed, alive = make_child(), make_child(), make_child()
    over.settle("completed", value=7, state=Completed())
    failed.settle("failed", exception=BOOM)  # before it had a state
    waited = prefect.futures.wait([over, failed, alive], timeout=0.01)
    assert ({over, failed}, {alive}) == (waited.done, waited.not_done)


def test_prefect_yields_children_as_they_end(make_child):
    children = [make_child() for _ in range(3)]
    children[0].settle("completed", state=Completed())
    endings = iter([children[2], children[1]])
    seen = []
    for child in prefect.futures.as_completed(children, timeout=10):
        seen.append(child)
        if (following := next(endings, None)) is not None:
            from_a_thread(following.settle, "completed")
    assert seen == [children[0], children[2], children[1]]


def test_prefects_list_of_futures_gathers_results(make_child):
    children = prefect.futures.PrefectFutureList([make_child(), make_child()])
    for number, child in enumerate(children):
        child.settle("completed", value=number)
    assert children.result(timeout=10) == [0, 1]


def test_a_launch_that_is_tried_again_has_the_same_task_run_and_the_next_generation_another(
    make_child,
):
    """The server keeps one task run for a generation, whatever id is sent the second time."""
    child = make_child()
    given_out = child.task_run_id
    assert child.new_tracking_id() == child.new_tracking_id() == given_out
    child.generation += 1
    second = child.new_tracking_id()
    assert second == child.new_tracking_id() == child.task_run_id
    assert second != given_out
