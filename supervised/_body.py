"""The body's thread or task: what ending it from the control plane needs to know."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from supervised import _compat

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

_SIGNAL_SECONDS = 0.05


class Body:
    """The body's thread or task: what ending it from the control plane needs to know."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None
        self.thread = threading.current_thread()
        self.is_running = False
        self.was_interrupted = False
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

    def interrupt(self) -> None:
        """End the body from another thread, if it can be: cancel its task, or signal it.

        A sync body is reached in the main thread only, where Prefect turns SIGTERM into
        `TerminationSignal`; elsewhere it ends when it next asks for a child.
        """
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and the body with it
                self.loop.call_soon_threadsafe(self._cancel_task)
            return
        with self._lock:
            reachable = self.thread is threading.main_thread() and _compat.has_sigterm_bridge()
            reachable = reachable and self.is_running and not self.was_interrupted
            if reachable and self.thread.ident is not None:
                self.was_interrupted = True
                signal.pthread_kill(self.thread.ident, signal.SIGTERM)

    def _cancel_task(self) -> None:
        # In the body's own loop, so that the body cannot end between the look and the cancel.
        if self.is_running and self.task is not None and not self.was_interrupted:
            self.was_interrupted = True
            self.task.cancel()
