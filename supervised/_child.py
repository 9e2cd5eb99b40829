"""The handle of one child: thread-safe, settled once, awaitable from any loop or thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

import attrs
from prefect.exceptions import CancelledRun, CrashedRun, FailedRun, MissingResult
from prefect.futures import PrefectFuture
from prefect.states import Pending
from prefect.utilities.urls import url_for

from supervised import _clock
from supervised import _compat as compat
from supervised._control import CONTROL_THREAD, wait_in_slices
from supervised._errors import (
    ChildCancelled,
    ChildCrashed,
    ChildError,
    ChildFailed,
    ChildTimedOut,
    SpawnError,
)
from supervised._lean import lean
from supervised._log import get_logger
from supervised._policy import check_seconds
from supervised._text import text_of
from supervised._types import CancelReason

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from datetime import datetime
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

    from supervised import _telemetry
    from supervised._types import Action, Cause, Kind, Outcome

logger = get_logger("prefect.supervised.child")

R = TypeVar("R")

_ERRORS: dict[Outcome, type[ChildError]] = {
    "failed": ChildFailed,
    "crashed": ChildCrashed,
    "timed_out": ChildTimedOut,
    "cancelled": ChildCancelled,
    "abandoned": ChildCancelled,
    "detached": ChildError,
}
_NO_RESULT: Any = object()
_LOOK_SECONDS = 0.05

Callback = tuple[Callable[[Any], None], contextvars.Context]


def _ignore(_: Child[Any]) -> None:
    """Do nothing about a child that has been settled."""


def _is_no_matter(_: Child[Any]) -> None:
    """Do nothing about a failure that nobody has heard."""


def _is_never_due() -> bool:
    """Tell that no signal is about to reach who waits for a child."""
    return False


def _is_final(_: Child[Any], __: End) -> bool:
    """Tell that the end of an attempt is the end of its child."""
    return False


@attrs.frozen
class End:
    """How an attempt at a child ended.

    Args:
        outcome: How.
        state: Its last Prefect state, if it got one.
        exception: What it raised, if that is known.
    """

    outcome: Outcome
    state: State[Any] | None
    exception: BaseException | None


@attrs.define(eq=False)
class Attempt:
    """One attempt at a child, so that what it has set going never acts on the next one.

    Args:
        is_queued: Whether it waits for its turn: the server knows nothing of it.
        was_requested: Whether a run was requested of the server: it may exist without our knowing.
        interrupt: Asks the code to stop, if that runs in this process or in one of ours.
        is_over: Whether it has ended.
    """

    is_queued: bool = False
    was_requested: bool = False
    interrupt: Callable[..., None] | None = None
    is_over: bool = False


@attrs.define(eq=False, repr=False, kw_only=True)  # with slots: there may be 100,000
class Child(PrefectFuture[R], Generic[R]):
    """A run that a supervisor launched and will not outlive.

    Returned by `supervisor.spawn`, never built by hand. It satisfies Prefect's future protocol,
    so `prefect.futures.wait`, `as_completed` and `task.submit(wait_for=[child])` take it.

    Example:
        ```python
        child = supervisor.spawn("score/gpu", {"part": 1})
        score = await child  # its result, or ChildFailed, ChildCancelled, ...
        ```
    """

    name: str
    kind: Kind
    key: str
    target: str
    on_parent: Mapping[Cause, Action]
    timeout_seconds: float | None = None
    run_name: str | None = None
    home_loop: asyncio.AbstractEventLoop | None = None
    """The loop an inline async child runs in; waiting there synchronously would deadlock."""
    _on_done: Callable[[Child[Any]], None] = attrs.field(alias="on_done")
    _on_settled: Callable[[Child[Any]], None] = attrs.field(default=_ignore, alias="on_settled")
    _on_attempt_over: Callable[[Child[Any], End], bool] = attrs.field(
        default=_is_final, alias="on_attempt_over"
    )
    _on_unheard: Callable[[Child[Any]], None] = attrs.field(
        default=_is_no_matter, alias="on_unheard"
    )
    _ask_cancel: Callable[[Child[Any], CancelReason], None] = attrs.field(alias="ask_cancel")
    _ask_detach: Callable[[Child[Any]], None] = attrs.field(alias="ask_detach")
    _is_signal_due: Callable[[], bool] = attrs.field(default=_is_never_due, alias="is_signal_due")

    generation: int = attrs.field(default=0, init=False)
    restarts: int = attrs.field(default=0, init=False)
    used_up_restarts: bool = attrs.field(default=False, init=False)
    was_heard: bool = attrs.field(default=False, init=False)
    """Whether somebody was given its result, or its error."""
    is_raced: bool = attrs.field(default=False, init=False)
    """Whether somebody else tells of its failure: the race that it is in."""
    cancel_reason: CancelReason | None = attrs.field(default=None, init=False)
    requested_at: datetime | None = attrs.field(default=None, init=False)
    acknowledged_at: datetime | None = attrs.field(default=None, init=False)
    ended_at: datetime | None = attrs.field(default=None, init=False)
    span: _telemetry.ChildSpan | None = attrs.field(default=None, init=False)
    escalations: tuple[str, ...] = attrs.field(default=(), init=False)
    detach_requested: bool = attrs.field(default=False, init=False)
    keeper: UUID | None = attrs.field(default=None, init=False)
    """Of an adopted one: the run that looks after it."""
    attempt: Attempt = attrs.field(init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _done: concurrent.futures.Future[None] | None = attrs.field(default=None, init=False)
    _is_told: bool = attrs.field(default=False, init=False)
    _callbacks: list[Callback] | None = attrs.field(default=None, init=False)
    _flow_run: FlowRun | None = attrs.field(default=None, init=False)
    _tracking_id: UUID | None = attrs.field(default=None, init=False)
    _tracked_generation: int = attrs.field(default=0, init=False)
    _state: State[Any] | None = attrs.field(default=None, init=False)
    _outcome: Outcome | None = attrs.field(default=None, init=False)
    _value: Any = attrs.field(default=_NO_RESULT, init=False)
    _exception: BaseException | None = attrs.field(default=None, init=False)
    _waiters: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.attempt = Attempt(is_queued=self.kind != "adopted")

    def __repr__(self) -> str:
        run = f" {self.flow_run_id}" if self.flow_run_id else ""
        return f"<Child {self.name!r} {self.kind} {self.outcome or self.state.name}{run}>"

    # -- what it is -------------------------------------------------------------------------

    @property
    def flow_run_id(self) -> UUID | None:
        """The id of the child's flow run; `None` until the server has created it."""
        return self._flow_run.id if self._flow_run is not None else None

    @property
    def flow_run(self) -> FlowRun | None:
        """The child's flow run as it was when it was created; `None` before that."""
        return self._flow_run

    @property
    def task_run_id(self) -> Any:
        """The id of the tracking task run that links the child to its parent's run."""
        linked = self._flow_run.parent_task_run_id if self._flow_run is not None else None
        return linked or self._own_tracking_id()

    @property
    def state(self) -> State[Any]:
        """The child's last known Prefect state; `Pending` before it has one."""
        return self._state or Pending(message="The run is being created.")

    @property
    def last_state(self) -> State[Any] | None:
        """The child's last known Prefect state, if it has had one."""
        return self._state

    @property
    def _final_state(self) -> State[Any] | None:  # type: ignore[override]  # futures.wait asks it
        return self.state if self.is_over else None

    @property
    def outcome(self) -> Outcome | None:
        """How the child ended; `None` while it lives."""
        return self._outcome

    @property
    def url(self) -> str | None:
        """The run's page in Prefect's UI, where one is configured."""
        return url_for("flow-run", obj_id=self.flow_run_id) if self.flow_run_id else None

    @property
    def is_over(self) -> bool:
        """Whether the child has an outcome."""
        return self._outcome is not None

    @property
    def is_local(self) -> bool:
        """Whether its code runs in this process or in one that this one has started."""
        return self.kind in {"inline", "process"}

    @property
    def waits_for_a_slot(self) -> bool:
        """Whether it runs elsewhere and has not been begun, as far as is known."""
        return not self.is_local and (self._state is None or self._state.is_scheduled())

    @property
    def delivered(self) -> bool:
        """Whether somebody has heard how it ended, or is about to: else its scope tells."""
        return self.was_heard or self.is_awaited

    @property
    def is_detached(self) -> bool:
        """Whether nothing that becomes of the parent concerns the child."""
        return self.detach_requested or set(self.on_parent.values()) == {"detach"}

    # -- waiting ----------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the child is over, whatever its outcome.

        Args:
            timeout: Seconds after which to return all the same; `None` for as long as it takes.

        Raises:
            RuntimeError: If called in the event loop that the child itself needs.
            ValueError: If *timeout* is negative.
        """
        check_seconds("timeout", timeout)
        self.refuse_deadlock()
        wait_in_slices(self._when_told(), timeout)

    async def wait_async(self, timeout: float | None = None) -> None:
        """Wait in the running event loop until the child is over, whatever its outcome.

        Args:
            timeout: Seconds after which to return all the same; `None` for as long as it takes.

        Raises:
            ValueError: If *timeout* is negative.
        """
        check_seconds("timeout", timeout)
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def wake(_: Child[R]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(over.set)

        self.add_done_callback(wake)
        try:
            await asyncio.wait_for(over.wait(), timeout)
        except asyncio.TimeoutError:
            return
        finally:
            self.remove_done_callback(wake)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Return the child's result, waiting for it if need be.

        Args:
            timeout: Seconds to wait; `None` for as long as it takes.
            raise_on_failure: If false, return the exception instead of raising it.

        Returns:
            What the flow returned; `None` for a deployment that persisted no result.

        Raises:
            TimeoutError: If the child is not over in time. It goes on running.
            ChildError: If it did not complete: `ChildFailed`, `ChildCrashed`, `ChildTimedOut`
                or `ChildCancelled`, with the child's own exception as `__cause__`.
            SpawnError: If it could not be launched.
            ValueError: If *timeout* is negative.
        """
        with self.being_awaited():
            self.wait(timeout)
            self._require_over(timeout)
            answer: R = self._told(self.answer(), raise_on_failure)
        return answer

    async def aresult(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Return the child's result, waiting for it in the running loop; see `result`."""
        with self.being_awaited():
            await self.wait_async(timeout)
            self._require_over(timeout)
            answer: R = self._told(await self.aanswer(), raise_on_failure)
        return answer

    def __await__(self) -> Generator[Any, Any, R]:
        return self.aresult().__await__()

    def add_done_callback(self, fn: Callable[[Any], None]) -> None:
        """Call *fn* with this child when it is over, at once if it is; from any thread.

        It is called in a copy of the present context, so that it may use `supervisor`.
        """
        with self._lock:
            if not self.is_over:
                self._callbacks = self._callbacks or []
                self._callbacks.append((fn, contextvars.copy_context()))
                return
        fn(self)

    def when_over(self, act: Callable[[], object]) -> None:
        """Call *act* when the child is over; see `add_done_callback`."""

        def call(_: Child[R]) -> None:
            act()

        self.add_done_callback(call)

    # -- acting -----------------------------------------------------------------------------

    def cancel(self, reason: str | None = None) -> None:
        """Ask for the child's cancellation, its own children included, and return at once.

        A child that is still being launched is cancelled as soon as it has a run. Cancelling a
        child that is over does nothing.

        Args:
            reason: One clause for people; it is kept in the run's state and on its span.
        """
        message = reason or "its handle was cancelled"
        self.cancel_because(CancelReason(source="explicit", message=message))

    def detach(self) -> None:
        """Let the child go on, whatever becomes of its parent. There is no way back."""
        self._ask_detach(self)

    # -- for the supervisor -----------------------------------------------------------------

    def cancel_because(self, reason: CancelReason) -> None:
        """Ask for the child's cancellation for a reason of ours."""
        self._ask_cancel(self, reason)

    def answer(self) -> Any:
        """Return the result of a child that is over, or its error; nobody has heard it yet."""
        if self._outcome != "completed":
            while self._is_signal_due():
                time.sleep(_LOOK_SECONDS)  # in the body's thread; the signal's exception ends it
            return self.error(self._load_exception_sync())
        if self._value is _NO_RESULT:
            self._value = self._load_sync()
        return self._value

    async def aanswer(self) -> Any:
        """Return the result of a child that is over, or its error; see `answer`."""
        if self._outcome != "completed":
            while self._is_signal_due():  # noqa: ASYNC110 - a signal sets no event
                await asyncio.sleep(_LOOK_SECONDS)
            return self.error(await self._load_exception())
        if self._value is _NO_RESULT:
            self._value = await self._load()
        return self._value

    def being_awaited(self) -> _Waiting:
        """Return a context in which somebody waits for the child."""
        return _Waiting(self)

    def remove_done_callback(self, fn: Callable[[Any], None]) -> None:
        """Forget a callback that has not been called."""
        with self._lock:
            kept = [entry for entry in self._callbacks or () if entry[0] is not fn]
            self._callbacks = kept or None

    def refuse_deadlock(self) -> None:
        """Refuse to wait for the child in a thread that its end depends on.

        Raises:
            RuntimeError: If this is one.
        """
        if self.is_over:
            return
        if threading.current_thread().name == CONTROL_THREAD:
            raise RuntimeError(
                f"A callback must not wait for child {self.name!r}: it runs in the thread that "
                "would hear of the child's end. Wait in the flow."
            )
        if self.home_loop is None:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self.home_loop:
            raise RuntimeError(
                f"Child {self.name!r} runs in this event loop, so waiting for it without `await` "
                "would never end. Use `await child`, or `await child.aresult()`."
            )

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for this child right now, and so will hear how it ended."""
        return self._waiters > 0

    @property
    def exception(self) -> BaseException | None:
        """The child's own exception, or why it could not be launched."""
        return self._exception

    def new_tracking_id(self) -> UUID:
        """Return the id for the tracking task run of the current generation, each time the same.

        The server knows a task run by its key too, which names the generation: what is recorded
        again under another id keeps the one it has, and would be waited for in vain.
        """
        if self._tracked_generation != self.generation:
            self._tracked_generation, self._tracking_id = self.generation, None
        return self._own_tracking_id()

    def _own_tracking_id(self) -> UUID:
        with self._lock:
            self._tracking_id = self._tracking_id or uuid4()
            return self._tracking_id

    def begin_restart(self) -> bool:
        """Forget the attempt that has ended; what comes next is a new run.

        Returns:
            False if the child is over, or somebody wants it to end.
        """
        with self._lock:
            if self.is_over or not self.is_spared:
                return False
            self.generation += 1
            self.restarts += 1
            self._flow_run = self._state = None
            self.cancel_reason = self.requested_at = self.acknowledged_at = None
            self.escalations = ()
            self.attempt = Attempt()
            return True

    @property
    def is_spared(self) -> bool:
        """Whether nobody wants the child to end for good."""
        return self.cancel_reason is None or self.cancel_reason.source == "restart"

    def assign_run(self, flow_run: FlowRun) -> None:
        """Record the run that the server created."""
        self._flow_run = lean(flow_run)
        if self._state is None:
            self._state = self._flow_run.state
        if self.span is not None:
            self.span.created(str(flow_run.id))

    def observe(self, state: State[Any]) -> None:
        """Record a state that does not end the child, unless a later one is known."""
        if self.is_over or (self._state is not None and state.timestamp < self._state.timestamp):
            return
        was_running = self._state is not None and self._state.is_running()
        self._state = lean(state)
        if state.is_running() and not was_running and self.span is not None:
            self.span.running()

    def mark_cancel(self, reason: CancelReason) -> bool:
        """Record who asked first for the cancellation; false if the child is over."""
        with self._lock:
            if self.is_over:
                return False
            if self.cancel_reason is None or self.cancel_reason.source == "restart":
                self.cancel_reason = reason
                self.requested_at = _clock.utc_now()
                if self.span is not None:
                    self.span.cancel_requested(reason)
            attempt = self.attempt
            is_unrequested = attempt.is_queued or not (
                attempt.was_requested or self._flow_run is not None or self.kind == "adopted"
            )
        if is_unrequested:  # there is nothing to ask the server for
            self.settle("cancelled", of=None if attempt.is_queued else attempt)
        return True

    def begin_request(self, attempt: Attempt) -> bool:
        """Take note that a run is about to be requested; false if nobody wants it any more.

        One whose request was not answered may have been carried out; only asking again tells.
        """
        with self._lock:
            is_wanted = attempt is self.attempt and self.cancel_reason is None
            attempt.was_requested |= is_wanted and not attempt.is_over
            return attempt.was_requested

    def note_escalation(self, step: str) -> None:
        """Record what had to be done beyond the first request."""
        self.escalations += (step,)
        if self.span is not None and self.requested_at is not None:
            waited = (_clock.utc_now() - self.requested_at).total_seconds()
            self.span.escalated(step, waited)

    def mark_acknowledged(self) -> None:
        """Record that the server has accepted the request."""
        if self.acknowledged_at is None:
            self.acknowledged_at = _clock.utc_now()
            if self.span is not None:
                self.span.cancel_acknowledged()

    def settle(
        self,
        outcome: Outcome,
        *,
        state: State[Any] | None = None,
        value: Any = _NO_RESULT,
        exception: BaseException | None = None,
        of: Attempt | None = None,
    ) -> bool:
        """End the child, once; later calls change nothing and return false.

        A child that is to be restarted goes on: then only the attempt has ended. The end *of* an
        attempt that is not the present one is none.
        """
        if of is not None and (of is not self.attempt or of.is_over):
            return False
        attempt, reason = self.attempt, self.cancel_reason
        if outcome == "cancelled" and reason is not None and reason.source == "deadline":
            outcome = "timed_out"
        if not self.is_over and self._on_attempt_over(self, End(outcome, state, exception)):
            attempt.is_over = True
            return False
        with self._lock:
            if self.is_over:
                return False
            attempt.is_over = True
            self._outcome = outcome
            self._value = value
            self._exception = exception
            if state is not None:
                self._state = state
            self.ended_at = _clock.utc_now()
            callbacks, self._callbacks = self._callbacks or (), None
        if self.span is not None:
            unasked = outcome == "cancelled" and reason is None and self.delivered
            self.span.end(
                outcome,
                state=self._state,
                exception=exception,
                end_ns=time.time_ns(),
                raised=self.error() if unasked else None,
            )
        # First the scope, so that whoever wakes up finds the siblings' fate decided.
        try:
            self._on_done(self)
        finally:
            self._wake()
        for callback, context in callbacks:
            try:
                context.run(callback, self)
            except BaseException:  # even SystemExit must not end the control plane
                logger.exception("A done callback of child %r raised", self.name)
        # Only now, so that a callback which spawns does so while the scope still waits.
        self._on_settled(self)
        return True

    def error(self, cause: BaseException | None = None) -> BaseException:
        """Return the exception that tells how the child ended."""
        if isinstance(self._exception, SpawnError):
            return self._exception
        outcome = self._outcome or "failed"
        error = _ERRORS.get(outcome, ChildFailed)(
            self._describe(cause),
            child=self.name,
            flow_run_id=self.flow_run_id,
            state=self._state,
            reason=self.cancel_reason,
            url=self.url,
        )
        error.__cause__ = cause
        return error

    @property
    def local_value(self) -> Any:
        """What it returned, if it ran here: that is perhaps nowhere else."""
        return self._value if self.is_local else _NO_RESULT

    def be_over(
        self,
        outcome: Outcome,
        run: FlowRun | None,
        state: State[Any] | None,
        *,
        value: Any,
        exception: BaseException | None,
        ended_at: datetime,
        task_run_id: UUID,
    ) -> None:
        """Be the handle of a child that is over; its scope has heard of that before."""
        self.attempt = Attempt(is_over=True)
        self._flow_run, self._state, self._tracking_id = run, state, task_run_id
        self._outcome, self._value, self._exception = outcome, value, exception
        self.ended_at = ended_at
        self.was_heard = self._is_told = True

    def load_exception(self) -> None:
        """Fetch what the child raised elsewhere, if that was persisted."""
        self._exception = self._load_exception_sync()

    async def aload_exception(self) -> None:
        """Fetch what the child raised elsewhere, if that was persisted."""
        self._exception = await self._load_exception()

    # -- inside -----------------------------------------------------------------------------

    def _when_told(self) -> concurrent.futures.Future[None]:
        """Return a future that is done once the child is over and the scope has heard of it."""
        with self._lock:
            if self._done is None:
                self._done = concurrent.futures.Future()
                if self._is_told:
                    self._done.set_result(None)
            return self._done

    def _wake(self) -> None:
        with self._lock:
            self._is_told = True
            done = self._done
        if done is not None:
            done.set_result(None)

    def _require_over(self, timeout: float | None) -> None:
        if not self.is_over:
            raise TimeoutError(f"Child {self.name!r} is not over after {timeout} s")

    def _told(self, answer: Any, raise_on_failure: bool) -> Any:
        """Give an answer to who has waited for it; only from then on it counts as heard."""
        self.was_heard = True
        if raise_on_failure and self._outcome != "completed":
            raise answer
        return answer

    def _load_sync(self) -> Any:
        if self._state is None or self._state.data is None:
            return None
        try:
            return compat.state_result(self._state)
        except MissingResult:
            return None

    async def _load(self) -> Any:
        if self._state is None or self._state.data is None:
            return None
        try:
            return await self._state.aresult(raise_on_failure=False)
        except MissingResult:
            return None

    def _load_exception_sync(self) -> BaseException | None:
        if self._exception is not None or not self._has_stored_exception():
            return self._exception
        assert self._state is not None
        try:
            return _own_exception(compat.state_result(self._state))
        except Exception:
            logger.debug("Could not read what child %r raised", self.name, exc_info=True)
            return None

    async def _load_exception(self) -> BaseException | None:
        if self._exception is not None or not self._has_stored_exception():
            return self._exception
        assert self._state is not None
        try:
            return _own_exception(await self._state.aresult(raise_on_failure=False))
        except Exception:
            logger.debug("Could not read what child %r raised", self.name, exc_info=True)
            return None

    def _has_stored_exception(self) -> bool:
        return self._state is not None and self._state.is_failed() and self._state.data is not None

    def describe_end(self) -> str:
        """Return how the child ended, in one line and without its name."""
        return self._describe(self._exception).splitlines()[0]

    def _describe(self, cause: BaseException | None) -> str:
        state = self.state
        if self._outcome in {"cancelled", "abandoned"}:
            because = f" because {self.cancel_reason}" if self.cancel_reason else ""
            tail = " and may still be alive" if self._outcome == "abandoned" else ""
            return f"was cancelled{because}{tail}."
        if self._outcome == "detached":
            return "was detached: it goes on, and nobody here hears how it ends."
        if self._outcome == "timed_out":
            reason = self.cancel_reason
            is_ours = reason is not None and reason.source == "deadline"
            return f"timed out: {reason if is_ours else state.message or state.name}"
        verb = "crashed" if self._outcome == "crashed" else "failed"
        if self.restarts:
            verb += f" after {self.restarts} restart(s)"
        if cause is not None:
            text = text_of(cause)
            return f"{verb}: {type(cause).__name__}" + (f": {text}" if text else "")
        return f"{verb}: {state.message or state.name}"


class _Waiting:
    """Counts a waiter, so that the supervisor knows that a failure will be heard.

    One that leaves with an exception has not heard it.
    """

    def __init__(self, child: Child[Any]) -> None:
        self._child = child

    def __enter__(self) -> None:
        with self._child._lock:
            self._child._waiters += 1

    def __exit__(self, kind: object, *_: object) -> None:
        child = self._child
        with child._lock:
            child._waiters -= 1
            is_unheard = child.is_over and not child.delivered
        if kind is not None and is_unheard:
            child._on_unheard(child)


def _own_exception(stored: object) -> BaseException | None:
    """Return the user's exception; Prefect's stand-ins say no more than the state does."""
    if isinstance(stored, BaseException) and not isinstance(
        stored, (FailedRun, CrashedRun, CancelledRun)
    ):
        return stored
    return None
