"""A budget of requests: who is limited by the server asks for what matters most first.

It works on the requests themselves, as hooks of Prefect's HTTP client, so nothing escapes it, not
even a retry. Prefect's client waits for `Retry-After` with the request that was refused; here
everybody else waits with it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from enum import IntEnum
from typing import TYPE_CHECKING

from supervised import _clock
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

logger = get_logger("prefect.supervised.budget")

_BURST_SECONDS = 10.0  # what was not used in so many seconds may be used at once
_REFUSED = {429, 503}
_MOST_PAUSED_SECONDS = 60.0  # who asks for more is asked again then


class Priority(IntEnum):
    """Who goes first."""

    TEARDOWN = 0
    LIFE = 1  # signs of life, and what is heard of the own run
    LAUNCH = 2
    POLL = 3


_turns = itertools.count()
_turn: ContextVar[tuple[Priority, float]] = ContextVar(
    "supervised_turn", default=(Priority.POLL, math.inf)
)


@contextmanager
def priority(value: Priority) -> Iterator[None]:
    """Give the requests of a block a priority, unless they have a higher one.

    Of two blocks with the same, the one that began first goes first with all its requests: so a
    launch is completed before the next one begins.
    """
    token = _turn.set(min((value, next(_turns)), _turn.get()))
    try:
        yield
    finally:
        _turn.reset(token)


class RequestBudget:
    """Lets requests through at a rate, by priority; lives in one event loop."""

    def __init__(self) -> None:
        self._limits: list[int] = []
        self._tokens = 0.0
        self._refilled = -math.inf
        self._paused_until = -math.inf
        self._order = itertools.count()
        self._waiting: list[tuple[tuple[Priority, float], int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _rate(self) -> float:
        """Requests a second."""
        return min(self._limits) / 60 if self._limits else math.inf

    @property
    def seconds_of_one(self) -> float:
        """How many seconds there are for one request; zero without a limit."""
        return 1 / self._rate

    def limit(self, per_minute: int) -> None:
        """Allow no more than so many requests a minute; of several limits the smallest counts."""
        self._limits.append(per_minute)

    def unlimit(self, per_minute: int) -> None:
        """Take a limit back."""
        self._limits.remove(per_minute)
        self._serve()

    def pause(self, seconds: float) -> None:
        """Let nothing through for some time."""
        seconds = min(seconds, _MOST_PAUSED_SECONDS)
        self._paused_until = max(self._paused_until, _clock.monotonic() + seconds)

    async def take(self) -> None:
        """Wait until a request may be made."""
        if not self._waiting and self._may_pass():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (_turn.get(), next(self._order), turn))
        self._serve()
        await turn

    def _may_pass(self) -> bool:
        now = _clock.monotonic()
        if now < self._paused_until:
            return False
        if math.isinf(self._rate):
            return True
        burst = max(1.0, self._rate * _BURST_SECONDS)
        gained = (now - self._refilled) * self._rate
        self._tokens = min(burst, self._tokens + gained)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _serve(self) -> None:
        self._waiting = [entry for entry in self._waiting if not entry[2].done()]
        heapq.heapify(self._waiting)
        while self._waiting and self._may_pass():
            heapq.heappop(self._waiting)[2].set_result(None)
        if self._waiting and (self._timer is None or self._timer.cancelled()):
            self._timer = asyncio.get_running_loop().call_later(
                self._seconds_to_wait(), self._again
            )

    def _again(self) -> None:
        self._timer = None
        self._serve()

    def _seconds_to_wait(self) -> float:
        paused = self._paused_until - _clock.monotonic()
        missing = 0.0 if math.isinf(self._rate) else (1 - self._tokens) / self._rate
        return max(paused, missing, 0.001)

    # -- as hooks of httpx --------------------------------------------------------------------

    async def before(self, _: httpx.Request) -> None:
        """Hold a request back until it is its turn."""
        await self.take()

    async def after(self, response: httpx.Response) -> None:
        """Hold everything back if the server asks for that."""
        if response.status_code not in _REFUSED:
            return
        seconds = _retry_after(response.headers.get("Retry-After", ""))
        if seconds is None:
            return
        logger.info("The server asks for %.0f s without requests", seconds)
        self.pause(seconds)


def _retry_after(value: str) -> float | None:
    """Return the seconds that a `Retry-After` header asks for: a number of them, or a date."""
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - _clock.utc_now()).total_seconds())
    return None
