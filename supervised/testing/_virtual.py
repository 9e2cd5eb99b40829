"""An event loop whose clock jumps: hours of waiting pass in milliseconds, always the same way."""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import threading
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from prefect.types._datetime import now
from typing_extensions import TypeVarTuple, Unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

Ts = TypeVarTuple("Ts")

_WIND_UP_ROUNDS = 5
_WIND_UP_SECONDS = 60.0
_THREAD_SECONDS = 0.005  # of real time, for code in threads to answer before the clock jumps


class Owner(Protocol):
    """Whose code it is that a loop runs."""

    @property
    def is_dead(self) -> bool:
        """Whether none of it may run any more."""
        ...


current_owner: ContextVar[Owner | None] = ContextVar("supervised_owner", default=None)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: when nothing is left to do now, it is later.

    While other threads run, it gives them a few real milliseconds before each jump. What belongs to
    an owner that is dead takes no further step: nothing is cancelled, raised or cleaned up.
    """

    def __init__(self) -> None:
        self.is_closing = False
        self._held: list[tuple[contextvars.Context, Callable[..., object], tuple[Any, ...]]] = []
        self._seconds = 0.0
        self._epoch = now("UTC")
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._seconds

    def utc_now(self) -> datetime:
        """Return the virtual date and time."""
        moment: datetime = self._epoch + timedelta(seconds=self._seconds)
        return moment

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Call something next, unless its owner is dead by then; tasks take their steps so."""
        return super().call_soon(self._mortal(callback, context), *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call something later, unless its owner is dead by then."""
        return super().call_at(when, self._mortal(callback, context), *args, context=context)

    def call_unowned(
        self, seconds: float, callback: Callable[[Unpack[Ts]], object], *args: Unpack[Ts]
    ) -> None:
        """Call something after so many seconds, even if who has asked for it is dead by then."""
        self.call_later(seconds, callback, *args, context=contextvars.Context())

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: Unpack[Ts],
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Call something next, from any thread, unless its owner is dead by then."""
        mortal = self._mortal(callback, context)
        return super().call_soon_threadsafe(mortal, *args, context=context)

    def _mortal(
        self, callback: Callable[[Unpack[Ts]], object], context: contextvars.Context | None
    ) -> Callable[[Unpack[Ts]], object]:
        context = context if context is not None else contextvars.copy_context()
        owner = context.get(current_owner)
        if owner is None:
            return callback

        def call(*args: Unpack[Ts]) -> None:
            if owner.is_dead and not self.is_closing:
                self._held.append((context, callback, args))
            else:
                callback(*args)

        return call

    def wind_up(self) -> None:
        """Cancel all that is still going on, of the dead as well, and see it end.

        Until now the dead have cleaned nothing up. Their coroutines would do it when they are
        collected: at any time, and without a loop.
        """
        self.is_closing = True
        for context, callback, args in self._held:
            super().call_soon(callback, *args, context=context)
        self._held.clear()
        for _ in range(_WIND_UP_ROUNDS):
            if not (tasks := asyncio.all_tasks(self)):
                return
            for task in tasks:
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=_WIND_UP_SECONDS))

    def _jump(self, seconds: float) -> None:
        self._seconds += seconds


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump
        self._others = frozenset(threading.enumerate())  # may end at any time: not to be counted

    def select(self, timeout: float | None = None) -> Any:
        """Return what is ready; if nothing is, let the time pass without waiting for it."""
        if timeout is not None and timeout <= 0:
            return super().select(0)
        # Looked at first: a thread that has ended by then has said before what it had to say.
        is_alone = self._others.issuperset(threading.enumerate())
        ready = super().select(0)
        if ready:
            return ready
        if not is_alone:
            ready = super().select(_THREAD_SECONDS if timeout is not None else None)
        elif timeout is None:
            raise RuntimeError("Nothing can ever happen any more: every task waits for another")
        if not ready and timeout is not None:
            self._jump(timeout)
        return ready
