"""The control plane: one thread with a loop of its own, and nothing of its callers in it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from supervised._control import ControlPlane

SECONDS = 60
mine = contextvars.ContextVar("mine", default="nothing")


class Services:
    """Services that count how often they are opened and closed."""

    def __init__(self):
        self.opened = self.closed = 0

    @asynccontextmanager
    async def __call__(self):
        self.opened += 1
        try:
            yield self
        finally:
            self.closed += 1


@pytest.fixture
def services():
    return Services()


@pytest.fixture
def plane(services):
    plane = ControlPlane.acquire(services)
    yield plane
    plane.release().result(timeout=SECONDS)


@pytest.fixture(autouse=True)
def _no_plane_is_left_behind():
    for thread in threads_of_planes():
        thread.join(timeout=SECONDS)  # another test's, which is ending
    yield
    assert ControlPlane._running == []


def let_go(plane):
    """Release as the last user, and see the thread end."""
    stopped = plane.release()
    assert stopped is not None
    assert stopped.result(timeout=SECONDS) is None
    plane._thread.join(timeout=SECONDS)
    assert not plane._thread.is_alive()


def threads_of_planes():
    return [thread for thread in threading.enumerate() if thread.name == "supervised-control"]


async def the_thread(_):
    return threading.current_thread()


# -- the thread ---------------------------------------------------------------------------------


def test_the_thread_starts_at_the_first_acquire_and_ends_with_the_last_release(services):
    assert threads_of_planes() == []
    first = ControlPlane.acquire(services)
    assert threads_of_planes() == [first._thread]
    second = ControlPlane.acquire(services)
    assert first is second
    assert threads_of_planes() == [first._thread]
    assert first.release() is None
    assert threads_of_planes() == [first._thread]
    let_go(second)
    assert threads_of_planes() == []
    assert (services.opened, services.closed) == (1, 1)


def test_after_the_last_release_the_next_acquire_starts_anew(services):
    first = ControlPlane.acquire(services)
    let_go(first)
    second = ControlPlane.acquire(services)
    assert first is not second
    assert second.submit(the_thread).result(timeout=SECONDS) is second._thread
    let_go(second)
    assert (services.opened, services.closed) == (2, 2)


def test_each_api_has_a_plane_of_its_own(services):
    here = ControlPlane.acquire(services)
    with temporary_settings({PREFECT_API_URL: "http://elsewhere.test/api"}):
        elsewhere = ControlPlane.acquire(services)
        assert elsewhere is ControlPlane.acquire(services)
    assert here is not elsewhere
    assert elsewhere.release() is None
    let_go(elsewhere)
    let_go(here)


def test_the_thread_does_not_keep_the_process_alive(plane):
    assert plane._thread.daemon
    assert plane._thread.name == "supervised-control"


@settings(max_examples=5)
@given(st.integers(2, 8))
def test_scopes_that_come_and_go_in_many_threads_never_find_the_plane_gone(count):
    services = Services()
    start = threading.Barrier(count)

    def scope():
        start.wait(timeout=SECONDS)
        plane = ControlPlane.acquire(services)
        try:
            return plane.submit(the_thread).result(timeout=SECONDS)
        finally:
            if (stopped := plane.release()) is not None:
                stopped.result(timeout=SECONDS)

    with ThreadPoolExecutor(count) as pool:
        threads = [future.result() for future in [pool.submit(scope) for _ in range(count)]]
    assert {thread.name for thread in threads} == {"supervised-control"}
    assert ControlPlane._running == []
    assert services.opened == services.closed == len(set(threads))


def test_the_plane_knows_its_own_thread(plane):
    async def ask(_):
        return plane.is_current_thread()

    assert plane.submit(ask).result(timeout=SECONDS)
    assert not plane.is_current_thread()


# -- submitting ---------------------------------------------------------------------------------


def test_a_coroutine_gets_the_services_and_its_result_comes_back(plane, services):
    async def double(given_services):
        await asyncio.sleep(0)
        return given_services, 2 * 21

    assert (services, 42) == plane.submit(double).result(timeout=SECONDS)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_whatever_a_coroutine_raises_comes_back(plane, error):
    async def fail(_):
        raise error

    assert error is plane.submit(fail).exception(timeout=SECONDS)
    assert plane.submit(the_thread).result(timeout=SECONDS) is plane._thread


def test_a_function_that_raises_before_it_awaits_is_no_different(plane):
    def fail(_):
        raise LookupError("no such run")

    assert isinstance(plane.submit(fail).exception(timeout=SECONDS), LookupError)


def test_a_coroutine_that_cancels_itself_cancels_its_future(plane):
    async def give_up(_):
        raise asyncio.CancelledError

    future = plane.submit(give_up)
    # Not `result`: only `wait` overlooks a cancellation that nobody was notified of.
    done, _ = concurrent.futures.wait([future], timeout=SECONDS)
    assert done == {future}
    assert future.cancelled()


def test_a_caller_that_gave_up_disturbs_nobody(plane):
    go_on = asyncio.Event()
    future = plane.submit(lambda _: go_on.wait())
    assert future.cancel()
    plane.call_soon(go_on.set)
    assert plane.submit(the_thread).result(timeout=SECONDS) is plane._thread


def test_coroutines_run_side_by_side(plane):
    everybody_is_there = asyncio.Event()
    meeting = []

    async def meet(_):
        meeting.append(asyncio.current_task())
        if len(meeting) == 3:
            everybody_is_there.set()
        await everybody_is_there.wait()

    futures = [plane.submit(meet) for _ in range(3)]
    done, _ = concurrent.futures.wait(futures, timeout=SECONDS)
    assert set(futures) == done


def test_the_plane_may_be_used_from_within_itself(plane):
    async def outer(_):
        return await asyncio.wrap_future(plane.submit(the_thread))

    assert plane.submit(outer).result(timeout=SECONDS) is plane._thread


def test_a_call_runs_in_the_planes_loop(plane):
    where = concurrent.futures.Future()
    assert plane.call_soon(lambda: where.set_result(threading.current_thread()))
    assert where.result(timeout=SECONDS) is plane._thread


# -- the end ------------------------------------------------------------------------------------


def test_who_starts_something_hears_of_its_failure_and_of_nothing_else(plane):
    failures = []
    error = ValueError("bad")

    async def fail(_):
        raise error

    async def succeed(_):
        return None

    plane.start(succeed, failures.append)
    plane.start(fail, failures.append)
    plane.submit(the_thread).result(timeout=SECONDS)
    assert failures == [error]


def test_who_starts_something_hears_that_it_was_cancelled(plane):
    failures = []

    async def give_up(_):
        raise asyncio.CancelledError

    plane.start(give_up, failures.append)
    plane.submit(the_thread).result(timeout=SECONDS)
    assert [type(each) for each in failures] == [asyncio.CancelledError]


def test_what_is_started_in_a_plane_that_is_gone_is_cancelled(services):
    plane = ControlPlane.acquire(services)
    let_go(plane)
    failures = []
    plane.start(the_thread, failures.append)
    assert [type(each) for each in failures] == [asyncio.CancelledError]


def test_what_was_submitted_before_the_release_is_finished_with_the_services_open(services):
    go_on = asyncio.Event()

    async def finish(given_services):
        await go_on.wait()
        return given_services.closed

    plane = ControlPlane.acquire(services)
    future = plane.submit(finish)
    stopped = plane.release()
    plane.call_soon(go_on.set)
    assert future.result(timeout=SECONDS) == 0
    stopped.result(timeout=SECONDS)
    assert services.closed == 1


def test_what_is_submitted_to_a_plane_that_is_gone_is_cancelled(services):
    plane = ControlPlane.acquire(services)
    let_go(plane)
    assert plane.submit(the_thread).cancelled()
    assert not plane.call_soon(lambda: None)


# -- services that fail -------------------------------------------------------------------------


@asynccontextmanager
async def unreachable():
    raise ConnectionError("no server")
    yield


def test_services_that_cannot_be_opened_fail_what_is_submitted_now_and_later():
    plane = ControlPlane.acquire(unreachable)
    for _ in range(2):
        error = plane.submit(the_thread).exception(timeout=SECONDS)
        assert isinstance(error, ConnectionError)
        assert str(error) == "no server"
    let_go(plane)


def test_a_failure_to_open_reaches_what_was_submitted_just_before_the_release():
    plane = ControlPlane.acquire(unreachable)
    handed_out = concurrent.futures.Future()
    # In one go in the loop itself, so that nothing of the plane's runs in between.
    plane.call_soon(lambda: handed_out.set_result((plane.submit(the_thread), plane.release())))
    future, stopped = handed_out.result(timeout=SECONDS)
    stopped.result(timeout=SECONDS)
    assert future.done()
    assert not future.cancelled()
    assert isinstance(future.exception(), ConnectionError)


def test_a_services_factory_that_raises_at_once_is_no_different():
    def broken():
        raise ConnectionError("no server")

    plane = ControlPlane.acquire(broken)
    assert isinstance(plane.submit(the_thread).exception(timeout=SECONDS), ConnectionError)
    let_go(plane)


# -- whose context ------------------------------------------------------------------------------


def test_nothing_of_the_callers_context_leaks_in():
    seen_by_services = []

    @asynccontextmanager
    async def services():
        seen_by_services.append(mine.get())
        yield

    async def see(_):
        seen = mine.get()
        mine.set("the plane's")
        return seen

    token = mine.set("the first scope's")
    try:
        plane = ControlPlane.acquire(services)
        mine.set("the caller's")
        called = concurrent.futures.Future()
        plane.call_soon(lambda: called.set_result(mine.get()))
        assert plane.submit(see).result(timeout=SECONDS) == "nothing"
        assert plane.submit(see).result(timeout=SECONDS) == "nothing"
        assert called.result(timeout=SECONDS) == "nothing"
        assert seen_by_services == ["nothing"]
        assert mine.get() == "the caller's"
        let_go(plane)
    finally:
        mine.reset(token)


def test_the_settings_that_were_current_at_the_first_acquire_hold_in_the_plane():
    url = "http://elsewhere.test/api"

    @asynccontextmanager
    async def services():
        yield get_current_settings().api.url

    async def see(opened_with):
        return opened_with, get_current_settings().api.url

    with temporary_settings({PREFECT_API_URL: url}):
        plane = ControlPlane.acquire(services)
    try:
        assert (url, url) == plane.submit(see).result(timeout=SECONDS)
        called = concurrent.futures.Future()
        plane.call_soon(lambda: called.set_result(get_current_settings().api.url))
        assert url == called.result(timeout=SECONDS)
    finally:
        let_go(plane)


# -- processes ----------------------------------------------------------------------------------


def in_a_process(script):
    """Run a script in an interpreter of its own and return what it printed."""
    prelude = """
        import os, sys, threading
        from contextlib import asynccontextmanager
        from supervised._control import ControlPlane

        @asynccontextmanager
        async def services():
            print("opened", flush=True)
            yield "services"
            print("closed", flush=True)

        async def identity(services):
            return services
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_a_forked_process_has_no_plane_and_can_start_its_own():
    lines = in_a_process("""
        plane = ControlPlane.acquire(services)
        assert plane.submit(identity).result(10) == "services"
        ControlPlane._lock.acquire()  # as another thread may hold it in that very moment
        pid = os.fork()
        if pid == 0:
            print("planes", len(ControlPlane._running), flush=True)
            print("threads", threading.active_count(), flush=True)
            own = ControlPlane.acquire(services)
            print("own", own is not plane, own.submit(identity).result(10), flush=True)
            own.release().result(10)
            os._exit(0)
        ControlPlane._lock.release()
        assert os.waitpid(pid, 0)[1] == 0
        print("parent", plane.submit(identity).result(10), flush=True)
        plane.release().result(10)
    """)
    assert lines == [
        "opened",
        "planes 0",
        "threads 1",
        "opened",
        "own True services",
        "closed",
        "parent services",
        "closed",
    ]


def test_a_plane_that_nobody_released_is_closed_when_the_interpreter_exits():
    lines = in_a_process("""
        plane = ControlPlane.acquire(services)
        plane.submit(identity).result(10)
        print("the last line", flush=True)
    """)
    assert lines == ["opened", "the last line", "closed"]
