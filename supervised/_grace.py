"""The time that a teardown has: for waiting as much as was promised, for asking what it takes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio

from supervised import _clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from supervised._policy import Budget

_ASKING_SECONDS = 5.0


class Grace:
    """Bounds the asking and the waiting of one teardown.

    What asking takes, within reason, is not taken from the waiting: a slow server would leave the
    runs that it has told last no time to end.

    Args:
        budget: What was promised.
        seconds_to_ask: Tells what a slow server needs for all that is to be asked, as far as that
            is known by now.
    """

    def __init__(self, budget: Budget, seconds_to_ask: Callable[[], float]) -> None:
        self.budget = budget
        self.started = _clock.monotonic()
        """When this began, or the harder end under which it goes on."""
        self._seconds_to_ask = seconds_to_ask
        self._extra = 0.0
        self._asking: anyio.CancelScope | None = None
        self._waiting: anyio.CancelScope | None = None

    @property
    def elapsed(self) -> float:
        """The seconds since the start."""
        return _clock.monotonic() - self.started

    @property
    def left(self) -> float:
        """The seconds that are left to wait."""
        return self.budget.total + self._extra - self.elapsed

    @contextmanager
    def for_asking(self) -> Iterator[None]:
        """Ask within this; see `allow_time_to_ask`."""
        with anyio.CancelScope() as self._asking:
            yield
        self._asking = None
        # Not for a server that does not answer: that has used up the grace.
        self._extra = min(max(0.0, self.elapsed - _ASKING_SECONDS), self._seconds_to_ask())

    def allow_time_to_ask(self) -> None:
        """Bound the requests by what is known by now of how many there are and what they take."""
        if self._asking is None:
            return
        seconds = max(self.budget.total, _ASKING_SECONDS + self._seconds_to_ask())
        self._asking.deadline = anyio.current_time() + seconds - self.elapsed

    @contextmanager
    def for_waiting(self) -> Iterator[None]:
        """Wait within this, as long as there is time left."""
        with anyio.move_on_after(self.left) as self._waiting:
            yield
        self._waiting = None

    def begin_anew(self) -> None:
        """Wait as long as was promised, from now on."""
        self.started = _clock.monotonic()
        self._extra = 0.0
        if self._waiting is not None:
            self._waiting.deadline = anyio.current_time() + self.left
