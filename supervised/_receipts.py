"""What a report says of each run: how it ended, or why nobody can vouch for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.utilities.urls import url_for

from supervised import _clock
from supervised._policy import outcome_of, receipt_status
from supervised._types import Receipt

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from supervised._child import Child
    from supervised._mandate import Mandate
    from supervised._targets import Target
    from supervised._types import CancelReason, Outcome


def receipt_for(
    target: Target, mandate: Mandate, *, reason: CancelReason, started: float
) -> Receipt:
    """Return what became of a target.

    Args:
        target: The run or child, as last read.
        mandate: What the teardown was about.
        reason: Why it was cancelled.
        started: When the teardown began, by the monotonic clock.
    """
    child = target.child
    outcome = _outcome(target)
    delegated = mandate.delegate_to is not None and target.acknowledged_at is not None
    is_known = outcome != "abandoned" and (target.is_over or outcome is not None)
    vouched = is_known or (delegated and outcome != "abandoned")
    own = child.escalations if child is not None else []
    return Receipt(
        name=target.name,
        flow_run_id=target.run_id,
        url=url_for("flow-run", obj_id=target.run_id) if target.run_id else None,
        status=receipt_status(
            outcome or ("cancelled" if delegated else "abandoned"),
            forced="closed" in target.escalations,
        ),
        reason=str(reason) if vouched else _why_unverified(target, mandate, started),
        requested_at=_requested_at(target),
        acknowledged_at=target.acknowledged_at,
        terminal_at=target.terminal_at or (child.ended_at if child else None),
        escalations=tuple(dict.fromkeys([*target.escalations, *own])),
        depth=target.depth,
    )


def detached_receipt(child: Child[Any]) -> Receipt:
    """Return what is said of a child that goes on."""
    return Receipt(
        name=child.name,
        flow_run_id=child.flow_run_id,
        url=child.url,
        status="detached",
        reason="detached on purpose",
    )


def unsearched_receipt(run_id: UUID, error: str) -> Receipt:
    """Return what is said of a tree that could not be searched to its end."""
    return Receipt(
        name="(what lies below)",
        flow_run_id=run_id,
        status="unverified",
        reason=f"the tree could not be searched: {error}",
        depth=0,
    )


def _outcome(target: Target) -> Outcome | None:
    outcome = target.child.outcome if target.child is not None else None
    if outcome in {None, "abandoned"} and target.state is not None:
        return outcome_of(target.state, asked=True) or outcome
    return outcome


def _requested_at(target: Target) -> datetime | None:
    if target.child is None or (target.was_never_asked and not target.is_over):
        return target.requested_at
    return target.requested_at or target.child.requested_at


def _why_unverified(target: Target, mandate: Mandate, started: float) -> str:
    where = f"still {target.state.name}" if target.state is not None else "no state known"
    if target.error:
        return f"{where}; {target.error}"
    if target.action == "wait":
        return f"{where}; its policy is to be waited for, and the grace ran out"
    if target.is_local:
        return f"{where}; its code in this process ignores the cancellation"
    if target.may_be_created:
        return f"{where}; the request that creates it was not answered"
    return f"{where}{_why_not_over(target, mandate, started)}"


def _why_not_over(target: Target, mandate: Mandate, started: float) -> str:
    if not target.runs_remotely and not mandate.can_wait:
        return "; it runs inside another run's process, which may be alive"
    if not target.runs_remotely:
        return "; it runs inline in code that this scope did not start"
    if target.was_never_asked:
        return "; it was never asked: there was no time for that"
    return f" {_waited(target, started):.0f} s after the request; its runner or process may be dead"


def _waited(target: Target, started: float) -> float:
    """Return the seconds since it was asked, perhaps before this teardown began."""
    asked = target.child.requested_at if target.child is not None else None
    if target.requested is None and asked is not None:
        return (_clock.utc_now() - asked).total_seconds()
    return _clock.monotonic() - (started if target.requested is None else target.requested)
