"""Decisions, as pure functions over frozen values: no I/O, no clock, no Prefect client."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import attrs
from prefect.client.schemas.objects import StateType

from supervised._types import (
    ACTIONS,
    CAUSES,
    DEFAULT_ON_PARENT,
    Action,
    CancelReason,
    Cause,
    OnParent,
    Outcome,
    ReceiptStatus,
    Source,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prefect.client.schemas.objects import FlowRun, State

T = TypeVar("T")
_SOURCES: Mapping[Cause, Source] = {
    "completed": "parent_completed",
    "failed": "parent_failed",
    "timed_out": "parent_timed_out",
    "cancelled": "parent_cancelled",
    "crashed": "parent_crashed",
}
LEASE_REQUESTS = 4
"""Requests that there must be in the term of a lease: its renewals share them with the rest."""

HARD_CAUSES: tuple[Cause, ...] = ("cancelled", "crashed")
"""Ends after which the process may be killed, so that waiting must have a bound."""

_WORDS: Mapping[Cause, str] = {
    "completed": "completed",
    "failed": "failed",
    "timed_out": "timed out",
    "cancelled": "was cancelled",
    "crashed": "crashed",
}


def resolve_on_parent(
    value: OnParent | None, default: Mapping[Cause, Action] = DEFAULT_ON_PARENT
) -> Mapping[Cause, Action]:
    """Return the action for every cause, *value* over *default*.

    Raises:
        ValueError: If *value* names a cause or an action that does not exist.
    """
    if value is None:
        return default
    if not isinstance(value, (str, Mapping)):
        raise ValueError(  # noqa: TRY004 - as for any other value that is not understood
            f"on_parent: {value!r} is neither an action nor a mapping from causes to actions"
        )
    given: Mapping[Cause, Action] = (
        dict.fromkeys(CAUSES, value) if isinstance(value, str) else value
    )
    _refuse_unknown("cause", given, CAUSES)
    _refuse_unknown("action", given.values(), ACTIONS)
    return policy_of(tuple(given.get(cause, default[cause]) for cause in CAUSES))


@functools.cache  # there are 243, and each of 100,000 children has one
def policy_of(actions: tuple[Action, ...]) -> Mapping[Cause, Action]:
    """Return the policy that has these actions, in the order of `CAUSES`."""
    return dict(zip(CAUSES, actions, strict=True))


def without_detach(policy: Mapping[Cause, Action]) -> Mapping[Cause, Action]:
    """Return the policy for a child that cannot outlive its parent's process."""
    return policy_of(
        tuple(
            DEFAULT_ON_PARENT[cause] if policy[cause] == "detach" else policy[cause]
            for cause in CAUSES
        )
    )


def _refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted({str(word) for word in given} - set(known)):
        raise ValueError(f"on_parent: {', '.join(unknown)} is no {what}; use {', '.join(known)}")


def check_seconds(name: str, value: float | None, *, least: float = 0.0) -> float | None:
    """Return *value* if it is a usable number of seconds, or `None`.

    Raises:
        ValueError: If it is less than *least*, or not finite.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and least <= value < math.inf):
        raise ValueError(f"{name} must be a number of seconds, {least:g} or more; got {value!r}")
    return value


def check_limit(name: str, value: int | None) -> int | None:
    """Return *value* if it is a usable limit, or `None`.

    Raises:
        ValueError: If it is not a whole number of 1 or more.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and value >= 1):
        raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")
    return value


def check_budget(requests_per_minute: int | None, lease_seconds: float) -> None:
    """Refuse a budget of requests with which a run could not give its signs of life in time.

    Raises:
        ValueError: If it is so small.
    """
    if requests_per_minute is None or requests_per_minute * lease_seconds >= 60 * LEASE_REQUESTS:
        return
    least = math.ceil(60 * LEASE_REQUESTS / requests_per_minute)
    raise ValueError(
        f"requests_per_minute={requests_per_minute} leaves fewer than {LEASE_REQUESTS} requests in "
        f"lease_seconds={lease_seconds:g}, so that children elsewhere would take this run for "
        f"dead; give it lease_seconds={least} or more."
    )


def check_choice(name: str, value: T, known: Sequence[T]) -> T:
    """Return *value* if it is one of those that there are.

    Raises:
        ValueError: If it is not.
    """
    if value not in known:
        raise ValueError(f"{name}: {value!r} is none; use {', '.join(map(str, known))}")
    return value


def parent_reason(cause: Cause, flow_name: str | None, detail: str = "") -> CancelReason:
    """Return the reason that a parent's end gives to its children; without a name, any one's."""
    parent = f"parent '{flow_name}'" if flow_name is not None else "a run above it"
    message = f"{parent} {_WORDS[cause]}"
    return CancelReason(
        source=_SOURCES[cause], message=f"{message}: {detail}" if detail else message
    )


def is_over(run: FlowRun) -> bool:
    """Whether a run has ended, as far as this reading of it knows."""
    return run.state is not None and run.state.is_final()


def has_process(run: FlowRun) -> bool:
    """Whether a run has a process of its own: a deployment's, or one that was submitted ad hoc."""
    return run.deployment_id is not None or run.work_pool_name is not None


def cause_of(state: State) -> Cause:
    """Return how a run that is over ended, as its children see it."""
    if state.type == StateType.COMPLETED:
        return "completed"
    if state.type == StateType.CANCELLED:
        return "cancelled"
    if state.type == StateType.FAILED:
        return "timed_out" if state.name == "TimedOut" else "failed"
    return "crashed"


def is_silent(state: State | None, standstill: float, lease_seconds: float) -> bool:
    """Whether a run's process has to be taken for dead, though its run is not over.

    Args:
        state: The run's state.
        standstill: Seconds for which its lease has stood still.
        lease_seconds: How long a lease lasts.
    """
    return may_have_process(state) and standstill > lease_seconds


def may_have_process(state: State | None) -> bool:
    """Whether a run has a process, or had one that has died.

    A run that is suspended, scheduled again or starting has none that could give a sign of life,
    and is not dead.
    """
    return state is not None and state.type in {StateType.RUNNING, StateType.CANCELLING}


def outcome_of(state: State, *, asked: bool) -> Outcome | None:
    """Return how a child with this state ended, or `None` while it lives.

    Args:
        state: Its Prefect state.
        asked: Whether we had asked for its cancellation. A run that dies while it is being
            cancelled was cancelled; a run that completes all the same completed.
    """
    if state.type == StateType.COMPLETED:
        return "completed"
    if state.type == StateType.CANCELLED:
        return "cancelled"
    if state.type == StateType.CRASHED:
        return "cancelled" if asked else "crashed"
    if state.type == StateType.FAILED:
        return "timed_out" if state.name == "TimedOut" else "failed"
    return None


LEAVING: Mapping[Outcome, Cause] = {
    "failed": "failed",
    "crashed": "crashed",
    "timed_out": "timed_out",
    "cancelled": "cancelled",
}
"""Ends after which a child may have left runs of its own behind, and what they are to these."""


def receipt_status(outcome: Outcome, *, forced: bool) -> ReceiptStatus:
    """Return what teardown can vouch for, given how the child ended."""
    if outcome == "completed":
        return "completed"
    if outcome == "detached":
        return "detached"
    if outcome == "abandoned":
        return "unverified"
    if outcome == "cancelled":
        return "forced" if forced else "cancelled"
    return "failed"


def breaks_scope(outcome: Outcome) -> bool:
    """Whether a child that ended so counts as failed for `on_child_failure`."""
    return outcome in {"failed", "crashed", "timed_out"}


@attrs.frozen
class Budget:
    """How a teardown divides its seconds. All values are seconds from its start.

    Asking comes first and costs milliseconds; what is left is waiting. A child that was still
    starting when it was asked is nudged and then closed in time for the report.

    Args:
        total: Everything; Prefect kills a run 30 s after SIGTERM and no setting changes that.
    """

    total: float

    @property
    def patience(self) -> float:
        """How long a child whose policy is `wait` may go on when the process may be killed."""
        return self.total * 0.5

    @property
    def nudge_after(self) -> float:
        """When a child that never ran is brought to its runner's notice again."""
        return min(2.5, self.total / 4)

    @property
    def close_after(self) -> float:
        """When a child that never ran, and that no runner claims, is closed.

        A runner that was nudged needs 3.3 s to see that a process is gone.
        """
        return min(7.0, self.total * 0.8)

    @property
    def request_again_after(self) -> float:
        """When a child that has not acknowledged the request is asked again."""
        return min(5.0, self.total / 2)
