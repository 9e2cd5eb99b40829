"""What lies below a run by Prefect's own parent link, searched again without reading it all again.

A tree may have 100,000 runs that are over. What they have launched may live, so it is looked for:
once, if their processes must be gone, and in every search as long as they may launch more.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Literal, TypeAlias

from supervised import _clock
from supervised._policy import has_process, is_over

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator, Visit

    Take: TypeAlias = Callable[[list[FlowRun], int], Awaitable[None]]

_A_WHILE_SECONDS = 30.0  # a process ends within seconds of its run, its hooks included
_LATE_SECONDS = 60.0  # of what ended before the last search: it may have been written since
_FEW = 200  # runs on one page
_WIDE = 1_000  # parents in one request, as long as hardly any has children
_NARROW = 100  # and once they have, as the server skips all that is on earlier pages


class Search:
    """Searches one tree, level by level, as often as it is asked to."""

    def __init__(self, api: Orchestrator) -> None:
        self._api = api
        self._over: dict[UUID, float] = {}  # since when; they may have launched something lately
        self._done: set[UUID] = set()  # over for a while, and searched since then
        self._read_at: dict[UUID, float] = {}  # whose children have been read, and when last
        self._ended = 0  # the most children that are over that one search had to read
        self._width = _WIDE
        self._ahead: float | None = None  # the server's clock, of ours
        self.seconds = 0.0
        """What the requests have taken that were answered."""

    def add_over(self, run_id: UUID, at: datetime | None) -> None:
        """Note that a run is over.

        Args:
            run_id: The run.
            at: Since when, by our clock; `None` if whatever ran in it may run on: its process is
                another run's.
        """
        if run_id not in self._done:
            self._over.setdefault(run_id, math.inf if at is None else at.timestamp())

    async def below(
        self,
        tops: Collection[UUID],
        live: Iterable[UUID],
        take: Take,
        is_left_alone: Callable[[UUID], bool],
    ) -> None:
        """Find what lives below some runs, and what has ended there since the last search.

        Args:
            tops: The runs. If it is one, most of its children that are over should have been noted
                before.
            live: What else may launch something.
            take: Called with the runs of each page, and their level as far as it is known; not
                for all children that are over.
            is_left_alone: Whether what is below a run is nobody's to end.
        """
        level = {*tops, *live}
        for run_id in level:  # perhaps again
            self._over.pop(run_id, None)
            self._done.discard(run_id)
        level |= self._over.keys()
        seen, depth, ended = set(level), 1, 0
        while level := {i for i in level if i not in self._done and not is_left_alone(i)}:
            found: set[UUID] = set()

            async def visit(
                runs: list[FlowRun], depth: int = depth, found: set[UUID] = found
            ) -> None:
                nonlocal ended
                ended += await self._note(runs)
                self._ended = max(self._ended, ended)
                found.update(run.id for run in runs)
                await take(runs, depth)

            await self._read(tops, level, visit)
            level = found - seen
            seen |= level
            depth += 1

    async def _note(self, runs: list[FlowRun]) -> int:
        """Note which of these are over; return how many."""
        over = [run for run in runs if is_over(run)]
        for run in over:
            if run.id not in self._over and run.id not in self._done:
                at = run.end_time if has_process(run) else None
                ahead = 0.0 if at is None else await self._seconds_ahead()
                self.add_over(run.id, at and at - timedelta(seconds=ahead))
        return len(over)

    async def _seconds_ahead(self) -> float:
        if self._ahead is None:
            theirs = await self._api.server_time()
            self._ahead = (theirs - _clock.utc_now()).total_seconds() if theirs else 0.0
        return self._ahead

    async def _read(self, tops: Collection[UUID], level: set[UUID], visit: Visit) -> None:
        again = level & self._read_at.keys()
        new = level - again
        if len(tops) == 1 and new.issuperset(tops) and len(self._over) > _FEW:
            new.difference_update(tops)
            await self._read_top(next(iter(tops)), visit)
        for some in self._chunks(new):
            await self._read_some(some, visit)
        for some in self._chunks(again):
            await self._read_some(some, visit, again=self._ended > _FEW)

    def _chunks(self, runs: Iterable[UUID]) -> Iterator[list[UUID]]:
        left = list(runs)
        while left:
            some = left[: self._width]
            del left[: len(some)]
            yield some  # which may change the width

    async def _read_top(self, top: UUID, visit: Visit) -> None:
        """Read the children of a run, but those that are over only if some are not known.

        To exclude so many is more than a filter can do. So they are counted: all of them, after
        what lives has been read, and those that are known.
        """
        began, known = _clock.utc_now(), [*self._over, *self._done]
        await self._visit([top], visit, only="live")
        before = _clock.monotonic()
        all_ended = await self._api.count_ended(top)
        known_ended = await self._api.count_ended(top, known)
        self.seconds += _clock.monotonic() - before
        self._ended = max(self._ended, all_ended)
        if known_ended != all_ended:
            await self._visit([top], visit, only="over")
        self._settle([top], began)

    async def _read_some(self, runs: list[UUID], visit: Visit, *, again: bool = False) -> None:
        """Read the children of runs: all of them, or what may have changed since the last time."""
        began = _clock.utc_now()
        if again:
            await self._visit(runs, visit, only="live")
            last = min(self._read_at[run_id] for run_id in runs)
            since = last + await self._seconds_ahead() - _LATE_SECONDS
            moment = datetime.fromtimestamp(since, timezone.utc)
            await self._visit(runs, visit, only="over", since=moment)
        else:
            await self._visit(runs, visit)
        self._settle(runs, began)

    async def _visit(
        self,
        runs: list[UUID],
        visit: Visit,
        *,
        only: Literal["live", "over"] | None = None,
        since: datetime | None = None,
    ) -> None:
        before, count = _clock.monotonic(), 0

        async def visit_page(page: list[FlowRun]) -> None:
            nonlocal before, count
            self.seconds += _clock.monotonic() - before
            count += len(page)
            await visit(page)
            before = _clock.monotonic()

        await self._api.visit_children(runs, visit_page, only=only, since=since)
        self._width = _NARROW if count > _FEW else _WIDE

    def _settle(self, runs: list[UUID], began: datetime) -> None:
        """Note that the children of runs have been read, and who has launched its last one."""
        at = began.timestamp()
        for run_id in runs:
            if at - self._over.get(run_id, math.inf) > _A_WHILE_SECONDS:
                del self._over[run_id]
                self._read_at.pop(run_id, None)
                self._done.add(run_id)
            else:
                self._read_at[run_id] = at
