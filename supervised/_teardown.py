"""Ending a tree: request → verify → sweep → escalate → report, all levels at once.

Requests go out first and in bulk, because they cost milliseconds and everything else is waiting.
Then the tree is searched again until nothing new turns up, so that a child which was launched in
the same instant, at any depth, is found. Nothing here raises before the report is written: what
cannot be done becomes a line of it.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from prefect.utilities.urls import url_for

from supervised import _clock, _identity, _telemetry
from supervised._log import get_logger
from supervised._policy import (
    HARD_CAUSES,
    Budget,
    has_process,
    is_over,
    outcome_of,
    receipt_status,
)
from supervised._targets import Target, Targets
from supervised._types import Action, CancelReason, Cause, Kind, Receipt, TeardownReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._api import Orchestrator
    from supervised._child import Child
    from supervised._finished import Finished
    from supervised._watch import Watcher

logger = get_logger("prefect.supervised.teardown")

# Between two reads. A runner needs 3 s to end a run, and on two cores the reads of one teardown
# took a sixth of all that the eight processes of a tree had to end with.
_READ_SECONDS = 0.4
_READ_SECONDS_WITH_EVENTS = 2.0
_SWEEP_SECONDS = 1.5
_SWEEP_SECONDS_WITH_EVENTS = 4.0
_LOOK_SECONDS = 0.05
_INLINE_SECONDS = 1.5
_ENGINE_SECONDS = 1.0  # what an engine may need, on a busy server, to write how its run has ended
_REQUEST_SECONDS = 8.0
_FOREIGN_SECONDS = 2.0
_ASK_AGAIN_SECONDS = 1.0
_ASKING_SECONDS = 5.0
_SEARCHING_SECONDS_EACH = 0.003  # of those that are over: a page of 200 takes 0.3 s
_ASKING_SECONDS_EACH = 0.1  # four times what SQLite needs to cancel a run on two busy cores


class Teardown:
    """The teardown of everything below one run.

    Args:
        flow_name: The supervised flow, for people.
        lineage: Its run and the ancestors.
        cause: How that run ends.
        reason: The same in words; it becomes the state message of every cancelled run.
        children: The registry's children, direct and known, over or not.
        finished: Those that have completed, and of which only that is kept.
        in_body: Supervised runs in this process, below the body; they have teardowns of their own.
        body_runs: Whether the body is still running, and with it what it has called plainly.
        budget: Seconds for all of it.
        delegate_to: An ancestor that tears the same tree down and verifies it.
        top: The run below which to search, if not the supervised run itself.
        top_is_gone: Whether that run's process is known to have ended, so that whatever ran
            inline in it is over too.
        can_wait: Whether somebody is there to wait for a child whose policy is to be waited for;
            otherwise it is left alone, which is as near as it gets.
        is_superseded: Tells whether a later attempt of the scope's run has begun, to whom all
            belongs that runs elsewhere. Asked before anything is asked of others.
        spares: Whether policies count; a command to cancel everything overrides them, except that
            a detached run is never touched.
        span: Gets an event a step, and is ended with the report.
    """

    def __init__(
        self,
        api: Orchestrator,
        watcher: Watcher,
        *,
        flow_name: str,
        lineage: _identity.Lineage,
        cause: Cause,
        reason: CancelReason,
        children: Callable[[], Iterable[Child[Any]]],
        finished: Callable[[], Iterable[Finished]] = tuple,
        in_body: Callable[[], set[UUID]],
        body_runs: Callable[[], bool] = lambda: False,
        budget: Budget,
        delegate_to: UUID | None = None,
        top: UUID | None = None,
        top_is_gone: bool = False,
        can_wait: bool = True,
        is_superseded: Callable[[], Awaitable[bool]] | None = None,
        spares: bool = True,
        span: _telemetry.TeardownSpan | None = None,
    ) -> None:
        self._api = api
        self._watcher = watcher
        self._flow_name = flow_name
        self._lineage = lineage
        self._cause: Cause = cause
        self._reason = reason
        self._children = children
        self._finished = finished
        self._in_body = in_body
        self._body_runs = body_runs
        self._budget = budget
        self._delegate_to = delegate_to
        self._is_handed_over = False
        self._top = top or lineage.run_id
        self._top_is_gone = top_is_gone
        self._can_wait = can_wait
        self._is_superseded = is_superseded
        self._spares = spares
        self._span = span
        self._targets = Targets()
        self._spared: set[UUID] = set()
        self._to_cut_loose: list[FlowRun] = []
        self._gone: set[UUID] = set()  # deployed runs below that are over, and their processes too
        self._read_cost = 0.0
        self._read_at = _clock.monotonic()
        self._news = watcher.news
        self._search_error = "" if delegate_to else "there was no time for it"
        self._is_waiting = False
        self._bound: anyio.CancelScope | None = None
        self._asking: anyio.CancelScope | None = None
        self._extra = self._seconds_to_search = 0.0
        self._started = _clock.monotonic()
        self._started_at = _clock.utc_now()

    @property
    def _elapsed(self) -> float:
        return _clock.monotonic() - self._started

    async def finds_something(self) -> bool:
        """Search the tree once, and tell whether there is anything to end."""
        await self._discover()
        return bool(len(self._targets) or self._search_error)

    async def run(self) -> TeardownReport:
        """Tear down, and return what became of every run."""
        self._seconds_to_search = sum(_SEARCHING_SECONDS_EACH for _ in self._finished())
        with anyio.CancelScope() as self._asking:
            await self._ask()  # whatever the grace: it is for waiting
        self._asking = None
        # Not for a server that does not answer: that has used up the grace.
        self._extra = min(max(0.0, self._elapsed - _ASKING_SECONDS), self.seconds_to_ask)
        await self._wait_within_budget()
        await self._wait_for_the_patient()
        await self._last_look()
        report = self._report()
        if self._span is not None:
            self._span.end(report)
        return report

    @property
    def is_waiting(self) -> bool:
        """Whether only children are left that may take as long as they need."""
        return self._is_waiting

    def hurry(self, cause: Cause, reason: CancelReason) -> None:
        """Go on under a harder cause: what was waited for falls under that one's policy.

        Args:
            cause: How the run ends after all; its process may be killed soon.
            reason: The same in words.
        """
        if self._cause in {cause, *HARD_CAUSES}:
            return
        self._cause, self._reason = cause, reason
        self._started = _clock.monotonic()
        if self._bound is not None:
            self._bound.deadline = anyio.current_time() + self._budget.total
        for target in self._targets:
            if target.action == "wait":
                target.action = self._action_for(target)
            if target.action == "detach":
                self._targets.remove(target)
                self._take_children()  # lets it go

    def _action_for(self, target: Target) -> Action:
        """Return what the present cause means to a target that is not over."""
        if target.child is not None:
            return target.child.on_parent[self._cause]
        assert target.run is not None
        return _identity.action_of(
            target.run.labels, self._cause if target.depth == 1 else "cancelled"
        )

    async def _ask(self) -> None:
        self._take_children()
        self._allow_time_to_ask()
        await self._request()
        if self._delegate_to is None:
            await self._discover()
            self._allow_time_to_ask()
            await self._request()

    def _allow_time_to_ask(self) -> None:
        """Bound the requests by what a slow server needs for as many."""
        assert self._asking is not None
        seconds = max(self._budget.total, _ASKING_SECONDS + self.seconds_to_ask)
        self._asking.deadline = anyio.current_time() + seconds - self._elapsed

    @property
    def seconds_to_ask(self) -> float:
        """What a slow server needs to be searched and asked for so many, on top of the grace."""
        return len(self._targets) * _ASKING_SECONDS_EACH + self._seconds_to_search

    @property
    def _left(self) -> float:
        """The seconds that are left of the grace, which asking does not use up."""
        return self._budget.total + self._extra - self._elapsed

    async def _wait_within_budget(self) -> None:
        with anyio.move_on_after(self._left) as self._bound:
            await self._wait()
        self._bound = None

    async def _wait_for_the_patient(self) -> None:
        """Wait for the children whose policy says so, unless a harder end overtakes us."""
        if not self._is_patient:
            return
        while self._is_patient and (waiting := self._waited_for()):
            self._is_waiting = not self._has_more_to_end
            if self._has_more_to_end:
                await self._wait_within_budget()
            else:
                await self._read_if_due(waiting)
            await anyio.sleep(_LOOK_SECONDS)
        self._is_waiting = False
        if self._left > 0 and self._pending():
            await self._wait_within_budget()

    @property
    def _has_more_to_end(self) -> bool:
        """Whether a harder end has left something to end, and time for it."""
        return self._left > 0 and bool(self._own())

    @property
    def _is_patient(self) -> bool:
        return self._cause not in HARD_CAUSES

    def _waited_for(self) -> list[Target]:
        return [t for t in self._live() if t.action == "wait"]

    def _lose_patience(self) -> None:
        """Cancel what is still being waited for, while there is time to see it end."""
        if self._is_patient or self._elapsed < self._budget.patience:
            return
        for target in self._waited_for():
            target.action = "cancel"
            self._first(target, "waited")

    async def _wait(self) -> None:
        if self._delegate_to is not None:
            await self._wait_for_own()
            return
        swept = _clock.monotonic()
        await anyio.lowlevel.checkpoint()  # with no budget left, nothing is escalated either
        while True:
            await self._read_if_due(self._pending())
            await self._escalate()
            self._lose_patience()
            await self._request()
            if self._delegate_to is not None:
                await self._wait_for_inline()
                return
            if not self._pending() and not await self._sweep():
                return
            hears = self._watcher.hears(self._lineage.tag)
            if _clock.monotonic() - swept > (
                _SWEEP_SECONDS_WITH_EVENTS if hears else _SWEEP_SECONDS
            ):
                await self._sweep()
                swept = _clock.monotonic()
            await anyio.sleep(_READ_SECONDS if self._search_error else _LOOK_SECONDS)

    async def _read_if_due(self, targets: list[Target]) -> None:
        """Read when something has ended or begun since the last time, or enough time has passed."""
        hears = self._watcher.hears(self._lineage.tag)
        seconds = _READ_SECONDS_WITH_EVENTS if hears else _READ_SECONDS
        due = self._read_at + max(seconds, 2 * self._read_cost)
        if self._watcher.news != self._news or _clock.monotonic() > due:
            self._news, self._read_at = self._watcher.news, _clock.monotonic()
            await self._verify(targets)

    def _live(self) -> list[Target]:
        open_ends = (t for t in self._targets if not t.is_over and not t.is_deleted)
        return [t for t in open_ends if not self._is_foreign(t)]

    def _pending(self) -> list[Target]:
        """Return what has to end within the budget."""
        return [t for t in self._live() if t.action == "cancel" or not self._is_patient]

    def _own(self) -> list[Target]:
        """Return what nobody but this scope sees end within the budget.

        If an ancestor verifies the tree, that is what runs in this process, what its policy says
        to wait for, and a run that was requested and not answered, which nobody else can know of.
        To stay for the rest would cost time on each level: the last process would be gone so much
        later.
        """
        pending = self._pending()
        if self._delegate_to is None:
            return pending
        return [t for t in pending if t.is_local or t.action == "wait" or t.may_be_created]

    def _is_foreign(self, target: Target) -> bool:
        """Whether a run executes here, in a task that no scope started, and had its chance.

        Nothing can end it from outside, so waiting longer would only delay the report.
        """
        return (
            target.child is None
            and not target.runs_remotely
            and not self._hosts_of(target)
            and not self._host_is_over(target)
            and not self._body_runs()
            and self._in_body().isdisjoint(target.above)
            and _clock.monotonic() - target.found > _FOREIGN_SECONDS
        )

    # -- find -------------------------------------------------------------------------------

    def _take_children(self) -> None:
        """Take up the direct children; newer ones turn up here on every call."""
        for child in self._children():
            # Who was told to cancel is cancelled, whatever its parent's end would have meant.
            action = "cancel" if child.cancel_reason else child.on_parent[self._cause]
            if action == "detach" or child.detach_requested or child.outcome == "detached":
                if child.flow_run_id is not None:
                    self._spared.add(child.flow_run_id)
                if not child.is_over:
                    child.detach()
                continue
            if child.is_over and child.cancel_reason is None:
                continue
            if self._is_handed_over and not child.is_local:
                continue
            target = self._targets.of_child(child.key)
            if target is None:
                target = Target(
                    name=child.name, depth=1, action=action, child=child, attempt=child.attempt
                )
                self._targets.add(target)
            if target.run is None and child.flow_run is not None:
                self._targets.set_run(target, child.flow_run, child.state)

    async def _sweep(self) -> bool:
        """Search again; true if something live turned up."""
        known = len(self._targets)
        self._take_children()
        await self._discover()
        await self._request()
        return len(self._targets) > known or bool(self._pending() or self._search_error)

    async def _discover(self) -> None:
        """Find the live runs of all levels: ours by tag, everybody else's by parent link."""
        known_error = self._search_error
        self._search_error = "there was no time for it"  # should the budget end the search
        try:
            await self._discover_tagged()
            await self._discover_linked()
            while self._to_cut_loose:
                # Or Prefect's own cascade would follow the link, in 20 s.
                await self._api.cut_loose(self._to_cut_loose[-1], {_identity.DETACHED: True})
                self._to_cut_loose.pop()
            self._search_error = ""
        except Exception as exc:
            self._search_error = repr(exc)
            level = logging.DEBUG if known_error == self._search_error else logging.WARNING
            logger.log(level, "Could not search the tree of %s; trying again", self._lineage.run_id)
            logger.debug("Searching failed", exc_info=True)

    async def _discover_tagged(self) -> None:
        own = self._top
        tagged = await self._api.read_tagged(self._lineage.tag, live_only=True)
        # Before the others: what a detached run has launched still carries the old path.
        # The run itself may be detached, from what is above it; that spares nothing below.
        detached = {run.id for run in tagged if run.labels.get(_identity.DETACHED)}
        for run_id in detached - {own}:
            self._spare(run_id)
        children = self._known_children()
        # Parents before their children: what is to become of a run decides on all below it.
        for run in sorted(tagged, key=lambda run: len(_identity.path_of(run.labels))):
            if run.id == own or not _identity.is_below(run.labels, own):
                continue
            if not _identity.is_ours(run):
                continue
            path = _identity.path_of(run.labels)
            between = path[path.index(own) + 1 :]
            if not any(self._is_left_alone(run_id) for run_id in between):
                self._take_run(run, children, depth=len(between) + 1)

    def _spare(self, run_id: UUID) -> None:
        """Leave a run that was detached alone, with all below it, unless it has been asked."""
        target = self._targets.of_run(run_id)
        if target is not None and target.requested is not None:
            return
        self._spared.add(run_id)
        for other in self._targets:
            is_below = other is target or run_id in other.above
            if is_below and other.child is None and other.requested is None:
                self._targets.remove(other)

    def _is_left_alone(self, run_id: UUID) -> bool:
        """Whether a run goes on, for good or for now, so that what is below it is its own."""
        if run_id in self._spared:
            return True
        target = self._targets.of_run(run_id)
        return target is not None and target.action == "wait" and not target.is_over

    def _over(self) -> dict[UUID, Kind]:
        """Return the children that are over; what a detached one has left is nobody's to end."""
        over = {}
        for each in self._finished():
            over[each.flow_run_id] = each.kind
            if each.action(self._cause) == "detach":
                self._spared.add(each.flow_run_id)
        for child in self._children():
            if child.is_over and child.flow_run_id is not None:
                over[child.flow_run_id] = child.kind
        return over

    async def _discover_linked(self) -> None:
        over = self._over()
        frontier = {self._top, *over}
        frontier |= {t.run_id for t in self._targets if t.run_id is not None}
        frontier |= {child.flow_run_id for child in self._children() if child.flow_run_id}
        self._gone |= {run_id for run_id, kind in over.items() if kind == "deployment"}
        seen = set(frontier)
        depth = 1
        while frontier := {run_id for run_id in frontier if not self._is_left_alone(run_id)}:
            found = await self._api.read_children(frontier)
            inline = [run for run in found if not has_process(run) and not is_over(run)]
            parents = await self._api.read_parents(inline) if inline else {}
            known = self._known_children()
            for run in found:
                if run.labels.get(_identity.DETACHED):
                    self._spare(run.id)
                elif is_over(run) and has_process(run):
                    self._gone.add(run.id)
                if run.id not in seen and not is_over(run):
                    self._take_run(run, known, depth=depth, parent_id=parents.get(run.id))
            frontier = {run.id for run in found} - seen
            seen |= frontier
            depth += 1

    def _take_run(
        self,
        run: FlowRun,
        children: set[object],
        *,
        depth: int,
        parent_id: UUID | None = None,
    ) -> None:
        """Take up a run that was found on the server, unless it is detached or known.

        Args:
            run: The run.
            children: What has a target of its own, see `_known_children`.
            depth: Levels below the top.
            parent_id: Its parent, where its labels do not say and it matters.
        """
        if run.id in self._in_body():
            return
        if run.labels.get(_identity.DETACHED):
            self._spare(run.id)
        if run.id in self._spared or self._targets.of_run(run.id) is not None:
            return
        if run.id in children or _identity.spawn_of(run.labels) in children:
            return  # its own target
        action = _identity.action_of(run.labels, self._cause if depth == 1 else "cancelled")
        if not self._spares:
            action = "cancel"
        if action == "detach" or (action == "wait" and not self._can_wait):
            self._spared.add(run.id)
            if action == "detach":
                self._to_cut_loose.append(run)
            return
        above = set(_identity.path_of(run.labels))
        if parent_id is not None:
            parent = self._targets.of_run(parent_id)
            above |= {parent_id} | (parent.above if parent is not None else set())
        self._targets.add(
            Target(
                name=run.name,
                depth=depth,
                action=action,
                run=run,
                state=run.state,
                above=frozenset(above),
            )
        )

    def _known_children(self) -> set[object]:
        """Return the runs of the direct children, and the spawns that have not been answered."""
        return {
            child.flow_run_id or (self._lineage.run_id, child.key, child.generation)
            for child in self._children()
            if child.flow_run_id is not None or not child.is_over
        }

    # -- request ----------------------------------------------------------------------------

    async def _request(self) -> None:
        """Ask everything that has not been asked: what runs here directly, the rest in bulk."""
        for target in self._targets:
            if target.run is None and target.new_run is not None:
                self._targets.set_run(target, target.new_run, target.new_run.state)
        now = _clock.monotonic()
        fresh = [
            t
            for t in self._pending()
            if t.action == "cancel" and t.requested is None and now >= t.ask_after
        ]
        for target in fresh:
            if target.child is not None:
                target.child.mark_cancel(self._reason)
            if target.attempt is not None and target.attempt.interrupt is not None:
                target.attempt.interrupt()
            if target.run is not None:
                target.requested = _clock.monotonic()
                target.requested_at = _clock.utc_now()
        remote = [t for t in fresh if t.runs_remotely or t.has_own_process]
        remote.sort(key=lambda t: t.depth)
        await self._ask_server(remote)

    async def _ask_server(self, targets: list[Target]) -> None:
        await self._api.pace.each(targets, self._ask_for_some)

    async def _ask_for_some(self, targets: list[Target]) -> bool:
        """Make one request; what it cannot ask for is asked for again in a later round.

        Returns:
            Whether it was answered.
        """
        by_id = {t.run_id: t for t in targets}
        message = _identity.mark_message(f"Cancelled because {self._reason}", self._lineage.run_id)
        try:
            with anyio.fail_after(_REQUEST_SECONDS):
                if await self._has_handed_over():
                    return False
            with anyio.fail_after(_REQUEST_SECONDS + len(by_id) * _ASKING_SECONDS_EACH):
                acks = await self._api.request_cancel([i for i in by_id if i], message)
        except Exception as exc:
            logger.debug("A request for cancellation failed", exc_info=True)
            for target in targets:
                target.requested = None
                target.error = f"the request failed: {exc!r}"
            self._read_at = -math.inf  # but read before: somebody may have detached one since
            return False
        if self._span is not None:
            self._span.step("requested", len(acks))
        for ack in acks:
            target = by_id[ack.run_id]
            target.error = "" if ack.accepted else ack.detail
            if ack.state is not None:
                self._update(target, ack.state)
            else:  # SQLite was locked, say
                target.requested = None
                target.ask_after = _clock.monotonic() + _ASK_AGAIN_SECONDS
            if ack.accepted and target.acknowledged_at is None:
                target.acknowledged_at = _clock.utc_now()
                if target.child is not None:
                    target.child.mark_acknowledged()
        return True

    async def _has_handed_over(self) -> bool:
        """Whether what runs elsewhere belongs to a later attempt of the scope's run."""
        if self._is_superseded is None or not await self._is_superseded():
            return False
        self._delegate_to, self._is_handed_over = self._lineage.run_id, True
        for target in self._targets:
            if not target.is_local:
                self._targets.remove(target)
        self._search_error = ""
        return True

    # -- verify -----------------------------------------------------------------------------

    async def _verify(self, targets: list[Target]) -> None:
        ids = [t.run_id for t in targets if t.run_id is not None]
        if not ids:
            return
        began = _clock.monotonic()
        try:
            with _telemetry.unobserved():
                runs = await self._api.read_runs(ids)
        except Exception:
            logger.debug("Could not read the tree; trying again", exc_info=True)
            return
        self._read_cost = _clock.monotonic() - began
        self._miss(targets, {run.id for run in runs})
        for run in runs:
            self._watcher.apply(run, at_once=True)
            if run.labels.get(_identity.DETACHED):
                self._spare(run.id)
            target = self._targets.of_run(run.id)
            if target is not None and run.state is not None:
                target.run = run
                target.was_read |= target.requested is not None
                self._update(target, run.state)

    def _miss(self, targets: list[Target], found: set[UUID]) -> None:
        """Take note of runs that the server does not know any more."""
        for target in targets:
            if target.run_id is None or target.run_id in found:
                target.missed = 0
                continue
            target.missed += 1
            target.error = "its run was deleted from the server"
            self._watcher.hint(target.run_id)

    def _update(self, target: Target, state: State[Any]) -> None:
        target.state = state
        if state.is_final() and target.terminal_at is None:
            target.terminal_at = _clock.utc_now()
        if state.is_final() and target.child is not None and target.run_id is not None:
            self._watcher.hint(target.run_id)

    async def _last_look(self) -> None:
        """Read once more what is not known to be over, so that the report is true when written."""
        if self._delegate_to is not None:
            return
        with anyio.move_on_after(_INLINE_SECONDS):
            # Whatever the grace: their engines need a moment to write what has become of them.
            await self._wait_for_inline()
        open_ends = [t for t in self._targets if t.state is None or not t.state.is_final()]
        with anyio.move_on_after(2.0, shield=True):
            await self._verify([t for t in open_ends if t.runs_remotely or not t.is_over])

    async def _wait_for_inline(self) -> None:
        """Wait for what runs in this process."""
        while any(target.is_local for target in self._pending()):
            await self._go_on()

    async def _wait_for_own(self) -> None:
        await self._request()  # what a harder end has left to be asked
        while self._own():
            await self._go_on()

    async def _go_on(self) -> None:
        await anyio.sleep(_LOOK_SECONDS)
        self._lose_patience()
        await self._request()
        await self._escalate()

    # -- escalate ---------------------------------------------------------------------------

    async def _escalate(self) -> None:
        for target in self._pending():
            if target.requested is None or target.action != "cancel":
                continue
            waited = _clock.monotonic() - target.requested
            try:
                await self._escalate_one(target, waited)
            except Exception as exc:
                logger.debug("Escalating %s failed", target.name, exc_info=True)
                target.error = f"escalating failed: {exc!r}"

    async def _escalate_one(self, target: Target, waited: float) -> None:
        if target.is_local:
            await self._escalate_inline(target, waited)
        elif not target.runs_remotely:
            await self._close_with_host(target)
        elif target.acknowledged_at is None:
            if waited > self._budget.request_again_after and self._first(target, "asked again"):
                await self._ask_server([target])
        elif target.never_ran:
            await self._close_unstarted(target, waited)

    async def _escalate_inline(self, target: Target, waited: float) -> None:
        """Repeat the request to code that swallowed it; at last end its engine's task."""
        interrupt = target.attempt.interrupt if target.attempt is not None else None
        if interrupt is None or target.has_own_process:
            return  # who owns a process kills it in time
        if waited > self._budget.request_again_after and self._first(target, "asked again"):
            interrupt()
        # To cut the engine off sooner, however short the grace, made `Crashed` of `Cancelled`.
        ends_after = max(self._budget.close_after, _ENGINE_SECONDS)
        if waited > ends_after and self._first(target, "interrupted"):
            interrupt(hard=True)

    async def _close_unstarted(self, target: Target, waited: float) -> None:
        """Close a run that was cancelled while its process was starting.

        The server refuses `Running` to it, so its process ends with code 1 before the user's
        code, and nothing ever writes its last state (300 s until the server's own timeout).
        A runner that had not registered the process yet is told again; it then needs 3.3 s to
        finish the run. If none does, there is no process.
        """
        assert target.run_id is not None
        if waited > self._budget.nudge_after and await self._may(target, "nudged"):
            await self._api.nudge(target.run_id)
        if waited > self._budget.close_after and await self._may(target, "closed"):
            state = await self._api.close_run(target.run_id, "Cancelled before it had started.")
            if state is not None:
                self._update(target, state)

    async def _close_with_host(self, target: Target) -> None:
        """Close an inline run in another process once that process's own run is over."""
        assert target.run is not None
        if not self._host_is_over(target) or target.run_id is None:
            return
        if await self._may(target, "closed"):
            state = await self._api.close_run(target.run_id, "Cancelled together with its process.")
            if state is not None:
                self._update(target, state)

    def _host_is_over(self, target: Target) -> bool:
        if hosts := self._hosts_of(target):
            return all(host.is_over for host in hosts)
        return self._top_is_gone or not self._gone.isdisjoint(target.above)

    def _hosts_of(self, target: Target) -> list[Target]:
        """Return the deployed runs above an inline one; the nearest is its process."""
        found = (self._targets.of_run(run_id) for run_id in target.above)
        return [host for host in found if host is not None and host.runs_remotely]

    async def _may(self, target: Target, step: str) -> bool:
        """Record a step, once, unless the target belongs to a later attempt of the scope's run."""
        if step in target.escalations or await self._has_handed_over():
            return False
        return self._first(target, step)

    def _first(self, target: Target, step: str) -> bool:
        """Record a step, once; false if it was taken before."""
        if step in target.escalations:
            return False
        target.escalations.append(step)
        if target.child is not None:
            target.child.note_escalation(step)
        return True

    # -- report -----------------------------------------------------------------------------

    def _report(self) -> TeardownReport:
        receipts = [
            self._receipt(target)
            for target in self._targets
            if target.child is None or target.child.outcome != "detached"
        ]
        receipts += [
            Receipt(
                name=child.name,
                flow_run_id=child.flow_run_id,
                url=child.url,
                status="detached",
                reason="detached on purpose",
            )
            for child in self._children()
            if child.outcome == "detached"
        ]
        if self._search_error:
            receipts.append(
                Receipt(
                    name="(what lies below)",
                    flow_run_id=self._top,
                    status="unverified",
                    reason=f"the tree could not be searched: {self._search_error}",
                    depth=0,
                )
            )
        return TeardownReport(
            flow_name=self._flow_name,
            flow_run_id=self._lineage.run_id,
            cause=self._cause,
            reason=str(self._reason),
            started_at=self._started_at,
            seconds=self._elapsed,
            receipts=tuple(sorted(receipts, key=lambda receipt: receipt.depth)),
            delegated_to=self._delegate_to,
        )

    def _receipt(self, target: Target) -> Receipt:
        child = target.child
        outcome = child.outcome if child is not None else None
        if outcome in {None, "abandoned"} and target.state is not None:
            outcome = outcome_of(target.state, asked=True) or outcome
        over = target.is_over or outcome is not None
        delegated = self._delegate_to is not None and target.acknowledged_at is not None
        status = receipt_status(
            outcome or ("cancelled" if delegated else "abandoned"),
            forced="closed" in target.escalations,
        )
        own = child.escalations if child is not None else []
        return Receipt(
            name=target.name,
            flow_run_id=target.run_id,
            url=url_for("flow-run", obj_id=target.run_id) if target.run_id else None,
            status=status,
            reason=str(self._reason) if over or delegated else self._why_unverified(target),
            requested_at=target.requested_at or (child.requested_at if child else None),
            acknowledged_at=target.acknowledged_at,
            terminal_at=target.terminal_at or (child.ended_at if child else None),
            escalations=tuple(dict.fromkeys([*target.escalations, *own])),
            depth=target.depth,
        )

    def _why_unverified(self, target: Target) -> str:
        where = f"still {target.state.name}" if target.state is not None else "no state known"
        if target.error:
            return f"{where}; {target.error}"
        if target.action == "wait":
            return f"{where}; its policy is to be waited for, and the grace ran out"
        if target.is_local:
            return f"{where}; its code in this process ignores the cancellation"
        if not target.runs_remotely and not self._can_wait:
            return f"{where}; it runs inside another run's process, which may be alive"
        if not target.runs_remotely:
            return f"{where}; it runs inline in code that this scope did not start"
        return f"{where} {self._elapsed:.0f} s after the request; its runner or process may be dead"
