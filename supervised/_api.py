"""The seam to Prefect: the only module, with `_bulk`, that uses its client.

`Orchestrator` says what supervision needs; `PrefectOrchestrator` does it over HTTP and the event
stream. Every call may be repeated: creations carry keys under which the server makes one thing.
Every call raises `httpx.TransportError` if the server cannot be reached.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID, uuid4

import anyio
import attrs
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import FlowRunCreate, StateCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import (
    DeploymentStatus,
    FlowRun,
    FlowRunPolicy,
    State,
    StateType,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import (
    Cancelled,
    Cancelling,
    Crashed,
    Failed,
    Pending,
    Scheduled,
    to_state_create,
)
from prefect.tasks import Task
from prefect.utilities.slugify import slugify

from supervised._batch import Batches
from supervised._budget import RequestBudget
from supervised._bulk import LIMIT as BULK_CREATION_LIMIT
from supervised._bulk import BulkCreation
from supervised._clock import monotonic, utc_now
from supervised._errors import (
    NO_API,
    DeploymentNotFoundError,
    NoApiError,
    ParametersError,
)
from supervised._pace import CHUNK, Pace
from supervised._schema import ParameterSchema, parameter_schema
from supervised._stall import Limit
from supervised._writers import Writers, note_refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events import Event
    from prefect.flows import Flow

T = TypeVar("T")

LIVE_STATES = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
_OVER_STATES = [state for state in StateType if state not in LIVE_STATES]
_PAGE = 200  # the server's maximum for reads
_COUNTED = 1_000  # ids in one request that counts: it has 40 KB, and a database takes 32,766
_LABEL_ATTEMPTS = 5
_UNAUTHORIZED = 401
_TRY_AGAIN = {408, 429}
_DEPLOYMENT_SECONDS = 10.0  # after which somebody may have served another version
_UNSERVED_SECONDS = 0.5  # or who has just served it again would be refused


@attrs.frozen(kw_only=True)
class Deployment:
    """What a launch needs to know of a deployment.

    Args:
        id: Its id.
        name: *flow/deployment*.
        version: Its version.
        is_served: Whether something may pick its runs up, as far as the server knows.
        schema: What a run's parameters have to fit; `None` if it may be given any.
    """

    id: UUID
    name: str
    version: str | None
    is_served: bool = True
    schema: ParameterSchema | None = None


@attrs.frozen(kw_only=True)
class RunRequest:
    """What a child's run is created with; the same for every kind of child."""

    name: str | None
    parameters: Mapping[str, Any]
    tags: Sequence[str]
    labels: Mapping[str, Any]
    idempotency_key: str
    parent_run_id: UUID
    tracking_key: str
    tracking_id: UUID
    task_inputs: Mapping[str, Any]
    is_linked: bool = True
    scheduled_time: datetime | None = None
    work_queue_name: str | None = None
    job_variables: Mapping[str, Any] | None = None
    is_checked: bool = False
    """Whether the parameters are known to fit the deployment's schema."""
    is_wanted: Callable[[], bool] = attrs.field(default=lambda: True, eq=False, repr=False)
    """Whether anybody still wants the run, as far as the server may not have been asked yet."""
    begin: Callable[[], bool] = attrs.field(default=lambda: True, eq=False, repr=False)
    """The same, asked when the request is about to go out: from then on it may have been."""


@attrs.frozen
class Ack:
    """The server's answer to a request for cancellation."""

    run_id: UUID
    state: State | None
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the run is being cancelled, or over already."""
        return self.state is not None and (self.state.is_cancelling() or self.state.is_final())


@attrs.frozen
class RunEvent:
    """A change of state, as the event stream tells it: a hint, to be confirmed by a read."""

    run_id: UUID
    state_type: StateType
    state_name: str | None = None
    occurred: datetime | None = None


Closing = Literal["cancelled", "crashed", "failed"]
"""How a run that has no process is said to have ended."""


def closing(as_: Closing, message: str) -> State[Any]:
    """Return the state that says so."""
    return {"cancelled": Cancelled, "crashed": Crashed, "failed": Failed}[as_](message=message)


Visit: TypeAlias = "Callable[[list[FlowRun]], Awaitable[None]]"
"""What is called with each page of runs."""


class Orchestrator(Protocol):
    """What supervision needs of Prefect."""

    budget: RequestBudget
    pace: Pace

    async def read_deployment(
        self, target: str | UUID, is_wanted: Callable[[], bool] = ...
    ) -> Deployment | None: ...

    async def create_deployment_run(
        self, deployment: Deployment, request: RunRequest
    ) -> FlowRun | None: ...

    async def create_inline_run(
        self, flow: Flow[..., Any], request: RunRequest
    ) -> FlowRun | None: ...

    async def read_runs(self, run_ids: Iterable[UUID]) -> list[FlowRun]: ...

    async def read_tagged(self, tag: str, *, live_only: bool) -> list[FlowRun]: ...

    async def read_children(self, parents: Iterable[UUID]) -> list[FlowRun]: ...

    async def visit_children(
        self,
        parents: Sequence[UUID],
        visit: Visit,
        *,
        only: Literal["live", "over"] | None = None,
        since: datetime | None = None,
    ) -> None: ...

    async def count_ended(self, parent: UUID, among: Sequence[UUID] | None = None) -> int: ...

    async def read_parents(self, runs: Iterable[FlowRun]) -> dict[UUID, UUID]: ...

    async def request_cancel(self, run_ids: Sequence[UUID], message: str) -> list[Ack]: ...

    async def close_run(
        self, run_id: UUID, message: str, *, as_: Closing = "cancelled"
    ) -> State | None: ...

    async def close_runs(self, run_ids: Sequence[UUID], message: str) -> list[Ack]: ...

    async def nudge(self, run_ids: Sequence[UUID]) -> None: ...

    async def server_time(self) -> datetime | None: ...

    async def read_limits(self, run: FlowRun) -> list[Limit]: ...

    async def label(self, run_id: UUID, labels: Mapping[str, Any]) -> None: ...

    async def label_for_good(self, run_id: UUID, labels: Mapping[str, Any]) -> None: ...

    async def tag(self, run_id: UUID, tags: Sequence[str]) -> None: ...

    async def cut_loose(self, run: FlowRun, labels: Mapping[str, Any]) -> None: ...

    def subscribe(
        self, resources: Sequence[str]
    ) -> AbstractAsyncContextManager[AsyncIterator[RunEvent]]: ...

    def subscribe_all(self) -> AbstractAsyncContextManager[AsyncIterator[RunEvent]]: ...


@asynccontextmanager
async def open_orchestrator() -> AsyncIterator[PrefectOrchestrator]:
    """Open a client of our own to the API that the current settings name.

    Raises:
        NoApiError: If no API is configured and an ephemeral one may not be started.
    """
    budget = RequestBudget()
    hooks = {"request": [budget.before], "response": [budget.after, note_refusal]}
    try:
        client = get_client(httpx_settings={"event_hooks": hooks})
    except ValueError as exc:
        raise NoApiError(NO_API) from exc
    async with client:
        api = PrefectOrchestrator(client, budget)
        try:
            yield api
        finally:
            await api.close()


class PrefectOrchestrator:
    """The real Prefect, over one client that belongs to the control plane."""

    def __init__(self, client: PrefectClient, budget: RequestBudget) -> None:
        self._client = client
        self.budget = budget
        self.pace = Pace()
        self._deployments: dict[str | UUID, tuple[float, Deployment]] = {}
        self._flow_ids: dict[str, UUID] = {}
        self._lookup = anyio.Lock()
        self._bulk = True
        # Concurrent writers collide on SQLite and wait for each other's locks: four launches
        # took 2 to 6 s side by side, and 0.4 s one after another.
        self._writers = Writers()
        self._bulk_creation = BulkCreation(
            client, self._writers, self.read_runs, self._read_schema, _tracking_task
        )
        self._creations = Batches(self._create_in_bulk, limit=BULK_CREATION_LIMIT)
        self._one_alone = anyio.Lock()
        self._one_inline = anyio.Lock()

    async def close(self) -> None:
        """Create nothing more; the client belongs to who opened it."""
        await self._creations.close()

    async def read_deployment(
        self, target: str | UUID, is_wanted: Callable[[], bool] = lambda: True
    ) -> Deployment | None:
        """Return a deployment by id or by *flow/deployment* name, looked up every few seconds.

        Args:
            target: The id or the name.
            is_wanted: Tells, when its turn has come, whether anybody still wants to know.

        Returns:
            The deployment; `None` if nobody wants to know any more.

        Raises:
            DeploymentNotFoundError: If the server has none.
        """
        async with self._lookup:
            if not is_wanted():
                return None
            until, deployment = self._deployments.get(target, (0.0, None))
            if deployment is None or until < monotonic():
                deployment = await self._find(target)
                known = _DEPLOYMENT_SECONDS if deployment.is_served else _UNSERVED_SECONDS
                until = monotonic() + known
                self._deployments[target] = self._deployments[deployment.id] = (until, deployment)
            return deployment

    async def _find(self, target: str | UUID) -> Deployment:
        try:
            found: DeploymentResponse = (
                await self._client.read_deployment(target)
                if isinstance(target, UUID)
                else await self._client.read_deployment_by_name(target)
            )
        except ObjectNotFound as exc:
            raise DeploymentNotFoundError(
                f"The server at {self._client.api_url} has no deployment {str(target)!r}. "
                "List them with: prefect deployment ls"
            ) from exc
        name = str(target)
        if isinstance(target, UUID):
            flow = await self._client.read_flow(found.flow_id)
            name = f"{flow.name}/{found.name}"
        return Deployment(
            id=found.id,
            name=name,
            version=found.version,
            is_served=_is_served(found),
            schema=parameter_schema(found),
        )

    async def create_deployment_run(
        self, deployment: Deployment, request: RunRequest
    ) -> FlowRun | None:
        """Create a deployment's run, or return the one that the same key made before.

        Those that are asked for in the same instant are created together.

        Returns:
            The run; `None` if nobody wanted it any more when its turn had come.

        Raises:
            ParametersError: If the deployment's schema refuses the parameters.
        """
        run = await self._creations.submit(deployment.id, (deployment, request))
        return run or await self._create_alone(deployment, request)

    async def _create_in_bulk(
        self, items: Sequence[tuple[Deployment, RunRequest]]
    ) -> list[FlowRun | None]:
        found = await self._bulk_creation.create(items[0][0], [request for _, request in items])
        return [found.get(request.idempotency_key) for _, request in items]

    async def _read_schema(self, deployment: Deployment) -> ParameterSchema | None:
        """Return a deployment's schema; thousands of launches take longer than it may be known."""
        if deployment.schema is None:
            return None
        try:
            found = await self.read_deployment(deployment.id)
        except (PrefectHTTPStatusError, DeploymentNotFoundError):
            return None
        return found.schema if found else None

    async def _create_alone(self, deployment: Deployment, request: RunRequest) -> FlowRun | None:
        """Create what was not created in bulk: one after the other, the first come first."""
        async with self._one_alone:
            return await self._create_run(deployment, request) if request.begin() else None

    async def _create_run(self, deployment: Deployment, request: RunRequest) -> FlowRun:
        task = _tracking_task(deployment)
        parent = await self._track(task, request) if request.is_linked else None
        return await self._write(
            lambda: self._client.create_flow_run_from_deployment(
                deployment.id,
                parameters=dict(request.parameters),
                state=Scheduled(scheduled_time=request.scheduled_time or utc_now()),
                name=request.name,
                tags=request.tags,
                idempotency_key=request.idempotency_key,
                parent_task_run_id=parent,
                work_queue_name=request.work_queue_name,
                job_variables=dict(request.job_variables) if request.job_variables else None,
                labels=dict(request.labels),
            ),
        )

    async def create_inline_run(self, flow: Flow[..., Any], request: RunRequest) -> FlowRun | None:
        """Create the run of a flow that is about to run in this process, if somebody wants it.

        Prefect's engine would create it without labels or key, and would hand a retried parent
        another child's result, because it matches by position (flow_engine.py,
        `load_subflow_run`); under a run of ours it does neither.
        """
        # One is created before the next is begun: it can run while the others wait.
        async with self._one_inline:
            return await self._create_inline(flow, request) if request.begin() else None

    async def _create_inline(self, flow: Flow[..., Any], request: RunRequest) -> FlowRun:
        parent = await self._track(_tracking_task(flow), request)
        if flow.name not in self._flow_ids:
            self._flow_ids[flow.name] = await self._write(
                lambda: self._client.create_flow_from_name(flow.name)
            )
        body = FlowRunCreate(
            flow_id=self._flow_ids[flow.name],
            flow_version=flow.version,
            name=request.name,
            parameters=flow.serialize_parameters(dict(request.parameters)),
            tags=list(request.tags),
            labels=dict(request.labels),
            parent_task_run_id=parent,
            idempotency_key=request.idempotency_key,
            state=to_state_create(Pending()),
            empirical_policy=FlowRunPolicy(
                retries=flow.retries, retry_delay=int(flow.retry_delay_seconds or 0)
            ),
        ).model_dump(mode="json", exclude_unset=True)
        response = await self._write(lambda: self._client.request("POST", "/flow_runs/", json=body))
        run = FlowRun.model_validate(response.json())
        run.parameters = dict(request.parameters)
        return run

    async def _track(self, task: Task[..., Any], request: RunRequest) -> UUID:
        """Create the task run that links a child to its parent, as `run_deployment` does."""
        tracking = await self._write(
            lambda: self._client.create_task_run(
                task=task,
                flow_run_id=request.parent_run_id,
                dynamic_key=request.tracking_key,
                id=request.tracking_id,
                task_inputs=dict(request.task_inputs),
                state=Pending(),
            )
        )
        return tracking.id

    async def _write(self, request: Callable[[], Awaitable[T]]) -> T:
        """Make a request for a launch, one at a time unless the server takes several.

        Raises:
            ParametersError: If the server says that the parameters do not fit.
        """
        try:
            async with self._writers.write:
                return await request()
        except PrefectHTTPStatusError as exc:
            if exc.response.status_code in {400, 409, 422}:
                raise ParametersError(f"The server refused the run: {_detail(exc)}") from exc
            raise

    async def read_runs(self, run_ids: Iterable[UUID]) -> list[FlowRun]:
        """Return the runs of these ids that the server knows."""
        found: list[FlowRun] = []
        for chunk in _chunks(run_ids, _PAGE):
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=chunk))
            found += await self._read(chosen, at_most=len(chunk))
        return found

    async def read_tagged(self, tag: str, *, live_only: bool) -> list[FlowRun]:
        """Return all runs with a tag."""
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=LIVE_STATES))
        return await self._read(
            FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=state if live_only else None)
        )

    async def read_children(self, parents: Iterable[UUID]) -> list[FlowRun]:
        """Return the direct children of these runs, by Prefect's own parent link."""
        found: list[FlowRun] = []
        for chunk in _chunks(parents, _PAGE):
            found += await self._read(_children_of(chunk))
        return found

    async def visit_children(
        self,
        parents: Sequence[UUID],
        visit: Visit,
        *,
        only: Literal["live", "over"] | None = None,
        since: datetime | None = None,
    ) -> None:
        """Read the direct children of these runs, and keep none: there may be 100,000.

        Args:
            parents: The runs, so many that one request may name them all.
            visit: Called with each page as it comes; a run may be on more than one.
            only: Leave the others out.
            since: By the server's clock: leave out what had ended before, and what has not ended.
        """
        await self._read_pages(_children_of(parents, only=only, since=since), visit)

    async def count_ended(self, parent: UUID, among: Sequence[UUID] | None = None) -> int:
        """Return how many direct children of a run are over: of these runs, or of all."""
        ended = _children_of([parent], only="over")
        if among is None:
            return await self._client.count_flow_runs(flow_run_filter=ended)
        count = 0
        for chunk in _chunks(among, _COUNTED):
            ended.id = FlowRunFilterId(any_=chunk)
            count += await self._client.count_flow_runs(flow_run_filter=ended)
        return count

    async def read_parents(self, runs: Iterable[FlowRun]) -> dict[UUID, UUID]:
        """Return the id of each run's parent run, for those that have one."""
        tracked = {run.id: run.parent_task_run_id for run in runs if run.parent_task_run_id}
        owners: dict[UUID, UUID] = {}
        for chunk in _chunks(set(tracked.values()), _PAGE):
            tasks = await self._client.read_task_runs(
                task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=chunk)), limit=_PAGE
            )
            owners |= {task.id: task.flow_run_id for task in tasks if task.flow_run_id}
        return {run: owners[task] for run, task in tracked.items() if task in owners}

    async def _read(self, run_filter: FlowRunFilter, *, at_most: float = math.inf) -> list[FlowRun]:
        found: dict[UUID, FlowRun] = {}

        async def keep(page: list[FlowRun]) -> None:
            found.update((run.id, run) for run in page)

        await self._read_pages(run_filter, keep, at_most=at_most)
        return list(found.values())

    async def _read_pages(
        self, run_filter: FlowRunFilter, visit: Visit, *, at_most: float = math.inf
    ) -> None:
        """Read all pages of what a filter chooses.

        Runs leave a filter for live ones while its pages are read, and all that come after them
        move up. So every page begins with a run that is known; one that does not is read again
        from further up.
        """
        known: set[UUID] = set()
        overlap = back = max(1, _PAGE // 10)
        offset = 0
        while True:
            page = await self._client.read_flow_runs(
                flow_run_filter=run_filter,
                sort=FlowRunSort.ID_DESC,
                limit=_PAGE,
                offset=offset,
            )
            if offset and (not page or page[0].id not in known):
                offset, back = max(0, offset - back), 2 * back
                continue
            known.update(run.id for run in page)
            await visit(page)
            if len(page) < _PAGE or len(known) >= at_most:
                return
            offset, back = offset + _PAGE - overlap, overlap

    async def request_cancel(self, run_ids: Sequence[UUID], message: str) -> list[Ack]:
        """Propose `Cancelling` to many runs, 50 a request.

        Never forced: a forced `Cancelling` resurrects a run that is over. The server turns a
        run that has not started straight into `Cancelled`, and leaves a terminal one alone.
        """
        return await self._propose(run_ids, Cancelling(message=message))

    async def _propose(self, run_ids: Sequence[UUID], state: State[Any]) -> list[Ack]:
        """Propose a state to many runs, in chunks; one run's refusal is no other's."""
        acks: list[Ack] = []
        for chunk in _chunks(run_ids, CHUNK):
            acks += await self._propose_to_chunk(chunk, state)
        return acks

    async def _propose_to_chunk(self, run_ids: list[UUID], state: State[Any]) -> list[Ack]:
        proposed = StateCreate(type=state.type, name=state.name, message=state.message)
        body = {
            "flow_runs": {"id": {"any_": [str(run_id) for run_id in run_ids]}},
            "state": proposed.model_dump(mode="json", exclude_unset=True),
            "limit": CHUNK,
        }
        if self._bulk:
            try:
                response = await self._client.request("POST", _BULK_ROUTE, json=body)
            except PrefectHTTPStatusError as exc:
                if exc.response.status_code not in {403, 404, 405, 501}:
                    return await self._propose_to_halves(run_ids, state, exc)
                self._bulk = False  # before 3.6.16, or not offered here
            else:
                return _read_acks(run_ids, response.json()["results"])
        return [await self._propose_to_one(run_id, state) for run_id in run_ids]

    async def _propose_to_halves(
        self, run_ids: list[UUID], state: State[Any], exc: PrefectHTTPStatusError
    ) -> list[Ack]:
        """Ask for all but those that the server fails at: one run must not keep 49 others alive.

        Raises:
            PrefectHTTPStatusError: If it is not for a run's sake that the server refuses.
        """
        if exc.response.status_code in {_UNAUTHORIZED, 429, 503}:
            raise exc
        if len(run_ids) == 1:
            return [Ack(run_ids[0], None, _detail(exc))]
        middle = len(run_ids) // 2
        first = await self._propose_to_chunk(run_ids[:middle], state)
        return first + await self._propose_to_chunk(run_ids[middle:], state)

    async def _propose_to_one(self, run_id: UUID, state: State[Any]) -> Ack:
        try:
            answer = await self._client.set_flow_run_state(run_id, state)
        except ObjectNotFound:
            return Ack(run_id, None, "the server no longer knows the run")
        except PrefectHTTPStatusError as exc:
            if exc.response.status_code == _UNAUTHORIZED:
                raise
            return Ack(run_id, None, _detail(exc))
        if answer.state is not None:
            return Ack(run_id, answer.state)
        # An abort carries no state: the run is over, or refuses; a read tells which.
        (run,) = await self.read_runs([run_id]) or (None,)
        return Ack(run_id, run.state if run else None, "aborted")

    async def close_run(
        self, run_id: UUID, message: str, *, as_: Closing = "cancelled"
    ) -> State | None:
        """Write a last state over a run that is known to have no process."""
        return (await self._client.set_flow_run_state(run_id, closing(as_, message))).state

    async def close_runs(self, run_ids: Sequence[UUID], message: str) -> list[Ack]:
        """Write `Cancelled` over many runs that are known to have no process."""
        return await self._propose(run_ids, closing("cancelled", message))

    async def nudge(self, run_ids: Sequence[UUID]) -> None:
        """Tell runners once more that runs are to be cancelled, without touching their states.

        A runner drops the notice of a run whose process it has not registered yet, and never
        looks again (runner/_cancellation_manager.py, "no process was found").
        """
        for chunk in _chunks(run_ids, CHUNK):
            events = [_notice(run_id) for run_id in chunk]
            await self._client.request("POST", "/events", json=events)

    async def server_time(self) -> datetime | None:
        """Return the time by the server's clock; `None` if it does not tell."""
        response = await self._client.request("GET", "/hello")
        said = response.headers.get("date")
        return _time_of(said) if said else None

    async def read_limits(self, run: FlowRun) -> list[Limit]:
        """Return what limits how many runs like this one may be at work at once."""
        limits: list[Limit] = []
        if run.deployment_id is not None:
            deployment = await self._client.read_deployment(run.deployment_id)
            found = deployment.global_concurrency_limit
            if found is not None:
                limits.append(Limit("deployment", deployment.name, found.limit))
        if run.work_pool_name is not None:
            pool = await self._client.read_work_pool(run.work_pool_name)
            if pool.concurrency_limit is not None:
                limits.append(Limit("work pool", pool.name, pool.concurrency_limit))
        if run.work_queue_id is not None:
            queue = await self._client.read_work_queue(run.work_queue_id)
            if queue.concurrency_limit is not None:
                limits.append(Limit("work queue", queue.name, queue.concurrency_limit))
        return limits

    async def label(self, run_id: UUID, labels: Mapping[str, Any]) -> None:
        """Add labels to a run."""
        await self._client.update_flow_run_labels(run_id, dict(labels))

    async def tag(self, run_id: UUID, tags: Sequence[str]) -> None:
        """Replace the tags of a run."""
        await self._client.update_flow_run(run_id, tags=tags)

    async def cut_loose(self, run: FlowRun, labels: Mapping[str, Any]) -> None:
        """Label a run, and cut its link to its parent.

        The server's own cascade cancels whatever is linked to a run that is `Cancelled`. The
        link is the tracking task run; deleting it leaves the child without a parent.
        """
        await self.label_for_good(run.id, labels)
        if run.parent_task_run_id is not None:
            with suppress(ObjectNotFound):
                await self._client.delete_task_run(run.parent_task_run_id)

    async def label_for_good(self, run_id: UUID, labels: Mapping[str, Any]) -> None:
        """Add labels and see that they are there.

        The server merges labels by reading and writing them, so of two requests at a time one
        may be lost (server/models/flow_runs.py, `update_flow_run_labels`).
        """
        for _ in range(_LABEL_ATTEMPTS):
            await self.label(run_id, labels)
            (run,) = await self.read_runs([run_id]) or (None,)
            if run is None or labels.items() <= run.labels.items():
                return

    @asynccontextmanager
    async def subscribe(self, resources: Sequence[str]) -> AsyncIterator[AsyncIterator[RunEvent]]:
        """Open a stream of the changes of state that involve any of these resources.

        `any_resource`, because the server does not apply `related` to live streams. The stream
        may drop, repeat, replay and end; it never proves anything.
        """
        chosen = EventAnyResourceFilter(id=list(resources))
        async with _stream(EventFilter(event=_CHANGES, any_resource=chosen)) as events:
            yield events

    @asynccontextmanager
    async def subscribe_all(self) -> AsyncIterator[AsyncIterator[RunEvent]]:
        """Open a stream of the changes of state of all runs; see `subscribe`."""
        async with _stream(EventFilter(event=_CHANGES)) as events:
            yield events


# Who has created a run knows of it. That hundreds of them are there took the server, which was
# still creating others, and this process 2 ms each to tell.
_CHANGES = EventNameFilter(
    prefix=["prefect.flow-run."], exclude_name=["prefect.flow-run.Scheduled"]
)


@asynccontextmanager
async def _stream(chosen: EventFilter) -> AsyncIterator[AsyncIterator[RunEvent]]:
    async with get_events_subscriber(chosen, reconnection_attempts=0) as subscriber:
        yield _run_events(subscriber)


_BULK_ROUTE: Any = "/flow_runs/bulk_set_state"  # not in the client's Literal of routes


async def _run_events(events: AsyncIterator[Event]) -> AsyncIterator[RunEvent]:
    async for event in events:
        state_type = event.resource.get("prefect.state-type")
        if state_type is not None:
            run_id = event.resource.id.removeprefix("prefect.flow-run.")
            yield RunEvent(
                UUID(run_id),
                StateType(state_type),
                event.resource.get("prefect.state-name"),
                event.occurred,
            )


def _children_of(
    parents: Sequence[UUID],
    *,
    only: Literal["live", "over"] | None = None,
    since: datetime | None = None,
) -> FlowRunFilter:
    """Return a filter for the direct children of these runs, by Prefect's own parent link."""
    chosen = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=list(parents)),
    )
    if only is not None:
        types = LIVE_STATES if only == "live" else _OVER_STATES
        chosen.state = FlowRunFilterState(type=FlowRunFilterStateType(any_=types))
    if since is not None:
        chosen.end_time = FlowRunFilterEndTime.model_validate({"after_": since})
    return chosen


def _is_served(found: DeploymentResponse) -> bool:
    """Whether something may pick the deployment's runs up, as far as the server knows.

    `serve` pauses its deployments when it ends, and a minute later the server calls them not ready;
    before that, it may just be starting again. Of one that is only paused the schedules are held
    back, and what is launched runs; the runs of a work pool wait for a worker (3.9.1).
    """
    is_silent = found.status is DeploymentStatus.NOT_READY
    return not (found.paused and is_silent and found.work_pool_name is None)


def _time_of(said: str) -> datetime | None:
    """Return the time of a `Date` header; proxies may have repeated or broken it."""
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


def _nothing() -> None:
    """Stand in for the function of a tracking task, which never runs."""


def _tracking_task(target: Deployment | Flow[..., Any]) -> Task[..., Any]:
    """Return the task whose runs link children to their parent."""
    return _tracking_task_named(target.name, target.version)


@functools.lru_cache
def _tracking_task_named(name: str, version: str | None) -> Task[..., Any]:
    task = Task[..., Any](name=name, fn=_nothing, version=version)
    task.task_key = f"supervised.spawn.{slugify(name)}"
    return task


def _chunks(items: Iterable[T], size: int) -> Iterable[list[T]]:
    everything = list(items)
    return (everything[start : start + size] for start in range(0, len(everything), size))


def _notice(run_id: UUID) -> dict[str, Any]:
    """Return the event that runners hear of when a run is to be cancelled."""
    return {
        "id": str(uuid4()),
        "occurred": utc_now().isoformat(),
        "event": "prefect.flow-run.Cancelling",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run_id}"},
        "payload": {"supervised": "repeated for a runner that was not ready"},
    }


def _read_acks(run_ids: Sequence[UUID], results: list[dict[str, Any]]) -> list[Ack]:
    answers = {UUID(result["flow_run_id"]): result for result in results}
    acks: list[Ack] = []
    for run_id in run_ids:
        result = answers.get(run_id)
        if result is None:
            acks.append(Ack(run_id, None, "the server no longer knows the run"))
            continue
        state = State.model_validate(result["state"]) if result.get("state") else None
        acks.append(Ack(run_id, state, str((result.get("details") or {}).get("reason") or "")))
    return acks


def is_refusal(exc: Exception) -> bool:
    """Whether the server will refuse a request again that it has refused with this."""
    if not isinstance(exc, PrefectHTTPStatusError):
        return False
    status = exc.response.status_code
    return status in range(400, 500) and status not in _TRY_AGAIN


def _detail(exc: PrefectHTTPStatusError) -> str:
    try:
        return str(exc.response.json().get("detail", exc))
    except ValueError:
        return str(exc)
