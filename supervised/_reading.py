"""What a teardown reads of its targets: soon what may be over, everything only at times.

The server that is read has the ends to write, and shares its machine with the processes that end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import anyio

from supervised import _clock, _identity, _telemetry
from supervised._log import get_logger

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._api import Orchestrator
    from supervised._targets import Target, Targets
    from supervised._watch import Watcher

logger = get_logger("prefect.supervised.teardown")

# Between two reads. A runner needs 3 s to end a run, and on two cores the reads of one teardown
# took a sixth of all that the eight processes of a tree had to end with.
_READ_SECONDS = 0.4
_READ_SECONDS_WITH_EVENTS = 2.0
# Times what the last read has taken, before the next: the server that is read has the ends to
# write. A thousand runs take it 1.5 s.
_REST = 5.0
_REST_WITH_EVENTS = 10.0
_MOST_REST_SECONDS = 10.0  # or twice what it has taken, if that is more
_MOST_REST_SECONDS_UNHEARD = 1.0
_PAGE = 200  # what one request reads


class Reading:
    """Reads the targets of one teardown, and takes over what the watcher reads of them.

    The watcher reads what the stream tells the end of, so this follows every run among them.

    Args:
        api: The seam to Prefect.
        watcher: What hears of ends, and is told of all that is read here.
        targets: What is to be read.
        tag: The tag of the tree, which the events of our runs carry.
    """

    def __init__(self, api: Orchestrator, watcher: Watcher, targets: Targets, *, tag: str) -> None:
        self._api = api
        self._watcher = watcher
        self._targets = targets
        targets.on_run = self._follow
        self._tag = tag
        self._followed: set[UUID] = set()
        self._news = anyio.Event()  # set when something may be over
        self._read_at = _clock.monotonic()  # everything
        self._seconds_of_page = 0.0  # as long as reading has taken the last time
        self._may_have_ended = False  # what the stream does not tell of, together with others
        self._rested = self._doubted_at = -math.inf

    @property
    def hears(self) -> bool:
        """Whether events of the tree arrive."""
        return self._watcher.hears(self._tag)

    def _follow(self, run_id: UUID) -> None:
        if run_id not in self._followed:
            self._followed.add(run_id)
            self._watcher.follow(run_id, self)

    def unfollow_all(self) -> None:
        """Hear no more of any run."""
        for run_id in self._followed:
            self._watcher.unfollow(run_id, self)

    async def wait_for_news(self, seconds: float) -> None:
        """Wait until something may be over, but no longer than that."""
        with anyio.move_on_after(seconds):
            await self._news.wait()
        self._news = anyio.Event()

    def wake(self) -> None:
        """Have whoever waits for news look again."""
        self._news.set()

    def expect_changes(self) -> None:
        """Have everything read in the next round."""
        self._read_at = -math.inf

    async def read_if_due(self, targets: list[Target]) -> None:
        """Read everything when enough time has passed: the watcher reads what it hears of.

        What the stream does not tell of is read when something else has ended: it may have been
        in that one's process.
        """
        pages = max(1, math.ceil(len(targets) / _PAGE))
        rest = seconds_between_reads(pages * self._seconds_of_page, hears=self.hears)
        now = _clock.monotonic()
        if now >= self._read_at + rest:
            was_read = await self.read(targets)
            self._read_at = _clock.monotonic()
            if was_read:  # what a failure took says nothing
                self._seconds_of_page = (self._read_at - now) / pages
        elif self._may_have_ended and now >= self._rested:
            self._may_have_ended = False
            await self.read([t for t in targets if self._is_unheard(t)][:_PAGE])
            taken = _clock.monotonic() - now
            self._rested = now + taken + min(_REST * taken, _MOST_REST_SECONDS_UNHEARD)

    def _is_unheard(self, target: Target) -> bool:
        """Whether no event of it arrives: it is none of ours, but somewhere below one."""
        run = target.run
        return target.child is None and run is not None and self._tag not in run.tags

    async def read_doubtful(self, asked: list[Target], *, after: float) -> None:
        """Read what may never have begun, and has to be closed then: only a new read tells.

        Args:
            asked: What has been asked, and is not over.
            after: Seconds from the request, in which a run may begin.
        """
        if _clock.monotonic() < self._doubted_at + _READ_SECONDS:
            return
        if doubtful := [t for t in asked if t.may_never_have_run and t.has_waited(after)]:
            await self.read(doubtful)
            self._doubted_at = _clock.monotonic()

    async def read(self, targets: list[Target]) -> bool:
        """Read these; false if the server failed."""
        ids = [t.run_id for t in targets if t.run_id is not None]
        if not ids:
            return True
        try:
            with _telemetry.unobserved():
                runs = await self._api.read_runs(ids)
        except Exception:
            logger.debug("Could not read the tree; trying again", exc_info=True)
            return False
        self._miss_all(targets, {run.id for run in runs})
        for run in runs:
            self._watcher.apply(run, at_once=True)
            target = self._targets.of_run(run.id)
            if target is not None and run.state is not None:
                target.run = run
                target.was_read |= target.requested is not None
        return True

    def _miss_all(self, targets: list[Target], found: set[UUID]) -> None:
        """Take note of runs that the server does not know any more."""
        for target in targets:
            if target.run_id is None or target.run_id in found:
                target.missed = 0
                continue
            self.miss(target.run_id)
            self._watcher.hint(target.run_id)

    def take(self, run: FlowRun) -> None:
        """Take over what was read of a run, here or by the watcher."""
        if run.labels.get(_identity.DETACHED):
            self._targets.spare([run.id])
        target = self._targets.of_run(run.id)
        if target is None or run.state is None:
            return
        target.missed = 0
        target.learn(run.state)
        if target.is_over:
            self._may_have_ended = True
            self.wake()

    def miss(self, run_id: UUID) -> None:
        """Take note that a run is not there any more."""
        target = self._targets.of_run(run_id)
        if target is not None:
            target.missed += 1
            target.error = "its run was deleted from the server"
            self.wake()

    def learn(self, target: Target, state: State[Any]) -> None:
        """Take over a state that the server has answered, and have the child told by a read."""
        target.learn(state)
        if state.is_final() and target.child is not None and target.run_id is not None:
            self._watcher.hint(target.run_id)


def seconds_between_reads(taken: float, *, hears: bool) -> float:
    """Return how long not to read everything again.

    Args:
        taken: Seconds that it takes.
        hears: Whether the stream tells of most ends, so that it is needed for certainty only.
    """
    rest, least = (
        (_REST_WITH_EVENTS, _READ_SECONDS_WITH_EVENTS) if hears else (_REST, _READ_SECONDS)
    )
    return max(least, min(rest * taken, max(_MOST_REST_SECONDS, 2 * taken)))
