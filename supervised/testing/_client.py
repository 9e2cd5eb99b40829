"""The seam to Prefect over the fake server: one for each simulated process, with faults between."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import anyio
import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling, Pending, Scheduled

from supervised._api import Ack, closing
from supervised._budget import RequestBudget
from supervised._errors import DeploymentNotFoundError
from supervised._pace import Pace
from supervised.testing._server import is_live

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.flows import Flow

    from supervised._api import Closing, Deployment, RunEvent, RunRequest, Visit
    from supervised._stall import Limit
    from supervised.testing._faults import Dice
    from supervised.testing._server import Change, Server
    from supervised.testing._virtual import VirtualLoop

T = TypeVar("T")

_ATTEMPTS = 6  # of Prefect's own client, for what it takes for a passing failure
_BACKOFF_SECONDS = 2.0
_REQUEST = httpx.Request("POST", "http://fake/api")


class Hub:
    """Delivers the server's events to streams: late, twice or not at all."""

    def __init__(self, server: Server, loop: VirtualLoop, dice: Dice) -> None:
        self._server = server
        self._loop = loop
        self._dice = dice
        self._streams: list[Stream] = []
        server.on_change.append(self._on_change)

    def open(self, resources: frozenset[str] | None) -> Stream:
        """Open a stream of the events of these resources; of all if there is no such set.

        Raises:
            ConnectionError: If the server is down.
        """
        if not self._server.is_up:
            raise ConnectionError("the fake server is down")
        stream = Stream(resources)
        self._streams.append(stream)
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream."""
        if stream in self._streams:
            self._streams.remove(stream)

    def break_all(self) -> None:
        """Close every stream, as a restart of the server does."""
        for stream in list(self._streams):
            stream.end()
            self.close(stream)

    def _on_change(self, change: Change) -> None:
        faults = self._dice.faults
        for stream in list(self._streams):
            if not stream.wants(change) or self._dice.happens(faults.dropped_events):
                continue
            if self._dice.happens(faults.closed_streams):
                stream.end()
                self.close(stream)
                continue
            delay = self._dice.upto(faults.event_seconds)
            self._loop.call_unowned(delay, stream.put, change.event)
            if self._dice.happens(faults.repeated_events):
                self._loop.call_unowned(self._dice.upto(60.0), stream.put, change.event)


class Stream:
    """One subscription."""

    def __init__(self, resources: frozenset[str] | None) -> None:
        self._resources = resources
        self._queue: list[RunEvent] = []
        self._news = anyio.Event()
        self._is_over = False

    def wants(self, change: Change) -> bool:
        """Whether an event is one of those that were asked for."""
        return self._resources is None or not self._resources.isdisjoint(change.resources)

    def put(self, event: RunEvent) -> None:
        """Deliver an event."""
        self._queue.append(event)
        self._news.set()

    def end(self) -> None:
        """End the stream after what has been delivered."""
        self._is_over = True
        self._news.set()

    async def events(self) -> AsyncIterator[RunEvent]:
        """Yield what is delivered, until the stream ends."""
        while True:
            while self._queue:
                yield self._queue.pop(0)
            if self._is_over:
                return
            self._news = anyio.Event()
            await self._news.wait()


class FakeOrchestrator:
    """What supervision needs of Prefect, from the fake server.

    Args:
        server: The server.
        hub: Its events.
        dice: What draws the faults.
        is_over: Tells when the simulation is being wound up.
    """

    def __init__(
        self, server: Server, hub: Hub, dice: Dice, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self._server = server
        self._hub = hub
        self._dice = dice
        self._is_over = is_over
        self._streams: list[Stream] = []
        self.budget = RequestBudget()
        self.pace = Pace()
        self.requests = 0
        """How many requests were made, repetitions included."""

    def disconnect(self) -> None:
        """Hear nothing any more: the process is gone."""
        for stream in self._streams:
            self._hub.close(stream)

    async def call(self, act: Callable[[], T]) -> T:
        """Make a request as Prefect's client does, which repeats what may pass."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._attempt(act)
            except (httpx.TransportError, PrefectHTTPStatusError):
                if attempt == _ATTEMPTS - 1:
                    raise
            await anyio.sleep(self._dice.upto(_BACKOFF_SECONDS, least=0.1))
        raise AssertionError("unreachable")  # pragma: no cover - the last attempt raises

    async def _attempt(self, act: Callable[[], T]) -> T:
        faults = self._dice.faults
        await self.budget.take()
        self.requests += 1
        if self._is_over():
            raise asyncio.CancelledError
        await anyio.sleep(self._dice.upto(faults.latency_seconds) / 2)
        if not self._server.is_up:
            raise httpx.ConnectError("the fake server is down", request=_REQUEST)
        if self._dice.happens(faults.refused):
            raise _refused(429 if self._dice.happens(0.5) else 503)
        if self._dice.happens(faults.repeated):
            act()
        answer = act()
        await anyio.sleep(self._dice.upto(faults.latency_seconds) / 2)
        if self._dice.happens(faults.lost_answer):
            raise httpx.ReadTimeout("the answer was lost", request=_REQUEST)
        return answer

    async def propose(self, run_id: UUID, state: State[Any]) -> State[Any]:
        """Propose a state as Prefect's engine does; return the one that the run has then."""
        answers: list[State[Any]] = []

        def propose() -> State[Any]:
            if not answers:  # a repetition is told by its transition id
                answers.append(self._server.propose(run_id, state).state)
            return answers[0]

        return await self.call(propose)

    async def read_deployment(
        self, target: str | UUID, is_wanted: Callable[[], bool] = lambda: True
    ) -> Deployment | None:
        if not is_wanted():
            return None
        found = await self.call(lambda: self._server.find_deployment(target))
        if found is None:
            raise DeploymentNotFoundError(
                f"The fake server has no deployment {str(target)!r}; add it with `deploy`."
            )
        return found

    async def create_deployment_run(
        self, deployment: Deployment, request: RunRequest
    ) -> FlowRun | None:
        if not request.begin():
            return None
        moment = request.scheduled_time
        state: State[Any] = Scheduled(scheduled_time=moment) if moment else Scheduled()
        return await self._create(
            deployment.name.split("/")[0],
            request,
            state=state,
            deployment_id=deployment.id,
            is_linked=request.is_linked,
        )

    async def create_inline_run(self, flow: Flow[..., Any], request: RunRequest) -> FlowRun | None:
        if not request.begin():
            return None
        return await self._create(flow.name, request, state=Pending())

    async def _create(
        self,
        flow_name: str,
        request: RunRequest,
        *,
        state: State[Any],
        deployment_id: UUID | None = None,
        is_linked: bool = True,
    ) -> FlowRun:
        tracking_id = None
        if is_linked:
            tracking_id = await self.call(
                lambda: self._server.track(
                    request.tracking_id, request.parent_run_id, request.tracking_key
                )
            )
        return await self.call(
            lambda: self._server.create(
                flow_name,
                state=state,
                deployment_id=deployment_id,
                name=request.name,
                parameters=request.parameters,
                tags=request.tags,
                labels=request.labels,
                idempotency_key=request.idempotency_key,
                parent_task_run_id=tracking_id,
            )
        )

    async def read_runs(self, run_ids: Iterable[UUID]) -> list[FlowRun]:
        wanted = sorted(run_ids)
        return await self.call(
            lambda: [self._server.read(one) for one in wanted if one in self._server.runs]
        )

    async def read_tagged(self, tag: str, *, live_only: bool) -> list[FlowRun]:
        return await self.call(lambda: self._server.tagged(tag, live_only=live_only))

    async def read_children(self, parents: Iterable[UUID]) -> list[FlowRun]:
        return await self.call(lambda: self._server.children(parents))

    async def visit_children(
        self,
        parents: Sequence[UUID],
        visit: Visit,
        *,
        only: Literal["live", "over"] | None = None,
        since: datetime | None = None,
    ) -> None:
        def read() -> list[FlowRun]:
            found = self._server.children(parents)
            if only is not None:
                found = [run for run in found if is_live(run) == (only == "live")]
            if since is not None:
                found = [run for run in found if run.end_time and run.end_time >= since]
            return found

        await visit(await self.call(read))

    async def count_ended(self, parent: UUID, among: Sequence[UUID] | None = None) -> int:
        def count() -> int:
            ended = {run.id for run in self._server.children([parent]) if not is_live(run)}
            return len(ended if among is None else ended.intersection(among))

        return await self.call(count)

    async def read_parents(self, runs: Iterable[FlowRun]) -> dict[UUID, UUID]:
        def read() -> dict[UUID, UUID]:
            found = {run.id: self._server.parent_of(run) for run in runs}
            return {run_id: parent for run_id, parent in found.items() if parent is not None}

        return await self.call(read)

    async def request_cancel(self, run_ids: Sequence[UUID], message: str) -> list[Ack]:
        return await self._propose(run_ids, Cancelling(message=message))

    async def _propose(self, run_ids: Sequence[UUID], state: State[Any]) -> list[Ack]:
        def ask(run_id: UUID) -> Ack:
            if run_id not in self._server.runs:
                return Ack(run_id, None, "the server no longer knows the run")
            answer = self._server.propose(run_id, _sent(state))
            return Ack(run_id, answer.state, answer.reason)

        return await self.call(lambda: [ask(run_id) for run_id in run_ids])

    async def close_run(
        self, run_id: UUID, message: str, *, as_: Closing = "cancelled"
    ) -> State[Any] | None:
        state = _sent(closing(as_, message))
        return await self.call(lambda: self._server.propose(run_id, state).state)

    async def close_runs(self, run_ids: Sequence[UUID], message: str) -> list[Ack]:
        return await self._propose(run_ids, closing("cancelled", message))

    async def nudge(self, run_ids: Sequence[UUID]) -> None:
        def tell() -> None:
            for run_id in run_ids:
                self._server.nudge(run_id)

        await self.call(tell)

    async def server_time(self) -> datetime | None:
        return await self.call(self._server.time)

    async def read_limits(self, run: FlowRun) -> list[Limit]:
        return self._server.limits.get(run.deployment_id, [])

    async def label(self, run_id: UUID, labels: Mapping[str, Any]) -> None:
        await self.call(lambda: self._server.label(run_id, labels))

    async def label_for_good(self, run_id: UUID, labels: Mapping[str, Any]) -> None:
        await self.label(run_id, labels)

    async def tag(self, run_id: UUID, tags: Sequence[str]) -> None:
        await self.call(lambda: self._server.tag(run_id, tags))

    async def cut_loose(self, run: FlowRun, labels: Mapping[str, Any]) -> None:
        await self.label(run.id, labels)
        tracking_id = run.parent_task_run_id
        if tracking_id is not None:
            await self.call(lambda: self._server.untrack(tracking_id))

    @asynccontextmanager
    async def subscribe(self, resources: Sequence[str]) -> AsyncIterator[AsyncIterator[RunEvent]]:
        async with self._stream(frozenset(resources)) as events:
            yield events

    @asynccontextmanager
    async def subscribe_all(self) -> AsyncIterator[AsyncIterator[RunEvent]]:
        async with self._stream(None) as events:
            yield events

    @asynccontextmanager
    async def _stream(
        self, resources: frozenset[str] | None
    ) -> AsyncIterator[AsyncIterator[RunEvent]]:
        await anyio.sleep(self._dice.upto(self._dice.faults.latency_seconds))
        stream = self._hub.open(resources)
        self._streams.append(stream)
        try:
            yield stream.events()
        finally:
            self._hub.close(stream)
            self._streams.remove(stream)


def _sent(state: State[Any]) -> State[Any]:
    """Return a state if a client could send it: a lone surrogate in its message is no UTF-8."""
    (state.message or "").encode()
    return state


def _refused(status: int) -> PrefectHTTPStatusError:
    response = httpx.Response(status, request=_REQUEST, json={"detail": "a seeded fault"})
    error = httpx.HTTPStatusError("a seeded fault", request=_REQUEST, response=response)
    refused: PrefectHTTPStatusError = PrefectHTTPStatusError.from_httpx_error(error)
    return refused
