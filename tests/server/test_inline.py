"""Inline children: flows that run in the parent's process, and end with it."""

import asyncio
import contextlib
import contextvars
import os
import signal
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import anyio
import anyio.from_thread
import psutil
import pytest
from prefect import flow, tags, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.states import Cancelling
from support.world import eventually

import supervised
from supervised import (
    Child,
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    DeploymentNotFoundError,
    NoSupervisorError,
    ParametersError,
    ScopeClosedError,
    SpawnError,
    _escalation,
    _interrupts,
    _teardown,
    supervised_flow,
    supervisor,
)
from supervised._control import ControlPlane

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.usefixtures("server")


@flow
async def double(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


@flow
def triple(x: int) -> int:
    return 3 * x


@flow
async def forever() -> None:
    await asyncio.sleep(3600)


@flow
def until_cancelled() -> str:
    while not supervised.cancelled():
        time.sleep(0.02)
    return "stopped"


@flow
async def broken(after: float = 0) -> None:
    await asyncio.sleep(after)
    raise ValueError("broken part")


def runs_below(run_id):
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {"parent_flow_run_id": {"any_": [str(run_id)]}}
            )
        )


def cancel_run(run_id):
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Cancelling())


def own_run_id():
    return FlowRunContext.get().flow_run.id


async def running(child: Child) -> None:
    with anyio.fail_after(30):
        while not child.state.is_running():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every scope gives the control plane back, whatever happened in it."""
    yield
    assert ControlPlane._running == []

    def ours():
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if name.startswith("supervised-")]

    # A scope waits 3 s for the plane, which may finish its reads.
    eventually(lambda: not ours(), seconds=15, what="our threads are gone")


@pytest.fixture
def engines_have_time(monkeypatch):
    """More than a second to write how a run has ended: a locked server is asked again in 2 s."""
    monkeypatch.setattr(_escalation, "_ENGINE_SECONDS", 20.0)
    monkeypatch.setattr(_teardown, "_INLINE_SECONDS", 20.0)


# -- results ------------------------------------------------------------------------------------


def test_an_async_body_awaits_async_and_sync_children():
    @supervised_flow
    async def parent():
        children = [supervisor.spawn(double, {"x": 1}), supervisor.spawn(triple, {"x": 1})]
        return [await child for child in children]

    assert asyncio.run(parent()) == [2, 3]


def test_a_sync_body_asks_async_and_sync_children_for_results():
    @supervised_flow
    def parent():
        children = [supervisor.spawn(double, {"x": 1}), supervisor.spawn(triple, {"x": 1})]
        return [child.result() for child in children]

    assert parent() == [2, 3]


def test_children_carry_the_parent_link_our_tag_and_what_the_user_gave():
    @supervised_flow
    async def parent():
        with tags("ambient"):
            child = supervisor.spawn(double, {"x": 1}, name="first", tags=["mine"])
        await child
        return own_run_id(), child.flow_run_id

    run_id, child_id = asyncio.run(parent())
    (run,) = runs_below(run_id)
    assert run.id == child_id
    assert run.name == "first"
    assert set(run.tags) == {"ambient", "mine", "supervised", f"supervised:{run_id}"}
    assert run.labels["supervised.parent"] == str(run_id)
    assert run.idempotency_key.startswith(f"supervised:{run_id}:")
    assert run.state.is_completed()


def test_a_body_that_returns_waits_for_its_children():
    done = []

    @flow
    async def slow():
        await asyncio.sleep(0.3)
        done.append(True)

    @supervised_flow
    async def parent():
        supervisor.spawn(slow)
        return "early"

    assert asyncio.run(parent()) == "early"
    assert done == [True]


def test_spawning_works_from_tasks_threads_and_nested_flows():
    @task
    def in_task():
        return supervisor.spawn(double, {"x": 1}).result()

    @supervised_flow
    async def nested():
        return await supervisor.spawn(double, {"x": 3})

    @supervised_flow
    async def parent():
        context = contextvars.copy_context()
        spawned = []
        thread = threading.Thread(
            target=lambda: context.run(lambda: spawned.append(supervisor.spawn(double, {"x": 2})))
        )
        thread.start()
        thread.join()
        submitted = in_task.submit()
        return [
            await asyncio.to_thread(submitted.result),
            await spawned[0],
            await nested(),
            await supervisor.spawn(nested),
        ]

    assert asyncio.run(parent()) == [2, 4, 6, 6]


def test_plain_calls_keep_working():
    @supervised_flow
    async def parent():
        return await double(4), triple(4)

    assert asyncio.run(parent()) == (8, 12)


def test_a_child_is_a_future_for_prefect():
    from prefect.futures import as_completed, wait

    @task
    def add_one(x):
        return x + 1

    @supervised_flow
    def parent():
        children = [supervisor.spawn(triple, {"x": x}) for x in range(3)]
        _, not_done = wait(children)
        assert not not_done
        assert {child.result() for child in as_completed(children)} == {0, 3, 6}
        return add_one.submit(1, wait_for=children).result()

    assert parent() == 2


def test_the_same_key_is_the_same_child():
    @supervised_flow
    async def parent():
        first = supervisor.spawn(double, {"x": 1}, key="only")
        again = supervisor.spawn(double, {"x": 1}, key="only")
        with pytest.raises(supervised.DuplicateKeyError, match="'only'"):
            supervisor.spawn(double, {"x": 2}, key="only")
        assert first is again
        return await first

    assert asyncio.run(parent()) == 2


def test_equal_children_are_different_runs():
    @supervised_flow
    async def parent():
        twins = [supervisor.spawn(double, {"x": 1}) for _ in range(2)]
        assert [await twin for twin in twins] == [2, 2]
        return len({twin.flow_run_id for twin in twins})

    assert asyncio.run(parent()) == 2


def test_max_concurrent_bounds_the_children_that_run_at_once():
    active, peak = [], []

    @flow
    async def counted(x):
        active.append(x)
        peak.append(len(active))
        await asyncio.sleep(0.05)
        active.remove(x)

    @supervised_flow(max_concurrent=2)
    async def parent():
        for x in range(5):
            supervisor.spawn(counted, {"x": x})

    asyncio.run(parent())
    assert len(peak) == 5
    assert max(peak) <= 2


# -- failures -----------------------------------------------------------------------------------


def test_awaiting_a_failed_child_raises_what_happened_and_why():
    @supervised_flow
    async def parent():
        await supervisor.spawn(broken, name="part-1")

    with pytest.raises(ChildFailed, match="part-1.*ValueError: broken part") as caught:
        asyncio.run(parent())
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.state.is_failed()
    assert str(caught.value.flow_run_id) in str(caught.value)


@pytest.mark.usefixtures("engines_have_time")
def test_an_unheard_failure_ends_the_body_and_the_siblings():
    seen = {}

    @supervised_flow
    async def parent():
        seen["sibling"] = supervisor.spawn(forever)
        supervisor.spawn(broken, {"after": 0.2})
        seen["run"] = own_run_id()
        await asyncio.sleep(3600)

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(parent())
    (failure,) = caught.value.exceptions
    assert isinstance(failure, ChildFailed)
    sibling = seen["sibling"]
    assert sibling.outcome == "cancelled"
    assert sibling.cancel_reason.source == "sibling_failed"
    assert "ValueError: broken part" in str(sibling.cancel_reason)
    assert sorted(run.state_name for run in runs_below(seen["run"])) == ["Cancelled", "Failed"]


def test_a_failure_that_came_before_it_was_awaited_is_raised_there_all_the_same():
    @supervised_flow
    async def parent():
        child = supervisor.spawn("score/nowhere")
        child.wait()  # as if the machine had kept the loop waiting
        await child

    with pytest.raises(DeploymentNotFoundError):
        asyncio.run(parent())


def test_a_failure_that_came_before_it_was_gathered_is_raised_there_all_the_same():
    @supervised_flow
    async def parent():
        sibling = supervisor.spawn(forever)
        child = supervisor.spawn("score/nowhere")
        child.wait()
        await asyncio.gather(sibling, child)

    with pytest.raises(DeploymentNotFoundError):
        asyncio.run(parent())


def test_a_failure_that_came_before_it_was_asked_for_is_raised_there_all_the_same(monkeypatch):
    monkeypatch.setattr(_interrupts, "_ABOUT_TO_WAIT_SECONDS", 20.0)  # a thread may have to wait

    @supervised_flow
    def parent():
        child = supervisor.spawn("score/nowhere")
        child.wait()
        child.result()

    with pytest.raises(DeploymentNotFoundError):
        parent()


def test_waiting_for_a_sibling_of_a_failed_child_tells_of_the_failure():
    @supervised_flow
    def parent():
        sibling = supervisor.spawn(until_cancelled)
        supervisor.spawn(broken)
        sibling.result()

    with pytest.raises(ExceptionGroup) as caught:
        parent()
    (failure,) = caught.value.exceptions
    assert isinstance(failure, ChildFailed)


@pytest.mark.parametrize("sibling", ["is queued for a slot", "runs"])
def test_a_body_that_waits_for_a_sibling_is_interrupted_once_and_not_in_its_cleanup(sibling):
    """Before it hears of the sibling's end, which comes of the failure too."""
    ends = []

    @supervised_flow(max_concurrent=1 if sibling == "is queued for a slot" else None)
    def parent():
        supervisor.spawn(broken, {"after": 0.5})
        waited_for = supervisor.spawn(forever)
        try:
            waited_for.result()
        except BaseException as exc:  # a signal's exception is no `Exception`
            ends.append(type(exc))
            until = time.monotonic() + 0.6
            while time.monotonic() < until:  # three times as long as a thread is looked at
                time.sleep(0.02)  # cleanup that a signal can cut off: there is no event for "none"
            ends.append("tidy")
            raise

    with pytest.raises(ExceptionGroup) as caught:
        parent()
    (failure,) = caught.value.exceptions
    assert isinstance(failure, ChildFailed)
    assert ends == [TerminationSignal, "tidy"]


def test_with_wait_the_others_finish_first():
    @supervised_flow(on_child_failure="wait")
    async def parent():
        supervisor.spawn(broken)
        return await supervisor.spawn(double, {"x": 5})

    with pytest.raises(ExceptionGroup, match="1 failure"):
        asyncio.run(parent())


def test_with_ignore_only_the_handle_knows():
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        child = supervisor.spawn(broken)
        await child.wait_async()
        return child.outcome

    assert asyncio.run(parent()) == "failed"


def test_a_failure_that_the_body_handled_is_not_raised_again():
    @supervised_flow(on_child_failure="wait")
    async def parent():
        try:
            await supervisor.spawn(broken)
        except ChildFailed:
            return "handled"

    assert asyncio.run(parent()) == "handled"


@pytest.mark.usefixtures("engines_have_time")
def test_a_body_that_raises_cancels_its_children_and_raises_its_own_exception():
    seen = {}

    @supervised_flow
    async def parent():
        child = seen["child"] = supervisor.spawn(forever)
        seen["run"] = own_run_id()
        await running(child)
        raise KeyError("body")

    with pytest.raises(KeyError):
        asyncio.run(parent())
    assert seen["child"].outcome == "cancelled"
    assert [run.state_name for run in runs_below(seen["run"])] == ["Cancelled"]


def test_the_report_names_every_child():
    seen = {}

    @supervised_flow
    def parent():
        supervisor.spawn(until_cancelled, name="loop")
        supervisor.spawn(forever, name="sleeper")
        seen["supervisor"] = supervised._context.current_supervisor.get()
        raise KeyError("body")

    with pytest.raises(KeyError):
        parent()
    report = seen["supervisor"].report
    assert report.ok
    assert {receipt.name: receipt.status for receipt in report.receipts} == {
        "loop": "cancelled",
        "sleeper": "cancelled",
    }
    assert "KeyError" in str(report)


def test_a_thread_that_ignores_cancellation_is_reported_as_unverified():
    release, began = threading.Event(), threading.Event()

    @flow
    def deaf():
        began.set()
        release.wait(30)

    @supervised_flow(grace_seconds=1)
    async def parent():
        supervisor.spawn(deaf, name="deaf")
        await asyncio.to_thread(began.wait)
        raise KeyError("body")

    try:
        with pytest.raises(ExceptionGroup) as caught:
            asyncio.run(parent())
        own, teardown = caught.value.exceptions
        assert isinstance(own, KeyError)
        assert isinstance(teardown, supervised.TeardownError)
        assert [receipt.name for receipt in teardown.report.unverified] == ["deaf"]
        assert "ignores the cancellation" in str(teardown.report)
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "supervised-deaf":
                thread.join(20)


# -- cancellation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [forever, until_cancelled])
def test_a_cancelled_child_ends_cancelled(target):
    @supervised_flow
    async def parent():
        child = supervisor.spawn(target)
        await running(child)
        child.cancel("enough of it")
        with pytest.raises(ChildCancelled, match="enough of it"):
            await child
        return child.flow_run_id

    child_id = asyncio.run(parent())
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(child_id).state
    assert state.is_cancelled()
    assert "enough of it" in state.message


@pytest.mark.usefixtures("engines_have_time")
def test_cancelling_at_any_moment_leaves_no_pending_run():
    @supervised_flow
    async def parent():
        for delay in range(12):
            child = supervisor.spawn(forever)
            await asyncio.sleep(delay * 0.02)
            child.cancel()
        return own_run_id()

    run_id = asyncio.run(parent())
    assert {run.state_name for run in runs_below(run_id)} <= {"Cancelled"}


def test_on_cancellation_hooks_of_an_inline_child_run():
    calls = []

    def hook(which_flow, run, state):
        calls.append((which_flow.name, state.name))

    @supervised_flow(on_cancellation=hook)
    async def hooked():
        await asyncio.sleep(3600)

    @supervised_flow
    async def parent():
        child = supervisor.spawn(hooked)
        await running(child)
        child.cancel()

    asyncio.run(parent())
    assert calls == [("hooked", "Cancelling")]


def test_a_childs_deadline_cancels_it_and_is_its_outcome():
    @supervised_flow(on_child_failure="ignore")
    async def parent():
        child = supervisor.spawn(forever, timeout_seconds=0.5)
        with pytest.raises(ChildTimedOut):
            await child
        return child.outcome

    assert asyncio.run(parent()) == "timed_out"


def test_cancelling_the_run_from_outside_ends_a_body_that_nobody_else_would_end():
    seen = {}

    @supervised_flow
    async def parent():
        child = seen["child"] = supervisor.spawn(forever)
        await running(child)
        seen["run"] = own_run_id()
        cancel_run(seen["run"])
        await asyncio.sleep(3600)

    with pytest.raises(CancelledRun):
        asyncio.run(parent())
    assert seen["child"].outcome == "cancelled"
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(seen["run"]).state_name == "Cancelled"


def test_cancelling_the_run_from_outside_ends_a_sync_body_in_the_main_thread():
    seen = {}

    @supervised_flow
    def parent():
        child = seen["child"] = supervisor.spawn(until_cancelled)
        while not child.state.is_running():
            time.sleep(0.01)
        seen["run"] = own_run_id()
        cancel_run(seen["run"])
        time.sleep(3600)

    with pytest.raises(CancelledRun):
        parent()
    assert seen["child"].outcome == "cancelled"


def test_a_timeout_cancels_the_children():
    seen = {}

    @supervised_flow(timeout_seconds=3)
    async def parent():
        seen["child"] = supervisor.spawn(forever)
        await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        asyncio.run(parent())
    assert seen["child"].outcome == "cancelled"
    assert seen["child"].cancel_reason.source == "parent_timed_out"


def test_a_timeout_hits_a_body_that_only_waits_for_children():
    seen = {}

    @supervised_flow(timeout_seconds=1.5)
    async def parent():
        seen["child"] = supervisor.spawn(forever)

    with pytest.raises(TimeoutError):
        asyncio.run(parent())
    assert seen["child"].outcome == "cancelled"


def test_cancelling_the_task_around_the_flow_cancels_the_children():
    seen = {}

    @supervised_flow
    async def parent():
        child = seen["child"] = supervisor.spawn(forever)
        await running(child)
        seen["ready"].set()
        await asyncio.sleep(3600)

    async def main():
        seen["ready"] = asyncio.Event()
        running_parent = asyncio.create_task(parent())
        await seen["ready"].wait()
        running_parent.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running_parent

    asyncio.run(main())
    assert seen["child"].outcome == "cancelled"


def test_nothing_can_be_spawned_during_teardown():
    seen = {}

    @supervised_flow
    async def parent():
        child = supervisor.spawn(forever)
        await running(child)
        supervisor.cancel("closing time")
        with pytest.raises(ScopeClosedError, match="closing time") as caught:
            supervisor.spawn(double, {"x": 1})
        seen["refused"] = caught.value
        await child.wait_async()

    asyncio.run(parent())
    assert seen["refused"]


def test_retries_of_the_parent_make_a_new_generation_of_each_child():
    attempts = []

    @supervised_flow(retries=1)
    async def parent():
        child = supervisor.spawn(double, {"x": 1})
        value = await child
        attempts.append((child.generation, child.flow_run_id, value))
        if len(attempts) == 1:
            raise ValueError("first attempt")
        return value

    assert asyncio.run(parent()) == 2
    (first, second) = attempts
    assert (first[0], second[0]) == (0, 1)
    assert first[1] != second[1]


def test_a_child_that_outlives_its_wait_goes_on():
    @supervised_flow
    async def parent():
        child = supervisor.spawn(forever)
        with pytest.raises(TimeoutError):
            await child.aresult(timeout=0.2)
        assert not child.is_over
        child.cancel()

    asyncio.run(parent())


def test_waiting_synchronously_for_a_child_of_the_same_loop_is_refused():
    @supervised_flow
    async def parent():
        released = asyncio.Event()

        @flow
        async def waits():
            await released.wait()
            return 2

        child = supervisor.spawn(waits)
        await running(child)
        with pytest.raises(RuntimeError, match="await child"):
            child.result()
        released.set()
        return await child

    assert asyncio.run(parent()) == 2


@pytest.mark.parametrize("how", ["exhausted", "broken off"])
def test_generator_flows_are_scopes_too(how):
    seen = {}

    @supervised_flow
    def parent():
        child = seen["child"] = supervisor.spawn(until_cancelled)
        yield 1
        child.cancel()
        yield 2

    if how == "exhausted":
        assert list(parent()) == [1, 2]
    else:
        for _ in parent():
            break
    assert seen["child"].outcome == "cancelled"


def test_async_generator_flows_are_scopes_too():
    seen = {}

    @supervised_flow
    async def parent():
        child = supervisor.spawn(double, {"x": 1})
        yield await child
        seen["sibling"] = supervisor.spawn(double, {"x": 2})

    async def main():
        return [item async for item in parent()]

    assert asyncio.run(main()) == [2]
    assert seen["sibling"].outcome == "completed"


def test_a_sync_body_can_cancel_an_async_child():
    @supervised_flow
    def parent():
        child = supervisor.spawn(forever)
        while not child.state.is_running():
            time.sleep(0.01)
        child.cancel("no longer")
        with pytest.raises(ChildCancelled, match="no longer"):
            child.result(timeout=20)

    parent()


def test_a_done_callback_may_spawn_but_not_wait():
    seen = {}

    @supervised_flow
    async def parent():
        scope = supervised._context.current_supervisor.get()

        def on_done(child):
            seen["spawned"] = scope.spawn(double, {"x": 2})

        first = supervisor.spawn(double, {"x": 1})
        first.add_done_callback(on_done)
        await first
        while "spawned" not in seen:
            await asyncio.sleep(0.01)
        return await seen["spawned"]

    assert asyncio.run(parent()) == 4


def test_many_threads_may_spawn_at_once():
    @supervised_flow
    def parent():
        contexts = [contextvars.copy_context() for _ in range(8)]
        spawned = []
        threads = [
            threading.Thread(
                target=context.run,
                args=(lambda: spawned.append(supervisor.spawn(triple, {"x": 1})),),
            )
            for context in contexts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(child.result() for child in spawned), len({child.key for child in spawned})

    assert parent() == (24, 8)


def test_a_body_that_blocks_its_loop_does_not_stop_supervision():
    seen = {}

    @supervised_flow
    async def parent():
        child = seen["child"] = supervisor.spawn(until_cancelled)
        await running(child)
        seen["run"] = own_run_id()
        cancel_run(seen["run"])
        deadline = time.monotonic() + 20
        while child.cancel_reason is None and time.monotonic() < deadline:
            time.sleep(0.01)  # on purpose: the loop is blocked
        seen["heard"] = child.cancel_reason is not None
        await asyncio.sleep(3600)

    with pytest.raises(CancelledRun):
        asyncio.run(parent())
    assert seen["heard"]
    assert seen["child"].outcome == "cancelled"


def test_a_failure_that_was_only_waited_for_is_raised_all_the_same():
    @supervised_flow(on_child_failure="wait")
    async def parent():
        child = supervisor.spawn(broken)
        await child.wait_async()

    with pytest.raises(ExceptionGroup):
        asyncio.run(parent())


def test_a_child_can_be_waited_for_by_a_task_before_it_has_a_run():
    @task
    def add(x, y):
        return x + y

    @supervised_flow
    def parent():
        child = supervisor.spawn(triple, {"x": 1})
        return add.submit(child, 1).result()

    assert parent() == 4


@pytest.mark.usefixtures("engines_have_time")
def test_with_no_grace_the_children_are_asked_all_the_same():
    seen = {}

    @supervised_flow(grace_seconds=0)
    async def parent():
        child = seen["child"] = supervisor.spawn(forever)
        await running(child)
        seen["run"] = own_run_id()
        raise KeyError("body")

    with pytest.raises((KeyError, ExceptionGroup)):
        asyncio.run(parent())
    assert seen["child"].cancel_reason.source == "parent_failed"
    assert [run.state_name for run in runs_below(seen["run"])] == ["Cancelled"]


@pytest.mark.usefixtures("engines_have_time")
def test_with_no_grace_the_engines_still_write_how_their_runs_have_ended():
    seen = {}

    async def takes_a_while(*_: object) -> None:
        await asyncio.sleep(0.3)
        seen["hook"] = "finished"

    hooked = forever.with_options(on_cancellation=[takes_a_while])

    @supervised_flow(grace_seconds=0)
    async def parent():
        child = supervisor.spawn(hooked)
        await running(child)
        seen["run"] = own_run_id()
        raise KeyError("body")

    with pytest.raises(KeyError):
        asyncio.run(parent())
    assert seen["hook"] == "finished"
    assert [run.state_name for run in runs_below(seen["run"])] == ["Cancelled"]


def test_a_key_that_an_earlier_attempt_used_up_gets_a_new_generation():
    """As after a suspend: the same run, from the top, and the server counts no new attempt."""
    seen = []

    @supervised_flow
    async def parent():
        scope = supervised._context.current_supervisor.get()
        first = scope.spawn(double, {"x": 1}, key="a")
        await first
        again = supervised._supervisor.Supervisor(scope.options, scope.flow, scope._context)
        second = again.spawn(double, {"x": 1}, key="a")
        await second
        again.close("completed", None)
        seen.extend([first, second])

    asyncio.run(parent())
    first, second = seen
    assert first.flow_run_id != second.flow_run_id
    assert (first.generation, second.generation) == (0, 1)


def test_a_cancellation_is_heard_after_the_body_has_returned():
    """The commonest shape: spawn, return, and let the scope wait."""
    seen = {}

    @supervised_flow
    async def parent():
        child = seen["child"] = supervisor.spawn(forever)
        await running(child)
        threading.Timer(0.5, contextvars.copy_context().run, (cancel_run, own_run_id())).start()

    with pytest.raises(CancelledRun):
        asyncio.run(parent())
    assert seen["child"].outcome == "cancelled"


def test_waiting_synchronously_is_refused_from_the_first_moment():
    @supervised_flow
    async def parent():
        child = supervisor.spawn(double, {"x": 1})
        with pytest.raises(RuntimeError, match="await child"):
            child.result()
        return await child

    assert asyncio.run(parent()) == 2


def test_a_callback_that_exits_does_not_take_supervision_along():
    @supervised_flow
    async def parent():
        first = supervisor.spawn(double, {"x": 1})
        first.add_done_callback(lambda _: sys.exit(3))
        return await first + await supervisor.spawn(double, {"x": 2})

    assert asyncio.run(parent()) == 6


def test_nothing_can_be_spawned_after_the_flow_is_over():
    seen = {}

    @supervised_flow
    async def parent():
        seen["scope"] = supervised._context.current_supervisor.get()

    asyncio.run(parent())
    with pytest.raises(ScopeClosedError, match="has ended"):
        seen["scope"].spawn(double, {"x": 1})


# -- waiting on purpose -------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [20, 0.3])
def test_a_child_that_a_failed_parent_waits_for_takes_the_time_it_needs(grace):
    """The grace bounds what is cancelled; waiting is what the policy asks for."""
    done = []

    @flow
    async def slow():
        await asyncio.sleep(1)
        done.append(True)

    @supervised_flow(grace_seconds=grace, on_parent={"failed": "wait"})
    async def parent():
        child = supervisor.spawn(slow)
        await running(child)
        raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        asyncio.run(parent())
    assert done == [True]


def test_a_cancellation_overtakes_the_wait_for_a_child():
    children = []

    @supervised_flow(on_parent={"failed": "wait"})
    async def parent():
        children.append(supervisor.spawn(forever))
        await running(children[0])
        asyncio.get_running_loop().call_later(0.5, cancel_run, own_run_id())
        raise ValueError("body")

    assert asyncio.run(parent(return_state=True)).is_cancelled()
    assert children[0].outcome == "cancelled"


def test_a_cancelled_parent_waits_for_half_of_the_grace_and_then_cancels():
    children = []

    @supervised_flow(grace_seconds=8, on_parent={"cancelled": "wait"})
    async def parent():
        children.append(supervisor.spawn(forever))
        await running(children[0])
        cancel_run(own_run_id())
        await asyncio.sleep(3600)

    assert asyncio.run(parent(return_state=True)).is_cancelled()
    assert children[0].outcome == "cancelled"
    assert children[0].escalations == ("waited",)


def test_telling_the_supervisor_to_cancel_cancels_every_child_whatever_its_policy():
    children = []

    @supervised_flow(on_parent={"cancelled": "wait"})
    async def parent():
        child = supervisor.spawn(forever)
        children.append(child)
        await running(child)
        supervisor.cancel("enough")
        await child.wait_async()

    asyncio.run(parent())
    (child,) = children
    assert child.outcome == "cancelled"
    assert str(child.cancel_reason) == "enough"
    assert child.escalations == ()


def test_a_child_that_waits_for_its_time_is_cancelled_at_once():
    children = []

    @supervised_flow
    async def parent():
        later = supervisor.spawn(
            forever, scheduled_time=datetime.now(timezone.utc) + timedelta(hours=1)
        )
        await supervisor.spawn(double, {"x": 1})
        children.append(later)
        later.cancel()
        await later.wait_async(5)

    asyncio.run(parent())
    (later,) = children
    assert later.outcome == "cancelled"
    assert later.flow_run_id is None


def test_an_inline_child_starts_at_its_time():
    @supervised_flow
    async def parent():
        at = datetime.now(timezone.utc) + timedelta(seconds=1)
        child = supervisor.spawn(double, {"x": 1}, scheduled_time=at)
        assert await child == 2
        return child.flow_run.created >= at

    assert asyncio.run(parent())


# -- what can be seen, and where ----------------------------------------------------------------


def test_a_hook_can_read_the_report_of_the_run():
    seen = []

    def hook(flow, flow_run, state):
        seen.append((supervisor.report, supervisor.flow_run_id == flow_run.id))

    @supervised_flow(on_failure=[hook])
    async def parent():
        await running(supervisor.spawn(forever))
        raise ValueError("body")

    @supervised_flow
    async def spawns_nothing():
        return 1

    async def main():
        with pytest.raises(ValueError, match="body"):
            await parent()
        await spawns_nothing()
        with pytest.raises(NoSupervisorError):
            supervisor.report  # noqa: B018

    asyncio.run(main())
    ((report, is_own),) = seen
    assert [receipt.status for receipt in report.receipts] == ["cancelled"]
    assert is_own


def test_a_done_callback_finds_the_supervisor():
    found = []

    @supervised_flow
    async def parent():
        first = supervisor.spawn(double, {"x": 1})
        first.add_done_callback(lambda _: found.append(supervisor.spawn(double, {"x": 2})))
        await first

    asyncio.run(parent())
    assert [child.result() for child in found] == [4]


def test_a_decorator_that_detaches_waits_for_children_that_cannot_be_detached():
    children = []

    @supervised_flow(on_parent="detach")
    async def parent():
        children.append(supervisor.spawn(double, {"x": 1}))

    asyncio.run(parent())
    (child,) = children
    assert child.result() == 2
    assert child.on_parent["failed"] == "cancel"


def test_a_plain_call_of_a_flow_that_spawned_makes_its_callers_watch_their_run():
    """The root has spawned nothing itself, and nobody else would hear of its cancellation."""

    @supervised_flow
    async def inner():
        child = supervisor.spawn(forever)
        await running(child)
        await asyncio.sleep(3600)

    @supervised_flow
    async def root():
        asyncio.get_running_loop().call_later(3, cancel_run, own_run_id())
        await inner()

    with anyio.from_thread.start_blocking_portal() as portal:
        state = portal.start_task_soon(lambda: root(return_state=True)).result(60)
    assert state.is_cancelled()


def test_hooks_of_a_nested_run_that_is_cancelled_alone_run_under_a_runner_too(monkeypatch):
    monkeypatch.setenv("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "false")
    called = []

    @supervised_flow(on_cancellation=[lambda flow, flow_run, state: called.append(flow.name)])
    async def inner():
        child = supervisor.spawn(forever)
        await running(child)
        cancel_run(own_run_id())
        await asyncio.sleep(3600)

    @supervised_flow
    async def root():
        return (await inner(return_state=True)).name

    assert asyncio.run(root()) == "Cancelled"
    assert called == ["inner"]


def test_interrupting_a_sync_body_once_leaves_the_teardown_alone():
    """The second Ctrl-C gives up; the first one, in whatever moment, does not."""
    children, begun = [], threading.Event()

    @flow
    def reluctant():
        begun.set()
        while not supervised.cancelled():
            time.sleep(0.02)
        time.sleep(0.5)  # by now the parent waits for the teardown
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    @supervised_flow
    def parent():
        children.append(supervisor.spawn(reluctant))
        assert begun.wait(30)
        raise ValueError("body")

    with pytest.raises(KeyboardInterrupt):
        parent()
    assert children[0].outcome == "cancelled"


def test_ten_runs_in_a_row_leave_no_thread_and_no_socket():
    @supervised_flow
    async def parent():
        children = [supervisor.spawn(forever), supervisor.spawn(until_cancelled)]
        for child in children:
            await running(child)
        raise ValueError("body")

    def run():
        with pytest.raises(ValueError, match="body"):
            asyncio.run(parent())
        me = psutil.Process()
        return me.num_threads(), len(me.net_connections()), me.num_fds()

    run()  # Prefect's own workers start with the first run, and stay
    counts = [run() for _ in range(9)]
    # Prefect's workers for logs and events may each be opening or closing a connection, and on a
    # busy machine several at a time; what has leaked is there after each of the last runs.
    left = [min(count) for count in zip(*counts[-4:], strict=True)]
    growth = [last - first for first, last in zip(counts[0], left, strict=True)]
    assert max(growth) <= 2, counts


# -- the edges of a scope -----------------------------------------------------------------------


def test_what_is_spawned_while_the_scope_ends_is_supervised_or_refused():
    """A thread spawns in a loop, and the last child may end in any instant."""
    children, refused = [], threading.Event()

    @supervised_flow
    def parent():
        def spawn_on():
            try:
                for _ in range(200):
                    children.append(supervisor.spawn(triple, {"x": 1}))
                    children[-1].result(timeout=30)
            except ScopeClosedError:
                refused.set()

        threading.Thread(target=contextvars.copy_context().run, args=(spawn_on,)).start()
        time.sleep(0.3)

    parent()
    assert all(child.is_over for child in children)


def test_a_child_that_is_spawned_after_the_body_has_returned_follows_its_policy():
    late = []

    @flow
    async def spawns_a_monitor():
        await asyncio.sleep(0.3)
        monitor = supervisor.spawn(forever, on_parent={"completed": "cancel"})
        late.append(monitor)

    @supervised_flow
    async def parent():
        supervisor.spawn(spawns_a_monitor)

    asyncio.run(parent())
    assert late[0].outcome == "cancelled"


@pytest.mark.parametrize(
    ("parameters", "options", "error"),
    [
        ([1], {}, ParametersError),
        ({1: 2}, {}, ParametersError),
        ({"x": 1}, {"tags": 5}, SpawnError),
        ({"x": 1}, {"tags": "one"}, SpawnError),
    ],
)
def test_a_spawn_that_raises_leaves_no_child_behind(parameters, options, error):
    @supervised_flow
    async def parent():
        with pytest.raises(error, match="must be"):
            supervisor.spawn(double, parameters, **options)
        return len(supervisor.children)

    assert asyncio.run(parent()) == 0


def test_calling_the_function_of_another_flow_supervises_nothing():
    @supervised_flow
    async def helper():
        with pytest.raises(NoSupervisorError):
            supervisor.spawn(double, {"x": 1})
        return 1

    @flow
    async def outer():
        return await helper.fn()

    assert asyncio.run(outer()) == 1


def test_slow_cleanup_of_a_nested_scope_is_waited_for():
    @flow
    async def cleans_up():
        try:
            await asyncio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(3)

    @supervised_flow
    async def inner():
        await running(supervisor.spawn(cleans_up))
        await asyncio.sleep(3600)

    @supervised_flow
    async def parent():
        child = supervisor.spawn(inner)
        await running(child)
        await asyncio.sleep(1)
        raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        asyncio.run(parent())


def test_a_cancellation_that_a_body_has_swallowed_does_not_hide_the_next_one():
    @flow
    async def slow_to_end():
        try:
            await asyncio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(3)

    @supervised_flow
    async def parent():
        await running(supervisor.spawn(slow_to_end))
        supervisor.spawn(broken)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        asyncio.get_running_loop().call_later(0.5, tasks[0].cancel)

    async def main():
        tasks.append(asyncio.create_task(parent(return_state=True)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    tasks = []
    asyncio.run(main())


def test_sigterm_after_the_timeout_is_no_timeout():
    """The timeout has ended the body already; what comes later is something else."""

    @supervised_flow(timeout_seconds=1, on_parent={"timed_out": "wait"}, grace_seconds=6)
    async def parent():
        children.append(supervisor.spawn(forever))
        asyncio.get_running_loop().call_later(2.5, asyncio.current_task().cancel)
        await asyncio.sleep(3600)

    children = []
    with pytest.raises(BaseException):  # noqa: B017 - Prefect decides which
        asyncio.run(parent())
    assert children[0].outcome == "cancelled"  # or it would wait as after the timeout: without end
