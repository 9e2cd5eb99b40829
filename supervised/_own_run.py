"""The supervised run itself: hearing that it is being cancelled, before any signal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio

from supervised import _clock, _identity
from supervised._budget import Priority, priority
from supervised._log import get_logger
from supervised._policy import parent_reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._api import Orchestrator
    from supervised._types import CancelReason
    from supervised._watch import Watcher

logger = get_logger("prefect.supervised")

_RECHECK_SECONDS = 2.0
_FRESH_SECONDS = 1.0


class OwnRun:
    """What the server says of the run whose scope this is; lives in the control plane.

    Args:
        run: The run.
        lineage: Where it stands in its tree.
        flow_name: Its flow, for people.
        on_cancelled: Called once, when somebody has set the run to `Cancelling`.
        on_superseded: Called when a later attempt of the run has begun elsewhere.
    """

    def __init__(
        self,
        run: FlowRun,
        lineage: _identity.Lineage,
        flow_name: str,
        on_cancelled: Callable[[], None],
        on_superseded: Callable[[], None],
    ) -> None:
        self._run = run
        self._lineage = lineage
        self._flow_name = flow_name
        self._on_cancelled = on_cancelled
        self._on_superseded = on_superseded
        self._is_over = False
        self._follows_tree = False
        self.cancellation: str | None = None
        """What the run's state says of its cancellation; `None` if there is none."""
        self.cancelled_at: float | None = None
        """When that was heard, by the monotonic clock."""
        self.lost: CancelReason | None = None
        """Why the run has to end though nobody cancelled it: something above it is gone."""
        self.is_superseded = False
        """Whether a later attempt of the run has begun elsewhere, to whom the children belong."""
        self._attempt = run.run_count
        self._checked = -math.inf
        self._checking = anyio.Lock()
        self._failure: tuple[float, Exception] | None = None
        self.delegate_to: UUID | None = None
        """The ancestor whose own teardown covers this whole tree, if one cancels the run."""

    def watch(self, watcher: Watcher) -> None:
        """Follow the run."""
        watcher.watch_owner(self._run.id, self._on_change)

    def watch_tree(self, watcher: Watcher) -> None:
        """Follow all runs of its tree: only who has children needs that, and most have none."""
        if not self._follows_tree:
            self._follows_tree = True
            watcher.watch_tree(self._lineage.tag)

    def unwatch(self, watcher: Watcher) -> None:
        """Stop following."""
        watcher.unwatch_owner(self._run.id)
        if self._follows_tree:
            self._follows_tree = False
            watcher.unwatch_tree(self._lineage.tag)

    def close(self) -> None:
        """Hear nothing any more: the scope is over."""
        self._is_over = True

    @property
    def reason(self) -> CancelReason:
        """Why everything below is cancelled, once the run is."""
        if self.lost is not None:
            return self.lost
        detail = "" if self.delegate_to else (self.cancellation or "")
        return parent_reason("cancelled", self._flow_name, detail)

    async def recheck(self, api: Orchestrator) -> bool:
        """Read the run, and tell whether it is being cancelled and nobody had heard of it.

        It tells a crash from a cancellation whose notice has not reached us yet, and names the
        ancestor that covers the tree.
        """
        if self.cancellation is not None:
            return False
        try:
            with anyio.fail_after(_RECHECK_SECONDS):
                (run,) = await api.read_runs([self._run.id])
        except Exception:
            logger.debug("Could not read the run's own state", exc_info=True)
            return False
        self._note_attempt(run)
        return self._note(run.state)

    async def check_superseded(self, api: Orchestrator) -> bool:
        """Tell whether a later attempt has begun, having read the run a second ago at most.

        Who asks at the same time shares the answer, a failure too: it may have taken a minute.

        Raises:
            Exception: If the server does not tell. Then nothing may be launched or cancelled.
        """
        wanted = _clock.monotonic()
        async with self._checking:
            if self._failure is not None and self._failure[0] > wanted:
                raise self._failure[1]
            if not self.is_superseded and wanted - self._checked > _FRESH_SECONDS:
                await self._check(api)
            return self.is_superseded

    async def _check(self, api: Orchestrator) -> None:
        asked = _clock.monotonic()
        try:
            with priority(Priority.TEARDOWN):
                for run in await api.read_runs([self._run.id]):
                    self._note_attempt(run)
        except Exception as exc:
            self._failure = (_clock.monotonic(), exc)
            raise
        self._checked = asked

    def _note_attempt(self, run: FlowRun) -> None:
        policy = run.empirical_policy
        if policy is not None and policy.resuming:
            # A resume in this very process after `pause_flow_run`: the server counts it as one
            # more attempt. One elsewhere, after a suspension, has cleared the flag by then.
            self._attempt = max(self._attempt, run.run_count)
        if run.run_count > self._attempt and not self.is_superseded:
            self.is_superseded = True
            self._on_superseded()

    def _on_change(self, run: FlowRun) -> None:
        self._note_attempt(run)
        if self.cancellation is None and not self._is_over and self._note(run.state):
            self._on_cancelled()

    def note_lost(self, message: str) -> None:
        """Take the run for cancelled, whether or not the server has been told."""
        if self.cancellation is None and not self._is_over:
            self._be_cancelled(message)
            self._on_cancelled()

    def _note(self, state: State | None) -> bool:
        if state is None or not (state.is_cancelling() or state.is_cancelled()):
            return False
        self._be_cancelled(state.message or "its run was set to Cancelling")
        by = _identity.marked_by(state.message)
        self.delegate_to = by if by is not None and by in self._lineage.path[:-1] else None
        return True

    def _be_cancelled(self, message: str) -> None:
        self.cancellation, self.cancelled_at = message, _clock.monotonic()
