"""The control plane: one thread with its own event loop, shared by all scopes of a process.

Supervision must not depend on the user's loop. A SIGTERM that lands while a background task is
executing becomes that task's exception and the flow never hears of it; a CPU-bound or sync body
blocks its loop; a cancelled anyio scope re-cancels every plain `await`. None of that reaches
this thread.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import contextvars
import functools
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from prefect.context import SettingsContext, get_settings_context
from typing_extensions import Self

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

S = TypeVar("S")
T = TypeVar("T")

CONTROL_THREAD = "supervised-control"
"""The thread's name; waiting for a child in it would wait for ever."""

SLICE_SECONDS = 0.5
"""How long a thread blocks at a time.

Prefect's timeout for flows off the main thread, and interpreters that deliver signals between
two instructions, can only enter where Python code runs.
"""

_CLOSE_SECONDS = 5.0


class Plane(Generic[S]):
    """Runs coroutines in one event loop, over services that it opens and closes there.

    Args:
        services: Opens what the coroutines work with, inside the loop.
    """

    def __init__(self, services: Callable[[], AbstractAsyncContextManager[S]]) -> None:
        self._open_services = services
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._services: concurrent.futures.Future[S] = concurrent.futures.Future()
        self.stopped: concurrent.futures.Future[None] = concurrent.futures.Future()
        # An empty context, or the run's own would live on here: its client is closed with it.
        self._context = contextvars.Context()

    def release(self) -> concurrent.futures.Future[None] | None:
        """Give the plane up; its last user gets the future of its end."""
        self.stop()
        return self.stopped

    def stop(self) -> None:
        """Have the plane finish what it is doing, and end; from any thread."""
        self.call_soon(self._stop.set)

    def submit(self, function: Callable[[S], Awaitable[T]]) -> concurrent.futures.Future[T]:
        """Run *function* over the services; the future carries its result or exception."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        async def run(services: S) -> None:
            _resolve(future, result=await function(services))

        self.start(run, functools.partial(_fail, future))
        return future

    def start(
        self,
        function: Callable[[S], Awaitable[None]],
        on_failure: Callable[[BaseException], object],
    ) -> None:
        """Run *function* over the services, and tell of nothing but a failure.

        For thousands at a time: a future that threads can wait for is a dozen objects.

        Args:
            function: What to run.
            on_failure: Called with what it has raised; with `asyncio.CancelledError` also if it
                could not be run because the plane is gone.
        """
        if not self.call_soon(functools.partial(self._begin, function, on_failure)):
            on_failure(asyncio.CancelledError())

    def _begin(
        self,
        function: Callable[[S], Awaitable[None]],
        on_failure: Callable[[BaseException], object],
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._run(function, on_failure))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(
        self,
        function: Callable[[S], Awaitable[None]],
        on_failure: Callable[[BaseException], object],
    ) -> None:
        opened = self._services
        try:
            # Of one that was cancelled, `result` raises what is no `asyncio.CancelledError`.
            is_open = opened.done() and not opened.cancelled()
            services = opened.result() if is_open else await asyncio.wrap_future(opened)
            await function(services)
        except asyncio.CancelledError as exc:
            on_failure(exc)
            raise
        except BaseException as exc:  # even SystemExit must not end the control plane
            on_failure(exc)

    def call_soon(self, function: Callable[[], object]) -> bool:
        """Call *function* in the plane's loop; false if the plane is gone."""
        if self._loop is None:
            return False
        try:
            # Not the caller's context: it holds the run's client and task.
            self._loop.call_soon_threadsafe(function, context=self._context.copy())
        except RuntimeError:  # the loop is closed
            return False
        return True

    async def _serve(self) -> None:
        try:
            async with self._open_services() as services:
                self._services.set_result(services)
                await self._stop.wait()
                await self._finish_tasks()
        except Exception as exc:
            if self._services.done():
                raise
            self._services.set_exception(exc)
            await self._stop.wait()
            await self._finish_tasks()

    async def _finish_tasks(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)

    def _has_stopped(self) -> None:
        if not self._services.done():
            self._services.cancel()
        _resolve(self.stopped, result=None)


class ControlPlane(Plane[S]):
    """A plane in a thread of its own.

    Scopes share one instance for each Prefect API through `acquire`; the thread ends when the
    last of them has called `release`. A forked child starts without any.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _running: ClassVar[list[ControlPlane[Any]]] = []

    def __init__(self, services: Callable[[], AbstractAsyncContextManager[S]]) -> None:
        super().__init__(services)
        self._users = 0
        self._ready = threading.Event()
        self._settings = get_settings_context()
        self._thread = threading.Thread(
            target=self._context.run,
            args=(self._main,),
            name=CONTROL_THREAD,
            daemon=True,
        )

    @classmethod
    def acquire(cls, services: Callable[[], AbstractAsyncContextManager[S]]) -> Self:
        """Return the running plane for the current settings, started if need be."""
        settings = (
            get_settings_context().settings
        )  # compared: their hash takes 0.1 s on a slow machine
        with cls._lock:
            for plane in cls._running:
                if plane._settings.settings == settings:
                    break
            else:
                plane = cls(services)
                cls._running.append(plane)
                plane._thread.start()
            plane._users += 1
        plane._ready.wait()
        return plane  # type: ignore[return-value]

    def release(self) -> concurrent.futures.Future[None] | None:
        """Give the plane up; the last user gets the future of its end, the others `None`."""
        with self._lock:
            self._users -= 1
            if self._users:
                return None
            if self in self._running:  # not in a child that was forked
                self._running.remove(self)
        return super().release()

    def is_current_thread(self) -> bool:
        """Whether the caller is the plane itself, which must never wait for itself."""
        return threading.current_thread() is self._thread

    def _main(self) -> None:
        try:
            with SettingsContext(profile=self._settings.profile, settings=self._settings.settings):
                asyncio.run(self._serve())
        finally:
            self._ready.set()
            self._has_stopped()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await super()._serve()


def wait_in_slices(future: concurrent.futures.Future[Any], timeout: float | None = None) -> bool:
    """Block until the future is done, open to interrupts; false if *timeout* seconds passed."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while not future.done():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        concurrent.futures.wait([future], timeout=min(left, SLICE_SECONDS))
    return True


async def wait_in_loop(
    future: concurrent.futures.Future[Any], timeout: float | None = None
) -> bool:
    """Wait in the running loop until the future is done; false if *timeout* seconds passed.

    Unlike `asyncio.wrap_future`, it leaves the future alone when the caller is cancelled.
    """
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def wake(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
            loop.call_soon_threadsafe(over.set)

    future.add_done_callback(wake)
    try:
        await asyncio.wait_for(over.wait(), timeout)
    except asyncio.TimeoutError:
        return future.done()
    return True


def _fail(future: concurrent.futures.Future[Any], exc: BaseException) -> None:
    if isinstance(exc, asyncio.CancelledError):
        _cancel(future)
    else:
        _resolve(future, exception=exc)


def _cancel(future: concurrent.futures.Future[Any]) -> None:
    """Cancel a future so that `concurrent.futures.wait` hears of it too."""
    if future.cancel():
        future.set_running_or_notify_cancel()


def _resolve(
    future: concurrent.futures.Future[Any],
    *,
    result: Any = None,
    exception: BaseException | None = None,
) -> None:
    """Settle a future that its holder may have cancelled in the meantime."""
    if not future.set_running_or_notify_cancel():
        return
    if exception is not None:
        future.set_exception(exception)
    else:
        future.set_result(result)


def _forget_after_fork() -> None:
    """Drop planes whose threads did not come along into this process."""
    ControlPlane._lock = threading.Lock()
    ControlPlane._running = []


def _stop_at_exit() -> None:
    """Let planes close their connections; only an interrupted scope leaves one behind."""
    for plane in list(ControlPlane._running):
        plane.stop()
        plane._thread.join(_CLOSE_SECONDS)


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_stop_at_exit)
