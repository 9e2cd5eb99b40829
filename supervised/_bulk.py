"""Many runs in few requests: what the launch of many children asks of the server.

By one request each, a run of a deployment costs three: its tracking task run, itself, and what the
client asks before. In bulk a hundred cost ten or so. Nothing here has to succeed: what the server
has not made in bulk, whatever the reason, is left to be asked for by itself.
"""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import attrs
from anyio.lowlevel import checkpoint
from prefect.client.schemas.actions import DeploymentFlowRunCreate
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Pending, Scheduled, to_state_create

from supervised import _clock
from supervised import _compat as compat
from supervised._log import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    import httpx
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.tasks import Task

    from supervised._api import Deployment, RunRequest
    from supervised._schema import ParameterSchema
    from supervised._writers import Writers

logger = get_logger("prefect.supervised.launch")

LIMIT = 100
"""How many runs one request may create (server/api/deployments.py, `BULK_CREATE_LIMIT`)."""

_FEW = 10  # fewer are quicker one by one: a busy server may take seconds to record events
_PAGE = 200
_PAUSES = (0.0, 0.2, 0.5)  # before each attempt: on SQLite a writer in between makes all of it fail
_RECORDED_SECONDS = 3.0
_RECORDED_SECONDS_EACH = 0.05  # a busy server needs 20 ms
_LOOK_SECONDS = 0.03  # each takes a server that is busy recording 20 ms
_MOST_LOOK_SECONDS = 1.0
_RECOVERY_SECONDS = 60.0  # for a server that does not record events, or is far behind
_CHECK_SECONDS = 0.1  # for a batch; half a millisecond each, if it is models that are checked
_MISSING = {403, 404, 405, 501}
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that is a proxy's, not the server's."""


@attrs.frozen
class Look:
    """What a look has found.

    Args:
        taken: Seconds since the events were sent.
        recorded: How many of them have been recorded.
    """

    taken: float = 0.0
    recorded: int = 0


@attrs.define
class Looks:
    """When to look whether events have been recorded: about when they will have been.

    A server begins late, by 0.3 s if they are its first, and then takes as long for one as for
    another. So two looks tell when it will be ready, and the first is one of them.

    Args:
        each: Seconds that it takes for one, once it has begun.
    """

    each: float = 0.004

    def first(self, count: int) -> float:
        """Return the seconds before the first look."""
        return _bounded(count * self.each)

    def again(self, count: int, before: Look, last: Look) -> float:
        """Return the seconds before the next look for so many, after these two.

        No more than a quarter of what it has taken: it may have been busy with something else.
        """
        each = (last.taken - before.taken) / max(1, last.recorded - before.recorded)
        return _bounded(min((count - last.recorded) * each, last.taken / 4))

    def learn(self, first: Look, last: Look) -> None:
        """Take note of how long it took from the first look to the last; the first may be late."""
        if last.recorded - first.recorded > _FEW:
            self.each = (last.taken - first.taken) / (last.recorded - first.recorded)
        elif first.recorded > LIMIT // 2:  # of few, most of the time is not theirs
            self.each = min(self.each, first.taken / first.recorded / 2)


def _bounded(seconds: float) -> float:
    return min(max(_LOOK_SECONDS, seconds), _MOST_LOOK_SECONDS)


@attrs.define
class BulkCreation:
    """Creates runs of deployments in bulk, as long as the server offers that.

    Args:
        client: The client.
        writers: What lets one large write through at a time, or two.
        read_runs: Reads runs by their ids.
        read_schema: Returns what a deployment's parameters have to fit now, if that is known.
        tracking_task: Returns the task whose run links a child of a deployment to its parent.
    """

    _client: PrefectClient
    _writers: Writers
    _read_runs: Callable[[Iterable[UUID]], Awaitable[list[FlowRun]]]
    _read_schema: Callable[[Deployment], Awaitable[ParameterSchema | None]]
    _tracking_task: Callable[[Deployment], Task[..., Any]]
    _is_offered: bool = True
    _events_again: float = -math.inf
    _looks: Looks = attrs.field(factory=Looks)

    async def create(
        self, deployment: Deployment, requests: Sequence[RunRequest]
    ) -> dict[str, FlowRun]:
        """Create those runs that can be created in bulk, and that somebody still wants.

        Returns:
            Each run by the idempotency key of its request. What is missing has to be asked for by
            itself, which also tells why.
        """
        if len(requests) < _FEW or not self._is_offered:
            return {}
        found: dict[str, FlowRun] = {}
        missing: Sequence[RunRequest] | None = None
        for pause in _PAUSES:
            await anyio.sleep(pause)
            # Until it has been answered; reading it may overlap. On SQLite, task runs that are sent
            # meanwhile are lost, and what is created at once after others meets their events: with
            # the task runs of both recorded first, 200 children took up to 23 s instead of 10.
            async with self._writers.turn:
                if missing is None:
                    missing = await self._tracked(
                        deployment, await self._sendable(deployment, requests)
                    )
                if len(missing) < _FEW or not self._is_offered:
                    break
                missing = [request for request in missing if request.begin()]
                if not missing:
                    break
                small = functools.partial(self._write_nothing, deployment)
                async with self._writers.large(small) as this:
                    made = await self._create(deployment, missing)
            # Read, not believed: where one of them fails for the database's sake, the whole
            # transaction is gone, whatever the answer says of the others.
            try:
                read = {str(run.idempotency_key): run for run in await self._read_runs(made)}
            except PrefectHTTPStatusError:
                logger.debug("Reading what was created failed", exc_info=True)
                break
            if not read and this.is_evidence:
                self._writers.note_lost()
            found |= read
            missing = [request for request in missing if request.idempotency_key not in found]
            if len(missing) < _FEW:
                break  # or who has a run would wait for a pause and the whole of the next batch
        return found

    async def _sendable(
        self, deployment: Deployment, requests: Iterable[RunRequest]
    ) -> list[RunRequest]:
        """Return those that are wanted and can be sent; mark whose parameters are known to fit."""
        found = [each for each in requests if each.is_wanted() and _is_sendable(each)]
        schema = await self._read_schema(deployment) if found else None
        if schema is None:
            return found
        until = _clock.monotonic() + _CHECK_SECONDS
        for at, request in enumerate(found):
            if _clock.monotonic() < until and schema.fits(request.parameters):
                found[at] = attrs.evolve(request, is_checked=True)
            await checkpoint()
        return found

    async def _tracked(
        self, deployment: Deployment, requests: Sequence[RunRequest]
    ) -> Sequence[RunRequest]:
        """Return those requests whose runs can be created: those that need one have a task run."""
        tracked = await self._track(deployment, [each for each in requests if each.is_linked])
        return [each for each in requests if not each.is_linked or each.tracking_id in tracked]

    async def _create(self, deployment: Deployment, requests: Sequence[RunRequest]) -> list[UUID]:
        try:
            response = await self._client.request(
                "POST",
                _BULK_ROUTE,
                path_params={"id": deployment.id},
                json=[create_body(request) for request in requests],
            )
        except PrefectHTTPStatusError as exc:
            logger.debug("Creating %d runs in bulk failed", len(requests), exc_info=True)
            has_route = "Deployment not found" in exc.response.text
            if exc.response.status_code in _MISSING and not has_route:
                self._is_offered = False  # before 3.6.16, or not offered here
            return []
        try:
            return _created(response)
        except _NONSENSE:
            logger.debug("What the bulk creation was answered makes no sense", exc_info=True)
            return []

    async def _write_nothing(self, deployment: Deployment) -> None:
        """Have the deployment's flow created, as whoever deploys it does: it is there already.

        It would be there again, empty, if somebody has deleted it in this instant.
        """
        await self._client.create_flow_from_name(deployment.name.split("/")[0])

    # -- tracking -------------------------------------------------------------------------------

    async def _track(self, deployment: Deployment, requests: Sequence[RunRequest]) -> set[UUID]:
        """Have tracking task runs recorded, as all task runs of Prefect 3 are: from events.

        A run is refused if its task run is not there yet, so it is waited for.

        Returns:
            The ids of those that the server has recorded.
        """
        if _clock.monotonic() < self._events_again or not requests:
            return set()
        task = self._tracking_task(deployment)
        events = [compat.task_run_event(tracking_task_run(task, each)) for each in requests]
        try:
            async with self._writers.write:
                await self._client.request("POST", "/events", json=events)
        except PrefectHTTPStatusError:
            logger.debug("Sending %d events failed", len(events), exc_info=True)
            self._events_again = _clock.monotonic() + _RECOVERY_SECONDS
            return set()
        try:
            recorded = await self._wait_until_recorded([each.tracking_id for each in requests])
        except (PrefectHTTPStatusError, *_NONSENSE):
            logger.debug("Looking for %d task runs failed", len(events), exc_info=True)
            return set()
        if len(recorded) < len(events):
            self._writers.note_lost()
        if not recorded:
            self._events_again = _clock.monotonic() + _RECOVERY_SECONDS
        return recorded

    async def _wait_until_recorded(self, ids: Sequence[UUID]) -> set[UUID]:
        """Count until all are there, which costs the server little; read only if some are not."""
        began = _clock.monotonic()
        until = began + _RECORDED_SECONDS + len(ids) * _RECORDED_SECONDS_EACH
        pause, looks = self._looks.first(len(ids)), [Look()]
        chosen = TaskRunFilter(id=TaskRunFilterId(any_=list(ids)))
        body = {"task_runs": chosen.model_dump(mode="json", exclude_unset=True)}
        while _clock.monotonic() < until:
            await anyio.sleep(pause)
            response = await self._client.request("POST", "/task_runs/count", json=body)
            looks.append(Look(_clock.monotonic() - began, response.json()))
            if looks[-1].recorded == len(ids):
                self._looks.learn(looks[1], looks[-1])
                return set(ids)
            pause = self._looks.again(len(ids), *looks[-2:])
        task_runs = await self._client.read_task_runs(task_run_filter=chosen, limit=_PAGE)
        return {task_run.id for task_run in task_runs}


_BULK_ROUTE: Any = "/deployments/{id}/create_flow_run/bulk"  # not in the client's Literal of routes


def _created(response: httpx.Response) -> list[UUID]:
    """Return the ids of the runs that a bulk creation says it has made."""
    results = response.json()["results"]
    if errors := {result["error"] for result in results if result["error"]}:
        logger.debug("Not created in bulk: %s", errors)
    return [UUID(result["flow_run_id"]) for result in results if result["flow_run_id"]]


def _is_sendable(request: RunRequest) -> bool:
    """Whether the parameters are JSON; otherwise one would fail all that are sent with it."""
    try:
        json.dumps(create_body(request), ensure_ascii=False, allow_nan=False).encode()
    except Exception:  # an object of any kind, a lone surrogate, a depth of hundreds
        return False
    return True


def create_body(request: RunRequest) -> dict[str, Any]:
    """Return what the server is sent for one run, as `create_flow_run_from_deployment` does."""
    body = DeploymentFlowRunCreate(
        parameters=dict(request.parameters),
        state=to_state_create(Scheduled(scheduled_time=request.scheduled_time or _clock.utc_now())),
        tags=list(request.tags),
        name=request.name,
        idempotency_key=request.idempotency_key,
        parent_task_run_id=request.tracking_id if request.is_linked else None,
        job_variables=dict(request.job_variables) if request.job_variables else None,
        labels=dict(request.labels),
    )
    if request.is_checked:
        body.enforce_parameter_schema = False
    if request.work_queue_name:
        body.work_queue_name = request.work_queue_name
    return body.model_dump(mode="json", exclude_unset=True)


def tracking_task_run(task: Task[..., Any], request: RunRequest) -> TaskRun:
    """Return the task run that links a child to its parent."""
    return TaskRun(
        id=request.tracking_id,
        flow_run_id=request.parent_run_id,
        task_key=task.task_key,
        dynamic_key=request.tracking_key,
        task_version=task.version,
        task_inputs=dict(request.task_inputs),
        state=Pending(),
    )
