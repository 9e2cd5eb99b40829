"""Whose end a teardown follows, and so what is to become of whom. Decisions only, all pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from supervised import _identity
from supervised._policy import HARD_CAUSES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._targets import Target, Targets
    from supervised._types import Action, CancelReason, Cause


@attrs.define(kw_only=True, eq=False)
class Mandate:
    """What one teardown is about. A harder end, or a later attempt, may change it on the way.

    Args:
        lineage: The supervised run and its ancestors.
        cause: How that run ends.
        reason: The same in words.
        tops: The runs below which everything is to end, none of them below another, and why what
            is below each is to end, where that is not the child's own reason, or the same for all.
        delegate_to: Who tears the same tree down and verifies it.
        can_wait: Whether somebody is there to wait for a child whose policy is to be waited for.
        spares: Whether policies count.
        is_handed_over: Whether what runs elsewhere is a later attempt's.
    """

    lineage: _identity.Lineage
    cause: Cause
    reason: CancelReason
    tops: Mapping[UUID, CancelReason | None]
    delegate_to: UUID | None = None
    can_wait: bool = True
    spares: bool = True
    is_handed_over: bool = False

    @property
    def is_patient(self) -> bool:
        """Whether there is time to wait for those whose policy says so."""
        return self.cause not in HARD_CAUSES

    def harden(self, cause: Cause, reason: CancelReason) -> bool:
        """Go on under another end; false if the present one is as hard."""
        if self.cause in {cause, *HARD_CAUSES}:
            return False
        self.cause, self.reason = cause, reason
        return True

    def hand_over(self) -> None:
        """Leave what runs elsewhere to a later attempt of the same run."""
        self.delegate_to, self.is_handed_over = self.lineage.run_id, True

    def action_for(self, target: Target) -> Action:
        """Return what the present cause means to a target that is not over."""
        if target.child is not None:
            return target.child.on_parent[self.cause]
        assert target.run is not None
        return self.action_for_run(target.run, target.depth)

    def action_for_run(self, run: FlowRun, depth: int) -> Action:
        """Return what its labels say is to become of a run.

        Args:
            run: The run.
            depth: Levels below the top. What is further down loses a parent that is cancelled.
        """
        if not self.spares:
            return "cancel"
        return _identity.action_of(run.labels, self.cause if depth == 1 else "cancelled")

    def reason_for(self, target: Target, targets: Targets) -> CancelReason:
        """Return why a run is cancelled: for its own reason, or that of the top it is below."""
        if target.child is not None:
            return target.child.cancel_reason or self.reason
        top = next(iter(self.tops.keys() & target.above), None)
        if top is None:
            return self.reason
        above = targets.of_run(top)
        child = above.child if above is not None else None
        return self.tops[top] or (child.cancel_reason if child is not None else None) or self.reason
