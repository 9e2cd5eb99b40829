"""Whether a server takes several writes at a time: found out by a small one beside a large one.

A database with one writer, SQLite, answers the small one after the large one; two large ones would
take longer side by side than one after the other, and fail each other. One with several writers
answers at once, and two large ones hide each other's waits.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from supervised import _clock
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

logger = get_logger("prefect.supervised.launch")

_WIDE = 2  # creations of a hundred runs; the server's CPU is busy then
_ANSWERS = 2  # the first may have been read before the large one, by a server that is behind
_PAUSE_SECONDS = 0.15  # before each small write: until then the large one has begun to write
_AT_ONCE_SECONDS = 0.3  # what has waited longer has waited for the large one
_LATE_SECONDS = 2.0
_AGAIN_SECONDS = 600.0  # after which another server may be behind the address


class Writers:
    """Lets one large write through at a time, or two where the server takes them.

    Lives in one event loop; what it has found out counts for all that use it.
    """

    def __init__(self) -> None:
        self.turn = anyio.CapacityLimiter(1)
        """What a large write waits for, with what belongs to it, in the order of coming."""
        self.write = anyio.CapacityLimiter(1)
        """What each request of a launch waits for that writes."""
        self._one_until = -math.inf  # when to find out again

    @property
    def width(self) -> int:
        """How many large writes may be under way at a time."""
        return int(self.turn.total_tokens)

    @property
    def may_be_several(self) -> bool:
        """Whether the server takes several, or that is to be found out."""
        return self.width > 1 or _clock.monotonic() >= self._one_until

    @asynccontextmanager
    async def large(self, small: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
        """Make a large write in the block, whose turn it is.

        Args:
            small: Makes a write that changes nothing. Called while the large one is under way and
                another one waits for it, unless it is known what comes of that.
        """
        async with self.write:
            if self.width > 1 or not self.may_be_several:
                yield
                return
            is_over = asyncio.Event()
            asking = asyncio.create_task(self._find_out(small, is_over))
            try:
                yield
                # On SQLite a small write that is left over would come into the next large one,
                # after that has read and before it writes, and all of it would be thrown out.
                is_over.set()
                if (await asyncio.wait([asking], timeout=_LATE_SECONDS))[1]:
                    self._settle(1)
            finally:
                asking.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([asking])

    def note_lost(self) -> None:
        """Take note that nothing came of a large write: another one beside it may be the reason."""
        if self.width > 1:
            self._settle(1)

    async def _find_out(
        self, small: Callable[[], Awaitable[object]], is_over: asyncio.Event
    ) -> None:
        answers = 0
        while answers < _ANSWERS:
            with anyio.move_on_after(_PAUSE_SECONDS):
                await is_over.wait()
            if is_over.is_set():
                return
            if self.turn.statistics().tasks_waiting:
                if not await self._is_answered_at_once(small):
                    return
                answers += 1
        if not is_over.is_set():
            self._settle(_WIDE)

    async def _is_answered_at_once(self, small: Callable[[], Awaitable[object]]) -> bool:
        began = _clock.monotonic()
        try:
            await small()
        except Exception:  # refused, not answered: then there is nothing to go by
            logger.debug("A small write beside a large one failed", exc_info=True)
        else:
            if _clock.monotonic() - began < _AT_ONCE_SECONDS:
                return True
        self._settle(1)
        return False

    def _settle(self, width: int) -> None:
        logger.debug("Large writes under way at a time from now on: %d", width)
        self.turn.total_tokens = self.write.total_tokens = width
        if width == 1:
            self._one_until = _clock.monotonic() + _AGAIN_SECONDS
