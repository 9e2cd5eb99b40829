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
_AGAIN = 64  # rounds, after which the server may be another, or have more to do
_SLOWER = 0.5  # than a width has been: then it is time to look again, too
_ROUNDS = 8  # of which the mean counts: one may have met a server that was busy
_TELLING = 10  # runs; of fewer, most of the time is the request's own


class Pace:
    """Sends chunks in rounds, twice as many at a time as long as the quicker of two is quicker.

    It looks again at times. A chunk that was not answered in time is followed by smaller ones.
    Lives in one event loop; what it has found out counts for all that use it.
    """

    def __init__(self) -> None:
        self.width = 1
        """How many requests to have under way at a time."""
        self.size = CHUNK
        """How many runs to ask for in one."""
        self._best = 0.0  # chunks in a second, of the widest rounds that were worth it
        self._speeds: list[float] = []  # of the rounds of the present width
        self._settled: int | None = None  # rounds since it has settled
        self._taken: deque[tuple[float, int]] = deque(maxlen=_ROUNDS)  # seconds, and runs

    @property
    def seconds_each(self) -> float:
        """How many seconds a run has taken, with as many requests at a time; zero if unknown."""
        runs = sum(count for _, count in self._taken)
        return sum(seconds for seconds, _ in self._taken) / runs if runs else 0.0

    async def each(
        self, items: Sequence[T], ask: Callable[[list[T]], Coroutine[Any, Any, bool]]
    ) -> None:
        """Call *ask* for all items, in chunks of 50 at most.

        Args:
            items: What to ask for, the most important first.
            ask: Makes one request; tells whether it was answered, as failures are quick and say
                nothing of the server's pace. What it raises ends the whole.
        """
        left = deque(items)
        while left:
            some = [self._cut(left) for _ in range(self.width) if left]
            answered: list[bool] = []

            async def ask_one(chunk: list[T], answered: list[bool] = answered) -> None:
                answered.append(await ask(chunk))

            began = _clock.monotonic()
            async with anyio.create_task_group() as tasks:
                for chunk in some:
                    tasks.start_soon(ask_one, chunk)
            if all(answered):
                self._note_answers([len(chunk) for chunk in some], _clock.monotonic() - began)

    def _cut(self, left: deque[T]) -> list[T]:
        return [left.popleft() for _ in range(min(self.size, len(left)))]

    def _note_answers(self, sizes: list[int], seconds: float) -> None:
        if sum(sizes) >= _TELLING:
            self._taken.append((seconds, sum(sizes)))
        if sizes == [CHUNK] * self.width:
            self.note(seconds)
        self.size = max(self.size, min(CHUNK, 2 * sizes[0]))

    def note_timeout(self, count: int) -> None:
        """Take note that a request for so many was not answered in time: ask for fewer.

        Few enough to be answered for certain: from then on it is known how slow the server is, and
        what it was before does not count.
        """
        self._taken.clear()
        self.size = max(1, min(self.size, count // 4))

    def note(self, seconds: float) -> None:
        """Take note of how long a full round has taken, and choose the next one's width."""
        self._speeds.append(self.width / max(seconds, 1e-6))
        if len(self._speeds) < _TRIES:
            return
        speed = max(self._speeds)
        self._speeds.clear()
        if self._settled is not None:
            self._settled += _TRIES
            if self._settled >= _AGAIN or speed < self._best * _SLOWER:
                self._look_again()
        elif speed <= self._best * _WORTH_IT:
            self.width //= 2
            self._settled = 0
        else:
            self._best = speed
            if self.width < _MOST:
                self.width *= 2
            else:
                self._settled = 0

    def _look_again(self) -> None:
        self.width = 1
        self._best, self._settled = 0.0, None
