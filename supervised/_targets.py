"""What a teardown has to end: runs and children, how far each has come, and how to find one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from supervised import _clock
from supervised._policy import has_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._child import Attempt, Child
    from supervised._types import Action


@attrs.define(kw_only=True, eq=False)
class Target:
    """One descendant, and how far its teardown has come."""

    name: str
    depth: int
    action: Action = "cancel"
    child: Child[Any] | None = None
    attempt: Attempt | None = None  # the child's, when this began
    run: FlowRun | None = None
    state: State[Any] | None = None
    requested_at: datetime | None = None
    requested: float | None = None
    acknowledged_at: datetime | None = None
    terminal_at: datetime | None = None
    escalations: list[str] = attrs.field(factory=list)
    error: str = ""
    found: float = attrs.field(factory=_clock.monotonic)
    above: frozenset[UUID] = frozenset()  # its labels say it, or it is one of these
    was_read: bool = False  # since it was asked: what is known from before proves nothing
    ask_after: float = -math.inf  # when to ask again: the server could not do it
    missed: int = 0  # reads in a row that did not find it

    @property
    def run_id(self) -> UUID | None:
        return self.run.id if self.run is not None else None

    @property
    def is_over(self) -> bool:
        if self.attempt is not None and (self.attempt.is_over or self.is_local):
            return self.attempt.is_over
        return self.state is not None and self.state.is_final()

    @property
    def is_deleted(self) -> bool:
        """Whether somebody has deleted its run, so that nothing will tell of its end.

        A child of ours is told of that by the watcher.
        """
        return self.child is None and self.missed > 1

    @property
    def is_local(self) -> bool:
        """Whether it runs in this process, or in one that this one has started."""
        return self.child is not None and self.child.is_local

    @property
    def may_be_created(self) -> bool:
        """Whether its run was requested and is not known: only this process may hear of it."""
        return self.run is None and self.attempt is not None and self.attempt.was_requested

    @property
    def new_run(self) -> FlowRun | None:
        """The run of the child's attempt, perhaps created since this was found."""
        if self.child is None or self.child.attempt is not self.attempt:
            return None
        return self.child.flow_run

    @property
    def runs_remotely(self) -> bool:
        """Whether a runner elsewhere owns the process, so that asking the server helps."""
        if self.run is None:
            return False
        is_adopted = self.child is not None and self.child.kind == "adopted"
        return is_adopted or has_process(self.run)

    @property
    def has_own_process(self) -> bool:
        """Whether we have started its process: the server only tells that why it ends."""
        return self.child is not None and self.child.kind == "process" and self.run is not None

    @property
    def never_ran(self) -> bool:
        """Whether the server has never seen it `Running`, and so will refuse to let it."""
        run = self.run
        return self.was_read and run is not None and run.start_time is None


class Targets:
    """The targets of one teardown, in the order in which they were found.

    Each is found in constant time by its child and by its run: a tree may have a hundred thousand.
    """

    def __init__(self) -> None:
        self._all: dict[Target, None] = {}
        self._by_child: dict[str, Target] = {}
        self._by_run: dict[UUID, Target] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._all))

    def of_child(self, key: str) -> Target | None:
        """Return the target that is the child of a key."""
        return self._by_child.get(key)

    def of_run(self, run_id: UUID) -> Target | None:
        """Return the target that is a run."""
        return self._by_run.get(run_id)

    def add(self, target: Target) -> None:
        """Take up a target."""
        self._all[target] = None
        if target.child is not None:
            self._by_child[target.child.key] = target
        if target.run_id is not None:
            self._by_run[target.run_id] = target

    def set_run(self, target: Target, run: FlowRun, state: State[Any] | None) -> None:
        """Note the run, or what was last read of it."""
        target.run, target.state = run, state
        self._by_run[run.id] = target

    def remove(self, target: Target) -> None:
        """Leave a target alone."""
        self._all.pop(target, None)
        if target.child is not None:
            self._by_child.pop(target.child.key, None)
        if target.run_id is not None and self._by_run.get(target.run_id) is target:
            del self._by_run[target.run_id]
