"""What a teardown has to end: runs and children, how far each has come, and how to find one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from supervised import _clock
from supervised._policy import has_process

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
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
    is_told: bool = False  # what runs here was interrupted, and its handle marked
    requested_at: datetime | None = None  # when it was asked for the first time
    requested: float | None = None  # since when it has been asked; not if that was in vain
    acknowledged_at: datetime | None = None
    terminal_at: datetime | None = None
    escalations: list[str] = attrs.field(factory=list)
    error: str = ""
    found: float = attrs.field(factory=_clock.monotonic)
    above: frozenset[UUID] = frozenset()  # its labels say it, or it is one of these
    was_read: bool = False  # since it was asked: what is known from before proves nothing
    ask_after: float = -math.inf  # when to ask, or to close, again: it was in vain
    missed: int = 0  # reads in a row that did not find it

    @classmethod
    def of_ended(cls, child: Child[Any]) -> Target:
        """Return a child that has ended before the teardown began, for its report."""
        run, state = child.flow_run, child.last_state
        return cls(name=child.name, depth=1, child=child, run=run, state=state)

    def learn(self, state: State[Any]) -> None:
        """Take over a state, unless it is older than an end that is known."""
        known = self.state
        if known is not None and known.is_final() and state.timestamp < known.timestamp:
            return  # a read that was overtaken
        self.state = state
        if state.is_final() and self.terminal_at is None:
            self.terminal_at = _clock.utc_now()

    def note_request(self) -> None:
        """Take note that it is being asked."""
        self.requested = _clock.monotonic()
        self.requested_at = self.requested_at or _clock.utc_now()

    def note_failure(self, error: str) -> None:
        """Take note that to ask it was in vain, so that it is asked again."""
        self.requested = None
        self.error = error

    def note_step(self, step: str) -> bool:
        """Record a step beyond the first request, once; false if it was taken before."""
        if step in self.escalations:
            return False
        self.escalations.append(step)
        if self.child is not None:
            self.child.note_escalation(step)
        return True

    @property
    def run_id(self) -> UUID | None:
        return self.run.id if self.run is not None else None

    @property
    def is_to_be_asked(self) -> bool:
        """Whether it is to be cancelled, and has not been asked or was in vain, a while ago."""
        is_unasked = self.requested is None and self.action == "cancel"
        return is_unasked and _clock.monotonic() >= self.ask_after

    @property
    def is_over(self) -> bool:
        if self.attempt is not None and (self.attempt.is_over or self.is_local):
            return self.attempt.is_over
        return self.state is not None and self.state.is_final()

    @property
    def over_since(self) -> datetime | None:
        """When its run's end was observed; `None` if that goes on."""
        return self.terminal_at if self.state is not None and self.state.is_final() else None

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
    def was_never_asked(self) -> bool:
        """Whether only asking the server helps, and nobody had the time to."""
        return (
            self.runs_remotely
            and self.requested_at is None
            and (self.child is None or self.child.acknowledged_at is None)
        )

    @property
    def has_own_process(self) -> bool:
        """Whether we have started its process: the server only tells that why it ends."""
        return self.child is not None and self.child.kind == "process" and self.run is not None

    @property
    def may_never_have_run(self) -> bool:
        """Whether it is not known to have begun, because it was not read since it was asked."""
        run = self.run
        return self.runs_remotely and not self.was_read and run is not None and not run.start_time

    def has_waited(self, seconds: float) -> bool:
        """Whether it was asked that long ago."""
        return self.requested is not None and _clock.monotonic() - self.requested > seconds

    @property
    def never_ran(self) -> bool:
        """Whether the server has never seen it `Running`, and so will refuse to let it."""
        run = self.run
        return self.was_read and run is not None and run.start_time is None


class Targets:
    """The targets of one teardown, in the order in which they were found.

    Each is found in constant time by its child and by its run: a tree may have a hundred thousand.

    Args:
        top_is_gone: Whether the process above all of them is known to have ended.
    """

    def __init__(self, *, top_is_gone: bool = False) -> None:
        self.on_run: Callable[[UUID], None] = lambda _: None
        """Told of every run that one of them has."""
        self.spared: set[UUID] = set()
        """Runs to leave alone, with all below them."""
        self.gone: set[UUID] = set()
        """Deployed runs that are over, and their processes too."""
        self._top_is_gone = top_is_gone
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
            self.on_run(target.run_id)

    def set_run(self, target: Target, run: FlowRun, state: State[Any] | None) -> None:
        """Note the run, or what was last read of it."""
        target.run, target.state = run, state
        self._by_run[run.id] = target
        self.on_run(run.id)

    def remove(self, target: Target) -> None:
        """Leave a target alone."""
        self._all.pop(target, None)
        if target.child is not None:
            self._by_child.pop(target.child.key, None)
        if target.run_id is not None and self._by_run.get(target.run_id) is target:
            del self._by_run[target.run_id]

    def set_new_runs(self) -> None:
        """Note the runs that were created for children since these were found."""
        for target in self:
            if target.run is None and target.new_run is not None:
                self.set_run(target, target.new_run, target.new_run.state)

    def spare(self, run_ids: Collection[UUID]) -> None:
        """Leave runs that were detached alone, with all below them, unless they have been asked."""
        spared = {run_id for run_id in run_ids if not self._was_asked(run_id)}
        if not spared:
            return
        self.spared |= spared
        for target in self:  # once for all of them: there may be thousands of either
            is_concerned = target.run_id in spared or not spared.isdisjoint(target.above)
            if is_concerned and target.child is None and target.requested is None:
                self.remove(target)

    def _was_asked(self, run_id: UUID) -> bool:
        target = self.of_run(run_id)
        return target is not None and target.requested is not None

    def is_left_alone(self, run_id: UUID) -> bool:
        """Whether a run goes on, for good or for now, so that what is below it is its own."""
        if run_id in self.spared:
            return True
        target = self.of_run(run_id)
        return target is not None and target.action == "wait" and not target.is_over

    def hosts_of(self, target: Target) -> list[Target]:
        """Return the deployed runs above an inline one; the nearest is its process."""
        found = (self.of_run(run_id) for run_id in target.above)
        return [host for host in found if host is not None and host.runs_remotely]

    def host_is_over(self, target: Target) -> bool:
        """Whether the process of an inline run is over with that process's own run."""
        if hosts := self.hosts_of(target):
            return all(host.is_over for host in hosts)
        return self._top_is_gone or not self.gone.isdisjoint(target.above)
