"""Ending a tree: request → verify → sweep → escalate → report, all levels at once.

Requests go out first and in bulk, because they cost milliseconds and everything else is waiting.
Then the tree is searched again until nothing new turns up, so that a child which was launched in
the same instant, at any depth, is found. Nothing here raises before the report is written: what
cannot be done becomes a line of it.

This is the order of the steps, and when each is over; how they are done, the modules below tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from supervised import _clock
from supervised._asking import Asking, seconds_for_all
from supervised._discovery import Discovery
from supervised._escalation import Escalation
from supervised._grace import Grace
from supervised._mandate import Mandate
from supervised._reading import Reading
from supervised._receipts import detached_receipt, receipt_for, unsearched_receipt
from supervised._search import Search
from supervised._targets import Target, Targets
from supervised._types import TeardownReport

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
    from uuid import UUID

    from supervised import _identity, _telemetry
    from supervised._api import Orchestrator
    from supervised._child import Child
    from supervised._finished import Finished
    from supervised._policy import Budget
    from supervised._types import CancelReason, Cause, Receipt
    from supervised._watch import Watcher

_SWEEP_SECONDS = 1.5
_SWEEP_SECONDS_WITH_EVENTS = 4.0
_SWEEP_REST = 4.0  # times as long as the last one took
_SEARCH_AGAIN_SECONDS = 0.4
_LOOK_SECONDS = 0.05
_ROUND_SECONDS = 0.25  # between two looks at all, where whatever ends wakes us up
_INLINE_SECONDS = 1.5
_FOREIGN_SECONDS = 2.0


class Teardown:
    """The teardown of everything below one run, or of several of its children together.

    Args:
        flow_name: The supervised flow, for people.
        lineage: Its run and the ancestors.
        cause: How that run ends.
        reason: The same in words; it becomes the state message of every cancelled run that has no
            reason of its own, and is not below a child among the *tops* that has one.
        children: The registry's children, direct and known, over or not.
        finished: Those that were over before, and of which only that is kept.
        in_body: Supervised runs in this process, below the body; they have teardowns of their own.
        body_runs: Whether the body is still running, and with it what it has called plainly.
        budget: Seconds for all of it.
        delegate_to: An ancestor that tears the same tree down and verifies it.
        tops: The runs below which to search, if not below the supervised run itself, and why what
            is below each is to end, if it is not a child with a reason; none is below another.
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
        tops: Mapping[UUID, CancelReason | None] | None = None,
        top_is_gone: bool = False,
        can_wait: bool = True,
        is_superseded: Callable[[], Awaitable[bool]] | None = None,
        spares: bool = True,
        span: _telemetry.TeardownSpan | None = None,
    ) -> None:
        self._api = api
        self._flow_name = flow_name
        self._mandate = Mandate(
            lineage=lineage,
            cause=cause,
            reason=reason,
            tops=tops or {lineage.run_id: None},
            delegate_to=delegate_to,
            can_wait=can_wait,
            spares=spares,
        )
        self._children = children
        self._finished = finished
        self._in_body = in_body
        self._body_runs = body_runs
        self._is_superseded = is_superseded
        self._span = span
        self._is_waiting = False
        self._sweep_took = 0.0
        self._started, self._started_at = _clock.monotonic(), _clock.utc_now()
        self._grace = Grace(budget, lambda: self.seconds_to_ask)
        self._targets = Targets(top_is_gone=top_is_gone)
        self._search = Search(api)
        self._discovery = Discovery(
            api,
            self._targets,
            self._mandate,
            search=self._search,
            grace=self._grace,
            children=children,
            finished=finished,
            in_body=in_body,
        )
        self._reading = Reading(api, watcher, self._targets, tag=lineage.tag)
        self._asking = Asking(
            api,
            self._targets,
            self._mandate,
            grace=self._grace,
            reading=self._reading,
            has_handed_over=self._has_handed_over,
            span=span,
        )
        self._escalation = Escalation(
            api,
            self._targets,
            budget,
            asking=self._asking,
            reading=self._reading,
            has_handed_over=self._has_handed_over,
        )

    async def run(self) -> TeardownReport:
        """Tear down, and return what became of every run."""
        try:
            return await self._run()
        finally:
            self._reading.unfollow_all()

    async def run_if_needed(self) -> TeardownReport | None:
        """Search the tree, and tear down what lives there; `None` if that is nothing."""
        try:
            await self._discovery.search()
            if not (len(self._targets) or self._discovery.error):
                return None
            return await self._run()
        finally:
            self._reading.unfollow_all()

    @property
    def is_waiting(self) -> bool:
        """Whether only children are left that may take as long as they need."""
        return self._is_waiting

    @property
    def began(self) -> float:
        """When its grace began, or the harder end's under which it goes on."""
        return self._grace.started

    @property
    def seconds_to_ask(self) -> float:
        """What a slow server needs to be searched and asked for so many, on top of the grace."""
        return seconds_for_all(len(self._targets), self._api.pace) + self._search.seconds

    def hurry(self, cause: Cause, reason: CancelReason) -> None:
        """Go on under a harder cause: what was waited for falls under that one's policy.

        Args:
            cause: How the run ends after all; its process may be killed soon.
            reason: The same in words.
        """
        if not self._mandate.harden(cause, reason):
            return
        self._grace.begin_anew()
        for target in self._targets:
            if target.action == "wait":
                target.action = self._mandate.action_for(target)
        detached = [target for target in self._targets if target.action == "detach"]
        for target in detached:
            self._targets.remove(target)
        if detached:
            self._discovery.take_children()  # lets them go
        self._reading.wake()

    async def _run(self) -> TeardownReport:
        with self._grace.for_asking():
            await self._ask()  # whatever the grace: it is for waiting
        await self._wait_within_budget()
        await self._wait_for_the_patient()
        await self._last_look()
        report = self._report()
        if self._span is not None:
            self._span.end(report)
        return report

    async def _ask(self) -> None:
        self._discovery.take_children()
        self._grace.allow_time_to_ask()
        await self._request()
        if self._mandate.delegate_to is None:
            await self._discovery.search()
            self._grace.allow_time_to_ask()
            await self._request()

    async def _wait_within_budget(self) -> None:
        with self._grace.for_waiting():
            await self._wait()

    async def _wait_for_the_patient(self) -> None:
        """Wait for the children whose policy says so, unless a harder end overtakes us."""
        if not self._mandate.is_patient:
            return
        while self._mandate.is_patient and (waiting := self._waited_for()):
            self._is_waiting = not self._has_more_to_end
            if self._has_more_to_end:
                await self._wait_within_budget()
            else:
                await self._reading.read_if_due(waiting)
            await self._pause()
        self._is_waiting = False
        if self._grace.left > 0 and self._has_pending:
            await self._wait_within_budget()

    @property
    def _has_more_to_end(self) -> bool:
        """Whether a harder end has left something to end, and time for it."""
        return self._grace.left > 0 and bool(self._own())

    async def _wait(self) -> None:
        if self._mandate.delegate_to is not None:
            await self._wait_for_own()
            return
        swept = _clock.monotonic()
        await anyio.lowlevel.checkpoint()  # with no budget left, nothing is escalated either
        while True:
            await self._reading.read_if_due(self._pending())
            await self._escalate()
            self._lose_patience()
            await self._request()
            if self._mandate.delegate_to is not None:
                await self._wait_for_inline()
                return
            if not self._has_pending and not await self._sweep():
                return
            if _clock.monotonic() - swept > self._seconds_between_sweeps:
                await self._sweep()
                swept = _clock.monotonic()
            await self._pause()

    @property
    def _seconds_between_sweeps(self) -> float:
        """How long to rest: most of the server's time is for what is to end, not for searches.

        But not beyond the time in which what another search finds can be asked.
        """
        seconds = _SWEEP_SECONDS_WITH_EVENTS if self._reading.hears else _SWEEP_SECONDS
        time_left = self._grace.left - 2 * self._sweep_took
        return max(seconds, min(_SWEEP_REST * self._sweep_took, time_left))

    async def _last_look(self) -> None:
        """Read once more what is not known to be over, so that the report is true when written."""
        if self._mandate.delegate_to is not None:
            return
        with anyio.move_on_after(_INLINE_SECONDS):
            # Whatever the grace: their engines need a moment to write what has become of them.
            await self._wait_for_inline()
        open_ends = [t for t in self._targets if t.state is None or not t.state.is_final()]
        with anyio.move_on_after(2.0, shield=True):
            await self._reading.read([t for t in open_ends if t.runs_remotely or not t.is_over])

    async def _wait_for_inline(self) -> None:
        """Wait for what runs in this process."""
        while any(t.is_local and self._is_pending(t) for t in self._targets):
            await self._go_on()

    async def _wait_for_own(self) -> None:
        await self._request()  # what a harder end has left to be asked
        while self._own():
            await self._go_on()

    async def _go_on(self) -> None:
        await self._pause()
        self._lose_patience()
        await self._request()
        await self._escalate()

    # -- one round --------------------------------------------------------------------------

    async def _pause(self) -> None:
        """Wait until something may be over, or there may be something to do."""
        if self._discovery.error:
            await anyio.sleep(_SEARCH_AGAIN_SECONDS)
            return
        # What runs here, or has no run yet, ends without anybody's telling.
        looks = any((t.is_local or t.run is None) and self._is_pending(t) for t in self._targets)
        await self._reading.wait_for_news(_LOOK_SECONDS if looks else _ROUND_SECONDS)

    async def _sweep(self) -> bool:
        """Search again; true if something live turned up."""
        known, began = len(self._targets), _clock.monotonic()
        self._discovery.take_children()
        await self._discovery.search()
        # What a failure took says nothing.
        self._sweep_took = 0.0 if self._discovery.error else _clock.monotonic() - began
        await self._request()
        return len(self._targets) > known or bool(self._has_pending or self._discovery.error)

    async def _request(self) -> None:
        """Ask everything that is live and has not been asked."""
        self._targets.set_new_runs()
        await self._asking.ask([t for t in self._targets if t.is_to_be_asked and self._is_live(t)])

    async def _escalate(self) -> None:
        cancelled = [t for t in self._targets if t.requested is not None and t.action == "cancel"]
        await self._escalation.escalate([t for t in cancelled if self._is_live(t)])

    def _lose_patience(self) -> None:
        """Cancel what is still being waited for, while there is time to see it end."""
        if self._mandate.is_patient or self._grace.elapsed < self._grace.budget.patience:
            return
        for target in self._waited_for():
            target.action = "cancel"
            target.note_step("waited")

    async def _has_handed_over(self) -> bool:
        """Whether what runs elsewhere belongs to a later attempt of the scope's run."""
        if self._is_superseded is None or not await self._is_superseded():
            return False
        self._mandate.hand_over()
        for target in self._targets:
            if not target.is_local:
                self._targets.remove(target)
        self._discovery.error = ""
        return True

    # -- what is left -----------------------------------------------------------------------

    def _is_live(self, target: Target) -> bool:
        return not (target.is_over or target.is_deleted or self._is_foreign(target))

    def _is_pending(self, target: Target) -> bool:
        """Whether it has to end within the budget."""
        return (target.action == "cancel" or not self._mandate.is_patient) and self._is_live(target)

    def _pending(self) -> list[Target]:
        return [t for t in self._targets if self._is_pending(t)]

    def _waited_for(self) -> list[Target]:
        return [t for t in self._targets if t.action == "wait" and self._is_live(t)]

    @property
    def _has_pending(self) -> bool:
        return any(self._is_pending(t) for t in self._targets)

    def _own(self) -> list[Target]:
        """Return what nobody but this scope sees end within the budget.

        If an ancestor verifies the tree, that is what runs in this process, what its policy says
        to wait for, and a run that was requested and not answered, which nobody else can know of.
        To stay for the rest would cost time on each level: the last process would be gone so much
        later.
        """
        pending = self._pending()
        if self._mandate.delegate_to is None:
            return pending
        return [t for t in pending if t.is_local or t.action == "wait" or t.may_be_created]

    def _is_foreign(self, target: Target) -> bool:
        """Whether a run executes here, in a task that no scope started, and had its chance.

        Nothing can end it from outside, so waiting longer would only delay the report.
        """
        return (
            target.child is None
            and not target.runs_remotely
            and not self._targets.hosts_of(target)
            and not self._targets.host_is_over(target)
            and not self._body_runs()
            and self._in_body().isdisjoint(target.above)
            and _clock.monotonic() - target.found > _FOREIGN_SECONDS
        )

    # -- report -----------------------------------------------------------------------------

    def _report(self) -> TeardownReport:
        receipts = sorted(self._receipts(), key=lambda receipt: receipt.depth)
        return TeardownReport(
            flow_name=self._flow_name,
            flow_run_id=self._mandate.lineage.run_id,
            cause=self._mandate.cause,
            reason=str(self._mandate.reason),
            started_at=self._started_at,
            seconds=_clock.monotonic() - self._started,
            receipts=tuple(receipts),
            delegated_to=self._mandate.delegate_to,
        )

    def _receipts(self) -> Iterator[Receipt]:
        for each in self._finished():
            if each.cancel_reason is not None:
                yield self._receipt(Target.of_ended(each.child()))
        for target in self._targets:
            if target.child is None or target.child.outcome != "detached":
                yield self._receipt(target)
        for child in self._children():
            if child.outcome == "detached":
                yield detached_receipt(child)
        if self._discovery.error:
            yield unsearched_receipt(self._mandate.lineage.run_id, self._discovery.error)

    def _receipt(self, target: Target) -> Receipt:
        reason = self._mandate.reason_for(target, self._targets)
        return receipt_for(target, self._mandate, reason=reason, started=self._grace.started)
