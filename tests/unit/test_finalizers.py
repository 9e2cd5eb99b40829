"""Callbacks of a teardown, for what Prefect does not own."""

import asyncio
import contextvars
import threading

import pytest

from supervised import ScopeClosedError, supervised_flow, supervisor
from supervised._finalizers import FINALIZER_THREAD, Finalizers
from supervised.testing import FakePrefect


def run(finalizers, seconds=60.0):
    return asyncio.run(finalizers.run(seconds))


def added(*callbacks):
    finalizers = Finalizers()
    for callback in callbacks:
        finalizers.add(callback, (), {})
    return finalizers


def test_the_last_added_is_called_first_and_each_once():
    called = []

    async def asynchronous():
        called.append("asynchronous")

    finalizers = added(lambda: called.append("first"), asynchronous)
    finalizers.add(called.append, ("last",), {})
    assert run(finalizers) == []
    assert called == ["last", "asynchronous", "first"]
    assert run(finalizers) == []
    assert len(called) == 3


def test_what_one_raises_is_told_and_the_others_are_called():
    called = []

    def bad():
        raise ValueError("no such query")

    async def worse():
        raise SystemExit(1)

    assert run(added(lambda: called.append(1), worse, bad)) == [
        "bad: ValueError: no such query",
        "worse: SystemExit: 1",
    ]
    assert called == [1]


def test_one_that_takes_too_long_is_told_and_left_behind():
    release, ended = threading.Event(), []

    def hangs():
        ended.append(release.wait(60))

    assert run(added(lambda: None, hangs), 0.5) == [
        "hangs: not done within the grace of 0.5 s",
        "<lambda>: not called, the grace of 0.5 s was over",
    ]
    assert not ended
    release.set()
    for thread in threading.enumerate():
        if thread.name == FINALIZER_THREAD:
            thread.join(5)


def test_those_whose_turn_comes_after_the_grace_are_not_called():
    called, release = [], threading.Event()

    async def asynchronous():
        called.append("asynchronous")

    finalizers = added(lambda: called.append("sync"), asynchronous, lambda: release.wait(60))
    assert run(finalizers, 0.05)[1:] == [
        "asynchronous: not called, the grace of 0.05 s was over",
        "<lambda>: not called, the grace of 0.05 s was over",
    ]
    release.set()
    for thread in threading.enumerate():
        if thread.name == FINALIZER_THREAD:
            thread.join(5)
    assert not called


def test_one_that_raises_stop_iteration_is_told_at_once():
    """A future cannot carry it."""

    def first_of_none():
        next(iter(()))

    assert run(added(first_of_none), 60) == ["first_of_none: StopIteration: "]


def test_they_see_the_context_in_which_they_were_added():
    name, seen = contextvars.ContextVar("name"), []

    async def asynchronous():
        seen.append(name.get("nothing"))

    name.set("spark")
    finalizers = added(lambda: seen.append(name.get("nothing")), asynchronous)
    assert contextvars.Context().run(run, finalizers) == []
    assert seen == ["spark", "spark"]


def test_one_that_was_taken_off_is_not_called():
    called = []
    finalizers = Finalizers()
    finalizer = finalizers.add(called.append, (1,), {})
    finalizer.remove()
    finalizer.remove()
    assert run(finalizers) == []
    assert not called


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="must be callable"):
        Finalizers().add("cancel", (), {})


@pytest.mark.parametrize("end", ["cancel", "raise"])
def test_a_teardown_calls_them_and_reports_what_they_raise(end):
    called = []

    def drop_cluster(name):
        called.append(name)
        raise ValueError("no such cluster")

    @supervised_flow
    async def root():
        supervisor.on_teardown(drop_cluster, "spark")
        await asyncio.sleep(5)
        if end == "raise":
            raise RuntimeError("bad")
        await asyncio.sleep(3600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        started = prefect.start("root/test")
        prefect.until(lambda: started.state.is_running())
        if end == "cancel":
            started.cancel()
        prefect.until(lambda: not prefect.alive, within=30)
        assert called == ["spark"]
        assert started.report.finalizer_errors == ("drop_cluster: ValueError: no such cluster",)
        assert "no such cluster" in str(started.report)


def test_one_that_ends_cancelled_is_told_and_the_tree_ends_all_the_same():
    async def stop():
        polling = asyncio.create_task(asyncio.sleep(100))
        polling.cancel()
        await polling

    @supervised_flow
    async def root():
        supervisor.spawn("score/gpu")
        supervisor.on_teardown(stop)
        await asyncio.sleep(20)
        raise RuntimeError("bad")

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("score/gpu", takes=3600)
        started = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive, within=60)
        assert started.state.is_failed()
        assert started.below[0].state.is_cancelled()
        assert started.report.finalizer_errors == ("stop: CancelledError: ",)
        assert [receipt.status for receipt in started.report.receipts] == ["cancelled"]


def test_a_body_that_returns_ends_its_things_itself():
    called = []

    @supervised_flow
    async def root():
        supervisor.on_teardown(called.append, 1)

    with FakePrefect() as prefect:
        started = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert started.state.is_completed()
    assert not called


def test_none_is_taken_once_the_scope_is_torn_down():
    refused = []

    @supervised_flow
    async def root():
        supervisor.cancel()
        with pytest.raises(ScopeClosedError):
            supervisor.on_teardown(print)
        refused.append(True)

    with FakePrefect() as prefect:
        prefect.start(root)
        prefect.until(lambda: not prefect.alive)
    assert refused


class Mute(Exception):
    def __str__(self):
        raise ValueError("no text")


def test_one_whose_error_has_no_text_does_not_end_the_teardown():
    def stop():
        raise Mute

    assert run(added(stop), 10) == ["stop: Mute: (it has no text)"]
