"""How many requests of a kind to have under way at a time: found out, not guessed.

Writers collide on SQLite, where two at a time take longer than one after the other; PostgreSQL
serves several at once. Which of them is behind the server, how many servers there are and how busy
they are does not show from outside, so it is tried.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from supervised import _clock

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

T = TypeVar("T")

CHUNK = 50
"""Runs in one request that sets states (server/api/flow_runs.py, `BULK_OPERATION_LIMIT`)."""

_WORTH_IT = 1.2  # as many runs in a second, or it was chance
_TRIES = 2  # of each width: the same request takes 0.9 s or 3 s, as the server is busy or not
_MOST = 8


class Pace:
    """Sends chunks in rounds, twice as many at a time as long as the quicker of two is quicker.

    Lives in one event loop; what it has found out counts for all that use it.
    """

    def __init__(self) -> None:
        self.width = 1
        """How many requests to have under way at a time."""
        self._best = 0.0  # chunks in a second, of the widest rounds that were worth it
        self._speeds: list[float] = []  # of the rounds of the present width
        self._is_settled = False

    async def each(
        self, items: Sequence[T], ask: Callable[[list[T]], Coroutine[Any, Any, bool]]
    ) -> None:
        """Call *ask* for all items, in chunks of 50.

        Args:
            items: What to ask for, the most important first.
            ask: Makes one request; tells whether it was answered, as failures are quick and say
                nothing of the server's pace. What it raises ends the whole.
        """
        chunks = deque(list(items[start : start + CHUNK]) for start in range(0, len(items), CHUNK))
        while chunks:
            some = [chunks.popleft() for _ in range(min(self.width, len(chunks)))]
            answered: list[bool] = []

            async def ask_one(chunk: list[T], answered: list[bool] = answered) -> None:
                answered.append(await ask(chunk) and len(chunk) == CHUNK)

            began = _clock.monotonic()
            async with anyio.create_task_group() as tasks:
                for chunk in some:
                    tasks.start_soon(ask_one, chunk)
            if len(some) == self.width and all(answered):
                self.note(_clock.monotonic() - began)

    def note(self, seconds: float) -> None:
        """Take note of how long a full round has taken, and choose the next one's width."""
        if self._is_settled:
            return
        self._speeds.append(self.width / max(seconds, 1e-6))
        if len(self._speeds) < _TRIES:
            return
        speed = max(self._speeds)
        self._speeds.clear()
        if speed > self._best * _WORTH_IT:
            self._best = speed
            if self.width < _MOST:
                self.width *= 2
            else:
                self._is_settled = True
        else:
            self.width //= 2
            self._is_settled = True
