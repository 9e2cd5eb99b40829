"""Hearing SIGTERM, whatever becomes of the exception that Prefect's handler raises for it.

A handler runs between two instructions of whatever the main thread is doing. If that is a step of
some background task, the `TerminationSignal` becomes the outcome of that task, or of nothing, and
the flow never hears of it: plain Prefect's process then lives on until something kills it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNAL_THREAD = "supervised-signals"
"""The name of the thread that waits for signals."""

_END_SECONDS = 1.0


class Bell:
    """Calls everybody back when this process gets SIGTERM, from a thread of its own.

    The interpreter writes the number of each signal to a descriptor, before and besides running
    its handler (`signal.set_wakeup_fd`). There is one for each process: if an event loop with
    signal handlers or uvloop has it, this bell stays silent. The thread lives from the first `add`
    to the last `remove`, both called in the main thread.
    """

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []
        self._reading: socket.socket | None = None
        self._writing: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def add(self, listener: Callable[[], None]) -> None:
        """Call *listener* at each SIGTERM from now on, in the bell's thread."""
        self._listeners = [*self._listeners, listener]
        if self._writing is None:
            self._open()

    def remove(self, listener: Callable[[], None]) -> None:
        """Call *listener* no more; harmless if it was never added."""
        self._listeners = [other for other in self._listeners if other != listener]
        if not self._listeners:
            self._close()

    def _open(self) -> None:
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        taken = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        if taken != -1:
            signal.set_wakeup_fd(taken)
            reading.close()
            writing.close()
            return
        self._reading, self._writing = reading, writing
        self._thread = threading.Thread(
            target=self._listen, args=(reading,), name=SIGNAL_THREAD, daemon=True
        )
        self._thread.start()

    def _close(self) -> None:
        if self._writing is None:
            return
        self._let_go()
        self._writing.close()  # which ends the thread, and that the other socket
        if self._thread is not None:
            self._thread.join(_END_SECONDS)
        self._reading = self._writing = self._thread = None

    def _let_go(self) -> None:
        assert self._writing is not None
        current = signal.set_wakeup_fd(-1)
        if current != self._writing.fileno():
            signal.set_wakeup_fd(current)  # somebody has taken it over

    def _listen(self, reading: socket.socket) -> None:
        with reading:
            while numbers := reading.recv(64):
                if signal.SIGTERM in numbers:
                    for listener in self._listeners:
                        listener()

    def forget_after_fork(self) -> None:
        """Leave the bell to the process that this one was forked from: it would ring there."""
        if self._writing is not None and self._reading is not None:
            self._let_go()
            self._writing.close()
            self._reading.close()
        self._listeners = []
        self._reading = self._writing = self._thread = None


bell = Bell()
"""The bell of this process."""

os.register_at_fork(after_in_child=bell.forget_after_fork)
