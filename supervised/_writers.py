"""How many writers the database behind the server takes at a time: found out, and no harm done.

SQLite takes one. Task runs that are to be recorded while runs are being created are lost there, and
two creations at once fail. PostgreSQL does both side by side. Which of them is behind the server
does not show from outside, so something is written that nothing hangs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import attrs

from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = get_logger("prefect.supervised.launch")

_FIRST_SECONDS = 0.1  # by then the other request has written something, and SQLite is locked
_PAUSE_SECONDS = 0.05
_TELLING = 3  # one may have been quicker than the other request's first write
_SEVERAL = 2  # four gain nothing: what is left is the server's own time


@attrs.define
class Writers:
    """How many requests that write may be under way at a time: one, until more are known to do.

    Lives in one event loop; what has been found out counts for all that use it.
    """

    turns: anyio.CapacityLimiter = attrs.field(factory=lambda: anyio.CapacityLimiter(1))
    """What lets so many through."""
    _is_settled: bool = False

    @property
    def are_several(self) -> bool:
        """Whether the database is known to take more than one."""
        return self.turns.total_tokens > 1

    async def find_out(self, write: Callable[[], Awaitable[object]]) -> bool:
        """Find out, while another request writes; to be cancelled as soon as that is answered.

        Args:
            write: Writes something else. If that is answered meanwhile, and again, nothing locks
                it out.

        Returns:
            Whether there are several.
        """
        if self._is_settled:
            return self.are_several
        await anyio.sleep(_FIRST_SECONDS)
        try:
            for _ in range(_TELLING):
                await anyio.sleep(_PAUSE_SECONDS)
                await write()
        except Exception:  # what the other request comes to tells what is the matter
            logger.debug("Whether there are several writers cannot be found out", exc_info=True)
            self.are_one()
            return False
        self._is_settled = True
        self.turns.total_tokens = _SEVERAL
        return True

    def are_one(self) -> None:
        """Let one through at a time from now on: two have been seen to collide."""
        self._is_settled = True
        self.turns.total_tokens = 1
