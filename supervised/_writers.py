"""Whether a server takes several writes at a time: found out by a small one beside a large one.

A database with one writer, SQLite, answers the small one after the large one; two large ones would
take longer side by side than one after the other, and fail each other. One with several writers
answers at once, and two large ones hide each other's waits.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import anyio
import attrs

from supervised import _clock
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import httpx

logger = get_logger("prefect.supervised.launch")

_WIDE = 2  # creations of a hundred runs; the server's CPU is busy then
_ANSWERS = 2  # the first may have been read before the large one, by a server that is behind
_PAUSE_SECONDS = 0.15  # before each small write, and after the last: the large one is to outlive it
_STOP_SECONDS = 2.0
_AGAIN_SECONDS = 600.0  # after which another server may be behind the address


@attrs.define(eq=False)
class LargeWrite:
    """A large write that is under way.

    Args:
        is_evidence: Whether it speaks against two at a time if nothing comes of it.
        asked: When the small one beside it was sent that has not been answered.
        was_refused: Whether the server has refused it once, and the client may send it again.
    """

    is_evidence: bool
    asked: float | None = None
    was_refused: bool = False


_current: ContextVar[LargeWrite | None] = ContextVar("supervised_large_write", default=None)


async def note_refusal(response: httpx.Response) -> None:
    """Take note of a large write that is refused: a response hook of the client that makes it.

    What is answered with 429, 502 or 503 the client sends again, 2 s later and more. Until then
    nothing is under way, and a small write that is answered at once says nothing.
    """
    large = _current.get()
    if large is not None and response.is_error:
        large.was_refused = True


class Writers:
    """Lets one large write through at a time, or two where the server takes them.

    Lives in one event loop; what it has found out counts for all that use it.
    """

    def __init__(self) -> None:
        self.turn = anyio.CapacityLimiter(1)
        """What a large write waits for, with what has to be done before it."""
        self.write = anyio.CapacityLimiter(1)
        """What each request of a launch waits for that writes."""
        self._known_until = -math.inf
        self._under_way: list[LargeWrite] = []

    @property
    def width(self) -> int:
        """How many large writes may be under way at a time."""
        return int(self.turn.total_tokens)

    @property
    def is_known(self) -> bool:
        """Whether it has been found out how many the server takes, and not too long ago."""
        return _clock.monotonic() < self._known_until

    @asynccontextmanager
    async def large(self, small: Callable[[], Awaitable[object]]) -> AsyncIterator[LargeWrite]:
        """Make a large write in the block, whose turn it is.

        Args:
            small: Makes a write that changes nothing. Called while the large one is under way and
                another one waits for its turn, unless it is known what comes of that.
        """
        async with self.write:
            this = LargeWrite(is_evidence=bool(self._under_way))
            for other in self._under_way:
                other.is_evidence = True
            self._under_way.append(this)
            finding_out = asyncio.create_task(self._find_out(small, this))
            token = _current.set(this)  # after that task has its context: the small one is not it
            try:
                yield this
                if this.asked and _clock.monotonic() - this.asked > _PAUSE_SECONDS:
                    self._settle(1)
            finally:
                _current.reset(token)
                self._under_way.remove(this)
                finding_out.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([finding_out], timeout=_STOP_SECONDS)

    def note_lost(self) -> None:
        """Take note that what was sent beside something large has led to nothing."""
        if self.width > 1:
            self._settle(1)

    async def _find_out(self, small: Callable[[], Awaitable[object]], large: LargeWrite) -> None:
        if self.is_known:
            return
        self._let_through(1)
        try:
            await self._ask(small, large)
        except Exception:  # refused, not answered: then there is nothing to go by
            logger.debug("A small write beside a large one failed", exc_info=True)
            self._settle(1)
        else:
            if large.was_refused:
                return
            # On SQLite one that is thrown out holds nobody up, either: if nothing comes of this
            # one, it has deceived.
            large.is_evidence = True
            self._settle(_WIDE)

    async def _ask(self, small: Callable[[], Awaitable[object]], large: LargeWrite) -> None:
        """Return once small writes have been answered that the large one has outlived."""
        answers = 0
        while answers < _ANSWERS:
            await anyio.sleep(_PAUSE_SECONDS)
            if self.turn.statistics().tasks_waiting:
                large.asked = _clock.monotonic()
                await small()
                large.asked = None
                answers += 1
        await anyio.sleep(_PAUSE_SECONDS)

    def _settle(self, width: int) -> None:
        logger.debug("Large writes at a time from now on: %d", width)
        self._known_until = _clock.monotonic() + _AGAIN_SECONDS
        self._let_through(width)

    def _let_through(self, width: int) -> None:
        self.turn.total_tokens = self.write.total_tokens = width
