"""Launching: from an admitted child to a run that exists, and inline to code that runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from uuid import UUID, uuid4

import anyio
import attrs
import httpx
from prefect.client.schemas.actions import DeploymentFlowRunCreate
from prefect.client.schemas.objects import FlowRun
from prefect.context import TagsContext
from prefect.flows import Flow
from prefect.futures import PrefectFlowRunFuture
from prefect.utilities.callables import get_call_parameters, parameters_to_args_kwargs
from pydantic_core import to_jsonable_python
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential, wait_random

from supervised import _clock, _identity
from supervised import _compat as compat
from supervised._api import Deployment, Orchestrator, RunRequest
from supervised._canonical import closure, digest, is_plain
from supervised._errors import (
    DeploymentPausedError,
    InvalidTargetError,
    ParametersError,
    RunNotFoundError,
    ScopeClosedError,
    ServerUnreachableError,
    SpawnError,
)
from supervised._log import get_logger
from supervised._policy import check_seconds, is_over, resolve_on_parent
from supervised._slots import SlotPool, Slots
from supervised._types import CancelReason

if TYPE_CHECKING:
    import contextvars
    from collections.abc import Awaitable, Callable, Sequence

    from supervised._child import Attempt, Child
    from supervised._restart import Restart
    from supervised._types import Reuse, ScopeOptions, SpawnOptions

logger = get_logger("prefect.supervised.launch")

T = TypeVar("T")
_PATIENCE_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.2
SUPERSEDED = "a later attempt of this run has begun elsewhere, and the children belong to it"


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
    pool: SlotPool = attrs.field(factory=SlotPool)
    seconds_left: Callable[[], float | None] = lambda: None
    work: str = ""
    reuse: Reuse = "never"
    id: str = attrs.field(factory=lambda: uuid4().hex)
    restart: Restart | None = None
    after: tuple[Child[Any], ...] = ()
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
        if compat.is_bound_to_infrastructure(target):
            raise InvalidTargetError(
                f"Flow {target.name!r} is bound to infrastructure, and would run here instead. "
                "Launch it with its `submit`, and hand what that returns to `supervisor.adopt`."
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


def check_run(target: object) -> UUID:
    """Return the id of a run that can be adopted.

    Raises:
        InvalidTargetError: If it is neither an id, nor a flow run, nor the future of one.
    """
    if isinstance(target, UUID):
        return target
    if isinstance(target, FlowRun):
        return target.id
    if isinstance(target, PrefectFlowRunFuture):
        return target.flow_run_id
    if isinstance(target, str):
        with contextlib.suppress(ValueError):
            return UUID(target)
    raise InvalidTargetError(
        f"Cannot adopt {target!r}: give the id of a flow run, the flow run, or the future of one, "
        "as `flow.submit()` returns it."
    )


def target_name(target: Flow[..., Any] | str | UUID) -> str:
    """Return the name under which people know the target."""
    return target.name if isinstance(target, Flow) else str(target)


def code_of(target: Flow[..., Any] | str | UUID) -> str:
    """Return what tells two flows of one name apart; nothing for deployments."""
    if not isinstance(target, Flow):
        return ""
    fn = inspect.unwrap(target.fn)
    name = f"{fn.__module__}.{fn.__qualname__}"
    made_by = closure(fn) if isinstance(fn, FunctionType) else ()
    return f"{name}:{digest(*made_by)}" if made_by else name


def check_options(target: str, options: SpawnOptions) -> None:
    """Refuse options that the server would refuse later, or take for something else.

    Raises:
        SpawnError: If one is not of its type.
        ValueError: If a value is out of range.
    """
    for option in ("name", "key", "work_queue_name"):
        value = options.get(option)
        if value is not None and not (isinstance(value, str) and value):
            raise SpawnError(
                f"{option} must be a string that is not empty; got {value!r}", child=target
            )
    variables = options.get("job_variables")
    if variables is not None and not isinstance(variables, Mapping):
        raise SpawnError(f"job_variables must be a mapping; got {variables!r}", child=target)
    moment = options.get("scheduled_time")
    if moment is not None and not isinstance(moment, datetime):
        raise SpawnError(f"scheduled_time must be a datetime; got {moment!r}", child=target)
    if moment is not None and moment.tzinfo is None:
        raise ValueError(
            f"scheduled_time {moment.isoformat()} has no time zone; give it one, such as "
            "datetime.now(timezone.utc) + timedelta(minutes=5)"
        )
    check_seconds("timeout_seconds", options.get("timeout_seconds"))


def check_tags(target: str, tags: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tags of a child.

    Raises:
        SpawnError: If they are not a sequence of strings.
    """
    if isinstance(tags, str) or not isinstance(tags or (), Iterable):
        kind = type(tags).__name__
        raise SpawnError(f"tags must be a list of strings; got {kind} {tags!r}", child=target)
    given = tuple(tags or ())
    if others := [tag for tag in given if not isinstance(tag, str)]:
        raise SpawnError(f"tags must be a list of strings; got {others[0]!r} in it", child=target)
    return given


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
        if is_plain(given):
            return cast("dict[str, Any]", to_jsonable_python(given, inf_nan_mode="null"))
        request = DeploymentFlowRunCreate(parameters=given)  # as Prefect's client makes it
        frozen: dict[str, Any] = request.model_dump(mode="json", include={"parameters"})
    except Exception:  # what a user's class does when it is looked at
        return given
    return cast("dict[str, Any]", frozen["parameters"])


def bind_parameters(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with the flow's defaults filled in.

    Raises:
        ParametersError: If a name is unknown or missing.
    """
    try:
        return get_call_parameters(flow.fn, (), dict(parameters))
    except Exception as exc:
        with contextlib.suppress(Exception):  # by name, what a call can only give by position
            args, kwargs = parameters_to_args_kwargs(flow.fn, dict(parameters))
            return get_call_parameters(flow.fn, args, kwargs)
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
        lineage: Where it stands in its tree.
        options: Those of its scope.
        is_superseded: Tells whether a later attempt of the run has begun.
        end_run: Ends a run with everything below it; returns whether it is over.
        seconds_left: Tells how long the scope has, if that is limited.
        call_soon: Calls something in the control plane's loop, from any thread.
    """

    def __init__(
        self,
        api: Orchestrator,
        *,
        run: FlowRun,
        lineage: _identity.Lineage,
        options: ScopeOptions,
        is_superseded: Callable[[], Awaitable[bool]],
        end_run: Callable[[FlowRun], Awaitable[bool]],
        seconds_left: Callable[[], float | None],
        call_soon: Callable[[Callable[[], object]], object],
    ) -> None:
        self._api = api
        self._run = run
        self._call_soon = call_soon
        self._lineage = lineage
        self._options = options
        self._is_superseded = is_superseded
        self._end_run = end_run
        self._seconds_left = seconds_left
        self._above: set[UUID] | None = None
        self._slots = Slots(options.max_concurrent)
        self._earlier: dict[str, FlowRun] | None = None
        self._met: set[str] = set()  # keys whose earlier run has been taken, ended or passed by
        self._reading_earlier = anyio.Lock()

    async def launch(self, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
        """Give the child a run: one that an earlier attempt left alive, or a new one.

        A failure becomes the child's outcome. A cancellation that came first wins: before the
        run exists there is nothing to ask the server for.

        Returns:
            The run, or `None` if there will be none.
        """
        attempt = child.attempt
        try:
            if attempt.is_queued:
                await self._wait_for_its_turn(child, spec)
            if attempt.is_over:
                return None
            run = await patiently(lambda: self._adopt_earlier(child, spec))
            if child.attempt is not attempt:
                return None  # restarted meanwhile: the run is the next attempt's to take
            run = run or await patiently(lambda: self._create(child, spec, attempt))
        except SpawnError as exc:
            exc.child = child.name
            child.settle("failed", exception=exc, of=attempt)
            return None
        except Exception as exc:
            failure = SpawnError(
                f"Launching child {child.name!r} failed: {exc!r}", child=child.name
            )
            failure.__cause__ = exc
            child.settle("failed", exception=failure, of=attempt)
            return None
        if run is not None and child.attempt is attempt:
            child.assign_run(run)
        return run

    async def _wait_for_its_turn(self, child: Child[Any], spec: LaunchSpec) -> None:
        """Wait for what comes first, for its time and for a slot, or until the child is over."""
        await _wait_for_predecessors(child, spec.after)
        await _wait_for_its_time(child, spec)
        await self._take_slot(child, spec.pool)
        child.attempt.is_queued = False

    async def adopt(self, child: Child[Any], run_id: UUID) -> FlowRun | None:
        """Give the child a run that exists, and mark that run as ours, so that everybody knows.

        Returns:
            The run, or `None` if the child is over.
        """
        try:
            run = await patiently(lambda: self._read_to_adopt(run_id))
            if not is_over(run):
                await patiently(self._require_current)
                await patiently(lambda: self._mark(child, run))
                run = await patiently(lambda: self._read_to_adopt(run_id))
        except SpawnError as exc:
            exc.child = child.name
            child.settle("failed", exception=exc)
            return None
        if _identity.keeper_of(run) == self._run.id:
            child.keeper = self._run.id
        child.assign_run(run)
        return run

    async def _read_to_adopt(self, run_id: UUID) -> FlowRun:
        found = {run.id: run for run in await self._api.read_runs([run_id, self._run.id])}
        run, own = found.get(run_id), found.get(self._run.id, self._run)
        if run is None:
            raise RunNotFoundError(
                f"There is no flow run {run_id} to adopt. List runs with: prefect flow-run ls"
            )
        if run_id in await self.runs_above() or _identity.keeper_of(own) == run_id:
            raise InvalidTargetError(
                f"Flow run {run.name!r} ({run_id}) is above this one, and waits for it: it cannot "
                "be its child as well."
            )
        keeper = _identity.keeper_of(run)
        if keeper not in {None, self._run.id} and await self._lives(keeper):
            raise SpawnError(
                f"Flow run {run.name!r} ({run_id}) is a child of run {keeper}, which looks after "
                "it. Detach it there first."
            )
        return run

    async def runs_above(self) -> set[UUID]:
        """Return the runs above this one, plain ones included, as Prefect links them; read once."""
        if self._above is None:
            seen: set[UUID] = set()
            run: FlowRun | None = self._run
            while run is not None and run.id not in seen:
                seen.add(run.id)
                parent = (await self._api.read_parents([run])).get(run.id)
                (run,) = (await self._api.read_runs([parent]) if parent else ()) or (None,)
            self._above = {*seen, *self._lineage.path} - {self._run.id}
        return self._above

    async def _lives(self, run_id: UUID | None) -> bool:
        runs = await self._api.read_runs([run_id]) if run_id is not None else []
        return any(not is_over(run) for run in runs)

    async def _mark(self, child: Child[Any], run: FlowRun) -> None:
        labels = _identity.child_labels(
            self._lineage,
            key=child.key,
            generation=child.generation,
            on_parent=child.on_parent,
            lease_seconds=self._options.lease_seconds,
        )
        labels.setdefault(_identity.DETACHED, False)
        if (left := self._seconds_left()) is not None and child.on_parent["timed_out"] == "cancel":
            # Who inherits it subtracts the time since its run was created.
            labels[_identity.DEADLINE_SECONDS] = round(left + await age_of(self._api, run), 3)
        tags = dict.fromkeys([*run.tags, _identity.COMMON_TAG, self._lineage.tag])
        # Labels first: what carries the tag alone is nobody's.
        await self._api.label_for_good(run.id, {**labels, _identity.ADOPTED: str(run.id)})
        await self._api.tag(run.id, list(tags))

    async def _take_slot(self, child: Child[Any], pool: SlotPool) -> None:
        """Wait for one of `max_concurrent` slots; the child gives it back when it is over."""
        if child.is_over or (self._options.max_concurrent is None and pool.limit is None):
            return
        await self._slots.take(pool)
        child.when_over(lambda: self._call_soon(lambda: self._slots.give_back(pool)))

    async def _adopt_earlier(self, child: Child[Any], spec: LaunchSpec) -> FlowRun | None:
        """Find what an earlier attempt of this run made of the same key, and see what to do."""
        # A run that is resumed may count as the same attempt; its children counted on its lease.
        is_first = self._run.run_count <= 1 and _identity.LEASE not in self._run.labels
        if is_first or child.key in self._met:
            return None
        attempt = child.attempt
        known = (await self._read_earlier()).get(child.key)
        # Read again: it may have ended since.
        (earlier,) = (await self._api.read_runs([known.id]) if known else None) or (None,)
        if child.attempt is not attempt:
            return None
        if earlier is None or earlier.state is None:
            self._met.add(child.key)
            return None
        child.generation = _generation(earlier)
        is_taken = await self._may_take(child, earlier, spec)
        if child.attempt is not attempt:
            return None
        self._met.add(child.key)
        if is_taken:
            return earlier
        child.generation += 1
        return None

    async def _read_earlier(self) -> dict[str, FlowRun]:
        """Return the last run of every key that earlier attempts have left, read once."""
        async with self._reading_earlier:
            if self._earlier is None:
                linked = await self._api.read_children([self._run.id])
                # What was detached has lost its link, and keeps its tag.
                tagged = await self._api.read_tagged(self._lineage.tag, live_only=True)
                let_go = [run for run in tagged if self._was_let_go(run)]
                runs = sorted([*linked, *let_go], key=_generation)
                self._earlier = {str(run.labels.get(_identity.KEY)): run for run in runs}
            return self._earlier

    def _was_let_go(self, run: FlowRun) -> bool:
        """Whether a run was detached by an earlier attempt of this one."""
        made = _identity.spawn_of(run.labels)
        is_detached = bool(run.labels.get(_identity.DETACHED))
        is_own = made is not None and made[0] == self._run.id
        return is_own and is_detached and _identity.is_ours(run)

    async def _create(
        self, child: Child[Any], spec: LaunchSpec, attempt: Attempt
    ) -> FlowRun | None:
        """Create the run, under the first generation of its key that has not been used up.

        The server answers with the run that it has if the key was used before.
        """
        while True:
            await self._require_current()
            run = await _create(self._api, child, spec, attempt)
            if run is None or await self._may_take(child, run, spec):
                return run
            child.generation += 1

    async def _require_current(self) -> None:
        """Refuse to launch for an attempt that a later one has replaced.

        Raises:
            ScopeClosedError: If one has.
        """
        if await self._is_superseded():
            raise ScopeClosedError(SUPERSEDED)

    async def _may_take(self, child: Child[Any], run: FlowRun, spec: LaunchSpec) -> bool:
        """Whether a run may become the child's; one that is in the way is ended first.

        One that was let go stays so: there is no way back.

        Raises:
            SpawnError: If it could not be ended.
        """
        met = meet(run, spec)
        if met == "take" and spec.reuse == "completed" and not await _has_result(run, spec):
            return False
        if met == "end":
            await self._require_current()
        if met == "end" and not await self._end_run(run):
            raise SpawnError(
                f"Run {run.name!r} ({run.id}) of an earlier attempt has the same key, and could "
                "not be ended. Cancel it by hand: prefect flow-run cancel <id>"
            )
        if met == "take" and run.labels.get(_identity.DETACHED):
            child.on_parent = resolve_on_parent("detach")
        return met == "take"


async def patiently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request that a child depends on; wait out a server that cannot be reached.

    Raises:
        ServerUnreachableError: If it stays unreachable for 30 s.
    """
    # Tenacity only where it is needed: each use leaves 37 objects to the garbage collector.
    with contextlib.suppress(httpx.TransportError):
        return await request()
    return await _persistently(request)


async def _persistently(request: Callable[[], Awaitable[T]]) -> T:
    """Make a request that has failed again, after a pause each time."""
    until = _clock.monotonic() + _PATIENCE_SECONDS
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(httpx.TransportError),
        wait=wait_exponential(multiplier=0.2, max=3) + wait_random(0, 0.3),
        stop=lambda _: _clock.monotonic() > until,
        reraise=True,
    )
    await anyio.sleep(_FIRST_PAUSE_SECONDS)
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


def meet(run: FlowRun, spec: LaunchSpec) -> Literal["take", "end", "pass"]:
    """Return what is to become of a run that the server has under a child's key.

    Args:
        run: The run: one that has just been created, or one of an earlier attempt.
        spec: What the child is to be.

    Returns:
        *take* to make it the child's, *end* if it must not live beside the child's own, *pass* if
        there is nothing to do.
    """
    state = run.state
    if state is None or run.labels.get(_identity.SPAWN) == spec.id:
        return "take"
    is_same = run.labels.get(_identity.WORK) == spec.work and _identity.is_comparable(spec.work)
    is_inline = run.deployment_id is None
    is_detached = bool(run.labels.get(_identity.DETACHED))
    if state.is_final():
        # A result that was not persisted has gone with the process.
        has_result = not is_inline or state.data is not None
        can_reuse = spec.reuse == "completed" and state.is_completed() and has_result
        return "take" if is_same and can_reuse else "pass"
    if is_inline:
        return "pass"  # so has its code
    if is_same and not state.is_cancelling():
        return "take"
    return "pass" if is_detached else "end"


async def _has_result(run: FlowRun, spec: LaunchSpec) -> bool:
    """Whether what the run of an earlier attempt has returned can be had here, if it has ended."""
    if run.labels.get(_identity.SPAWN) == spec.id or run.state is None:
        return True
    if not run.state.is_completed() or run.state.data is None:
        return True
    try:
        await run.state.aresult(raise_on_failure=False)
    except Exception as exc:
        logger.warning("The result of run %r (%s) is gone: %r", run.name, run.id, exc)
        return False
    return True


async def age_of(api: Orchestrator, run: FlowRun) -> float:
    """Return the seconds since a run was created, by the server's clock."""
    now = await patiently(api.server_time)
    return max(0.0, (now - run.created).total_seconds()) if now and run.created else 0.0


def _generation(run: FlowRun) -> int:
    return int(run.labels.get(_identity.GENERATION, 0))


async def _create(
    api: Orchestrator, child: Child[Any], spec: LaunchSpec, attempt: Attempt
) -> FlowRun | None:
    if isinstance(spec.target, Flow):
        return await _create_inline(api, child, spec, attempt, spec.target)
    return await _create_deployed(api, child, spec, attempt, spec.target)


async def _create_deployed(
    api: Orchestrator, child: Child[Any], spec: LaunchSpec, attempt: Attempt, target: str | UUID
) -> FlowRun | None:
    is_wanted = functools.partial(_is_wanted, attempt)
    deployment = await api.read_deployment(target, is_wanted)
    if deployment is None or not is_wanted():
        return None
    if not deployment.is_served and not _lies_ahead(spec.scheduled_time):
        raise DeploymentPausedError(
            f"Deployment {deployment.name!r} is paused, is in no work pool, and nothing has asked "
            "for its runs lately: nothing would pick the run up. Serve it again; or resume it, and "
            "the run waits."
        )
    if child.span is not None:
        child.span.rename(deployment.name.split("/")[0], deployment.name)
    schema = deployment.schema
    if schema is not None and (unknown := schema.unknown(spec.parameters)):
        raise ParametersError(
            f"Deployment {deployment.name!r} takes no parameter {', '.join(map(repr, unknown))}. "
            f"It takes: {', '.join(schema.names) or 'none'}."
        )
    request = _request(child, spec, deployment)
    begin = functools.partial(child.begin_request, attempt)
    asked = attrs.evolve(request, is_wanted=is_wanted, begin=begin)
    return await api.create_deployment_run(deployment, asked)


def _lies_ahead(moment: datetime | None) -> bool:
    return moment is not None and moment > _clock.utc_now()


async def _create_inline(
    api: Orchestrator,
    child: Child[Any],
    spec: LaunchSpec,
    attempt: Attempt,
    flow: Flow[..., Any],
) -> FlowRun | None:
    parameters = bind_parameters(flow, spec.parameters)
    begin = functools.partial(child.begin_request, attempt)
    request = attrs.evolve(_request(child, spec), parameters=parameters, begin=begin)
    return await api.create_inline_run(flow, request)


async def _wait_for_its_time(child: Child[Any], spec: LaunchSpec) -> None:
    """Wait for the time at which an inline child is to start, or for its cancellation.

    Raises:
        ParametersError: If it could not be started then.
    """
    if spec.scheduled_time is None or not isinstance(spec.target, Flow):
        return  # deployments wait on the server
    bind_parameters(spec.target, spec.parameters)
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    child.when_over(lambda: _wake(loop, over))
    with anyio.move_on_after(max(0.0, (spec.scheduled_time - _clock.utc_now()).total_seconds())):
        await over.wait()


async def _wait_for_predecessors(child: Child[Any], after: Sequence[Child[Any]]) -> None:
    """Wait until all of *after* have completed; if one does not, neither does the child begin."""
    if not after:
        return
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    for each in (child, *after):
        each.when_over(lambda: _wake(loop, changed))
    while not child.is_over:
        ends = [each for each in after if each.is_over]
        if (
            failed := next((each for each in ends if each.outcome != "completed"), None)
        ) is not None:
            message = f"'{failed.name}', which comes before it, {failed.describe_end()}"
            child.mark_cancel(
                CancelReason(source="predecessor_failed", message=message, child=failed.name)
            )
        elif len(ends) == len(after):
            break
        else:
            await changed.wait()
            changed.clear()


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
        loop.call_soon_threadsafe(event.set)


def _is_wanted(attempt: Attempt) -> bool:
    """Whether there is anything to launch, or something may have been.

    A request that was not answered may have been carried out; only asking again tells.
    """
    return attempt.was_requested or not attempt.is_over


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
    labels[_identity.WORK] = spec.work
    labels[_identity.SPAWN] = spec.id
    left = spec.seconds_left()
    if left is not None and child.on_parent["timed_out"] == "cancel":
        labels[_identity.DEADLINE_SECONDS] = round(left, 3)
    if child.span is not None and (traceparent := child.span.traceparent) is not None:
        labels[compat.TRACEPARENT_LABEL] = traceparent
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
