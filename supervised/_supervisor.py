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
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar, overload

import anyio
import attrs
from prefect.client.schemas.objects import FlowRun, TaskRunResult
from prefect.context import FlowRunContext, TaskRunContext
from prefect.flows import Flow
from prefect.utilities.engine import collect_task_run_inputs_sync

from supervised import _clock, _identity, _join, _launch, _telemetry
from supervised import _compat as compat
from supervised._body import Body
from supervised._budget import Priority, priority
from supervised._child import Child
from supervised._context import current_supervisor
from supervised._deadline import Deadline
from supervised._errors import (
    DuplicateKeyError,
    InvalidTargetError,
    NoSupervisorError,
    ParametersError,
    ScopeClosedError,
    ScopeTimeoutError,
)
from supervised._finalizers import Finalizer, Finalizers
from supervised._host import current_host
from supervised._interrupts import Interrupts
from supervised._join import Children, Join, Joiners
from supervised._lease import LeaseHolder
from supervised._lifecycle import Lifecycle, Services, open_services
from supervised._link import Link
from supervised._log import get_logger, run_logger
from supervised._own_run import OwnRun
from supervised._policy import (
    HARD_CAUSES,
    Budget,
    breaks_scope,
    check_choice,
    check_limit,
    check_seconds,
    parent_reason,
    resolve_on_parent,
    without_detach,
)
from supervised._registry import Registry, describe_ban
from supervised._restart import Restart, check_restart
from supervised._slots import SlotPool
from supervised._teardown import Teardown
from supervised._types import (
    ISOLATIONS,
    REUSES,
    Action,
    CancelReason,
    Cause,
    FlowLike,
    Isolation,
    Kind,
    OnParent,
    Reuse,
    ScopeOptions,
    SpawnOptions,
    TeardownReport,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from prefect.futures import PrefectFuture
    from typing_extensions import Unpack

    from supervised._control import Plane

logger = get_logger("prefect.supervised")

R = TypeVar("R")
T = TypeVar("T")


class Supervisor(Joiners):
    """The supervisor of the current flow run; reached through `supervised.supervisor`."""

    def __init__(
        self, options: ScopeOptions, flow: Flow[..., Any], context: FlowRunContext
    ) -> None:
        super().__init__()
        assert context.flow_run is not None
        self.options = options
        self._flow = flow
        self._context = context
        self._run = context.flow_run
        self.host = current_host.get()
        self._pid = os.getpid()
        self._started = _clock.monotonic()
        self._started_ns = time.time_ns()
        self._lock = threading.RLock()
        self._registry = Registry(flow.name)
        self._lives = Lifecycle(self, self._registry)
        self._plane: Plane[Services] | None = None
        self._span: _telemetry.SupervisorSpan | None = None
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
        self.timed_out: ScopeTimeoutError | None = None
        self.own = OwnRun(
            self._run, self.lineage, flow.name, self._on_own_cancellation, self._on_superseded
        )
        self._link = Link(self._run, self._on_lost) if self._is_launched_child else None
        self._deadline = Deadline(
            self._run,
            started=self._started,
            seconds=options.deadline_seconds,
            inherited=_identity.deadline_seconds_of(self._run.labels) if self._link else None,
        )
        self._lease: LeaseHolder | None = None
        self._leasing = anyio.Lock()
        self.failures: list[Child[Any]] = []
        self._pool = SlotPool()
        self._finalizers = Finalizers()
        self._closed = False
        self._released = False
        self.body = Body()
        self._interrupts = Interrupts(
            self.body,
            run=self._run,
            own=self.own,
            host=self.host,
            live=self._registry.live,
            call_soon=self._call_soon,
        )
        self._make_child = functools.partial(
            Child,
            on_done=self._on_child_done,
            on_settled=self._lives.settled,
            on_attempt_over=self._lives.attempt_over,
            on_unheard=self._interrupts.stop_waiting,
            ask_cancel=self._lives.cancel,
            ask_detach=self._lives.detach,
            is_signal_due=self._interrupts.is_signal_due,
        )
        self._tell_seconds_left = lambda: self.seconds_left  # one for all children

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
        restart: Restart | None = None,
        after: Sequence[Child[Any]] | None = None,
        reuse: Reuse = "never",
        isolation: Isolation = "none",
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
            restart: Limits within which it is restarted if it fails or crashes; the decorator's
                by default, which are shared with the other children.
            after: Children that have to complete first. It begins when they have, and is
                cancelled if one of them ends otherwise.
            reuse: What to do if an earlier attempt of this run has completed the same work under
                the same key: *never* runs it again (default), *completed* takes its result, if
                that was persisted. One that is still alive is taken over in any case.
            isolation: *process* runs a flow in a process of its own, which is sent SIGTERM, and
                SIGKILL if it ignores that; *none* runs it in this one (default). A deployment has
                a process anyway. What goes in and comes out is pickled.

        Returns:
            The child's handle: `await child`, `child.result()`, `child.cancel()`.

        Raises:
            InvalidTargetError: If *target* is neither a flow nor names a deployment.
            DuplicateKeyError: If *key* stands for other work already.
            ScopeClosedError: If the scope is over or being torn down.
            SpawnError: If an option is not of its type.
            ValueError: If *timeout_seconds* is negative, *scheduled_time* has no time zone, or
                *on_parent* is not understood.

        Example:
            ```python
            @supervised_flow
            async def nightly(day: str) -> list[float]:
                parts = [supervisor.spawn("score/gpu", {"part": i}) for i in range(40)]
                return [await part for part in parts]
            ```
        """
        options = SpawnOptions(
            name=name,
            key=key,
            tags=tags,
            job_variables=job_variables,
            work_queue_name=work_queue_name,
            scheduled_time=scheduled_time,
            timeout_seconds=timeout_seconds,
            on_parent=on_parent,
            restart=restart,
            after=after,
            reuse=reuse,
            isolation=isolation,
        )
        return self._spawn(target, parameters, self._pool, options)

    def _spawn(
        self,
        target: FlowLike[Any] | Flow[..., Any] | str | UUID,
        parameters: Mapping[str, Any] | None,
        pool: SlotPool,
        options: SpawnOptions,
    ) -> Child[Any]:
        self._require_own_process()
        checked = _launch.check_target(target)
        label = _launch.target_name(checked)
        _launch.check_options(label, options)
        name, timeout_seconds = options.get("name"), options.get("timeout_seconds")
        given = _launch.freeze_parameters(checked, parameters)
        all_tags = (*_launch.ambient_tags(checked), *_launch.check_tags(label, options.get("tags")))
        # Of what was passed: Prefect knows the result of a task by its identity.
        task_inputs = _task_inputs(label, parameters or {}, self._run.id)
        policy = self._policy_for(checked, options.get("on_parent"))
        restart = check_restart(options.get("restart"))
        after = _join.check(options.get("after") or ())
        reuse = check_choice("reuse", options.get("reuse", "never"), REUSES)
        kind = _kind_of(
            checked, check_choice("isolation", options.get("isolation", "none"), ISOLATIONS)
        )
        if (ending := self._nearest_ending()) is not None:
            self._registry.ban(describe_ban(ending))

        def make(final_key: str) -> Child[Any]:
            return self._make_child(
                name=name or label,
                kind=kind,
                key=final_key,
                target=label,
                on_parent=policy,
                timeout_seconds=timeout_seconds,
                run_name=name,
                home_loop=self._loop_of(checked) if kind == "inline" else None,
            )

        # Of what was passed: as JSON, a set has the order in which it happens to come.
        code = _launch.code_of(checked)
        work = _identity.default_key(label, parameters or {}, code=code)
        child, is_new = self._registry.admit(key=options.get("key"), work=work, make=make)
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
                lease_seconds=self.options.lease_seconds,
                pool=pool,
                scheduled_time=options.get("scheduled_time"),
                work_queue_name=options.get("work_queue_name"),
                job_variables=options.get("job_variables"),
                restart=restart,
                after=after,
                seconds_left=self._tell_seconds_left,
                work=work,
                reuse=reuse,
            )
            self._begin(child, lambda: self._lives.start(child, spec))
        return child

    def _begin(self, child: Child[Any], begin: Callable[[], object]) -> None:
        try:
            begin()
        except BaseException as exc:
            child.settle("failed", exception=exc)  # or the scope would wait for it
            raise
        if self._is_completing:
            self._lives.complete(child)

    def adopt(
        self,
        target: UUID | str | FlowRun | PrefectFuture[R],
        *,
        name: str | None = None,
        key: str | None = None,
        timeout_seconds: float | None = None,
        on_parent: OnParent | None = None,
    ) -> Child[R]:
        """Take over a run that somebody else has launched; from then on it is a child like others.

        For a plain `run_deployment(timeout=0)`, the future of a `flow.submit()`, or the run of
        another tool. Its tags and labels say on the server that it is ours now.

        Args:
            target: The run, its id, or a future of it.
            name: Name of the child; the run's id by default.
            key: Identity of the work within this run; made from the run's id by default.
            timeout_seconds: Seconds from its adoption after which the child is cancelled with
                outcome *timed_out*; `None` for no limit.
            on_parent: What the end of this run does to the child; see `spawn`.

        Returns:
            The child's handle. If there is no such run, or another supervisor looks after it,
            that is its outcome.

        Raises:
            InvalidTargetError: If *target* is none of these, or the run is this one, or above it.
                One that only the server knows to be above it is the child's outcome.
            DuplicateKeyError: If *key* stands for other work already.
            ScopeClosedError: If the scope is over or being torn down.
            SpawnError: If *name* or *key* is not a string.
            ValueError: If *timeout_seconds* is negative or *on_parent* is not understood.

        Example:
            ```python
            run = await arun_deployment("score/gpu", timeout=0)
            child = supervisor.adopt(run)
            ```
        """
        self._require_own_process()
        run_id = _launch.check_run(target)
        if run_id in self.lineage.path:
            raise InvalidTargetError(f"Run {run_id} cannot adopt itself, or a run above it.")
        _launch.check_options(str(run_id), SpawnOptions(name=name, key=key))
        check_seconds("timeout_seconds", timeout_seconds)
        policy = resolve_on_parent(on_parent, self.options.on_parent)

        def make(final_key: str) -> Child[Any]:
            return self._make_child(
                name=name or str(run_id),
                kind="adopted",
                key=final_key,
                target=str(run_id),
                on_parent=policy,
                timeout_seconds=timeout_seconds,
            )

        if (known := self._registry.of_run(run_id)) is not None:
            return self._adopted_before(known, key)
        own_key = key or f"adopted:{run_id}"
        child, is_new = self._registry.admit(key=own_key, work=str(run_id), make=make)
        if is_new:
            self._begin(child, lambda: self._lives.adopt(child, run_id))
        return child

    def _adopted_before(self, known: Child[Any], key: str | None) -> Child[Any]:
        if key is not None and key != known.key:
            raise DuplicateKeyError(
                f"Run {known.flow_run_id} is child {known.name!r} already, with the key "
                f"{known.key!r}. Adopt it under that key, or under none.",
                child=known.name,
            )
        return known

    @overload
    def map(
        self,
        target: Flow[..., Coroutine[Any, Any, R]],
        parameters: Iterable[Mapping[str, Any]],
        *,
        max_concurrent: int | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Children[R]: ...

    @overload
    def map(
        self,
        target: FlowLike[R],
        parameters: Iterable[Mapping[str, Any]],
        *,
        max_concurrent: int | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Children[R]: ...

    @overload
    def map(
        self,
        target: str | UUID,
        parameters: Iterable[Mapping[str, Any]],
        *,
        max_concurrent: int | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Children[Any]: ...

    def map(
        self,
        target: FlowLike[Any] | Flow[..., Any] | str | UUID,
        parameters: Iterable[Mapping[str, Any]],
        *,
        max_concurrent: int | None = None,
        **options: Unpack[SpawnOptions],
    ) -> Children[Any]:
        """Spawn one child for each set of parameters, and return their handles at once.

        Args:
            target: What to spawn; see `spawn`.
            parameters: The parameters of each child.
            max_concurrent: How many of them are launched and not over at any one time; no limit
                of their own by default. The decorator's limit holds besides, and is shared fairly
                with other calls.
            **options: Options of `spawn`, for each of them; a *key* or *name* gets the child's
                position appended.

        Returns:
            A list of children: `await children` and `children.result()` give all results.

        Raises:
            ValueError: If *max_concurrent* is not a whole number of 1 or more.
            TypeError: If an option is unknown.

        Example:
            ```python
            scores = await supervisor.map("score/gpu", [{"part": i} for i in range(40)])
            ```
        """
        if unknown := options.keys() - SpawnOptions.__annotations__.keys():
            raise TypeError(f"map() got unexpected options: {', '.join(sorted(unknown))}")
        pool = SlotPool(check_limit("max_concurrent", max_concurrent))
        made: Children[Any] = Children()
        for position, given in enumerate(parameters):
            made.append(self._spawn(target, given, pool, _numbered(options, position)))
        return made

    def on_teardown(self, callback: Callable[..., object], *args: Any, **kwargs: Any) -> Finalizer:
        """Have something called when the scope is torn down: what Prefect cannot end for you.

        Callbacks are called once, the last added first, side by side with the children's end and
        within the same grace; what they raise is in the report. A body that returns is not torn
        down, and ends what it began itself. So does a process that is killed: nobody calls then.

        Args:
            callback: A function or a coroutine function, called in a thread of its own, where a
                coroutine function gets a loop of its own: not the body's.
            *args: Its arguments.
            **kwargs: Its arguments by name.

        Returns:
            A handle; `remove()` takes the callback off.

        Raises:
            TypeError: If *callback* cannot be called.
            ScopeClosedError: If the scope is over or being torn down.

        Example:
            ```python
            query = warehouse.submit("select ...")
            finalizer = supervisor.on_teardown(query.cancel)
            query.wait()
            finalizer.remove()
            ```
        """
        self._require_own_process()
        self._registry.require_open()
        finalizer = self._finalizers.add(callback, args, kwargs)
        try:
            self._registry.require_open()  # or the teardown may have called all there were
        except ScopeClosedError:
            finalizer.remove()
            raise
        self.engage()
        return finalizer

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
    def is_linked(self) -> bool:
        """Whether a supervisor elsewhere has launched this run, and waits for it."""
        return self._link is not None

    @property
    def launched_plainly(self) -> bool:
        """Whether the body called plain `run_deployment`, or a plain flow that may have."""
        deployments, flows = compat.plain_launches(self._context)
        return deployments > 0 or flows > len(self.harmless_calls)

    @property
    def launched_since_teardown(self) -> bool:
        """Whether the body has called plain `run_deployment`, or a flow, since it was torn down."""
        return compat.plain_launches(self._context) != self._launches_seen

    @property
    def unheard(self) -> list[Child[Any]]:
        """The children whose failures nobody has asked about: the scope's end tells of them."""
        failed = [child for child in self.failures if not (child.delivered or child.is_raced)]
        return failed + [child for race in self.lost_races for child in race.losers]

    def owns(self, child: Child[Any]) -> bool:
        """Whether this scope spawned the child."""
        return self._registry.owns(child)

    @property
    def is_own_process(self) -> bool:
        """Whether this is the process of the run, and not a fork of it."""
        return os.getpid() == self._pid

    @property
    def seconds_to_ask(self) -> float:
        """What the present teardown may take on top of the grace, because its tree is large."""
        return self._tearing.seconds_to_ask if self._tearing is not None else 0.0

    @property
    def teardown_began(self) -> float:
        """When the present grace began, by the monotonic clock."""
        return self._tearing.began if self._tearing is not None else -math.inf

    @property
    def grace_seconds(self) -> float:
        """Seconds that a whole teardown may take."""
        return self.options.grace_seconds

    @property
    def ending(self) -> tuple[Cause, CancelReason] | None:
        """Why the scope is being torn down, if it is."""
        return self._ending

    def begin_teardown(
        self, cause: Cause, reason: CancelReason, first: Callable[[], object] = lambda: None
    ) -> concurrent.futures.Future[None]:
        """Begin to end everything below, once; from any thread.

        Args:
            cause: What ends the scope.
            reason: Why, for the children.
            first: Called before anything is ended, if this call is what begins it.

        Returns:
            A future that is done when the report is there.
        """
        with self._lock:
            if self._closed:
                return _done()
            if self._teardown is not None and not self._is_outdated(self._teardown):
                self._hurry(cause, reason)
                return self._teardown
            self._launches_seen = compat.plain_launches(self._context)
            if self._has_nothing_to_end(reason):
                self._ending = (cause, reason)
                return _done()
            self._ending = (cause, reason)
            self._tearing = None
            self._registry.ban(describe_ban(reason))
            first()
            self._teardown = self.engage()[0].submit(self._tear_down)
            self._teardown.add_done_callback(self._note_teardown)
        self._lives.stop_restarts()
        for inner in list(self.nested):
            if inner.is_engaged:
                inner.begin_teardown("cancelled", reason)
        return self._teardown

    def _has_nothing_to_end(self, reason: CancelReason) -> bool:
        """Whether nothing was launched so far; then nothing can be spawned any more."""
        if self.is_engaged or self.launched_plainly:
            return False
        return self._registry.ban_if_empty(describe_ban(reason))

    def _note_teardown(self, teardown: concurrent.futures.Future[None]) -> None:
        """Tell of a teardown that broke down, and of what it may have left alive."""
        if teardown.cancelled() or (exc := teardown.exception()) is None:
            return
        self._logger.error("The teardown itself failed", exc_info=exc)
        self.log_given_up()
        for child in self._registry.live():
            child.settle("abandoned")

    def end_nested(self, run_id: UUID | None, reason: CancelReason) -> None:
        """Tear down the scope of an inline child's own run."""
        for inner in list(self.nested):
            if inner.flow_run_id == run_id and inner.is_engaged:
                inner.begin_teardown("cancelled", reason)

    def _is_outdated(self, teardown: concurrent.futures.Future[None]) -> bool:
        """Whether a body that went on after a teardown has launched something plainly."""
        return teardown.done() and self.launched_since_teardown

    @property
    def is_waiting(self) -> bool:
        """Whether the teardown waits for children whose policy is to be waited for."""
        return self._tearing is not None and self._tearing.is_waiting

    def _hurry(self, cause: Cause, reason: CancelReason) -> None:
        """Let a harder end overtake a teardown that is still waiting for children."""
        if cause not in {*HARD_CAUSES, "timed_out"} or self._plane is None:
            return

        async def hurry(_: Services) -> None:
            if self._tearing is not None:
                self._tearing.hurry(cause, reason)
            else:
                self._ending = (cause, reason)

        self._plane.submit(hurry)

    def prepare_completion(self) -> None:
        """Apply `on_parent` for a body that returned to the children that are not waited for."""
        self._is_completing = True
        for child in self._registry.live():
            self._lives.complete(child)

    def seal(self) -> bool:
        """Admit no more children, unless there are live ones to wait for."""
        return self._registry.ban_if_settled("the flow has ended")

    def end_processes(self) -> list[Child[Any]]:
        """End the children in processes of ours: the run goes on elsewhere and begins them anew."""
        message = f"its parent '{self._flow.name}' was suspended or rescheduled"
        ended = [child for child in self._registry.live() if child.kind == "process"]
        for child in ended:
            child.cancel_because(CancelReason(source="parent_suspended", message=message))
        return ended

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

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline of this scope or of one around it; `None` without any."""
        scope: Supervisor | None = self
        deadline = math.inf
        while scope is not None:
            deadline, scope = min(deadline, scope._deadline.at), scope.outer
        return None if math.isinf(deadline) else max(0.0, deadline - _clock.monotonic())

    def arm_deadline(self) -> None:
        """Begin to count the time that the scope has, if that is limited."""
        if self._deadline.is_limited:
            self.engage()[0].submit(self._count_down)

    def link(self) -> None:
        """Begin to watch the run that launched this one, if a supervisor did."""
        if self.outer is None and _identity.LEASE in self._run.labels:
            # An earlier attempt has left children, who count on a sign of life.
            self._acquire().submit(self.hold_lease)
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

    @property
    def plane(self) -> Plane[Services] | None:
        """The control plane, once something has needed it."""
        return self._plane

    @property
    def is_torn_down(self) -> bool:
        """Whether this very scope is being torn down, or was."""
        return self._ending is not None

    def engage(self) -> tuple[Plane[Services], _telemetry.SupervisorSpan]:
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
                    on_child_failure=self.options.on_child_failure,
                    grace_seconds=self.options.grace_seconds,
                    context=_telemetry.current_context(self._run.labels, compat.TRACEPARENT_LABEL),
                    start_ns=self._started_ns,
                )
                if self._link is None:
                    plane.submit(self._watch)
                if self.options.requests_per_minute is not None:
                    plane.submit(self._limit_requests)
                if self.outer is None:
                    self.body.listen()
            return plane, self._span

    def _acquire(self) -> Plane[Services]:
        with self._lock:
            if self._plane is None:
                self._plane = self.host.acquire_plane(functools.partial(open_services, self.host))
            return self._plane

    def _call_soon(self, call: Callable[[], object]) -> bool:
        """Call something in the control plane's loop; false if there is none."""
        return self._plane is not None and self._plane.call_soon(call)

    def _engage_if_open(self) -> None:
        with self._lock:
            if not self._closed:
                self.engage()

    # -- what children do and are told -----------------------------------------------------------

    def _on_child_done(self, child: Child[Any]) -> None:
        """Take note of a child's end, and act on a failure; in whatever thread it happens."""
        outcome = child.outcome
        assert outcome is not None
        run = f" (flow run {child.flow_run_id})" if child.flow_run_id else ""
        if breaks_scope(outcome):  # nothing else may tell of it
            self._logger.warning("Child %r%s %s", child.name, run, child.describe_end())
        elif outcome == "abandoned":
            self._logger.error("Child %r%s was given up: it may still be alive", child.name, run)
        else:
            self._logger.info("Child %r%s ended: %s", child.name, run, outcome)
        if child.is_raced:
            return
        policy = "cancel_siblings" if child.used_up_restarts else self.options.on_child_failure
        if breaks_scope(outcome) and policy != "ignore":
            with self._lock:
                self.failures.append(child)
            if policy == "cancel_siblings" and self._ending is None:
                self._fail_with(child)

    def _fail_with(self, child: Child[Any]) -> None:
        reason = CancelReason(
            source="sibling_failed",
            message=f"sibling '{child.name}' {child.describe_end()}",
            child=child.name,
        )
        if self._span is not None:
            self._span.culprit = child.span
        self._interrupts.fail(child, lambda first: self.begin_teardown("failed", reason, first))

    def _begin_race(self, race: Join[Any]) -> None:
        with self._lock:
            if not self._closed:
                self.engage()[0].submit(lambda _: race.expire_in_time())

    # -- the run's own end -----------------------------------------------------------------------

    async def _count_down(self, services: Services) -> None:
        """End the scope when its time is over, or that of the parent that has launched it."""
        if await self._deadline.wait(services.api, self._lives.wait_for_close):
            self._on_deadline()

    def _on_deadline(self) -> None:
        if self._closed or self.own.cancellation is not None:
            return
        seconds = self._deadline.at - self._started
        detail = f"its deadline was exceeded, {seconds:.3g} s after it began"
        reason = parent_reason("timed_out", self._flow.name, detail)
        self.timed_out = ScopeTimeoutError(f"Flow {self._flow.name!r} timed out: {detail}")
        self.begin_teardown("timed_out", reason)
        self.body.interrupt()

    async def _watch(self, services: Services) -> None:
        self.own.watch(services.watcher)
        self.own.watch_tree(services.watcher)

    async def _limit_requests(self, services: Services) -> None:
        assert self.options.requests_per_minute is not None
        services.api.budget.limit(self.options.requests_per_minute)

    async def _unwatch(self, services: Services) -> None:
        self._lives.close()
        if self._span is not None and self.options.requests_per_minute is not None:
            services.api.budget.unlimit(self.options.requests_per_minute)
        self._drop_lease()
        await self._unwatch_above(services)
        self.own.unwatch(services.watcher)

    async def _unwatch_above(self, services: Services) -> None:
        if self._link is not None:
            self._link.unwatch(services.watcher)

    async def hold_lease(self, services: Services) -> None:
        """Give signs of life to children elsewhere, from now to the end of the scope."""
        if self.outer is not None and not self.outer._closed:
            await self.outer.hold_lease(services)
            return
        async with self._leasing:  # in turn: who came first is launched first
            if self._lease is None and self._plane is not None:
                # Known before it is renewed: it may be dropped meanwhile.
                self._lease = lease = LeaseHolder(
                    services.api, self._run, self.options.lease_seconds
                )
                await lease.renew()
                self._plane.submit(lambda _: lease.hold())

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.drop()

    def _on_superseded(self) -> None:
        """Leave the children to the later attempt: it finds them by their keys."""
        self._logger.warning(
            "This attempt launches and cancels nothing more: %s", _launch.SUPERSEDED
        )
        self._drop_lease()
        self.hand_over()

    def hand_over(self) -> None:
        """Let go of what runs elsewhere; end what runs here, which a later attempt begins anew."""
        self._registry.ban(_launch.SUPERSEDED)
        self._lives.stop_restarts()
        for child in self._registry.live():
            if child.is_local or child.attempt.is_queued:
                child.cancel_because(CancelReason(source="superseded", message=_launch.SUPERSEDED))
            elif child.flow_run is not None:
                child.settle("detached")  # one that is being launched is refused
        for inner in list(self.nested):
            if not inner.is_spawned:
                inner.hand_over()

    @property
    def is_spawned(self) -> bool:
        """Whether the scope around this one has spawned its run: a later attempt makes its own."""
        return self.outer is not None and _identity.is_ours(self._run)

    def attempt_checked(self) -> concurrent.futures.Future[None]:
        """Return a future that is done once it is known whether a later attempt has begun.

        Only who has launched children elsewhere asks: they end with what this one writes.
        """
        with self._lock:
            if self._lease is None or self._plane is None or self._released:
                return _done()
            return self._plane.submit(self._check_attempt)

    async def _check_attempt(self, services: Services) -> None:
        try:
            await self.check_superseded(services)
        except Exception:
            logger.debug("Could not see whether a later attempt has begun", exc_info=True)

    async def check_superseded(self, services: Services) -> bool:
        """Tell whether a later attempt of the run has begun, or of one that has called it plainly.

        Raises:
            Exception: If the server does not tell.
        """
        scope = self
        while scope.outer is not None and not scope.is_spawned:
            scope = scope.outer
        return await scope.own.check_superseded(services.api)

    def _on_lost(self, lost: UUID, reason: CancelReason) -> None:
        """End the run, because what it must not outlive is gone; in the control plane."""
        with self._lock:
            if self._plane is not None:
                self._plane.submit(lambda services: self._follow(services, lost, reason))

    async def _follow(self, services: Services, lost: UUID, reason: CancelReason) -> None:
        """End with a run above, unless somebody has detached this one from it since."""
        assert self._link is not None
        if self.own.cancellation is not None:
            return
        path = self.lineage.path
        below = path[path.index(lost) + 1 :] if lost in path else path[-1:]
        try:
            runs = await services.api.read_runs(below)
        except Exception:
            logger.debug("Could not read what lies below a lost run", exc_info=True)
            self._link.look_again(lost)
            return
        if self.own.cancellation is not None or self.own.lost is not None:
            return
        if any(run.labels.get(_identity.DETACHED) for run in runs):
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
        if self._plane is not None:
            self._plane.submit(self._unwatch_above)  # its own end is decided
        self.begin_teardown("cancelled", self.own.reason)
        self._interrupts.cancel()

    async def _tear_down(self, services: Services) -> None:
        assert self._ending is not None
        assert self._span is not None
        with priority(Priority.TEARDOWN):
            if self._ending[0] in HARD_CAUSES and await self.own.recheck(services.api):
                self._ending = ("cancelled", self.own.reason)
        cause, reason = self._ending
        live = len(self._registry.live())
        span = None
        if live or self.launched_plainly:
            span = _telemetry.TeardownSpan(
                self._span, reason=reason, live=live, grace_seconds=self.options.grace_seconds
            )
        self._tearing = Teardown(
            services.api,
            services.watcher,
            flow_name=self._flow.name,
            lineage=self.lineage,
            cause=cause,
            reason=reason,
            children=self._registry.kept,
            finished=self._registry.finished_children,
            in_body=self.runs_in_body,
            body_runs=lambda: self.body.is_running,
            budget=Budget(self.options.grace_seconds),
            delegate_to=self.own.delegate_to,
            is_superseded=lambda: self.check_superseded(services),
            span=span,
        )
        report = await self._end_all(self._tearing)
        self._report = report = report.after(self._report)
        if report.receipts or report.finalizer_errors:
            is_fine = report.ok and not report.finalizer_errors
            self._logger.log(logging.INFO if is_fine else logging.ERROR, "%s", report)
        vouched = {r.flow_run_id for r in report.receipts if r.status in {"cancelled", "forced"}}
        for child in self._registry.live():
            if child.detach_requested:
                continue  # it is still being launched
            child.settle("cancelled" if child.flow_run_id in vouched else "abandoned")

    async def _end_all(self, teardown: Teardown) -> TeardownReport:
        """End children and whatever else, side by side: there is one grace for both."""
        with priority(Priority.TEARDOWN):
            errors, report = await asyncio.gather(
                self._finalizers.run(self.options.grace_seconds), teardown.run()
            )
        return attrs.evolve(report, finalizer_errors=tuple(errors))

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
        policy = resolve_on_parent(on_parent, self.options.on_parent)
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
        return self.outer is None and _identity.is_ours(self._run)

    def _find_lineage(self) -> _identity.Lineage:
        if not _identity.is_ours(self._run):
            # A copy of one of our runs may carry its labels; what it launches is its own.
            if self.outer is not None:
                return self.outer.lineage.nested(self._run.id)
            return _identity.Lineage(self._run.id, (self._run.id,))
        lineage = _identity.lineage_of(self._run.id, self._run.labels)
        if self.outer is None:
            return lineage
        return attrs.evolve(lineage, host=self.outer.lineage.host)  # which holds the lease

    def runs_in_body(self) -> set[UUID]:
        """Return the supervised runs that this body executes by plain calls."""
        inner = {scope.flow_run_id for scope in list(self.nested)}
        return inner.union(*(scope.runs_in_body() for scope in list(self.nested)))

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


def _kind_of(target: Flow[..., Any] | str | UUID, isolation: Isolation) -> Kind:
    if not isinstance(target, Flow):
        return "deployment"
    return "process" if isolation == "process" else "inline"


def _done() -> concurrent.futures.Future[None]:
    """Return a future of something that needs not be done."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_result(None)
    return future


def _numbered(options: SpawnOptions, position: int) -> SpawnOptions:
    """Return options with the key and the name of one of several children."""
    own = options.copy()
    if (key := options.get("key")) is not None:
        own["key"] = f"{key}-{position}"
    if (name := options.get("name")) is not None:
        own["name"] = f"{name}-{position}"
    return own


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
