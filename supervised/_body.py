"""The body's thread or task: what ending it from the control plane needs to know."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from supervised import _compat
from supervised._bell import bell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

_SIGNAL_SECONDS = 0.05
_SWALLOWED_SECONDS = 5.0  # after which a signal that has not ended the body never will


class Body:
    """The body's thread or task: what ending it from the control plane needs to know."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None
        self.thread = threading.current_thread()
        self.is_running = False
        self.is_waiting = False  # for children, after its code has returned
        self.was_interrupted = False
        self.swallowed_signal = False
        """Whether SIGTERM came, and some other task of the loop got the exception."""
        self._is_listening = False
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the time in which the user's own code runs, and only it may be interrupted."""
        self.is_running = True
        try:
            yield
        finally:
            with self._lock:
                self.is_running = False
            if self.was_interrupted and self.task is None:
                # A signal that is on its way is to be raised here, not in Prefect's engine.
                time.sleep(_SIGNAL_SECONDS)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the time in which the body is over and waits for children; a signal may end it."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False

    def listen(self) -> None:
        """Have an async body end at SIGTERM even if that is raised in another task of its loop."""
        if self.loop is not None and self.thread is threading.main_thread():
            with suppress(RuntimeError):  # the loop is closed, and the body with it
                self.loop.call_soon_threadsafe(self._listen)

    def unlisten(self) -> None:
        """Be deaf to signals again; in the body's thread."""
        if self._is_listening:
            self._is_listening = False
            bell.remove(self._on_signal)

    def _listen(self) -> None:
        if self.is_running and not self._is_listening and _compat.has_sigterm_bridge():
            self._is_listening = True
            bell.add(self._on_signal)

    def _on_signal(self) -> None:
        loop = self.loop
        assert loop is not None
        if not _compat.has_sigterm_bridge():
            return  # the user's own handler has it, and decides
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.call_later, _SWALLOWED_SECONDS, self._be_interrupted)

    def _be_interrupted(self) -> None:
        can_end = self._is_listening and (self.is_running or self.is_waiting)
        if not can_end or self.task is None or self.swallowed_signal or _loop_shuts_down():
            return
        self.swallowed_signal = True
        self.task.cancel()

    def interrupt(self, unless: Callable[[], bool] = lambda: False) -> None:
        """End the body from another thread, if it can be: cancel its task, or signal it.

        A sync body is reached in the main thread only, where Prefect turns SIGTERM into
        `TerminationSignal`; elsewhere it ends when it next asks for a child.

        Args:
            unless: Tells, when the body has come to its next await, that it need not end.
        """
        loop = self.loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and the body with it
                # What the body has just set going has its first step before it is asked.
                loop.call_soon_threadsafe(loop.call_soon, self._cancel_task, unless)
            return
        with self._lock:
            reachable = self.thread is threading.main_thread() and _compat.has_sigterm_bridge()
            reachable = reachable and self.is_running and not self.was_interrupted and not unless()
            if reachable and self.thread.ident is not None:
                self.was_interrupted = True
                signal.pthread_kill(self.thread.ident, signal.SIGTERM)

    def _cancel_task(self, unless: Callable[[], bool]) -> None:
        # In the body's own loop, so that the body cannot end between the look and the cancel.
        if unless():
            return
        if self.is_running and self.task is not None and not self.was_interrupted:
            self.was_interrupted = True
            self.task.cancel()


def _loop_shuts_down() -> bool:
    """Whether a signal has left the loop, and `asyncio.run` has cancelled all of its tasks.

    Then the body has been told, and is cleaning up. Called in the loop's own thread, where that
    shows in the stack.
    """
    frame = sys._getframe()  # noqa: SLF001 - as the standard library does for namedtuple
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_cancel_all_tasks" and "asyncio" in code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
