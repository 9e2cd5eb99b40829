"""The life of a child: launched, followed, cancelled or let go, cleared up after.

The supervisor decides what is to become of the scope; what that means to one child is here. All of
it is begun from any thread and goes on in the control plane.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import attrs
from prefect.flows import Flow

from supervised import _clock, _identity, _launch, _telemetry
from supervised._api import closing, is_refusal
from supervised._batch import Batches, Groups
from supervised._budget import Priority, priority
from supervised._errors import SpawnError
from supervised._inline import InlineRun
from supervised._log import run_logger
from supervised._policy import LEAVING, Budget, is_over, outcome_of, parent_reason
from supervised._process import ProcessRun
from supervised._reap import reap_below
from supervised._restart import Restarts
from supervised._stall import domain_of, find_stall
from supervised._teardown import Teardown
from supervised._types import CancelReason
from supervised._watch import Watcher, open_watcher

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised._api import Closing, Orchestrator
    from supervised._child import Attempt, Child, End
    from supervised._control import Plane
    from supervised._host import Host
    from supervised._own_run import OwnRun
    from supervised._process import Exit
    from supervised._registry import Registry
    from supervised._restart import Round
    from supervised._stall import Limit, Stall
    from supervised._types import Cause, ScopeOptions, TeardownReport


_LOOK_SECONDS = 0.5
_ASKING_SECONDS = 8.0  # whatever the grace: it is for waiting
_TELLING_SECONDS = 0.05
_FEW = 10
_STALL_SECONDS = 20.0
_LOOK_AT_ONCE = 200


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


class Scope(Protocol):
    """What a child's life depends on of the scope that it was spawned in."""

    host: Host
    lineage: _identity.Lineage
    options: ScopeOptions
    own: OwnRun

    @property
    def flow(self) -> Flow[..., Any]: ...

    @property
    def flow_run(self) -> FlowRun: ...

    @property
    def is_torn_down(self) -> bool: ...

    @property
    def seconds_left(self) -> float | None: ...

    @property
    def plane(self) -> Plane[Services] | None: ...

    def engage(self) -> tuple[Plane[Services], _telemetry.SupervisorSpan]: ...

    async def hold_lease(self, services: Services) -> None: ...

    async def check_superseded(self, services: Services) -> bool: ...

    def runs_in_body(self) -> set[UUID]: ...

    def end_nested(self, run_id: UUID | None, reason: CancelReason) -> None: ...


@attrs.frozen
class Cancellation:
    """What is to end for a child's sake, whatever becomes of the child meanwhile.

    Args:
        child: The child.
        attempt: The attempt at it that is cancelled.
        run_id: That attempt's run.
        reason: Why.
    """

    child: Child[Any]
    attempt: Attempt
    run_id: UUID = attrs.field(eq=False)
    reason: CancelReason = attrs.field(eq=False)


@attrs.frozen
class Ended:
    """A child's run that has ended, and may have left something alive.

    Args:
        name: The child's name.
        run_id: The run.
    """

    name: str = attrs.field(eq=False)
    run_id: UUID


class Lifecycle:
    """The lives of one scope's children.

    Args:
        scope: The scope.
        registry: Its children.
    """

    def __init__(self, scope: Scope, registry: Registry) -> None:
        self._scope = scope
        self._registry = registry
        self._launcher: _launch.Launcher | None = None
        self._last_words: dict[str, concurrent.futures.Future[None]] = {}  # of detached children
        self._specs: dict[str, _launch.LaunchSpec] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}  # of the runs whose time is limited
        self._closed = anyio.Event()
        # Of nine writes at once SQLite refused six, and each was repeated 2 to 4 s later.
        self._cutting = anyio.Lock()
        self._restarts = Restarts(registry, scope.options.restart)
        self._spawned: list[str] = []  # and not yet told of
        self._bereaved: Batches[UUID, bool] | None = None  # whose descendants are looked for
        self._reaped: dict[Cause, Groups[Ended]] = {}  # below whom something was left
        self._cancelled: dict[bool, Groups[Cancellation]] = {}  # by whether they run here

    @property
    def _logger(self) -> Any:
        return run_logger(self._scope.flow_run, self._scope.flow)

    @property
    def _plane(self) -> Plane[Services] | None:
        return self._scope.plane

    # -- its beginning ---------------------------------------------------------------------------

    def start(self, child: Child[Any], spec: _launch.LaunchSpec) -> None:
        """Launch a child that the registry has admitted; a failure becomes its outcome."""
        self._specs[child.key] = spec
        if spec.restart is not None:
            self._restarts.limit(child, spec.restart)
        self._begin(child)

    def _begin(self, child: Child[Any]) -> None:
        plane, span = self._scope.engage()
        spec = self._specs[child.key]
        child.span = _telemetry.ChildSpan(
            span,
            name=child.name,
            kind=child.kind,
            flow_name=child.target.split("/")[0],
            deployment_name=child.target if child.kind == "deployment" else None,
            generation=child.generation,
            detached=child.is_detached,
            start_ns=time.time_ns(),
            earlier=child.span,
        )

        plane.start(
            functools.partial(self._launch_child, child, spec),
            functools.partial(_settle_failed, child, child.attempt),
        )

    async def _launch_child(
        self, child: Child[Any], spec: _launch.LaunchSpec, services: Services
    ) -> None:
        attempt = child.attempt
        self._scope.own.watch_tree(services.watcher)
        if not child.is_local:
            await self._scope.hold_lease(services)
        with priority(Priority.LAUNCH):
            run = await self._launcher_with(services).launch(child, spec)
        if run is None:
            return
        if attempt.is_over and child.outcome != "detached" and not is_over(run):
            await self._end_late(services, child, run)
            return
        services.watcher.watch(child)
        self._tell_spawned(child, run)
        if run.state is not None and run.state.is_final():
            # By an earlier attempt, or before its creation was answered.
            outcome = outcome_of(run.state, asked=child.cancel_reason is not None)
            child.settle(outcome or "crashed", state=run.state)
            return
        if child.detach_requested:
            self.detach(child)
        elif child.span is not None and child.is_detached:
            child.span.end("detached", state=run.state, exception=None, end_ns=time.time_ns())
        await self._resume_deadline(services, child, spec, run)
        has_process = child.kind == "process" and self._scope.host.starts_processes
        if isinstance(spec.target, Flow) and has_process:
            self._start_process(child, spec, spec.target, run)
        elif isinstance(spec.target, Flow):
            self._start_inline(services, child, spec, spec.target, run)
        elif child.cancel_reason is not None and not self._scope.is_torn_down:
            await self._cancel_run(
                services, child
            )  # else the scope's teardown asks for it, in bulk

    def _tell_spawned(self, child: Child[Any], run: FlowRun) -> None:
        """Log a child's run: of those that are created together, in one record."""
        self._spawned.append(f"{child.name!r} as flow run {run.id} ({child.url or child.kind})")
        loop = asyncio.get_running_loop()
        if child.is_local:
            # Once it is started: before it logs anything itself, it makes requests.
            loop.call_soon(self._tell_all_spawned)
        elif len(self._spawned) == 1:
            loop.call_later(_TELLING_SECONDS, self._tell_all_spawned)

    def _tell_all_spawned(self) -> None:
        spawned, self._spawned = self._spawned, []
        if len(spawned) > _FEW:  # a record each took a tenth of the launch
            self._logger.info("Spawned %d children:\n%s", len(spawned), "\n".join(spawned))
            return
        for each in spawned:
            self._logger.info("Spawned child %s", each)

    async def _ask_to_end(self, services: Services, run_ids: Sequence[UUID], message: str) -> None:
        """Ask for the cancellation of runs until the server has heard it: it may be locked.

        Not again if it refuses who asks, or the question.
        """
        left, why = list(run_ids), "there was no time for it"
        try:
            with anyio.move_on_after(max(self._scope.options.grace_seconds, _ASKING_SECONDS)):
                while left:
                    left, why = await self._ask_once(services, left, message)
                    if left:
                        await anyio.sleep(_LOOK_SECONDS)
        except Exception as exc:
            why = repr(exc)
        finally:  # also if the control plane ends
            if left:
                runs = ", ".join(map(str, left))
                self._logger.error(
                    "Could not cancel %s: %s. Cancel it by hand: prefect flow-run cancel <id>",
                    runs,
                    why,
                )

    async def _ask_once(
        self, services: Services, run_ids: list[UUID], message: str
    ) -> tuple[list[UUID], str]:
        """Ask once; return who has not been heard and lives, and why.

        Raises:
            PrefectHTTPStatusError: If to ask again would not help.
        """
        try:
            acks = await services.api.request_cancel(run_ids, message)
            unheard = {ack.run_id: ack.detail for ack in acks if ack.state is None}
            known = await services.api.read_runs(unheard) if unheard else []
        except Exception as exc:
            if is_refusal(exc):
                raise
            return run_ids, repr(exc)
        left = [run.id for run in known if not is_over(run)]
        return left, next((unheard[run_id] for run_id in left), "")

    async def _end_late(self, services: Services, child: Child[Any], run: FlowRun) -> None:
        """End a run whose creation was answered when nobody waited for it any more."""
        self._logger.warning("Cancelling %s, which nobody waits for", run.id)
        message = f"Cancelled because {child.cancel_reason or 'its launch was given up'}"
        with priority(Priority.TEARDOWN):
            if child.is_local:
                await services.api.close_run(run.id, message)
            else:
                await self._ask_to_end(services, [run.id], message)

    def _start_inline(
        self,
        services: Services,
        child: Child[Any],
        spec: _launch.LaunchSpec,
        flow: Flow[..., Any],
        run: FlowRun,
    ) -> None:
        plane = self._plane
        assert plane is not None
        InlineRun(
            child,
            flow,
            run,
            _launch.bind_parameters(flow, spec.parameters),
            host=self._scope.host,
            context=spec.context,
            home_loop=spec.home_loop,
            conclude=lambda as_, message: plane.submit(
                lambda services: self._conclude(services, run, as_, message)
            ),
        ).start()
        # It tells of its own end. To read that as well kept the server from what came next.
        child.when_over(lambda: plane.call_soon(lambda: services.watcher.unwatch(run.id)))

    def _start_process(
        self, child: Child[Any], spec: _launch.LaunchSpec, flow: Flow[..., Any], run: FlowRun
    ) -> None:
        plane = self._plane
        assert plane is not None
        process = ProcessRun(
            child,
            flow,
            run,
            _launch.bind_parameters(flow, spec.parameters),
            context=spec.context,
            grace_seconds=self._scope.options.grace_seconds,
            conclude=lambda end: plane.submit(
                lambda services: self._conclude_process(services, child, run, end)
            ),
        )
        process.start()
        if child.cancel_reason is not None:
            process.interrupt()

    async def _conclude_process(
        self, services: Services, child: Child[Any], run: FlowRun, end: Exit
    ) -> State[Any]:
        """Return the last state of a run whose process is gone."""
        services.watcher.unwatch(run.id)
        return await self._conclude(services, run, *_how_it_ended(child, end))

    async def _conclude(
        self, services: Services, run: FlowRun, as_: Closing, message: str
    ) -> State[Any]:
        """Return the last state of a run that nothing runs any more; write it if that did not."""
        read = await _launch.patiently(lambda: services.api.read_runs([run.id]))
        state = read[0].state if read else None
        if state is not None and state.is_final():
            return state
        written = await _launch.patiently(lambda: services.api.close_run(run.id, message, as_=as_))
        return written or closing(as_, message)

    def _launcher_with(self, services: Services) -> _launch.Launcher:
        if self._launcher is None:
            assert self._plane is not None
            self._plane.submit(self._look_for_stalls)
            self._launcher = _launch.Launcher(
                services.api,
                run=self._scope.flow_run,
                lineage=self._scope.lineage,
                options=self._scope.options,
                is_superseded=functools.partial(self._scope.check_superseded, services),
                end_run=functools.partial(self._end_earlier, services),
                seconds_left=lambda: self._scope.seconds_left,
                call_soon=self._plane.call_soon,
            )
        return self._launcher

    async def _resume_deadline(
        self, services: Services, child: Child[Any], spec: _launch.LaunchSpec, run: FlowRun
    ) -> None:
        """Arm the child's deadline; a run that an earlier attempt launched has used some of it."""
        if child.timeout_seconds is not None:
            is_new = run.labels.get(_identity.SPAWN) == spec.id
            self._arm_deadline(child, 0.0 if is_new else await _launch.age_of(services.api, run))

    def _arm_deadline(self, child: Child[Any], age: float = 0.0) -> None:
        if child.timeout_seconds is None:
            return
        message = f"its deadline of {child.timeout_seconds:g} s was exceeded"
        reason = CancelReason(source="deadline", message=message)
        self._disarm_deadline(child)
        self._timers[child.key] = asyncio.get_running_loop().call_later(
            max(0.0, child.timeout_seconds - age), self._expire, child, child.attempt, reason
        )
        plane = self._plane
        assert plane is not None
        child.when_over(lambda: plane.call_soon(lambda: self._disarm_deadline(child)))

    def _expire(self, child: Child[Any], attempt: Attempt, reason: CancelReason) -> None:
        if child.attempt is attempt and not attempt.is_over:  # or it is the next one's time
            self.cancel(child, reason)

    def _disarm_deadline(self, child: Child[Any]) -> None:
        if (timer := self._timers.pop(child.key, None)) is not None:
            timer.cancel()

    def adopt(self, child: Child[Any], run_id: UUID) -> None:
        """Take over a run that others have launched; a failure becomes the child's outcome."""
        plane, span = self._scope.engage()
        child.span = _telemetry.ChildSpan(
            span,
            name=child.name,
            kind=child.kind,
            flow_name=child.target,
            deployment_name=None,
            generation=0,
            detached=False,
            start_ns=time.time_ns(),
        )
        plane.start(
            lambda services: self._adopt(services, child, run_id),
            functools.partial(_settle_failed, child, child.attempt),
        )

    async def _adopt(self, services: Services, child: Child[Any], run_id: UUID) -> None:
        self._scope.own.watch_tree(services.watcher)
        await self._scope.hold_lease(services)
        with priority(Priority.LAUNCH):
            run = await self._launcher_with(services).adopt(child, run_id)
        if run is None:
            return
        if child.is_over and child.outcome != "detached" and not is_over(run):
            await self._end_late(services, child, run)
            return
        services.watcher.watch(child)
        services.watcher.apply(run)
        self._logger.info("Adopted flow run %s (%s)", run.id, child.url or run.name)
        if child.detach_requested:
            self.detach(child)
        self._arm_deadline(child)
        if child.cancel_reason is not None:
            await self._cancel_run(services, child)

    # -- where it waits -------------------------------------------------------------------------

    async def _look_for_stalls(self, services: Services) -> None:
        """Say it once if every child waits for a slot that those hold who wait for it."""
        while not await self.wait_for_close(_STALL_SECONDS):
            try:
                stall = await self._find_stall(services)
            except Exception:
                self._logger.debug("Could not look for what the children wait for", exc_info=True)
                continue
            if stall is not None:
                self._logger.warning("%s", stall)
                return

    async def _find_stall(self, services: Services) -> Stall | None:
        api = services.api
        live = [child for child in self._registry.live() if not child.attempt.is_queued]
        ids = [child.flow_run_id for child in live if child.flow_run_id is not None]
        if not ids or len(ids) < len(live) or not all(child.waits_for_a_slot for child in live):
            return None
        runs = await api.read_runs(ids)
        overdue = _clock.utc_now() - timedelta(seconds=_STALL_SECONDS / 2)
        for run in runs:
            due = run.expected_start_time
            if run.state is None or not run.state.is_scheduled() or due is None or due > overdue:
                return None
        lineage = self._scope.lineage
        of_tree = await api.read_tagged(lineage.tag, live_only=True)
        above = {*lineage.path, *await self._launcher_with(services).runs_above()}
        holders = {run.id: run for run in [*await api.read_runs(above), *of_tree]}
        at_work = [run for run in holders.values() if run.state and not run.state.is_scheduled()]
        limits: dict[object, Sequence[Limit]] = {}
        for run in runs:
            if domain_of(run) not in limits:
                limits[domain_of(run)] = await api.read_limits(run)
        return find_stall(runs, at_work, {run.id: limits[domain_of(run)] for run in runs})

    def close(self) -> None:
        """Look after nothing any more: the scope is over; in the control plane."""
        self._closed.set()
        self._tell_all_spawned()

    async def wait_for_close(self, seconds: float) -> bool:
        """Wait for the scope's end; false if *seconds* have passed before."""
        with anyio.move_on_after(max(0.0, seconds)):
            await self._closed.wait()
        return self._closed.is_set()

    # -- its restarts ---------------------------------------------------------------------------

    def attempt_over(self, child: Child[Any], end: End) -> bool:
        """Take note that an attempt has ended; true if the child is to be restarted."""
        plane = self._plane
        if plane is None or self._scope.is_torn_down:
            return False
        goes_on, begun = self._restarts.note_end(child, end, _clock.monotonic())
        if begun is not None:
            for other in begun.others:
                message = f"it is restarted together with '{child.name}'"
                other.cancel_because(CancelReason(source="restart", message=message))
            future = plane.submit(lambda services: self._restart(services, begun))
            future.add_done_callback(lambda future: self._give_up_restart(begun, future))
        return goes_on

    async def _restart(self, services: Services, begun: Round) -> None:
        """Restart the members of a round, once all of their attempts have ended."""
        await asyncio.wrap_future(begun.ready)
        if not begun.members:
            return
        for child in list(begun.members):
            await self._end_attempt(services, child, begun.ends[child.key])
        delay = self._delay_of(begun)
        self._logger.warning(
            "Restarting %s in %.3g s: child %r %s (%d of %d within %g s)",
            ", ".join(repr(child.name) for child in begun.members),
            delay,
            begun.culprit.name,
            begun.ends[begun.culprit.key].outcome if begun.culprit.key in begun.ends else "ended",
            begun.number,
            begun.restart.max,
            begun.restart.within_seconds,
        )
        with anyio.move_on_after(delay):
            await asyncio.wrap_future(begun.deserted)
        for child in list(begun.members):
            if self._restarts.restart(child):
                self._begin_again(child)
            elif not child.is_over:
                child.settle("cancelled")  # by somebody who came in between

    def _delay_of(self, begun: Round) -> float:
        """Return the seconds of backoff; a function of the user's that fails delays nothing."""
        try:
            return begun.restart.delay(begun.number)
        except Exception:
            self._logger.exception(
                "The backoff for child %r cannot be told; restarting it at once", begun.culprit.name
            )
            return 0.0

    def _begin_again(self, child: Child[Any]) -> None:
        try:
            self._begin(child)
        except Exception as exc:  # the plane is closed
            child.settle("failed", exception=exc)
            raise

    def stop_restarts(self) -> None:
        """Restart nobody any more: who waits for it has ended for good."""
        for child, end in self._restarts.stop():
            child.settle(end.outcome, state=end.state, exception=end.exception)

    async def _end_attempt(self, services: Services, child: Child[Any], end: End) -> None:
        """Close what an attempt has left behind: its span, and what it had launched."""
        if child.span is not None:
            child.span.end(
                end.outcome, state=end.state, exception=end.exception, end_ns=time.time_ns()
            )
        if child.flow_run_id is not None:
            services.watcher.unwatch(child.flow_run_id)
        elif child.attempt.was_requested and not child.is_local:
            await self._end_unanswered(services, child, self._specs[child.key])
        self._disarm_deadline(child)  # the next one's run has its own
        cause = LEAVING.get(end.outcome)
        if child.kind != "inline" and cause is not None and child.cancel_reason is None:
            await self._reap_below(services, child, cause, alone=True)

    def _give_up_restart(self, begun: Round, future: concurrent.futures.Future[None]) -> None:
        """Settle the members of a round that could not be restarted as their attempts ended."""
        if not future.cancelled() and future.exception() is None:
            return
        for child in list(begun.members):
            self._restarts.leave(child)
            end = begun.ends.get(child.key)
            child.settle(
                end.outcome if end is not None else "failed",
                exception=None if future.cancelled() else future.exception(),
            )

    async def _end_earlier(self, services: Services, run: FlowRun) -> bool:
        """End the run of an earlier attempt that is in the way of a child's own."""
        # Not marked as ours: its own teardown, if it has one, is to see to what is below it.
        message = "Cancelled because its parent has begun other work under the same key"
        reason = CancelReason(source="explicit", message="its parent run cancelled it")
        self._logger.warning("Ending run %r (%s) of an earlier attempt", run.name, run.id)
        with anyio.move_on_after(self._scope.options.grace_seconds):
            await self._ask_to_end(services, [run.id], message)
            await _until_over(services.api, run.id)
            await reap_below(
                services.api,
                self._scope.lineage.nested(run.id),
                flow_name=run.name,
                cause="cancelled",
                reason=reason,
                grace_seconds=self._scope.options.grace_seconds,
            )
            return True
        return False

    # -- what it is told -------------------------------------------------------------------------

    def complete(self, child: Child[Any]) -> None:
        """Apply a child's policy for a parent that has completed."""
        action = child.on_parent["completed"]
        if action == "cancel":
            self.cancel(child, parent_reason("completed", self._scope.flow.name))
        elif action == "detach":
            child.detach()

    def cancel(self, child: Child[Any], reason: CancelReason) -> None:
        """Ask for a child's cancellation, with everything below it; its siblings go on."""
        if child.detach_requested or not child.mark_cancel(reason):
            return
        if (interrupt := child.attempt.interrupt) is not None:
            interrupt()
        self._scope.end_nested(child.flow_run_id, reason)
        if self._plane is not None:
            self._plane.submit(lambda services: self._cancel_run(services, child))

    async def _cancel_run(self, services: Services, child: Child[Any]) -> None:
        """Tear down a child, and with it who is cancelled in the same instant; siblings go on."""
        attempt, run_id, reason = child.attempt, child.flow_run_id, child.cancel_reason
        if run_id is None or reason is None or attempt.is_over:
            return
        # One by one, 200 children took 600 searches of the whole tree, and 201 requests at once.
        groups = self._cancelled.get(child.is_local)
        if groups is None:
            end = functools.partial(self._cancel_runs, services, are_local=child.is_local)
            groups = self._cancelled[child.is_local] = Groups(end)
        await groups.add(Cancellation(child, attempt, run_id, reason))

    async def _cancel_runs(
        self, services: Services, group: Sequence[Cancellation], *, are_local: bool
    ) -> None:
        """Tear down children with everything below them, all that run here or all that do not."""
        teardown = Teardown(
            services.api,
            services.watcher,
            flow_name=self._scope.flow.name,
            lineage=self._scope.lineage,
            cause="cancelled",
            reason=_common_reason(group),
            children=lambda: [each.child for each in group if each.child.attempt is each.attempt],
            in_body=self._scope.runs_in_body,
            budget=Budget(self._scope.options.grace_seconds),
            tops={each.run_id: each.reason for each in group},
            # What is below code that runs here is never the later attempt's.
            is_superseded=None
            if are_local
            else functools.partial(self._scope.check_superseded, services),
        )
        with priority(Priority.TEARDOWN):
            report = await teardown.run()
        if not self._scope.is_torn_down:
            self._give_up(group, report)

    def _give_up(self, group: Sequence[Cancellation], report: TeardownReport) -> None:
        """Settle who has not ended in the grace; how the others have, they hear themselves."""
        unverified = {receipt.flow_run_id for receipt in report.unverified}
        alive = [each for each in group if each.run_id in unverified and not each.attempt.is_over]
        if not alive:
            return
        reason = str(_common_reason(alive))
        self._logger.error("%s", attrs.evolve(report, reason=reason, receipts=report.unverified))
        for each in alive:
            each.child.settle("abandoned", of=each.attempt)

    def detach(self, child: Child[Any]) -> None:
        """Let a child go on, whatever becomes of the parent.

        Raises:
            ValueError: If it runs in this process.
        """
        if child.is_local:
            raise ValueError(
                f"Child {child.name!r} runs inline, in this process, and cannot outlive it. "
                "Spawn a deployment to detach it."
            )
        if not child.is_spared:
            return  # it has been told to end: there is no way back from that either
        child.detach_requested = True
        run = child.flow_run
        if run is None or self._plane is None or (child.attempt.is_over and not child.is_over):
            return  # as soon as it has a run
        if child.key not in self._last_words:
            self._last_words[child.key] = self._plane.submit(
                lambda services: self._cut_loose(services, child, run)
            )
        child.settle("detached")

    async def _cut_loose(self, services: Services, child: Child[Any], run: FlowRun) -> None:
        """Have the server know that a child is detached: who else ends trees asks it."""

        async def tell() -> None:
            async with self._cutting:
                await services.api.cut_loose(run, {_identity.DETACHED: True})

        try:
            if not await _launch.patiently(lambda: self._scope.check_superseded(services)):
                await _launch.patiently(tell)
        except Exception:
            self._logger.exception(
                "Child %r (%s) is detached, but the server could not be told, so it may still be "
                "ended with this run",
                child.name,
                run.id,
            )

    # -- its end ---------------------------------------------------------------------------------

    def settled(self, child: Child[Any]) -> None:
        """Count a child as over, once what it may have left behind is over too."""
        spec = self._specs.pop(child.key, None)
        last_words = self._last_words.get(child.key) or self._clear_up_after(child, spec)
        if last_words is None:
            self._registry.finished(child)
        else:
            last_words.add_done_callback(lambda _: self._registry.finished(child))

    def _clear_up_after(
        self, child: Child[Any], spec: _launch.LaunchSpec | None
    ) -> concurrent.futures.Future[None] | None:
        """Begin to end what a child may have left behind, if a teardown of ours does not."""
        cause = LEAVING.get(child.outcome) if child.outcome is not None else None
        if child.kind == "inline" or cause is None:
            return None
        if self._scope.is_torn_down or self._plane is None:
            return None
        is_unanswered = child.flow_run is None and child.attempt.was_requested
        if is_unanswered and spec is not None and not child.is_local:
            return self._plane.submit(lambda services: self._end_unanswered(services, child, spec))
        if child.flow_run is not None and child.cancel_reason is None:
            reap = functools.partial(self._reap_below, child=child, cause=cause)
            return self._plane.submit(reap)
        return None

    async def _reap_below(
        self, services: Services, child: Child[Any], cause: Cause, *, alone: bool = False
    ) -> None:
        """End what a child launched that ended badly: it may have died before it could.

        Args:
            services: Those of the control plane.
            child: The child.
            cause: How it ended.
            alone: Whether somebody waits for just that, and for nothing that others have left.
        """
        assert child.flow_run is not None
        if self._bereaved is None:
            look = functools.partial(self._which_left_something, services.api)
            self._bereaved = Batches(look, limit=_LOOK_AT_ONCE)
        # Hundreds may end together: one look at all of them instead of a search for each.
        ended = Ended(child.name, child.flow_run.id)
        if not await self._bereaved.submit(None, ended.run_id):
            return
        if alone:
            await self._reap_below_all(services, [ended], cause=cause)
            return
        groups = self._reaped.get(cause)
        if groups is None:
            reap = functools.partial(self._reap_below_all, services, cause=cause)
            groups = self._reaped[cause] = Groups(reap)
        await groups.add(ended)

    async def _reap_below_all(
        self, services: Services, group: Sequence[Ended], *, cause: Cause
    ) -> None:
        """End what children that ended in the same instant have left, by one search."""
        lineage, name = self._scope.lineage, None
        if len(group) == 1:
            lineage, name = lineage.nested(group[0].run_id), group[0].name
        report = await reap_below(
            services.api,
            lineage,
            flow_name=name or f"{len(group)} children of {self._scope.flow.name}",
            cause=cause,
            reason=parent_reason(cause, name),
            grace_seconds=self._scope.options.grace_seconds,
            tops={each.run_id: parent_reason(cause, each.name) for each in group},
            watcher=services.watcher,
        )
        if report is not None and report.receipts:
            self._logger.log(logging.INFO if report.ok else logging.ERROR, "%s", report)

    async def _which_left_something(
        self, api: Orchestrator, run_ids: Sequence[UUID]
    ) -> list[bool | Exception]:
        """Tell of each of these runs whether it may have left anything alive; if in doubt, yes."""
        try:
            found = await api.read_children(run_ids)
            parents = set((await api.read_parents(found)).values()) if found else set()
            tagged = await api.read_tagged(self._scope.lineage.tag, live_only=True)
        except Exception:
            self._logger.debug("Could not look below children that have ended", exc_info=True)
            return [True] * len(run_ids)
        above = {run_id for run in tagged for run_id in _identity.path_of(run.labels)}
        return [run_id in parents or run_id in above for run_id in run_ids]

    async def _end_unanswered(
        self, services: Services, child: Child[Any], spec: _launch.LaunchSpec
    ) -> None:
        """Cancel the run of a launch that was given up: the server may have created it."""
        message = f"Cancelled because the launch of {child.name!r} was given up"
        try:
            tagged = await _launch.patiently(
                lambda: services.api.read_tagged(self._scope.lineage.tag, live_only=True)
            )
            made = [run.id for run in tagged if run.labels.get(_identity.SPAWN) == spec.id]
            if made:
                self._logger.warning("Cancelling %s, which nobody waits for", made[0])
                await self._ask_to_end(services, made, message)
                with anyio.move_on_after(self._scope.options.grace_seconds):
                    for run_id in made:
                        await _until_over(services.api, run_id)
        except Exception:
            self._logger.exception(
                "The launch of child %r was given up, and nobody knows whether it has a run",
                child.name,
            )


def _common_reason(group: Sequence[Cancellation]) -> CancelReason:
    """Return why all of these are cancelled; each keeps its own reason if there are several."""
    reasons = {each.reason for each in group}
    if len(reasons) == 1:
        return reasons.pop()
    message = "its parent has cancelled it, or a run above it"
    return CancelReason(source="parent_cancelled", message=message)


def _how_it_ended(child: Child[Any], end: Exit) -> tuple[Closing, str]:
    """Return what to say of a run whose process has not said how it ended, or never was."""
    if isinstance(end.exception, SpawnError):
        return "failed", str(end.exception)
    how = f"Its process ended with exit code {end.code}."
    if child.cancel_reason is not None:
        return "cancelled", f"Cancelled because {child.cancel_reason}. {how}"
    return "crashed", how


def _settle_failed(child: Child[Any], attempt: Attempt, exc: BaseException) -> None:
    """Settle a child whose launch ended without giving it a run, or an outcome."""
    if isinstance(exc, asyncio.CancelledError):
        child.settle("cancelled", of=attempt)
    else:
        child.settle("failed", exception=exc, of=attempt)


async def _until_over(api: Orchestrator, run_id: UUID) -> None:
    while True:
        (run,) = await api.read_runs([run_id]) or (None,)
        if run is None or (run.state is not None and run.state.is_final()):
            return
        await anyio.sleep(_LOOK_SECONDS)
