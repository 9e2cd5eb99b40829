"""The link of a supervised child to its parent: no parent, no child.

It needs no service: the child's own control plane watches, so a child ends itself within seconds
of its parent's death, whatever killed it, and ends its own tree first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from supervised import _identity
from supervised._lease import LeaseReader, renewal_seconds
from supervised._log import get_logger
from supervised._policy import cause_of, is_silent
from supervised._types import CancelReason

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._watch import Watcher

logger = get_logger("prefect.supervised.link")


class Link:
    """Watches the runs that a supervised run must not outlive; lives in the control plane.

    Args:
        run: The run, whose labels name its parent, its root and the process that holds the lease.
        on_lost: Called when one of them is lost, once for each, with its id and the reason.
    """

    def __init__(self, run: FlowRun, on_lost: Callable[[UUID, CancelReason], None]) -> None:
        self._policy = _identity.on_parent_of(run.labels)
        self._seconds = _identity.lease_seconds_of(run.labels)
        self._above = _identity.runs_above(run.labels)
        self._on_lost = on_lost
        self._leases = LeaseReader()
        self._lost: set[UUID] = set()

    def watch(self, watcher: Watcher) -> None:
        """Begin to watch."""
        for run_id in self._above:
            watcher.watch_other(run_id, self._on_change, every=renewal_seconds(self._seconds))

    def unwatch(self, watcher: Watcher) -> None:
        """Stop watching."""
        for run_id in self._above:
            watcher.unwatch_other(run_id, self._on_change)

    def look_again(self, run_id: UUID) -> None:
        """Judge a run anew: what its loss called for could not be done."""
        self._lost.discard(run_id)

    def _on_change(self, run_id: UUID, run: FlowRun | None) -> None:
        """Judge what a read says; `None` is a run that the server does not know any more."""
        if run_id in self._lost or (what := self._why_lost(run_id, run)) is None:
            return
        self._lost.add(run_id)
        self._on_lost(run_id, CancelReason(source="parent_lost", message=what))

    def _why_lost(self, run_id: UUID, run: FlowRun | None) -> str | None:
        if run is None:
            return f"run {run_id} above it no longer exists"
        if run.state is not None and run.state.is_final():
            if self._policy.get(cause_of(run.state)) == "cancel":
                return f"run {run.name!r} above it ended as {run.state.name}"
        elif self._policy.get("crashed") == "cancel" and self._is_silent(run):
            return f"run {run.name!r} above it has not been heard of for {self._seconds:g} s"
        return None

    def _is_silent(self, run: FlowRun) -> bool:
        if _identity.LEASE not in run.labels:
            return False  # only the process's outermost run holds one
        standstill = self._leases.standstill(run, self._seconds)
        return is_silent(run.state, standstill, self._seconds)
