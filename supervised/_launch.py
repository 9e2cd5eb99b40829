"""Launching: from an admitted child to a run that exists, and inline to code that runs."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import anyio
import attrs
import httpx
from prefect.context import TagsContext
from prefect.flows import Flow
from prefect.utilities.callables import get_call_parameters
from pydantic_core import PydanticSerializationError, to_jsonable_python
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential, wait_random

from supervised import _clock, _compat, _identity
from supervised._api import Deployment, Orchestrator, RunRequest
from supervised._errors import (
    DeploymentPausedError,
    InvalidTargetError,
    ParametersError,
    ServerUnreachableError,
    SpawnError,
)
from supervised._log import get_logger
from supervised._policy import outcome_of

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from prefect.client.schemas.objects import FlowRun

    from supervised._child import Child

logger = get_logger("prefect.supervised.launch")

T = TypeVar("T")
_PATIENCE_SECONDS = 30.0


@attrs.frozen(kw_only=True)
class LaunchSpec:
    """What the user asked for, apart from what the child's handle knows."""

    target: Flow[..., Any] | str | UUID
    parameters: Mapping[str, Any]
    lineage: _identity.Lineage
    run_name: str | None
    tags: tuple[str, ...]
    task_inputs: Mapping[str, Any]
    context: contextvars.Context
    home_loop: asyncio.AbstractEventLoop | None
    lease_seconds: float
    scheduled_time: datetime | None = None
    work_queue_name: str | None = None
    job_variables: Mapping[str, Any] | None = None


def check_target(target: object) -> Flow[..., Any] | str | UUID:
    """Return a target that can be spawned.

    Raises:
        InvalidTargetError: If it is neither a flow nor the name or id of a deployment.
    """
    if isinstance(target, Flow):
        if target.isgenerator:
            raise InvalidTargetError(
                f"Flow {target.name!r} is a generator: it has no one result to wait for. "
                "Iterate over it in the body, or spawn a flow that does."
            )
        return target
    if isinstance(target, UUID):
        return target
    if isinstance(target, str):
        try:
            return UUID(target)
        except ValueError:
            if target.count("/") == 1 and all(target.split("/")):
                return target
    kind = f" ({type(target).__name__})" if not isinstance(target, str) else ""
    raise InvalidTargetError(
        f"Cannot spawn {target!r}{kind}: give a flow, a deployment's 'flow-name/deployment-name', "
        "or its id."
    )


def target_name(target: Flow[..., Any] | str | UUID) -> str:
    """Return the name under which people know the target."""
    return target.name if isinstance(target, Flow) else str(target)


def code_of(target: Flow[..., Any] | str | UUID) -> str:
    """Return what tells two flows of one name apart; nothing for deployments."""
    if not isinstance(target, Flow):
        return ""
    return f"{target.fn.__module__}.{target.fn.__qualname__}"


def check_tags(target: str, tags: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tags of a child.

    Raises:
        SpawnError: If they are not a sequence of strings.
    """
    if isinstance(tags, str) or not isinstance(tags or (), Iterable):
        kind = type(tags).__name__
        raise SpawnError(f"tags must be a list of strings; got {kind} {tags!r}", child=target)
    return tuple(tags or ())


def freeze_parameters(
    target: Flow[..., Any] | str | UUID, parameters: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return parameters that later changes by the caller do not reach.

    What a deployment is given travels as JSON, so it is made that at once; what has no JSON form
    is left for the launch to refuse. An inline flow gets the caller's very objects, as by a call.

    Raises:
        ParametersError: If they are not a mapping from names.
    """
    given = parameters if parameters is not None else {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ParametersError(
            f"The parameters for {target_name(target)!r} must be a dict with the parameters' names "
            f"as keys; got {type(given).__name__} {given!r:.80}",
            child=target_name(target),
        )
    given = dict(given)
    if isinstance(target, Flow):
        return given
    try:
        frozen: dict[str, Any] = to_jsonable_python(given)
    except (PydanticSerializationError, ValueError, RecursionError):
        return given
    return frozen


def bind_parameters(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with the flow's defaults filled in.

    Raises:
        ParametersError: If a name is unknown or missing.
    """
    try:
        return get_call_parameters(flow.fn, (), dict(parameters))
    except Exception as exc:
        raise ParametersError(
            f"Parameters {sorted(parameters)} do not fit flow {flow.name!r}"
            f"{inspect.signature(flow.fn)}: {exc}",
            child=flow.name,
        ) from exc


class Launcher:
    """Brings the children of one scope to life; lives in the control plane.

    Args:
        api: The seam to Prefect.
        run: The supervised run.
        max_concurrent: Children launched and not over at any one time; `None` for no limit.
        call_soon: Calls something in the control plane's loop, from any thread.
    """

    def __init__(
        self,
        api: Orchestrator,
        *,
        run: FlowRun,
        max_concurrent: int | None,
        call_soon: Callable[[Callable[[], object]], object],
    ) -> None:
        self._api = api
        self._run = run
        self._call_soon = call_soon
        self._slots = anyio.Semaphore(max_concurrent) if max_concurrent is not None else None
        self._earlier: dict[str, FlowRun] | None = None

    async def launch(self, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
        """Give the child a run: one that an earlier attempt left alive, or a new one.

        A failure becomes the child's outcome. A cancellation that came first wins: before the
        run exists there is nothing to ask the server for.

        Returns:
            The run, or `None` if there will be none.
        """
        await self._take_slot(child)
        if child.is_over:
            return None
        try:
            await _wait_for_its_time(child, spec)
            run = await patiently(lambda: self._adopt_earlier(child, spec)) or await patiently(
                lambda: self._create(child, spec)
            )
        except SpawnError as exc:
            exc.child = child.name
            child.settle("failed", exception=exc)
            return None
        except Exception as exc:
            failure = SpawnError(
                f"Launching child {child.name!r} failed: {exc!r}", child=child.name
            )
            failure.__cause__ = exc
            child.settle("failed", exception=failure)
            return None
        if run is not None:
            child.assign_run(run)
        return run

    async def _take_slot(self, child: Child[Any]) -> None:
        """Wait for one of `max_concurrent` slots; the child gives it back when it is over."""
        slots = self._slots
        if slots is None:
            return
        child.is_queued = True
        if child.cancel_reason is not None:
            child.settle("cancelled")
            return
        await slots.acquire()
        child.is_queued = False
        child.when_over(lambda: self._call_soon(slots.release))

    async def _adopt_earlier(self, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
        """Find what an earlier attempt of this run made of the same key.

        A live deployment run is taken over. Anything else gets the next generation, because the
        server returns a terminal run for a key that it knows.
        """
        if self._run.run_count <= 1:
            return None
        if self._earlier is None:
            runs = await self._api.read_children([self._run.id])
            runs.sort(key=_generation)
            self._earlier = {str(run.labels.get(_identity.KEY)): run for run in runs}
        earlier = self._earlier.get(child.key)
        if earlier is None or earlier.state is None:
            return None
        is_live = outcome_of(earlier.state, asked=False) is None
        if is_live and not isinstance(spec.target, Flow) and not earlier.state.is_cancelling():
            child.generation = _generation(earlier)
            return earlier
        child.generation = _generation(earlier) + 1
        return None

    async def _create(self, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
        """Create the run, under the first generation of its key that has not been used up.

        A resumed run counts as the same attempt, so only the answer tells that a key was used.
        """
        while True:
            run = await _create(self._api, child, spec)
            if run is None or not _is_used_up(run):
                return run
            child.generation += 1


async def patiently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request that a child depends on; wait out a server that cannot be reached.

    Raises:
        ServerUnreachableError: If it stays unreachable for 30 s.
    """
    until = _clock.monotonic() + _PATIENCE_SECONDS
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(httpx.TransportError),
        wait=wait_exponential(multiplier=0.2, max=3) + wait_random(0, 0.3),
        stop=lambda _: _clock.monotonic() > until,
        reraise=True,
    )
    try:
        async for attempt in retrying:
            with attempt:
                return await request()
    except httpx.TransportError as exc:
        raise ServerUnreachableError(
            f"The Prefect server did not answer for {_PATIENCE_SECONDS:.0f} s "
            f"({type(exc).__name__}: {exc}). Check that it runs, and PREFECT_API_URL."
        ) from exc
    raise AssertionError("unreachable")  # pragma: no cover - tenacity re-raises


def _is_used_up(run: FlowRun) -> bool:
    """Whether the server answered with a run that an earlier attempt left behind."""
    if run.state is None:
        return False
    if run.deployment_id is None:
        return not run.state.is_pending()
    return run.state.is_final() or run.state.is_cancelling()


def _generation(run: FlowRun) -> int:
    return int(run.labels.get(_identity.GENERATION, 0))


async def _create(api: Orchestrator, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
    if isinstance(spec.target, Flow):
        return await _create_inline(api, child, spec, spec.target)
    return await _create_deployed(api, child, spec, spec.target)


async def _create_deployed(
    api: Orchestrator, child: Child[Any], spec: LaunchSpec, target: str | UUID
) -> FlowRun | None:
    deployment = await api.read_deployment(target)
    if deployment.paused:
        raise DeploymentPausedError(
            f"Deployment {deployment.name!r} is paused, so nothing would pick the run up. "
            "Serve it again, or resume it in the UI."
        )
    if child.span is not None:
        child.span.rename(deployment.name.split("/")[0], deployment.name)
    if unknown := _unknown_parameters(deployment, spec.parameters):
        raise ParametersError(
            f"Deployment {deployment.name!r} takes no parameter {', '.join(map(repr, unknown))}. "
            f"It takes: {', '.join(deployment.parameters or ()) or 'none'}."
        )
    if _cancelled_early(child):
        return None
    child.was_requested = True
    return await api.create_deployment_run(deployment, _request(child, spec, deployment))


async def _create_inline(
    api: Orchestrator, child: Child[Any], spec: LaunchSpec, flow: Flow[..., Any]
) -> FlowRun | None:
    parameters = bind_parameters(flow, spec.parameters)
    if _cancelled_early(child):
        return None
    child.was_requested = True
    request = attrs.evolve(_request(child, spec), parameters=parameters)
    return await api.create_inline_run(flow, request)


def _unknown_parameters(deployment: Deployment, given: Mapping[str, Any]) -> list[str]:
    """Return the names that the flow cannot take; none if it may take any (`**kwargs`)."""
    takes = deployment.parameters
    if takes is None or None in takes.values():
        return []
    return sorted(set(given) - set(takes))


async def _wait_for_its_time(child: Child[Any], spec: LaunchSpec) -> None:
    """Wait for the time at which an inline child is to start, or for its cancellation.

    Raises:
        ParametersError: If it could not be started then.
    """
    if spec.scheduled_time is None or not isinstance(spec.target, Flow):
        return  # deployments wait on the server
    bind_parameters(spec.target, spec.parameters)
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    child.when_over(lambda: loop.call_soon_threadsafe(over.set))
    child.is_queued = True
    if child.cancel_reason is not None:
        child.settle("cancelled")
    with anyio.move_on_after(max(0.0, (spec.scheduled_time - _clock.utc_now()).total_seconds())):
        await over.wait()
    child.is_queued = False


def _cancelled_early(child: Child[Any]) -> bool:
    """Whether there is nothing left to launch, and nothing has been.

    A request that was not answered may have been carried out; only asking again tells.
    """
    if child.was_requested:
        return False
    if child.cancel_reason is not None:
        child.settle("cancelled")
    return child.is_over


def _request(
    child: Child[Any], spec: LaunchSpec, deployment: Deployment | None = None
) -> RunRequest:
    labels = _identity.child_labels(
        spec.lineage,
        key=child.key,
        generation=child.generation,
        on_parent=child.on_parent,
        lease_seconds=spec.lease_seconds,
    )
    if child.span is not None and (traceparent := child.span.traceparent) is not None:
        labels[_compat.TRACEPARENT_LABEL] = traceparent
    detached = labels.get(_identity.DETACHED, False)
    # A detached child is nobody's to tear down, so nothing that finds a tree may find it.
    ours = () if detached else (_identity.COMMON_TAG, spec.lineage.tag)
    return RunRequest(
        name=spec.run_name,
        parameters=spec.parameters,
        tags=(*spec.tags, *ours),
        labels=labels,
        idempotency_key=_identity.idempotency_key(spec.lineage.run_id, child.key, child.generation),
        parent_run_id=spec.lineage.run_id,
        tracking_key=f"{child.key}:{child.generation}",
        tracking_id=child.new_tracking_id(),
        # Prefect's own cascade follows the link of every run that is cancelled.
        is_linked=not detached and child.on_parent["cancelled"] != "detach",
        task_inputs=spec.task_inputs,
        scheduled_time=spec.scheduled_time if deployment is not None else None,
        work_queue_name=spec.work_queue_name,
        job_variables=spec.job_variables,
    )


def ambient_tags(target: Flow[..., Any] | str | UUID) -> tuple[str, ...]:
    """Return the tags of `prefect.tags(...)`, which Prefect applies to inline runs only."""
    return tuple(sorted(TagsContext.get().current_tags)) if isinstance(target, Flow) else ()
