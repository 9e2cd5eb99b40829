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
import attrs
from prefect.utilities.urls import url_for

from supervised import _clock, _identity, _telemetry
from supervised._log import get_logger
from supervised._policy import HARD_CAUSES, Budget, is_over, outcome_of, receipt_status
from supervised._types import Action, CancelReason, Cause, Receipt, TeardownReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._api import Orchestrator
    from supervised._child import Child
    from supervised._watch import Watcher

logger = get_logger("prefect.supervised.teardown")

# Between two reads. A runner needs 3 s to end a run, and on two cores the reads of one teardown
# took a sixth of all that the eight processes of a tree had to end with.
_READ_SECONDS = 0.4
_READ_SECONDS_WITH_EVENTS = 2.0
_SWEEP_SECONDS = 1.5
_SWEEP_SECONDS_WITH_EVENTS = 4.0
_LOOK_SECONDS = 0.05
_INLINE_SECONDS = 1.0
_HEARING_SECONDS = 3.0
_HEARING_LOOK_SECONDS = 0.2
_REQUEST_SECONDS = 8.0
_FOREIGN_SECONDS = 2.0
_ASKING_SECONDS = 5.0


@attrs.define(kw_only=True)
class _Target:
    """One descendant, and how far its teardown has come."""

    name: str
    depth: int
    action: Action = "cancel"
    child: Child[Any] | None = None
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

    @property
    def run_id(self) -> UUID | None:
        return self.run.id if self.run is not None else None

    @property
    def is_over(self) -> bool:
        if self.child is not None and (self.child.is_over or self.child.kind == "inline"):
            return self.child.is_over
        return self.state is not None and self.state.is_final()

    @property
    def runs_remotely(self) -> bool:
        """Whether a runner elsewhere owns the process, so that asking the server helps."""
        return self.run is not None and self.run.deployment_id is not None

    @property
    def never_ran(self) -> bool:
        """Whether the server has never seen it `Running`, and so will refuse to let it."""
        run = self.run
        return self.was_read and run is not None and run.start_time is None


class Teardown:
    """The teardown of everything below one run.

    Args:
        flow_name: The supervised flow, for people.
        lineage: Its run and the ancestors.
        cause: How that run ends.
        reason: The same in words; it becomes the state message of every cancelled run.
        children: The registry's children, direct and known, over or not.
        in_body: Supervised runs in this process, below the body; they have teardowns of their own.
        body_runs: Whether the body is still running, and with it what it has called plainly.
        budget: Seconds for all of it.
        delegate_to: An ancestor that tears the same tree down and verifies it.
        top: The run below which to search, if not the supervised run itself.
        top_is_gone: Whether that run's process is known to have ended, so that whatever ran
            inline in it is over too.
        can_wait: Whether somebody is there to wait for a child whose policy is to be waited for;
            otherwise it is left alone, which is as near as it gets.
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
        in_body: Callable[[], set[UUID]],
        body_runs: Callable[[], bool] = lambda: False,
        budget: Budget,
        delegate_to: UUID | None = None,
        top: UUID | None = None,
        top_is_gone: bool = False,
        can_wait: bool = True,
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
        self._in_body = in_body
        self._body_runs = body_runs
        self._budget = budget
        self._delegate_to = delegate_to
        self._top = top or lineage.run_id
        self._top_is_gone = top_is_gone
        self._can_wait = can_wait
        self._spares = spares
        self._span = span
        self._targets: dict[object, _Target] = {}
        self._spared: set[UUID] = set()
        self._to_cut_loose: list[FlowRun] = []
        self._gone: set[UUID] = set()  # deployed runs below that are over, and their processes too
        self._read_cost = 0.0
        self._read_at = _clock.monotonic()
        self._news = watcher.news
        self._search_error = "" if delegate_to else "there was no time for it"
        self._is_waiting = False
        self._bound: anyio.CancelScope | None = None
        self._started = _clock.monotonic()
        self._started_at = _clock.utc_now()

    @property
    def _elapsed(self) -> float:
        return _clock.monotonic() - self._started

    async def finds_something(self) -> bool:
        """Search the tree once, and tell whether there is anything to end."""
        await self._discover()
        return bool(self._targets or self._search_error)

    async def run(self) -> TeardownReport:
        """Tear down, and return what became of every run."""
        with anyio.move_on_after(max(self._budget.total, _ASKING_SECONDS)):
            await self._ask()  # whatever the grace: it is for waiting
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
        for key, target in list(self._targets.items()):
            if target.action == "wait":
                target.action = self._action_for(target)
            if target.action == "detach":
                del self._targets[key]
                self._take_children()  # lets it go

    def _action_for(self, target: _Target) -> Action:
        """Return what the present cause means to a target that is not over."""
        if target.child is not None:
            return target.child.on_parent[self._cause]
        assert target.run is not None
        return _identity.action_of(
            target.run.labels, self._cause if target.depth == 1 else "cancelled"
        )

    async def _ask(self) -> None:
        self._take_children()
        await self._request()
        if self._delegate_to is None:
            await self._discover()
            await self._request()

    async def _wait_within_budget(self) -> None:
        with anyio.move_on_after(self._budget.total - self._elapsed) as self._bound:
            await self._wait()
        self._bound = None

    async def _wait_for_the_patient(self) -> None:
        """Wait for the children whose policy says so, unless a harder end overtakes us."""
        if not self._is_patient:
            return
        self._is_waiting = True
        while self._is_patient and (waiting := self._waited_for()):
            await self._read_if_due(waiting)
            await anyio.sleep(_LOOK_SECONDS)
        self._is_waiting = False
        if not self._is_patient:
            await self._wait_within_budget()

    @property
    def _is_patient(self) -> bool:
        return self._cause not in HARD_CAUSES

    def _waited_for(self) -> list[_Target]:
        return [t for t in self._live() if t.action == "wait"]

    def _lose_patience(self) -> None:
        """Cancel what is still being waited for, while there is time to see it end."""
        if self._is_patient or self._elapsed < self._budget.patience:
            return
        for target in self._waited_for():
            target.action = "cancel"
            self._first(target, "waited", self._elapsed)

    async def _wait(self) -> None:
        if self._delegate_to is not None:
            await self._wait_for_inline()
            await self._wait_to_hear()
            return
        swept = _clock.monotonic()
        await anyio.lowlevel.checkpoint()  # with no budget left, nothing is escalated either
        while True:
            await self._read_if_due(self._pending())
            await self._escalate()
            self._lose_patience()
            await self._request()
            if not self._pending() and not await self._sweep():
                return
            hears = self._watcher.hears
            if _clock.monotonic() - swept > (
                _SWEEP_SECONDS_WITH_EVENTS if hears else _SWEEP_SECONDS
            ):
                await self._sweep()
                swept = _clock.monotonic()
            await anyio.sleep(_READ_SECONDS if self._search_error else _LOOK_SECONDS)

    async def _read_if_due(self, targets: list[_Target]) -> None:
        """Read when something has ended or begun since the last time, or enough time has passed."""
        seconds = _READ_SECONDS_WITH_EVENTS if self._watcher.hears else _READ_SECONDS
        due = self._read_at + max(seconds, 2 * self._read_cost)
        if self._watcher.news != self._news or _clock.monotonic() > due:
            self._news, self._read_at = self._watcher.news, _clock.monotonic()
            await self._verify(targets)

    def _live(self) -> list[_Target]:
        return [t for t in self._targets.values() if not t.is_over and not self._is_foreign(t)]

    def _pending(self) -> list[_Target]:
        """Return what has to end within the budget."""
        return [t for t in self._live() if t.action == "cancel" or not self._is_patient]

    def _is_foreign(self, target: _Target) -> bool:
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
            if action == "detach" or child.outcome == "detached":
                if child.flow_run_id is not None:
                    self._spared.add(child.flow_run_id)
                if not child.is_over:
                    child.detach()
                continue
            if child.is_over and child.cancel_reason is None:
                continue
            target = self._targets.get(child.key)
            if target is None:
                target = _Target(name=child.name, depth=1, action=action, child=child)
                self._targets[child.key] = target
            if target.run is None and child.flow_run is not None:
                target.run, target.state = child.flow_run, child.state

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
        # Parents before their children: what is to become of a run decides on all below it.
        for run in sorted(tagged, key=lambda run: len(_identity.path_of(run.labels))):
            if run.id == own or not _identity.is_below(run.labels, own):
                continue
            if not _identity.is_ours(run.labels, run.idempotency_key):
                continue
            path = _identity.path_of(run.labels)
            between = path[path.index(own) + 1 :]
            if not any(self._is_left_alone(run_id) for run_id in between):
                self._take_run(run, depth=len(between) + 1)

    def _spare(self, run_id: UUID) -> None:
        """Leave a run that was detached alone, with all below it, unless it has been asked."""
        target = self._target_of(run_id)
        if target is not None and target.requested is not None:
            return
        self._spared.add(run_id)
        for key, other in list(self._targets.items()):
            is_below = other is target or run_id in other.above
            if is_below and other.child is None and other.requested is None:
                del self._targets[key]

    def _is_left_alone(self, run_id: UUID) -> bool:
        """Whether a run goes on, for good or for now, so that what is below it is its own."""
        if run_id in self._spared:
            return True
        target = self._target_of(run_id)
        return target is not None and target.action == "wait" and not target.is_over

    def _target_of(self, run_id: UUID) -> _Target | None:
        for target in self._targets.values():
            if target.run_id == run_id:
                return target
        return None

    async def _discover_linked(self) -> None:
        frontier = {self._top} | {
            child.flow_run_id for child in self._children() if child.flow_run_id is not None
        }
        frontier |= {t.run_id for t in self._targets.values() if t.run_id is not None}
        self._gone |= {
            child.flow_run_id
            for child in self._children()
            if child.kind == "deployment" and child.is_over and child.flow_run_id is not None
        }
        seen = set(frontier)
        depth = 1
        while frontier := {run_id for run_id in frontier if not self._is_left_alone(run_id)}:
            found = await self._api.read_children(frontier)
            inline = [run for run in found if run.deployment_id is None and not is_over(run)]
            parents = await self._api.read_parents(inline) if inline else {}
            for run in found:
                if run.labels.get(_identity.DETACHED):
                    self._spare(run.id)
                elif is_over(run) and run.deployment_id is not None:
                    self._gone.add(run.id)
                if run.id not in seen and not is_over(run):
                    self._take_run(run, depth=depth, parent_id=parents.get(run.id))
            frontier = {run.id for run in found} - seen
            seen |= frontier
            depth += 1

    def _take_run(self, run: FlowRun, *, depth: int, parent_id: UUID | None = None) -> None:
        """Take up a run that was found on the server, unless it is detached or known.

        Args:
            run: The run.
            depth: Levels below the top.
            parent_id: Its parent, where its labels do not say and it matters.
        """
        if run.id in self._in_body():
            return
        if run.labels.get(_identity.DETACHED):
            self._spare(run.id)
        if run.id in self._spared or self._target_of(run.id) is not None:
            return
        for child in self._children():
            if child.flow_run_id == run.id or self._is_about_to_be(child, run):
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
            parent = self._target_of(parent_id)
            above |= {parent_id} | (parent.above if parent is not None else set())
        self._targets[run.id] = _Target(
            name=run.name,
            depth=depth,
            action=action,
            run=run,
            state=run.state,
            above=frozenset(above),
        )

    def _is_about_to_be(self, child: Child[Any], run: FlowRun) -> bool:
        """Whether a run is that of a child whose creation has not been answered yet."""
        if child.flow_run_id is not None or child.is_over:
            return False
        spawn = (self._lineage.run_id, child.key, child.generation)
        return _identity.spawn_of(run.labels) == spawn

    # -- request ----------------------------------------------------------------------------

    async def _request(self) -> None:
        """Ask everything that has not been asked: what runs here directly, the rest in bulk."""
        fresh = [t for t in self._pending() if t.action == "cancel" and t.requested is None]
        for target in fresh:
            if target.child is not None:
                target.child.mark_cancel(self._reason)
                if target.child.interrupt is not None:
                    target.child.interrupt()
            if target.run is not None:
                target.requested = _clock.monotonic()
                target.requested_at = _clock.utc_now()
        remote = [t for t in fresh if t.runs_remotely]
        remote.sort(key=lambda t: t.depth)
        await self._ask_server(remote)

    async def _ask_server(self, targets: list[_Target]) -> None:
        if not targets:
            return
        by_id = {t.run_id: t for t in targets}
        message = _identity.mark_message(f"Cancelled because {self._reason}", self._lineage.run_id)
        try:
            with anyio.fail_after(_REQUEST_SECONDS):
                acks = await self._api.request_cancel([i for i in by_id if i], message)
        except Exception as exc:
            logger.debug("A request for cancellation failed", exc_info=True)
            for target in targets:  # all of them are asked again in the next round
                target.requested = None
                target.error = f"the request failed: {exc!r}"
            self._read_at = -math.inf  # but read before: somebody may have detached one since
            return
        if self._span is not None:
            self._span.step("requested", len(acks))
        for ack in acks:
            target = by_id[ack.run_id]
            target.error = "" if ack.accepted else ack.detail
            if ack.state is not None:
                self._update(target, ack.state)
            if ack.accepted and target.acknowledged_at is None:
                target.acknowledged_at = _clock.utc_now()
                if target.child is not None:
                    target.child.mark_acknowledged()

    # -- verify -----------------------------------------------------------------------------

    async def _verify(self, targets: list[_Target]) -> None:
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
        for run in runs:
            self._watcher.apply(run)
            if run.labels.get(_identity.DETACHED):
                self._spare(run.id)
            for target in self._targets.values():
                if target.run_id == run.id and run.state is not None:
                    target.run = run
                    target.was_read |= target.requested is not None
                    self._update(target, run.state)

    def _update(self, target: _Target, state: State[Any]) -> None:
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
        open_ends = [t for t in self._targets.values() if t.state is None or not t.state.is_final()]
        with anyio.move_on_after(2.0, shield=True):
            await self._verify([t for t in open_ends if t.runs_remotely or not t.is_over])

    async def _wait_for_inline(self) -> None:
        """Wait for what runs in this process; an ancestor verifies everything else."""
        while any(t.child is not None and t.child.kind == "inline" for t in self._pending()):
            await anyio.sleep(_LOOK_SECONDS)
            self._lose_patience()
            await self._request()
            await self._escalate()

    async def _wait_to_hear(self) -> None:
        """Wait a little for the others too, without a request, while events tell of their ends.

        A process that ends takes CPU from those of its children, and a runner that finds one of
        these alive after 3 s looks again only 3 s later: of nine processes on two cores, one in
        twenty missed the first look. By then either they are gone or waiting does not help: with
        4 s, one tree in seven was gone after 6 to 7 s.
        """
        with anyio.move_on_after(_HEARING_SECONDS):
            while self._watcher.hears and self._pending():
                await anyio.sleep(_HEARING_LOOK_SECONDS)
                self._take_children()
                await self._request()

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

    async def _escalate_one(self, target: _Target, waited: float) -> None:
        if target.child is not None and target.child.kind == "inline":
            await self._escalate_inline(target, target.child, waited)
        elif not target.runs_remotely:
            await self._close_with_host(target, waited)
        elif target.acknowledged_at is None:
            if waited > self._budget.request_again_after and self._first(
                target, "asked again", waited
            ):
                await self._ask_server([target])
        elif target.never_ran:
            await self._close_unstarted(target, waited)

    async def _escalate_inline(self, target: _Target, child: Child[Any], waited: float) -> None:
        """Repeat the request to code that swallowed it; at last end its engine's task."""
        if child.interrupt is None:
            return
        if waited > self._budget.request_again_after and self._first(target, "asked again", waited):
            child.interrupt()
        if waited > self._budget.close_after and self._first(target, "interrupted", waited):
            child.interrupt(hard=True)

    async def _close_unstarted(self, target: _Target, waited: float) -> None:
        """Close a run that was cancelled while its process was starting.

        The server refuses `Running` to it, so its process ends with code 1 before the user's
        code, and nothing ever writes its last state (300 s until the server's own timeout).
        A runner that had not registered the process yet is told again; it then needs 3.3 s to
        finish the run. If none does, there is no process.
        """
        assert target.run_id is not None
        if waited > self._budget.nudge_after and self._first(target, "nudged", waited):
            await self._api.nudge(target.run_id)
        if waited > self._budget.close_after and self._first(target, "closed", waited):
            state = await self._api.close_run(target.run_id, "Cancelled before it had started.")
            if state is not None:
                self._update(target, state)

    async def _close_with_host(self, target: _Target, waited: float) -> None:
        """Close an inline run in another process once that process's own run is over."""
        assert target.run is not None
        if not self._host_is_over(target) or target.run_id is None:
            return
        if self._first(target, "closed", waited):
            state = await self._api.close_run(target.run_id, "Cancelled together with its process.")
            if state is not None:
                self._update(target, state)

    def _host_is_over(self, target: _Target) -> bool:
        if hosts := self._hosts_of(target):
            return all(host.is_over for host in hosts)
        return self._top_is_gone or not self._gone.isdisjoint(target.above)

    def _hosts_of(self, target: _Target) -> list[_Target]:
        """Return the deployed runs above an inline one; the nearest is its process."""
        return [t for t in self._targets.values() if t.runs_remotely and t.run_id in target.above]

    def _first(self, target: _Target, step: str, waited: float) -> bool:
        """Record a step, once; false if it was taken before."""
        if step in target.escalations:
            return False
        target.escalations.append(step)
        if target.child is not None:
            target.child.escalations.append(step)
            if target.child.span is not None:
                target.child.span.escalated(step, waited)
        return True

    # -- report -----------------------------------------------------------------------------

    def _report(self) -> TeardownReport:
        receipts = [
            self._receipt(target)
            for target in self._targets.values()
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

    def _receipt(self, target: _Target) -> Receipt:
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
        return Receipt(
            name=target.name,
            flow_run_id=target.run_id,
            url=url_for("flow-run", obj_id=target.run_id) if target.run_id else None,
            status=status,
            reason=str(self._reason) if over or delegated else self._why_unverified(target),
            requested_at=target.requested_at or (child.requested_at if child else None),
            acknowledged_at=target.acknowledged_at,
            terminal_at=target.terminal_at or (child.ended_at if child else None),
            escalations=tuple(target.escalations),
            depth=target.depth,
        )

    def _why_unverified(self, target: _Target) -> str:
        where = f"still {target.state.name}" if target.state is not None else "no state known"
        if target.error:
            return f"{where}; {target.error}"
        if target.action == "wait":
            return f"{where}; its policy is to be waited for, and the grace ran out"
        if target.child is not None and target.child.kind == "inline":
            return f"{where}; its code in this process ignores the cancellation"
        if not target.runs_remotely and not self._can_wait:
            return f"{where}; it runs inside another run's process, which may be alive"
        if not target.runs_remotely:
            return f"{where}; it runs inline in code that this scope did not start"
        return f"{where} {self._elapsed:.0f} s after the request; its runner or process may be dead"
