"""One watcher a process: hears state changes from one event stream, confirms them by reads.

The stream only hints. Every end is read before it counts, many in one request, so an event that
is dropped costs latency, and one that is repeated, late or replayed costs a read.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import anyio
from prefect.client.schemas.objects import State, StateType

from supervised import _clock, _identity, _telemetry
from supervised._budget import Priority, priority
from supervised._errors import SpawnError
from supervised._log import get_logger
from supervised._policy import outcome_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun

    from supervised._api import Orchestrator, RunEvent
    from supervised._child import Child

    OnRead = Callable[[UUID, FlowRun | None], None]

logger = get_logger("prefect.supervised.watch")

_POLL_SECONDS = 10.0  # while events flow: only a safety net
_POLL_WITHOUT_EVENTS_SECONDS = 1.5
# Reading a page of 200 takes a server 0.1 s and more (benchmarks/sweep.py): of many thousands of
# children, that is its whole time.
_POLL_SHARE = 0.05
_PAGE = 200  # what one request reads: to read some of it alone saves nothing
_POLLS = 3  # of which the quickest counts: one may have waited for a server that was starting anew
_POLL_SHARE_WITHOUT_EVENTS = 0.25
_COALESCE_SECONDS = 0.02
# The server tells of a change before it has committed it (server/orchestration/
# instrumentation_policies.py, `after_transition`): a read may come too early.
_COMMIT_SECONDS = (0.5, 1.0, 2.0)  # from one read to the next
_MOST_REST_SECONDS = 1.0
_REST = 5.0  # times what a read has taken, before the next: reads then take a sixth of the time
_BURST = 10  # reads without a rest: what waits for the last of a few children waits for it alone
_BURST_SECONDS = 5.0
_RECONNECT_SECONDS = 2.0
_REOPEN_SECONDS = 0.25  # scopes that begin together share one stream, not one each after the other
_CRASH_SECONDS = 3.0  # in which whoever reschedules a crashed run has done so
_TERMINAL = {StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}


class Follower(Protocol):
    """What ends runs at any depth of a tree, and wants to know when they are over."""

    def take(self, run: FlowRun) -> None:
        """Take over what was read of a run."""

    def miss(self, run_id: UUID) -> None:
        """Take note that the server does not know a run."""


class Watcher:
    """Observes children and the runs that own scopes, for all scopes of a control plane."""

    def __init__(self, api: Orchestrator) -> None:
        self._api = api
        self._children: dict[UUID, Child[Any]] = {}
        self._crashes: dict[UUID, tuple[UUID, float]] = {}  # states, and when they were first seen
        self._owners: dict[UUID, Callable[[FlowRun], None]] = {}
        self._others: dict[UUID, list[OnRead]] = {}
        self._paces: dict[tuple[UUID, OnRead], float] = {}
        self._followers: dict[UUID, list[Follower]] = {}
        self._resources: Counter[str] = Counter()
        self._hinted: set[UUID] = set()
        # What the stream has told of and no read has shown yet, and what has it read again.
        self._expected: dict[UUID, tuple[StateType, asyncio.TimerHandle]] = {}
        self._wake_reader = anyio.Event()
        self._resubscribe = anyio.Event()
        self._connected = False
        self._streamed: set[str] = set()  # the resources that the stream tells of
        self._stream_lost = anyio.Event()
        self._is_trusted = True  # until an end is found that the stream has not told of
        self._heard: set[UUID] = set()  # ends that the stream told of since the last poll
        self._unheard: set[UUID] = set()  # ends that only the last poll has found
        self._poll_seconds_taken: deque[float] = deque(maxlen=_POLLS)

    def watch(self, child: Child[Any]) -> None:
        """Follow a child whose run exists."""
        assert child.flow_run_id is not None
        self._children[child.flow_run_id] = child

    def unwatch(self, run_id: UUID) -> None:
        """Stop following a child's run."""
        self._children.pop(run_id, None)
        self._crashes.pop(run_id, None)

    def watch_owner(self, run_id: UUID, on_change: Callable[[FlowRun], None]) -> None:
        """Follow a scope's own run."""
        self._owners[run_id] = on_change
        self._subscribe(+1, _run_resource(run_id))

    def unwatch_owner(self, run_id: UUID) -> None:
        """Stop following a scope's own run."""
        self._owners.pop(run_id, None)
        self._subscribe(-1, _run_resource(run_id))

    def watch_tree(self, tag: str) -> None:
        """Hear of all runs with a tree's tag."""
        self._subscribe(+1, _tag_resource(tag))

    def unwatch_tree(self, tag: str) -> None:
        """Stop hearing of them."""
        self._subscribe(-1, _tag_resource(tag))

    def watch_other(self, run_id: UUID, on_change: OnRead, *, every: float) -> None:
        """Follow a run of another process.

        Args:
            run_id: The run.
            on_change: Called with every read of it, and with `None` if it does not exist.
            every: Seconds in which it is read at least once.
        """
        self._paces[run_id, on_change] = every
        self._others.setdefault(run_id, []).append(on_change)
        self._subscribe(+1, _run_resource(run_id))
        self.hint(run_id)

    def unwatch_other(self, run_id: UUID, on_change: OnRead) -> None:
        """Stop following a run of another process."""
        self._paces.pop((run_id, on_change), None)
        listeners = self._others.get(run_id, [])
        if on_change in listeners:
            listeners.remove(on_change)
            self._subscribe(-1, _run_resource(run_id))
        if not listeners:
            self._others.pop(run_id, None)

    def follow(self, run_id: UUID, follower: Follower) -> None:
        """Read a run of a tree that is watched when the stream tells of its end.

        A crash of it counts at once: whoever follows it has asked it to end.
        """
        self._followers.setdefault(run_id, []).append(follower)

    def unfollow(self, run_id: UUID, follower: Follower) -> None:
        """Stop doing so."""
        self._followers[run_id].remove(follower)
        if not self._followers[run_id]:
            del self._followers[run_id]

    def hears(self, tag: str) -> bool:
        """Whether events of a tree arrive, so that reads are needed for certainty only."""
        return self._connected and _tag_resource(tag) in self._streamed

    def hint(self, run_id: UUID) -> None:
        """Have a run read soon."""
        self._hinted.add(run_id)
        self._wake_reader.set()

    def _expect(
        self, run_id: UUID, told: StateType, waits: Sequence[float] = _COMMIT_SECONDS
    ) -> None:
        """Have a run read soon, and again until a read shows what the stream has told of it."""
        self._expect_no_more(run_id)
        watched = self._children, self._owners, self._others, self._followers
        if not any(run_id in each for each in watched):
            return
        self.hint(run_id)
        if waits:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(waits[0], self._expect, run_id, told, waits[1:])
            self._expected[run_id] = told, timer

    def _expect_no_more(self, run_id: UUID) -> None:
        if (expected := self._expected.pop(run_id, None)) is not None:
            expected[1].cancel()

    def _hint_all(self) -> None:
        others = {*self._owners, *self._others}
        everything = {*self._children, *others}
        for run_id in everything if len(everything) <= _PAGE else others:
            self.hint(run_id)

    def apply(self, run: FlowRun, *, at_once: bool = False) -> None:
        """Take over what a read says of a run.

        Args:
            run: The run, as just read.
            at_once: Whether a crash counts though somebody may yet reschedule the run.
        """
        told = self._expected.get(run.id)
        if run.state is not None and told and (run.state.type == told[0] or run.state.is_final()):
            self._expect_no_more(run.id)
        followers = list(self._followers.get(run.id, ()))
        if (on_change := self._owners.get(run.id)) is not None:
            on_change(run)
        for listen in list(self._others.get(run.id, ())):
            listen(run.id, run)
        self._tell_child(run, at_once=at_once or bool(followers))
        for follower in followers:
            follower.take(run)

    def _tell_child(self, run: FlowRun, *, at_once: bool) -> None:
        child = self._children.get(run.id)
        if child is None or run.state is None:
            return
        if child.keeper is not None and _identity.keeper_of(run) != child.keeper:
            self.unwatch(run.id)
            message = f"Run {run.name!r} ({run.id}) is not ours: another run has adopted it as well"
            child.settle("failed", state=run.state, exception=SpawnError(message, child=child.name))
            return
        outcome = outcome_of(run.state, asked=child.cancel_reason is not None)
        is_held = outcome == "crashed" and not at_once and self._may_come_back(child, run)
        if outcome is None or is_held:
            child.observe(run.state)
            self._ask_inline(child, run.state)
        elif not child.is_local:
            self.unwatch(run.id)
            child.settle(outcome, state=run.state)
        elif child.is_over:
            self._children.pop(run.id, None)

    def _may_come_back(self, child: Child[Any], run: FlowRun) -> bool:
        """Whether a crash is so fresh that an automation or the infrastructure may yet undo it."""
        if child.is_local or run.state is None:
            return False
        known = self._crashes.get(run.id)
        if known is None or known[0] != run.state.id:
            known = self._crashes[run.id] = (run.state.id, _clock.monotonic())
            asyncio.get_running_loop().call_later(_CRASH_SECONDS, self.hint, run.id)
        if _clock.monotonic() - known[1] < _CRASH_SECONDS:
            return True
        del self._crashes[run.id]
        return False

    @staticmethod
    def _ask_inline(child: Child[Any], state: State) -> None:
        """Cancel an inline child whose run somebody set to `Cancelling`: no runner will."""
        if child.is_local and state.is_cancelling() and child.cancel_reason is None:
            child.cancel(state.message or "its run was set to Cancelling")

    async def run(self) -> None:
        """Watch until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            tasks.start_soon(self._read_hinted)
            tasks.start_soon(self._poll)

    # -- events -----------------------------------------------------------------------------

    def _subscribe(self, step: int, *resources: str) -> None:
        before = set(self._resources)
        for resource in resources:
            self._resources[resource] += step
        self._resources = +self._resources
        if set(self._resources) - before:
            self._resubscribe.set()

    async def _listen(self) -> None:
        while True:
            while not self._resources:
                await self._resubscribe.wait()
                self._resubscribe = anyio.Event()
            self._resubscribe = anyio.Event()
            async with anyio.create_task_group() as tasks:
                due = _clock.monotonic() + _REOPEN_SECONDS
                tasks.start_soon(self._stream, list(self._resources), tasks.cancel_scope)
                await self._resubscribe.wait()
                await anyio.sleep(max(0.0, due - _clock.monotonic()))
                tasks.cancel_scope.cancel()

    async def _stream(self, resources: list[str], scope: anyio.CancelScope) -> None:
        try:
            async with self._api.subscribe(resources) as events:
                if self._streamed:
                    self._hint_all()  # what has happened while there was no stream
                self._connected, self._streamed = self._is_trusted, set(resources)
                async for event in events:
                    self._connected = self._is_trusted = True
                    self._on_event(event)
            logger.debug("The event stream ended; polling until it is back")
        except Exception:
            logger.debug("The event stream failed; polling until it is back", exc_info=True)
        finally:
            self._connected = False
        self._stream_lost.set()
        await anyio.sleep(_RECONNECT_SECONDS)
        scope.cancel()

    def _on_event(self, event: RunEvent) -> None:
        if event.state_type in _TERMINAL:
            self._heard.add(event.run_id)
            self._unheard.discard(event.run_id)
            if event.run_id in self._followers:
                self._expect(event.run_id, event.state_type)
        child = self._children.get(event.run_id)
        is_local = child is not None and child.is_local
        is_owner = event.run_id in self._owners
        is_listened_to = is_owner or event.run_id in self._others
        if child is None and not is_listened_to:
            return
        if event.state_type in _TERMINAL and is_local and not is_listened_to:
            return  # its own code tells of its end
        # Of who runs elsewhere, a runner hears that.
        is_asked = event.state_type == StateType.CANCELLING and (is_owner or is_local)
        if event.state_type in _TERMINAL or is_asked:
            self._expect(event.run_id, event.state_type)
        elif child is not None:
            occurred = event.occurred or _clock.utc_now()
            child.observe(State(type=event.state_type, name=event.state_name, timestamp=occurred))

    # -- reads ------------------------------------------------------------------------------

    async def _read_hinted(self) -> None:
        rested = -math.inf
        lately: deque[float] = deque(maxlen=_BURST)
        while True:
            await self._wake_reader.wait()
            await anyio.sleep(max(_COALESCE_SECONDS, rested - _clock.monotonic()))
            self._wake_reader = anyio.Event()
            hinted, self._hinted = self._hinted, set()
            began = _clock.monotonic()
            is_followed = not self._followers.keys().isdisjoint(hinted)
            with priority(Priority.TEARDOWN if is_followed else Priority.POLL):
                was_read = await self.refresh(hinted)
            # Hundreds that end one after the other are not read one after the other.
            now = _clock.monotonic()
            if len(lately) == _BURST and now - lately[0] < _BURST_SECONDS:
                rested = now + min(_REST * (now - began), _MOST_REST_SECONDS)
            lately.append(now)
            if not was_read:
                await anyio.sleep(_POLL_WITHOUT_EVENTS_SECONDS)
                for run_id in hinted:
                    self.hint(run_id)

    @property
    def _poll_cost(self) -> float:
        """How many seconds it takes to read everything."""
        taken = self._poll_seconds_taken
        return min(taken) if len(taken) > 1 else 0.0

    @property
    def _poll_seconds(self) -> float:
        """How long nothing has to be read: longer, the longer it takes."""
        if self._connected:
            return max(_POLL_SECONDS, self._poll_cost / _POLL_SHARE)
        return max(_POLL_WITHOUT_EVENTS_SECONDS, self._poll_cost / _POLL_SHARE_WITHOUT_EVENTS)

    async def _poll(self) -> None:
        polled = paced = _clock.monotonic()
        while True:
            now = _clock.monotonic()
            due = polled + self._poll_seconds - now
            pace = paced + min(self._paces.values(), default=math.inf) - now
            with anyio.move_on_after(max(0.0, min(due, pace))):
                await self._stream_lost.wait()
                self._stream_lost = anyio.Event()
                continue  # without events it is due sooner
            everything = {*self._children, *self._owners, *self._others}
            if pace < due and len(everything) > _PAGE:
                await self.refresh(set(self._others))
                paced = _clock.monotonic()
                continue
            polled = _clock.monotonic()
            was_read = await self._poll_all()
            paced = _clock.monotonic()
            if was_read:  # what a failure took says nothing
                self._poll_seconds_taken.append(paced - polled)

    async def _poll_all(self) -> bool:
        if self._unheard:
            self._distrust()
        before = set(self._children)
        was_read = await self.refresh({*before, *self._owners, *self._others})
        if self._connected:
            self._unheard = before - set(self._children) - self._heard
        self._heard.clear()
        return was_read

    def _distrust(self) -> None:
        """Open a new stream: one that is open but silent looks like one with nothing to say."""
        logger.debug("The event stream kept quiet about %d ends", len(self._unheard))
        self._unheard.clear()
        self._connected = self._is_trusted = False
        self._resubscribe.set()

    async def refresh(self, run_ids: set[UUID]) -> bool:
        """Read these runs in one go and apply what they say; false if the server failed."""
        if not run_ids:
            return True
        try:
            concerns_owner = not self._owners.keys().isdisjoint(run_ids)
            value = Priority.LIFE if concerns_owner else Priority.POLL
            with _telemetry.unobserved(), priority(value):
                runs = await self._api.read_runs(run_ids)
        except Exception:
            logger.debug("Could not read %d runs; trying again", len(run_ids), exc_info=True)
            return False
        for run in runs:
            self.apply(run)
        for run_id in run_ids - {run.id for run in runs}:
            self._lost(run_id)
        return True

    def _lost(self, run_id: UUID) -> None:
        """Tell of a run that somebody deleted; a child of ours is over with it."""
        self._expect_no_more(run_id)
        for follower in list(self._followers.get(run_id, ())):
            follower.miss(run_id)
        for listen in list(self._others.get(run_id, ())):
            listen(run_id, None)
        child = self._children.pop(run_id, None)
        if child is not None and not child.is_local:
            gone = LookupError("its flow run was deleted from the server")
            child.settle("crashed", exception=gone)


def _run_resource(run_id: UUID) -> str:
    """Return what the events of a run have in common, as Prefect names it."""
    return f"prefect.flow-run.{run_id}"


def _tag_resource(tag: str) -> str:
    """Return what the events of all runs with a tag have in common."""
    return f"prefect.tag.{tag}"


@asynccontextmanager
async def open_watcher(api: Orchestrator) -> AsyncIterator[Watcher]:
    """Run a watcher for as long as the context lasts."""
    watcher = Watcher(api)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watcher.run)
        try:
            yield watcher
        finally:
            tasks.cancel_scope.cancel()
