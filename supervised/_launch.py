"""Launching: from an admitted child to a run that exists, and inline to code that runs."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import logging
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import attrs
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import TerminationSignal
from prefect.flows import Flow
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Cancelling
from prefect.types._datetime import now
from prefect.utilities.callables import get_call_parameters

from supervised import _compat, _identity
from supervised._api import Deployment, Orchestrator, RunRequest
from supervised._context import current_child
from supervised._errors import (
    DeploymentPausedError,
    InvalidTargetError,
    ParametersError,
    SpawnError,
)
from supervised._policy import outcome_of

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._child import Child

logger = logging.getLogger("prefect.supervised.launch")


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


async def launch(api: Orchestrator, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
    """Create the child's run, and start it if it is inline.

    A failure becomes the child's outcome. A cancellation that came first wins: before the run
    exists there is nothing to ask the server for.

    Returns:
        The run, or `None` if there will be none.
    """
    try:
        if isinstance(spec.target, Flow):
            run = await _create_inline(api, child, spec, spec.target)
        else:
            run = await _create_deployed(api, child, spec, spec.target)
    except SpawnError as exc:
        exc.child = child.name
        child.settle("failed", exception=exc)
        return None
    except Exception as exc:
        failure = SpawnError(f"Launching child {child.name!r} failed: {exc!r}", child=child.name)
        failure.__cause__ = exc
        child.settle("failed", exception=failure)
        return None
    if run is not None:
        child.assign_run(run)
    return run


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
    if _cancelled_early(child):
        return None
    return await api.create_deployment_run(deployment, _request(child, spec, deployment))


async def _create_inline(
    api: Orchestrator, child: Child[Any], spec: LaunchSpec, flow: Flow[..., Any]
) -> FlowRun | None:
    parameters = bind_parameters(flow, spec.parameters)
    if spec.scheduled_time is not None:
        await anyio.sleep(max(0.0, (spec.scheduled_time - now("UTC")).total_seconds()))
    if _cancelled_early(child):
        return None
    request = attrs.evolve(_request(child, spec), parameters=parameters)
    return await api.create_inline_run(flow, request)


def _cancelled_early(child: Child[Any]) -> bool:
    if child.cancel_reason is not None:
        child.settle("cancelled")
    return child.is_over


def _request(
    child: Child[Any], spec: LaunchSpec, deployment: Deployment | None = None
) -> RunRequest:
    labels = _identity.child_labels(
        spec.lineage, key=child.key, generation=child.generation, on_parent=child.on_parent
    )
    if child.span is not None and (traceparent := child.span.traceparent) is not None:
        labels[_compat.TRACEPARENT_LABEL] = traceparent
    detached = labels.get(_identity.DETACHED, False)
    # A detached child is nobody's to tear down, so nothing that finds a tree may find it.
    ours = () if detached else (spec.lineage.tag,)
    return RunRequest(
        name=spec.run_name,
        parameters=spec.parameters,
        tags=(*spec.tags, *ours),
        labels=labels,
        idempotency_key=_identity.idempotency_key(spec.lineage.run_id, child.key, child.generation),
        parent_run_id=spec.lineage.run_id,
        tracking_key=f"{child.key}:{child.generation}",
        task_inputs=spec.task_inputs,
        scheduled_time=spec.scheduled_time if deployment is not None else None,
        work_queue_name=spec.work_queue_name,
        job_variables=spec.job_variables,
    )


def ambient_tags(target: Flow[..., Any] | str | UUID) -> tuple[str, ...]:
    """Return the tags of `prefect.tags(...)`, which Prefect applies to inline runs only."""
    return tuple(sorted(TagsContext.get().current_tags)) if isinstance(target, Flow) else ()


class InlineRun:
    """One inline child's code: an async flow in the body's loop, or a sync one in a thread.

    Prefect marks a run whose task is cancelled as `Crashed`, and leaves it `Pending` if the
    cancellation hits its engine before the body. So the request is kept until the body runs,
    delivered there once, and turned into a returned `Cancelled` state.
    """

    def __init__(
        self, child: Child[Any], flow: Flow[..., Any], run: FlowRun, spec: LaunchSpec
    ) -> None:
        self._child = child
        self._run = run
        self._parameters = bind_parameters(flow, spec.parameters)
        self._spec = spec
        self._loop = spec.home_loop if flow.isasync else None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._in_body = False
        self._flow = self._guarded(flow)
        child.interrupt = self.interrupt

    def start(self) -> None:
        """Start the code where it belongs; from any thread."""
        if self._loop is None:
            self._thread = threading.Thread(
                target=self._spec.context.run,
                args=(self._run_in_thread,),
                name=f"supervised-{self._child.name}",
                daemon=True,  # a thread cannot be ended; it must not keep the process alive
            )
            self._thread.start()
            return
        self._child.home_loop = self._loop
        try:
            self._loop.call_soon_threadsafe(self._create_task)
        except RuntimeError:  # the body's loop is closed
            self._child.settle("cancelled")

    def interrupt(self, *, hard: bool = False) -> None:
        """Ask the code to stop; *hard* also where only Prefect's engine runs."""
        if self._loop is None:
            return  # sync code asks `supervised.cancelled()`
        try:
            self._loop.call_soon_threadsafe(self._cancel_task, hard)
        except RuntimeError:  # the loop is closed, and the task with it
            self._child.settle("cancelled")

    @property
    def is_running(self) -> bool:
        """Whether code of this child may still be executing."""
        if self._thread is not None:
            return self._thread.is_alive()
        return self._task is not None and not self._task.done()

    def _create_task(self) -> None:
        assert self._loop is not None
        # create_task(context=) is Python 3.11; a task copies the context it is created in.
        self._task = self._spec.context.run(self._loop.create_task, self._run_in_loop())

    def _cancel_task(self, hard: bool) -> None:
        if self._task is not None and (self._in_body or hard):
            self._task.cancel()

    async def _run_in_loop(self) -> None:
        current_child.set(self._child)
        try:
            state: State[Any] = await _compat.run_flow_inline(
                self._flow, self._run, self._parameters
            )
        except BaseException as exc:
            self._ended_by(exc)
            if isinstance(exc, Exception):
                return
            raise
        await self._ended(state)

    def _run_in_thread(self) -> None:
        # A thread has nobody to raise to; what happened is on the child.
        with contextlib.suppress(asyncio.CancelledError, TerminationSignal):
            if self._flow.isasync:
                asyncio.run(self._run_in_own_loop())
            else:
                self._run_sync()

    async def _run_in_own_loop(self) -> None:
        """Run an async flow for a sync body, which has no loop to run it in."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        await self._run_in_loop()

    def _run_sync(self) -> None:
        current_child.set(self._child)
        try:
            state: State[Any] = _compat.run_flow_inline(self._flow, self._run, self._parameters)
        except BaseException as exc:
            self._ended_by(exc)
            return
        asyncio.run(self._ended(state))

    async def _ended(self, state: State[Any]) -> None:
        outcome = outcome_of(state, asked=self._child.cancel_reason is not None)
        if outcome is None:
            # The engine gave up because the run was being cancelled behind its back.
            self._child.settle("cancelled", state=state)
        elif outcome == "completed":
            value = await state.aresult(raise_on_failure=False)
            self._child.settle(outcome, state=state, value=value)
        else:
            exception = await state.aresult(raise_on_failure=False)
            own = exception if isinstance(exception, BaseException) else None
            self._child.settle(outcome, state=state, exception=own)

    def _ended_by(self, exc: BaseException) -> None:
        """Settle a child whose engine raised instead of returning a state."""
        if isinstance(exc, (asyncio.CancelledError, TerminationSignal)):
            self._child.settle("cancelled")
        elif self._child.cancel_reason is not None:
            self._child.settle("cancelled", exception=exc)
        else:
            self._child.settle("crashed", exception=exc)

    # -- inside the child's own run -----------------------------------------------------------

    def _guarded(self, flow: Flow[..., Any]) -> Flow[..., Any]:
        """Return a copy of the flow whose function knows of cancellation."""
        guarded = copy.copy(flow)
        if self._spec.run_name is not None:
            guarded.flow_run_name = None  # an explicit name wins over the flow's template
        guarded.fn = self._guard_async(flow) if flow.isasync else self._guard_sync(flow)
        return guarded

    def _guard_sync(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        @functools.wraps(flow.fn)
        def body(*args: Any, **kwargs: Any) -> Any:
            result = None if self._begins_cancelled() else flow.fn(*args, **kwargs)
            if self._child.cancel_reason is None:
                return result
            _compat.run_coroutine(run_cancellation_hooks(flow, self._run, self._message()))
            return self._cancelled_state()

        return body

    def _guard_async(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        @functools.wraps(flow.fn)
        async def body(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            self._in_body = True
            try:
                if not self._begins_cancelled():
                    return await flow.fn(*args, **kwargs)
            except asyncio.CancelledError:
                if _own_timeout(flow, started) or self._engine_handles_it():
                    raise
                uncancel()
            finally:
                self._in_body = False
            await run_cancellation_hooks(flow, self._run, self._message())
            return self._cancelled_state()

        return body

    def _begins_cancelled(self) -> bool:
        """Take note that the body begins, and tell whether it should end at once."""
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None and context.flow_run.state:
            self._child.observe(context.flow_run.state)
        return self._child.cancel_reason is not None

    def _engine_handles_it(self) -> bool:
        """Whether a runner cancels the whole process, which Prefect's engine does right."""
        return self._child.cancel_reason is None and _compat.termination_intent() is not None

    def _message(self) -> str:
        reason = self._child.cancel_reason
        return f"Cancelled because {reason}" if reason else "Cancelled together with its parent"

    def _cancelled_state(self) -> State[Any]:
        return Cancelled(message=self._message())


def _own_timeout(flow: Flow[..., Any], started: float) -> bool:
    limit = flow.timeout_seconds
    return limit is not None and time.monotonic() - started >= limit * 0.95


def uncancel() -> None:
    """Take the cancellation as answered (Python 3.11 counts them)."""
    task: Any = asyncio.current_task()
    if task is not None and hasattr(task, "uncancel"):
        task.uncancel()


async def run_cancellation_hooks(flow: Flow[..., Any], run: FlowRun, message: str) -> None:
    """Run a flow's `on_cancellation` hooks as the engine would.

    The engine runs them only for the cancellations that it hears of itself.
    """
    hooks = flow.on_cancellation_hooks
    if not hooks:
        return
    run_logger = get_run_logger()
    state: State[Any] = Cancelling(message=message)
    for hook in hooks:
        name = getattr(hook, "__name__", type(hook).__name__)
        run_logger.info("Running hook %r in response to entering state %r", name, state.name)
        try:
            result: Any = hook(flow, run, state)
            if inspect.isawaitable(result):
                await result
        except Exception:
            run_logger.exception("An error was encountered while running hook %r", name)
        else:
            run_logger.info("Hook %r finished running successfully", name)
