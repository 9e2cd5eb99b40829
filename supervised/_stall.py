"""Telling why nothing moves: every child waits for a slot that its own tree holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

LimitKind = Literal["deployment", "work pool", "work queue"]

_DOMAINS: Mapping[LimitKind, Callable[[FlowRun], object]] = {
    "deployment": lambda run: run.deployment_id,
    "work pool": lambda run: run.work_pool_name,
    "work queue": lambda run: run.work_queue_id,
}


@attrs.frozen
class Limit:
    """How many runs of a kind may be at work at once.

    Args:
        kind: What limits them.
        name: Its name, for people.
        slots: How many there may be.
    """

    kind: LimitKind
    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} (limit {self.slots})"

    def covers(self, run: FlowRun, other: FlowRun) -> bool:
        """Whether two runs share the slots, one of which is limited by this."""
        domain = _DOMAINS[self.kind]
        return domain(run) is not None and domain(run) == domain(other)


@attrs.frozen
class Stall:
    """Why no child can begin.

    Args:
        limit: What they wait for.
        holders: Those of the same tree that hold its slots.
        waiting: How many children wait.
    """

    limit: Limit
    holders: tuple[FlowRun, ...]
    waiting: int

    def __str__(self) -> str:
        who = "The only child waits" if self.waiting == 1 else f"All {self.waiting} children wait"
        if not self.holders:
            return f"{who} for a slot of {self.limit}, which has none. Raise the limit."
        names = ", ".join(repr(run.name) for run in self.holders)
        return (
            f"{who} for a slot of {self.limit}, and runs of the same tree hold the slots: {names}. "
            "If these wait for the children, nothing will move: raise the limit, or run the "
            "children elsewhere."
        )


def domain_of(run: FlowRun) -> tuple[object, ...]:
    """Return what two runs have in common that are limited alike."""
    return tuple(domain(run) for domain in _DOMAINS.values())


def find_stall(
    waiting: Sequence[FlowRun],
    holders: Sequence[FlowRun],
    limits: Mapping[UUID, Sequence[Limit]],
) -> Stall | None:
    """Return why no child can begin, or `None` if one may, as far as limits tell.

    Args:
        waiting: The children; none of them has begun.
        holders: The other runs of the tree that are at work: those above them, and beside.
        limits: What limits each child, by its id.
    """
    found: Stall | None = None
    for run in waiting:
        stall = _stall_of(run, holders, limits.get(run.id, ()), len(waiting))
        if stall is None:
            return None
        found = found or stall
    return found


def _stall_of(
    run: FlowRun, holders: Sequence[FlowRun], limits: Sequence[Limit], waiting: int
) -> Stall | None:
    for limit in limits:
        held = tuple(holder for holder in holders if limit.covers(run, holder))
        if len(held) >= limit.slots:
            return Stall(limit, held, waiting)
    return None
