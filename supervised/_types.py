"""The words and frozen values that every other module speaks in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, get_args

import attrs

from supervised._text import clause

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from supervised._child import Child
    from supervised._restart import Restart

R_co = TypeVar("R_co", covariant=True)

Cause = Literal["completed", "failed", "timed_out", "cancelled", "crashed"]
"""How a parent ended."""

Action = Literal["wait", "cancel", "detach"]
"""What a parent's end does to one child."""

OnParent = Action | Mapping[Cause, Action]
"""What users write: one action for every cause, or a mapping for some of them."""

OnChildFailure = Literal["cancel_siblings", "wait", "ignore"]
"""What a failed child does to the scope."""

Kind = Literal["inline", "process", "deployment", "adopted"]
"""Where a child runs: in this process, in one of ours, or wherever its deployment's runner is.

An adopted one runs wherever somebody else has started it.
"""

Outcome = Literal[
    "completed", "failed", "crashed", "timed_out", "cancelled", "abandoned", "detached"
]
"""How a child ended; `abandoned` is teardown giving up on it."""

Source = Literal[
    "explicit",
    "sibling_failed",
    "parent_completed",
    "parent_failed",
    "parent_timed_out",
    "parent_cancelled",
    "parent_crashed",
    "parent_lost",
    "deadline",
    "lost_race",
    "restart",
    "predecessor_failed",
    "superseded",
    "parent_suspended",
    "unknown",
]
"""Who asked for a cancellation."""

ReceiptStatus = Literal["cancelled", "completed", "failed", "detached", "forced", "unverified"]
"""What teardown can vouch for: `completed` lost the race, `unverified` may be alive."""

CAUSES: tuple[Cause, ...] = get_args(Cause)
ACTIONS: tuple[Action, ...] = get_args(Action)


Isolation = Literal["none", "process"]
"""Whether an inline flow runs in this process, or in one of its own that can be ended."""

Reuse = Literal["never", "completed"]
"""What a spawn does with the run that an earlier attempt has completed under the same key."""

REUSES: tuple[Reuse, ...] = get_args(Reuse)
ISOLATIONS: tuple[Isolation, ...] = get_args(Isolation)


class FlowLike(Protocol[R_co]):
    """What type checkers take a flow for: its result, without the coroutine around it.

    One protocol for both kinds, because pyright remembers a failed match with a protocol for
    all flows; beside it, an overload for `Coroutine`, which is how mypy sees async functions.
    """

    @property
    def fn(self) -> Callable[..., Awaitable[R_co] | R_co]:
        """The flow's function."""
        ...


class SpawnOptions(TypedDict, total=False):
    """The options of `Supervisor.spawn`, which documents them."""

    name: str | None
    key: str | None
    tags: Sequence[str] | None
    job_variables: Mapping[str, Any] | None
    work_queue_name: str | None
    scheduled_time: datetime | None
    timeout_seconds: float | None
    on_parent: OnParent | None
    restart: Restart | None
    after: Sequence[Child[Any]] | None
    reuse: Reuse
    isolation: Isolation


@attrs.frozen(kw_only=True)
class CancelReason:
    """Why something was cancelled.

    Args:
        source: Who asked, from a closed list.
        message: One clause for people, e.g. *"sibling 'score-3' failed: ValueError: bad"*.
        child: Name of the child at fault, where there is one.
    """

    source: Source
    message: str = attrs.field(converter=clause)
    child: str | None = None

    def __str__(self) -> str:
        return self.message


@attrs.frozen(kw_only=True)
class Receipt:
    """What teardown did to one run, and what came of it.

    Args:
        name: The child's name.
        flow_run_id: Its flow run, or `None` if it never had one.
        url: The run's page in Prefect's UI, where a UI is configured.
        status: What teardown can vouch for.
        reason: Why it was cancelled, or why it could not be verified.
        requested_at: When cancellation was asked for.
        acknowledged_at: When the server accepted the request.
        terminal_at: When its end was observed.
        escalations: What had to be done beyond the first request, in order.
        depth: 1 for a direct child, 2 for a child's child, 0 where unknown.
    """

    name: str
    flow_run_id: UUID | None
    status: ReceiptStatus
    reason: str
    url: str | None = None
    requested_at: datetime | None = None
    acknowledged_at: datetime | None = None
    terminal_at: datetime | None = None
    escalations: tuple[str, ...] = ()
    depth: int = 1

    @property
    def seconds(self) -> float | None:
        """Seconds from the request to the observed end, if both are known."""
        if self.requested_at is None or self.terminal_at is None:
            return None
        return (self.terminal_at - self.requested_at).total_seconds()

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" after {self.seconds:.1f} s"
        extra = f" ({', '.join(self.escalations)})" if self.escalations else ""
        run = f" {self.flow_run_id}" if self.flow_run_id else ""
        why = f": {self.reason}" if self.status == "unverified" else ""
        return f"{self.status:<10} {self.name}{run}{took}{extra}{why}"


@attrs.frozen(kw_only=True)
class TeardownReport:
    """What became of every run below a scope that was torn down.

    Args:
        flow_name: The supervised flow.
        flow_run_id: Its run.
        cause: How that run ended.
        reason: The cause in words.
        started_at: When teardown began.
        seconds: How long it took.
        receipts: One for each descendant that teardown dealt with, direct children first.
        delegated_to: The ancestor run whose own teardown verifies this subtree, if any.
        finalizer_errors: What went wrong in callbacks of `supervisor.on_teardown`, a line each.
    """

    flow_name: str
    flow_run_id: UUID
    cause: Cause
    reason: str
    started_at: datetime
    seconds: float
    receipts: tuple[Receipt, ...]
    delegated_to: UUID | None = None
    finalizer_errors: tuple[str, ...] = ()

    @property
    def unverified(self) -> tuple[Receipt, ...]:
        """The runs that may still be alive."""
        return tuple(r for r in self.receipts if r.status == "unverified")

    @property
    def ok(self) -> bool:
        """Whether every run is known to be over, or was detached on purpose."""
        return not self.unverified

    def after(self, earlier: TeardownReport | None) -> TeardownReport:
        """Return this report with the receipts of an earlier one for the runs it does not name."""
        if earlier is None:
            return self
        named = {receipt.flow_run_id for receipt in self.receipts}
        kept = (receipt for receipt in earlier.receipts if receipt.flow_run_id not in named)
        return attrs.evolve(
            self,
            receipts=(*kept, *self.receipts),
            finalizer_errors=(*earlier.finalizer_errors, *self.finalizer_errors),
        )

    def counts(self) -> dict[ReceiptStatus, int]:
        """How many runs ended in each way, most frequent first."""
        seen: dict[ReceiptStatus, int] = {}
        for receipt in self.receipts:
            seen[receipt.status] = seen.get(receipt.status, 0) + 1
        return dict(sorted(seen.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        summary = ", ".join(f"{n} {status}" for status, n in self.counts().items())
        head = (
            f"Teardown of '{self.flow_name}' {self.flow_run_id} ({self.cause}: {self.reason}) "
            f"took {self.seconds:.1f} s: {summary or 'nothing was running'}"
        )
        if self.delegated_to is not None:
            head += f"; verified by run {self.delegated_to}"
        failed = (f"  finalizer  {error}" for error in self.finalizer_errors)
        return "\n".join([head, *(f"  {receipt}" for receipt in self.receipts), *failed])


@attrs.frozen(kw_only=True)
class ScopeOptions:
    """What `@supervised_flow` adds to the options of `@flow`. Immutable and picklable.

    Args:
        grace_seconds: Seconds that a whole teardown may take before what is left is
            reported as `unverified`.
        on_parent: Default `on_parent` of every child.
        on_child_failure: What a failed child does to the others.
        max_concurrent: Children launched and not over at any one time; `None` for no limit.
        lease_seconds: Seconds without a sign of life from this process after which its children
            elsewhere take it for dead.
        restart: Limits within which children that fail or crash are restarted; `None` for never.
        requests_per_minute: How many requests this process's supervision may make in a minute;
            `None` for no limit.
        deadline_seconds: Seconds from the body's beginning after which the scope is torn down;
            `None` for no limit of its own.
    """

    grace_seconds: float = 20.0
    lease_seconds: float = 30.0
    on_parent: Mapping[Cause, Action] = attrs.field(factory=lambda: DEFAULT_ON_PARENT)
    on_child_failure: OnChildFailure = "cancel_siblings"
    max_concurrent: int | None = None
    restart: Restart | None = None
    deadline_seconds: float | None = None
    requests_per_minute: int | None = None


DEFAULT_ON_PARENT: Mapping[Cause, Action] = {
    "completed": "wait",
    "failed": "cancel",
    "timed_out": "cancel",
    "cancelled": "cancel",
    "crashed": "cancel",
}
