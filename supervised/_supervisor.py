"""The supervisor of one run: admits children, hears of the run's end, and ends the tree.

A scope lives in two planes. The body's side (`spawn`, `run_sync`, `run_async`) is called by user
code and only ever hands work over or waits. The control plane's side does everything that must
not depend on the user's loop. What crosses is a handful of flags under one lock, and futures.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import logging
import os
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, overload

import attrs
from prefect.client.schemas.objects import FlowRun, TaskRunResult
from prefect.context import FlowRunContext, TaskRunContext
from prefect.flows import Flow
from prefect.utilities.engine import collect_task_run_inputs_sync

from supervised import _clock, _compat, _identity, _launch, _telemetry
from supervised._body import Body
from supervised._child import Child
from supervised._context import current_supervisor
from supervised._errors import NoSupervisorError, ParametersError
from supervised._host import Host, current_host
from supervised._inline import InlineRun
from supervised._lease import LeaseHolder
from supervised._link import Link
from supervised._log import get_logger, run_logger
from supervised._own_run import OwnRun
from supervised._policy import (
    HARD_CAUSES,
    LEAVING,
    Budget,
    breaks_scope,
    check_seconds,
    parent_reason,
    resolve_on_parent,
    without_detach,
)
from supervised._reap import reap_below
from supervised._registry import Registry, describe_ban
from supervised._teardown import Teardown
from supervised._types import (
    Action,
    CancelReason,
    Cause,
    FlowLike,
    OnParent,
    ScopeOptions,
    SpawnOptions,
    TeardownReport,
)
from supervised._watch import Watcher, open_watcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from typing_extensions import Unpack

    from supervised._api import Orchestrator
    from supervised._control import Plane

logger = get_logger("prefect.supervised")

R = TypeVar("R")
_RUNNER_SECONDS = 5.0  # how long a runner has to signal a body whose run is being cancelled


@attrs.frozen
class Services:
    """What the control plane opens once for all scopes."""

    api: Orchestrator
    watcher: Watcher


@asynccontextmanager
async def open_services(host: Host) -> AsyncIterator[Services]:
    """Open the client and the watcher of a control plane."""
    async with host.open_orchestrator() as api, open_watcher(api) as watcher:
        yield Services(api, watcher)


class Supervisor:
    """The supervisor of the current flow run; reached through `supervised.supervisor`."""

    def __init__(
        self, options: ScopeOptions, flow: Flow[..., Any], context: FlowRunContext
    ) -> None:
        assert context.flow_run is not None
        self._options = options
        self._flow = flow
        self._context = context
        self._run = context.flow_run
        self.host = current_host.get()
        self._pid = os.getpid()
        self._started = _clock.monotonic()
        self._started_ns = time.time_ns()
        self._lock = threading.RLock()
        self._registry = Registry(flow.name)
        self._plane: Plane[Services] | None = None
        self._span: _telemetry.SupervisorSpan | None = None
        self._launcher: _launch.Launcher | None = None
        self._ending: tuple[Cause, CancelReason] | None = None
        self._teardown: concurrent.futures.Future[None] | None = None
        self._tearing: Teardown | None = None
        self._report: TeardownReport | None = None
        self.outer = current_supervisor.get()
        self.nested: set[Supervisor] = set()
        self.harmless_calls: set[UUID] = set()  # of supervised flows that launched nothing plainly
        self._is_completing = False
        self._launches_seen = (0, 0)
        self.lineage = self._find_lineage()
        self.own = OwnRun(
            self._run, self.lineage, flow.name, self._on_own_cancellation, self._drop_lease
        )
        self._link = Link(self._run, self._on_lost) if self._is_launched_child else None
        self._lease: LeaseHolder | None = None
        self.failures: list[Child[Any]] = []
        self._last_words: dict[str, concurrent.futures.Future[None]] = {}  # of detached children
        self._closed = False
        self._released = False
        self.body = Body()

    # -- what users see ---------------------------------------------------------------------

    @property
    def flow_run_id(self) -> UUID:
        """The id of the supervised run."""
        return self._run.id

    @property
    def children(self) -> tuple[Child[Any], ...]:
        """Every child so far, over or not, in the order of spawning."""
        return tuple(self._registry.all())

    @property
    def report(self) -> TeardownReport | None:
        """What became of the children, once something had to be torn down; `None` before."""
        return self._report

    @property
    def is_ending(self) -> bool:
        """Whether the scope, or one around it, is being torn down."""
        return self._ending is not None or (self.outer is not None and self.outer.is_ending)

    @overload
    def spawn(
        self,
        target: Flow[..., Coroutine[Any, Any, R]],
        parameters: Mapping[str, Any] | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Child[R]: ...

    @overload
    def spawn(
        self,
        target: FlowLike[R],
        parameters: Mapping[str, Any] | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Child[R]: ...

    @overload
    def spawn(
        self,
        target: str | UUID,
        parameters: Mapping[str, Any] | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Child[Any]: ...

    def spawn(
        self,
        target: FlowLike[Any] | Flow[..., Any] | str | UUID,
        parameters: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        key: str | None = None,
        tags: Sequence[str] | None = None,
        job_variables: Mapping[str, Any] | None = None,
        work_queue_name: str | None = None,
        scheduled_time: datetime | None = None,
        timeout_seconds: float | None = None,
        on_parent: OnParent | None = None,
    ) -> Child[Any]:
        """Launch a child that this run will not leave behind, and return its handle at once.

        The launch goes on in the background; if it fails, that is the outcome of the handle.
        The same call works in sync and async flows, in tasks of the run, and in threads that
        carry its context.

        Args:
            target: A flow, to run inline in this process: async in the body's loop, sync in a
                thread. Or a deployment, by *"flow-name/deployment-name"* or id.
            parameters: The flow's parameters by name.
            name: Name of the child and of its run; the target's name and one that Prefect
                makes up, by default.
            key: Identity of the work within this run. The same key with the same work returns
                the same child. Derived from target and parameters by default.
            tags: Tags of the run, added to the deployment's own.
            job_variables: Infrastructure overrides; used by deployments only.
            work_queue_name: Work queue to submit to; used by deployments only.
            scheduled_time: When to start; now, by default.
            timeout_seconds: Seconds from the creation of its run after which the child is
                cancelled with outcome *timed_out*; `None` for no limit.
            on_parent: What the end of this run does to the child: *wait*, *cancel* or *detach*
                for every cause, or a mapping from some of *completed*, *failed*, *timed_out*,
                *cancelled*, *crashed*. Defaults to the decorator's, which waits for completion
                and cancels for everything else.

        Returns:
            The child's handle: `await child`, `child.result()`, `child.cancel()`.

        Raises:
            InvalidTargetError: If *target* is neither a flow nor names a deployment.
            DuplicateKeyError: If *key* stands for other work already.
            ScopeClosedError: If the scope is over or being torn down.
            ValueError: If *timeout_seconds* is negative or *on_parent* is not understood.

        Example:
            ```python
            @supervised_flow
            async def nightly(day: str) -> list[float]:
                parts = [supervisor.spawn("score/gpu", {"part": i}) for i in range(40)]
                return [await part for part in parts]
            ```
        """
        self._require_own_process()
        checked = _launch.check_target(target)
        check_seconds("timeout_seconds", timeout_seconds)
        label = _launch.target_name(checked)
        given = _launch.freeze_parameters(checked, parameters)
        all_tags = (*_launch.ambient_tags(checked), *_launch.check_tags(label, tags))
        task_inputs = _task_inputs(label, given, self._run.id)
        policy = self._policy_for(checked, on_parent)
        if (ending := self._nearest_ending()) is not None:
            self._registry.ban(describe_ban(ending))

        def make(final_key: str) -> Child[Any]:
            return Child(
                name=name or label,
                kind="inline" if isinstance(checked, Flow) else "deployment",
                key=final_key,
                target=label,
                on_parent=policy,
                on_done=self._on_child_done,
                on_settled=self._on_child_settled,
                ask_cancel=self._cancel_child,
                ask_detach=self._detach_child,
                timeout_seconds=timeout_seconds,
                run_name=name,
                home_loop=self._loop_of(checked),
            )

        work = _identity.default_key(label, given, code=_launch.code_of(checked))
        child, is_new = self._registry.admit(key=key, work=work, make=make)
        if is_new:
            spec = _launch.LaunchSpec(
                target=checked,
                parameters=given,
                lineage=self.lineage,
                run_name=name,
                tags=all_tags,
                task_inputs=task_inputs,
                context=contextvars.copy_context(),
                home_loop=self.body.loop,
                lease_seconds=self._options.lease_seconds,
                scheduled_time=scheduled_time,
                work_queue_name=work_queue_name,
                job_variables=job_variables,
            )
            try:
                self._start(child, spec)
            except BaseException as exc:
                child.settle("failed", exception=exc)  # or the scope would wait for it
                raise
            if self._is_completing:
                self._complete(child)
        return child

    def cancel(self, reason: str | None = None) -> None:
        """Cancel every child, with all that they launched, and return at once.

        The run itself goes on; nothing can be spawned in it any more.

        Args:
            reason: One clause for people.
        """
        message = reason or "its supervisor was told to cancel"
        told = CancelReason(source="explicit", message=message)
        for child in self._registry.live():
            if not child.is_detached:
                child.mark_cancel(told)  # whatever the run's own end would have meant for it
        self.begin_teardown("cancelled", told)

    # -- for the scope's two ends ---------------------------------------------------------------

    @property
    def flow(self) -> Flow[..., Any]:
        """The supervised flow."""
        return self._flow

    @property
    def flow_run(self) -> FlowRun:
        """The supervised run as it was when this attempt began."""
        return self._run

    @property
    def started(self) -> float:
        """When this attempt's body began, by the monotonic clock."""
        return self._started

    @property
    def is_engaged(self) -> bool:
        """Whether there is anything to end: something was spawned, or is being torn down."""
        return self._span is not None

    @property
    def launched_plainly(self) -> bool:
        """Whether the body called plain `run_deployment`, or a plain flow that may have."""
        deployments, flows = _compat.plain_launches(self._context)
        return deployments > 0 or flows > len(self.harmless_calls)

    @property
    def launched_since_teardown(self) -> bool:
        """Whether the body has called plain `run_deployment`, or a flow, since it was torn down."""
        return _compat.plain_launches(self._context) != self._launches_seen

    def owns(self, child: Child[Any]) -> bool:
        """Whether this scope spawned the child."""
        return any(each is child for each in self._registry.all())

    @property
    def is_own_process(self) -> bool:
        """Whether this is the process of the run, and not a fork of it."""
        return os.getpid() == self._pid

    @property
    def grace_seconds(self) -> float:
        """Seconds that a whole teardown may take."""
        return self._options.grace_seconds

    @property
    def ending(self) -> tuple[Cause, CancelReason] | None:
        """Why the scope is being torn down, if it is."""
        return self._ending

    def begin_teardown(self, cause: Cause, reason: CancelReason) -> concurrent.futures.Future[None]:
        """Begin to end everything below, once; from any thread.

        Returns:
            A future that is done when the report is there.
        """
        with self._lock:
            if self._closed:
                return _done()
            if self._teardown is not None and not self._is_outdated(self._teardown):
                self._hurry(cause, reason)
                return self._teardown
            self._launches_seen = _compat.plain_launches(self._context)
            self._ending = (cause, reason)
            self._registry.ban(describe_ban(reason))
            self._teardown = self._engage().submit(self._tear_down)
        for inner in list(self.nested):
            if inner.is_engaged:
                inner.begin_teardown("cancelled", reason)
        return self._teardown

    def _is_outdated(self, teardown: concurrent.futures.Future[None]) -> bool:
        """Whether a body that went on after a teardown has launched something plainly."""
        return teardown.done() and self.launched_since_teardown

    @property
    def is_waiting(self) -> bool:
        """Whether the teardown waits for children whose policy is to be waited for."""
        return self._tearing is not None and self._tearing.is_waiting

    def _hurry(self, cause: Cause, reason: CancelReason) -> None:
        """Let a harder end overtake a teardown that is still waiting for children."""
        if cause not in HARD_CAUSES or self._plane is None:
            return

        async def hurry(_: Services) -> None:
            if self._tearing is not None:
                self._tearing.hurry(cause, reason)

        self._plane.submit(hurry)

    def prepare_completion(self) -> None:
        """Apply `on_parent` for a body that returned to the children that are not waited for."""
        self._is_completing = True
        for child in self._registry.live():
            self._complete(child)

    def _complete(self, child: Child[Any]) -> None:
        action = child.on_parent["completed"]
        if action == "cancel":
            self._cancel_child(child, parent_reason("completed", self._flow.name))
        elif action == "detach":
            child.detach()

    def seal(self) -> bool:
        """Admit no more children, unless there are live ones to wait for."""
        return self._registry.ban_if_settled("the flow has ended")

    def log_given_up(self) -> None:
        """Name what may still be alive when the body's side stops waiting for the teardown."""
        live = [f"{child.name} ({child.flow_run_id})" for child in self._registry.live()]
        if live:
            self._logger.error(
                "No longer waiting for the teardown; these may still be alive: %s", ", ".join(live)
            )

    def children_over(self) -> concurrent.futures.Future[None]:
        """Return a future that is done once no child is live, or a teardown has begun."""
        return self._registry.when_settled()

    def close_if_unused(self) -> bool:
        """End a scope in which nothing was spawned; false if there is something to end."""
        with self._lock:
            if self._span is not None or not self._registry.ban_if_empty("the flow has ended"):
                return False
            self._closed = True
            return True

    def link(self) -> None:
        """Begin to watch the run that launched this one, if a supervisor did."""
        if self.outer is None and _identity.LEASE in self._run.labels:
            # An earlier attempt has left children, who count on a sign of life.
            self._acquire().submit(self._hold_lease)
        if self._link is None:
            return
        link = self._link

        async def watch(services: Services) -> None:
            link.watch(services.watcher)
            self.own.watch(services.watcher)

        self._acquire().submit(watch)

    def unlink(self) -> concurrent.futures.Future[None] | None:
        """Give the control plane up, if only the link has used it."""
        with self._lock:
            self._closed = True
            plane, self._released = (None if self._released else self._plane), True
        if plane is None:
            return None
        self.own.close()
        plane.submit(self._unwatch)
        return plane.release()

    def close(
        self, outcome: Cause, raised: BaseException | None
    ) -> concurrent.futures.Future[None] | None:
        """End the scope; the last one of the process gets the future of the plane's end."""
        self._registry.ban("the flow has ended")
        self.own.close()
        with self._lock:
            self._closed = True
        if self._span is not None:
            reason = self._ending[1] if self._ending else None
            self._span.end(outcome=outcome, reason=reason, raised=raised)
        return self.unlink()

    # -- the control plane's side ----------------------------------------------------------------

    def _engage(self) -> Plane[Services]:
        """Start supervising: called by the first spawn, and by a teardown without any.

        The scopes around this one start as well: what is spawned here is below their runs too,
        and only who watches a run hears that it is being cancelled.
        """
        if self.outer is not None:
            self.outer._engage_if_open()
        with self._lock:
            plane = self._acquire()
            if self._span is None:
                self._span = _telemetry.SupervisorSpan(
                    flow_name=self._flow.name,
                    flow_run_id=str(self._run.id),
                    function=f"{self._flow.fn.__module__}.{self._flow.fn.__qualname__}",
                    on_child_failure=self._options.on_child_failure,
                    grace_seconds=self._options.grace_seconds,
                    context=_telemetry.current_context(self._run.labels, _compat.TRACEPARENT_LABEL),
                    start_ns=self._started_ns,
                )
                if self._link is None:
                    plane.submit(self._watch)
                if self.outer is None:
                    self.body.listen()
            return plane

    def _acquire(self) -> Plane[Services]:
        with self._lock:
            if self._plane is None:
                self._plane = self.host.acquire_plane(functools.partial(open_services, self.host))
            return self._plane

    def _engage_if_open(self) -> None:
        with self._lock:
            if not self._closed:
                self._engage()

    def _start(self, child: Child[Any], spec: _launch.LaunchSpec) -> None:
        plane = self._engage()
        assert self._span is not None
        child.span = _telemetry.ChildSpan(
            self._span,
            name=child.name,
            kind=child.kind,
            flow_name=child.target.split("/")[0],
            deployment_name=child.target if child.kind == "deployment" else None,
            generation=child.generation,
            detached=child.is_detached,
            start_ns=time.time_ns(),
        )

        def settle_failed(future: concurrent.futures.Future[None]) -> None:
            if future.cancelled():
                child.settle("cancelled")
            elif (exc := future.exception()) is not None:
                child.settle("failed", exception=exc)

        future = plane.submit(lambda services: self._launch_child(services, child, spec))
        future.add_done_callback(settle_failed)

    async def _launch_child(
        self, services: Services, child: Child[Any], spec: _launch.LaunchSpec
    ) -> None:
        if child.kind == "deployment":
            await self._hold_lease(services)
        run = await self._launcher_with(services).launch(child, spec)
        if run is None:
            return
        services.watcher.watch(child)
        self._logger.info(
            "Spawned child %r as flow run %s (%s)", child.name, run.id, child.url or child.kind
        )
        if child.detach_requested:
            self._detach_child(child)
        elif child.span is not None and child.is_detached:
            child.span.end("detached", state=run.state, exception=None, end_ns=time.time_ns())
        self._arm_deadline(child)
        if isinstance(spec.target, Flow):
            parameters = _launch.bind_parameters(spec.target, spec.parameters)
            InlineRun(
                child,
                spec.target,
                run,
                parameters,
                host=self.host,
                context=spec.context,
                home_loop=spec.home_loop,
            ).start()
        elif child.cancel_reason is not None:
            await self._cancel_run(services, child)

    def _launcher_with(self, services: Services) -> _launch.Launcher:
        if self._launcher is None:
            assert self._plane is not None
            self._launcher = _launch.Launcher(
                services.api,
                run=self._run,
                max_concurrent=self._options.max_concurrent,
                call_soon=self._plane.call_soon,
            )
        return self._launcher

    def _arm_deadline(self, child: Child[Any]) -> None:
        if child.timeout_seconds is None:
            return
        message = f"its deadline of {child.timeout_seconds:g} s was exceeded"
        reason = CancelReason(source="deadline", message=message)
        timer = asyncio.get_running_loop().call_later(
            child.timeout_seconds, self._cancel_child, child, reason
        )
        plane = self._plane
        assert plane is not None
        child.when_over(lambda: plane.call_soon(timer.cancel))

    # -- what children do and are told -----------------------------------------------------------

    def _on_child_done(self, child: Child[Any]) -> None:
        """Take note of a child's end, and act on a failure; in whatever thread it happens."""
        outcome = child.outcome
        assert outcome is not None
        level = logging.WARNING if breaks_scope(outcome) else logging.INFO
        self._logger.log(level, "Child %r ended: %s", child.name, outcome)
        if breaks_scope(outcome) and self._options.on_child_failure != "ignore":
            with self._lock:
                self.failures.append(child)
            if self._options.on_child_failure == "cancel_siblings" and self._ending is None:
                self._fail_with(child)

    def _on_child_settled(self, child: Child[Any]) -> None:
        """Count a child as over, once what it may have left behind is over too."""
        last_words = self._last_words.get(child.key) or self._clear_up_after(child)
        if last_words is None:
            self._registry.finished(child)
        else:
            last_words.add_done_callback(lambda _: self._registry.finished(child))

    def _clear_up_after(self, child: Child[Any]) -> concurrent.futures.Future[None] | None:
        """Begin to end what a child may have left behind, if a teardown of ours does not."""
        cause = LEAVING.get(child.outcome) if child.outcome is not None else None
        if child.kind != "deployment" or cause is None:
            return None
        if self._ending is not None or self._plane is None:
            return None
        if child.flow_run is None and child.was_requested:
            return self._plane.submit(lambda services: self._end_unanswered(services, child))
        if child.flow_run is not None and child.cancel_reason is None:
            reap = functools.partial(self._reap_below, child=child, cause=cause)
            return self._plane.submit(reap)
        return None

    async def _reap_below(self, services: Services, child: Child[Any], cause: Cause) -> None:
        """End what a child launched that ended badly: it may have died before it could."""
        assert child.flow_run is not None
        report = await reap_below(
            services.api,
            self.lineage.nested(child.flow_run.id),
            flow_name=child.name,
            cause=cause,
            reason=parent_reason(cause, child.name),
            grace_seconds=self._options.grace_seconds,
        )
        if report is not None and report.receipts:
            self._logger.log(logging.INFO if report.ok else logging.ERROR, "%s", report)

    def _fail_with(self, child: Child[Any]) -> None:
        reason = CancelReason(
            source="sibling_failed",
            message=f"sibling '{child.name}' {child.describe_end()}",
            child=child.name,
        )
        if self._span is not None:
            self._span.culprit = child.span
        self.begin_teardown("failed", reason)
        if not child.delivered:
            self.body.interrupt()

    def _cancel_child(self, child: Child[Any], reason: CancelReason) -> None:
        if not child.mark_cancel(reason):
            return
        if child.interrupt is not None:
            child.interrupt()
        for inner in list(self.nested):
            if inner.flow_run_id == child.flow_run_id and inner.is_engaged:
                inner.begin_teardown("cancelled", reason)
        if self._plane is not None:
            self._plane.submit(lambda services: self._cancel_run(services, child))

    async def _cancel_run(self, services: Services, child: Child[Any]) -> None:
        """Tear down one child with everything below it; its siblings go on."""
        if child.flow_run_id is None or child.cancel_reason is None or child.is_over:
            return
        report = await Teardown(
            services.api,
            services.watcher,
            flow_name=self._flow.name,
            lineage=self.lineage,
            cause="cancelled",
            reason=child.cancel_reason,
            children=lambda: [child],
            in_body=self._runs_in_body,
            budget=Budget(self._options.grace_seconds),
            top=child.flow_run_id,
        ).run()
        if not report.ok and self._ending is None:
            self._logger.error("%s", report)
            child.settle("abandoned")

    def _detach_child(self, child: Child[Any]) -> None:
        if child.kind == "inline":
            raise ValueError(
                f"Child {child.name!r} runs inline, in this process, and cannot outlive it. "
                "Spawn a deployment to detach it."
            )
        child.detach_requested = True
        run = child.flow_run
        if run is None or self._plane is None:
            return  # as soon as it has a run
        if child.key not in self._last_words:
            self._last_words[child.key] = self._plane.submit(
                lambda services: self._cut_loose(services, child, run)
            )
        child.settle("detached")

    async def _cut_loose(self, services: Services, child: Child[Any], run: FlowRun) -> None:
        """Have the server know that a child is detached: who else ends trees asks it."""
        try:
            await _launch.patiently(lambda: services.api.cut_loose(run, {_identity.DETACHED: True}))
        except Exception:
            self._logger.exception(
                "Child %r (%s) is detached, but the server could not be told, so it may still be "
                "ended with this run",
                child.name,
                run.id,
            )

    async def _end_unanswered(self, services: Services, child: Child[Any]) -> None:
        """Cancel the run of a launch that was given up: the server may have created it."""
        message = f"Cancelled because the launch of {child.name!r} was given up"
        try:
            tagged = await _launch.patiently(
                lambda: services.api.read_tagged(self.lineage.tag, live_only=True)
            )
            spawn = (self._run.id, child.key, child.generation)
            made = [run.id for run in tagged if _identity.spawn_of(run.labels) == spawn]
            if made:
                self._logger.warning("Cancelling %s, which nobody waits for", made[0])
                await services.api.request_cancel(made, message)
        except Exception:
            self._logger.exception(
                "The launch of child %r was given up, and nobody knows whether it has a run",
                child.name,
            )

    # -- the run's own end -----------------------------------------------------------------------

    async def _watch(self, services: Services) -> None:
        self.own.watch(services.watcher)

    async def _unwatch(self, services: Services) -> None:
        self._drop_lease()
        if self._link is not None:
            self._link.unwatch(services.watcher)
        self.own.unwatch(services.watcher)

    async def _hold_lease(self, services: Services) -> None:
        """Give signs of life to children elsewhere, from now to the end of the scope."""
        if self.outer is not None and not self.outer._closed:
            await self.outer._hold_lease(services)
        elif self._lease is None and self._plane is not None:
            self._lease = LeaseHolder(services.api, self._run, self._options.lease_seconds)
            await self._lease.renew()
            lease = self._lease
            self._plane.submit(lambda _: lease.hold())

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.drop()

    def _on_lost(self, lost: UUID, reason: CancelReason) -> None:
        """End the run, because what it must not outlive is gone; in the control plane."""
        with self._lock:
            if self._plane is not None:
                self._plane.submit(lambda services: self._follow(services, lost, reason))

    async def _follow(self, services: Services, lost: UUID, reason: CancelReason) -> None:
        """End with a run above, unless somebody has detached this one from it since."""
        assert self._link is not None
        path = self.lineage.path
        below = path[path.index(lost) + 1 :] if lost in path else path[-1:]
        try:
            runs = await services.api.read_runs(below)
        except Exception:
            logger.debug("Could not read what lies below a lost run", exc_info=True)
            self._link.look_again(lost)
            return
        if self.own.lost is not None or any(run.labels.get(_identity.DETACHED) for run in runs):
            return
        self._logger.warning("This run ends itself: %s", reason)
        self.own.lost = reason
        await self._cancel_own_run(services)

    async def _cancel_own_run(self, services: Services) -> None:
        """Have the runner end this process, as for any cancellation, and not wait for it."""
        message = f"Cancelled because {self.own.lost}"
        try:
            await services.api.request_cancel([self._run.id], message)
        except Exception:
            logger.debug("Could not cancel the own run", exc_info=True)
        self.own.note_lost(message)

    def _on_own_cancellation(self) -> None:
        self.begin_teardown("cancelled", self.own.reason)
        delay = _RUNNER_SECONDS if self.host.runner_owns(self._run) else 0.0
        asyncio.get_running_loop().call_later(delay, self.body.interrupt)

    async def _tear_down(self, services: Services) -> None:
        assert self._ending is not None
        assert self._span is not None
        cause, reason = self._ending
        if cause in {"crashed", "cancelled"} and await self.own.recheck(services.api):
            cause, reason = self._ending = ("cancelled", self.own.reason)
        live = len(self._registry.live())
        span = None
        if live or self.launched_plainly:
            span = _telemetry.TeardownSpan(
                self._span, reason=reason, live=live, grace_seconds=self._options.grace_seconds
            )
        self._tearing = Teardown(
            services.api,
            services.watcher,
            flow_name=self._flow.name,
            lineage=self.lineage,
            cause=cause,
            reason=reason,
            children=self._registry.all,
            in_body=self._runs_in_body,
            body_runs=lambda: self.body.is_running,
            budget=Budget(self._options.grace_seconds),
            delegate_to=self.own.delegate_to,
            span=span,
        )
        report = await self._tearing.run()
        self._report = report = report.after(self._report)
        if report.receipts:
            self._logger.log(logging.INFO if report.ok else logging.ERROR, "%s", report)
        vouched = {r.flow_run_id for r in report.receipts if r.status in {"cancelled", "forced"}}
        for child in self._registry.live():
            if child.detach_requested:
                continue  # it is still being launched
            child.settle("cancelled" if child.flow_run_id in vouched else "abandoned")

    # -- inside ---------------------------------------------------------------------------------

    @property
    def _logger(self) -> Any:
        return run_logger(self._run, self._flow)

    def _policy_for(
        self, target: Flow[..., Any] | str | UUID, on_parent: OnParent | None
    ) -> Mapping[Cause, Action]:
        """Return a child's policy; the decorator's `detach` is for deployments only.

        Raises:
            ValueError: If *on_parent* is not understood, or asks an inline flow to outlive us.
        """
        policy = resolve_on_parent(on_parent, self._options.on_parent)
        if not isinstance(target, Flow) or "detach" not in policy.values():
            return policy
        if on_parent is not None:
            raise ValueError(
                f"{target.name!r} is a flow and would run inline, in this process, which it "
                "cannot outlive: on_parent='detach' needs a deployment."
            )
        return without_detach(policy)

    def _loop_of(self, target: Flow[..., Any] | str | UUID) -> asyncio.AbstractEventLoop | None:
        """Return the loop that an inline child needs, and that must not wait for it."""
        return self.body.loop if isinstance(target, Flow) and target.isasync else None

    @property
    def _is_launched_child(self) -> bool:
        """Whether a supervisor of another process has launched this run."""
        return self.outer is None and _identity.is_ours(self._run.labels, self._run.idempotency_key)

    def _find_lineage(self) -> _identity.Lineage:
        if not _identity.is_ours(self._run.labels, self._run.idempotency_key):
            # A copy of one of our runs may carry its labels; what it launches is its own.
            if self.outer is not None:
                return self.outer.lineage.nested(self._run.id)
            return _identity.Lineage(self._run.id, (self._run.id,))
        lineage = _identity.lineage_of(self._run.id, self._run.labels)
        if self.outer is None:
            return lineage
        return attrs.evolve(lineage, host=self.outer.lineage.host)  # which holds the lease

    def _runs_in_body(self) -> set[UUID]:
        """Return the supervised runs that this body executes by plain calls."""
        inner = {scope.flow_run_id for scope in list(self.nested)}
        return inner.union(*(scope._runs_in_body() for scope in list(self.nested)))

    def _nearest_ending(self) -> CancelReason | None:
        if self._ending is not None:
            return self._ending[1]
        return self.outer._nearest_ending() if self.outer is not None else None

    def _require_own_process(self) -> None:
        if not self.is_own_process:
            raise NoSupervisorError(
                f"This process was forked from run {self._run.id} and cannot spawn for it. "
                "Spawn in the flow's own process."
            )


def _done() -> concurrent.futures.Future[None]:
    """Return a future of something that needs not be done."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_result(None)
    return future


def _task_inputs(target: str, parameters: Mapping[str, Any], flow_run_id: UUID) -> dict[str, Any]:
    """Return what links the child to upstream tasks, as `run_deployment` records it.

    Raises:
        ParametersError: If the parameters are nested too deeply to be searched.
    """
    try:
        inputs: dict[str, Any] = {
            name: list(collect_task_run_inputs_sync(value)) for name, value in parameters.items()
        }
    except RecursionError as exc:
        raise ParametersError(
            f"The parameters for {target!r} are nested too deeply. Pass a reference to the data.",
            child=target,
        ) from exc
    task = TaskRunContext.get()
    if task is not None and task.task_run.flow_run_id == flow_run_id:
        inputs["__parents__"] = [TaskRunResult(id=task.task_run.id)]
    return inputs
