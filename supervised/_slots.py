"""Slots: how many children are launched and not over at any one time, fairly shared."""

from __future__ import annotations

import math
from collections import deque

import anyio
import attrs


@attrs.frozen(eq=False)
class SlotPool:
    """Children that share a limit of their own, such as those of one `supervisor.map`.

    Args:
        limit: How many of them may be launched and not over; `None` for no limit.
    """

    limit: int | None = None


@attrs.define
class _Group:
    limit: float
    held: int = 0
    waiting: deque[anyio.Event] = attrs.field(factory=deque)

    @property
    def can_be_served(self) -> bool:
        return bool(self.waiting) and self.held < self.limit


class Slots:
    """Gives slots to pools in turn, so that a large one does not keep the others waiting.

    Within a pool, who came first is served first. Lives in the control plane.

    Args:
        limit: Slots in all; `None` for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._free = math.inf if limit is None else limit
        self._groups: dict[SlotPool, _Group] = {}  # in the order in which they are served next

    async def take(self, pool: SlotPool) -> None:
        """Wait for a slot."""
        entry = self._groups.get(pool)
        if entry is None:
            limit = math.inf if pool.limit is None else pool.limit
            entry = self._groups[pool] = _Group(limit)
        turn = anyio.Event()
        entry.waiting.append(turn)
        self._serve()
        try:
            await turn.wait()
        except BaseException:  # cancelled, perhaps in the same instant in which its turn came
            if turn.is_set():
                self.give_back(pool)
            else:
                entry.waiting.remove(turn)
                self._forget_if_idle(pool, entry)
            raise

    def give_back(self, pool: SlotPool) -> None:
        """Return one of the pool's slots."""
        entry = self._groups[pool]
        entry.held -= 1
        self._free += 1
        self._forget_if_idle(pool, entry)
        self._serve()

    def _serve(self) -> None:
        while self._free > 0:
            ready = [pool for pool, each in self._groups.items() if each.can_be_served]
            if not ready:
                return
            self._serve_one(ready[0])

    def _serve_one(self, pool: SlotPool) -> None:
        entry = self._groups[pool] = self._groups.pop(pool)  # its next turn comes last
        entry.held += 1
        self._free -= 1
        entry.waiting.popleft().set()

    def _forget_if_idle(self, pool: SlotPool, entry: _Group) -> None:
        if not entry.held and not entry.waiting:
            self._groups.pop(pool, None)
