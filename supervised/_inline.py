"""Running a child's flow in this process, so that it can be cancelled and ends `Cancelled`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext
from prefect.exceptions import ParameterTypeError, TerminationSignal
from prefect.states import Cancelled, Cancelling

from supervised import _clock, _compat, _telemetry
from supervised._api import closing
from supervised._context import current_child
from supervised._errors import ParametersError
from supervised._log import get_logger, run_logger
from supervised._policy import outcome_of
from supervised._text import clause, text_of

if TYPE_CHECKING:
    import concurrent.futures
    import contextvars
    from collections.abc import Callable, Mapping, Sequence

    from prefect.client.schemas.objects import FlowRun, State
    from prefect.flows import Flow

    from supervised._api import Closing
    from supervised._child import Child
    from supervised._host import Host

logger = get_logger("prefect.supervised.inline")

_NOT_READY = "NotReady"  # Prefect's name for what waits for a result that will not come


class InlineRun:
    """One inline child's code: an async flow in the body's loop, or a sync one in a thread.

    Prefect marks a run whose task is cancelled as `Crashed`, and leaves it `Pending` if the
    cancellation hits its engine before the body. So the request is kept until the body runs,
    delivered there once, and turned into a returned `Cancelled` state.

    Args:
        child: The child.
        flow: Its flow.
        run: Its run.
        parameters: The flow's parameters by name.
        host: The process.
        context: The context that it was spawned in.
        home_loop: The loop of the body that has spawned it.
        conclude: Ends the run, unless it has ended; the future gives the run's last state.
    """

    def __init__(
        self,
        child: Child[Any],
        flow: Flow[..., Any],
        run: FlowRun,
        parameters: Mapping[str, Any],
        *,
        host: Host,
        context: contextvars.Context,
        home_loop: asyncio.AbstractEventLoop | None,
        conclude: Callable[[Closing, str], concurrent.futures.Future[State[Any]]],
    ) -> None:
        self._child = child
        self._run = run
        self._conclude = conclude
        self._host = host
        self._parameters = parameters
        self._context = context
        self._loop = home_loop if flow.isasync else None
        self._task: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None
        self._in_body = False
        self._began = False
        self._has_leaked = False  # a cancellation of something else that it has waited for
        self._flow = self._guarded(flow)
        self._attempt = child.attempt
        self._attempt.interrupt = self.interrupt

    def start(self) -> None:
        """Start the code where it belongs; from any thread."""
        if self._loop is None:
            self._thread = threading.Thread(
                target=self._context.run,
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
            self._child.settle("cancelled", of=self._attempt)

    def interrupt(self, *, hard: bool = False) -> None:
        """Ask the code to stop; *hard* also where only Prefect's engine runs."""
        if self._loop is None:
            return  # sync code asks `supervised.cancelled()`
        try:
            self._loop.call_soon_threadsafe(self._cancel_task, hard)
        except RuntimeError:  # the loop is closed, and the task with it
            self._child.settle("cancelled", of=self._attempt)

    @property
    def is_running(self) -> bool:
        """Whether code of this child may still be executing."""
        if self._thread is not None:
            return self._thread.is_alive()
        return self._task is not None and not self._task.done()

    def _create_task(self) -> None:
        assert self._loop is not None
        # create_task(context=) is Python 3.11; a task copies the context it is created in.
        self._task = self._context.run(self._loop.create_task, self._run_in_loop())

    def _cancel_task(self, hard: bool) -> None:
        if self._task is not None and (self._in_body or hard):
            self._task.cancel()

    async def _run_in_loop(self) -> None:
        current_child.set(self._child)
        try:
            with self._in_span():
                state: State[Any] = await self._host.run_flow(
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
            with self._in_span():
                state: State[Any] = self._host.run_flow(self._flow, self._run, self._parameters)
        except BaseException as exc:
            self._ended_by(exc)
            return
        asyncio.run(self._ended(state))

    def _in_span(self) -> AbstractContextManager[None]:
        """Make the child's span current: with Prefect's telemetry off nobody else does."""
        span = self._child.span
        return _telemetry.within(span.span) if span is not None else nullcontext()

    async def _ended(self, state: State[Any]) -> None:
        outcome = outcome_of(state, asked=self._child.cancel_reason is not None)
        if outcome is None and state.name == _NOT_READY and self._child.cancel_reason is None:
            self._never_begins("failed", state.message or "what it was to be given has failed")
        elif outcome is None:
            # The engine gave up because the run was being cancelled behind its back.
            self._child.settle("cancelled", state=state, of=self._attempt)
        elif outcome == "completed":
            value = await state.aresult(raise_on_failure=False)
            self._child.settle(outcome, state=state, value=value, of=self._attempt)
        else:
            exception = await state.aresult(raise_on_failure=False)
            own = exception if isinstance(exception, BaseException) else None
            self._child.settle(
                outcome, state=state, exception=self._explained(own), of=self._attempt
            )

    def _explained(self, exc: BaseException | None) -> BaseException | None:
        """Return our own exception for parameters that the flow's types refuse."""
        if self._began or not isinstance(exc, ParameterTypeError):
            return exc
        return refused(self._child, self._flow, self._parameters, exc)

    def _ended_by(self, exc: BaseException) -> None:
        """Settle a child whose engine raised instead of returning a state."""
        is_interrupt = isinstance(exc, (asyncio.CancelledError, TerminationSignal))
        if is_interrupt and not self._has_leaked:
            self._child.settle("cancelled", of=self._attempt)
        elif self._child.cancel_reason is not None:
            self._child.settle("cancelled", exception=exc, of=self._attempt)
        elif self._began:
            self._child.settle("crashed", exception=exc, of=self._attempt)
        else:
            self._never_begins("crashed", f"{type(exc).__name__}: {text_of(exc)}", exc)

    def _never_begins(self, as_: Closing, why: str, exc: BaseException | None = None) -> None:
        """End a child that Prefect leaves `Pending`: what it was to be given cannot be had."""
        message = clause(f"It did not begin: {why}")

        def settle(concluded: concurrent.futures.Future[State[Any]]) -> None:
            is_known = not concluded.cancelled() and concluded.exception() is None
            state = concluded.result() if is_known else closing(as_, message)
            self._child.settle(as_, state=state, exception=exc, of=self._attempt)

        self._conclude(as_, message).add_done_callback(settle)

    # -- inside the child's own run -----------------------------------------------------------

    def _guarded(self, flow: Flow[..., Any]) -> Flow[..., Any]:
        """Return a copy of the flow whose function knows of cancellation."""
        guarded = copy.copy(flow)
        if self._child.run_name is not None:
            guarded.flow_run_name = None  # an explicit name wins over the flow's template
        guarded.fn = self._guard_async(flow) if flow.isasync else self._guard_sync(flow)
        # By the function of the flow: its annotations may be strings, with names of its module.
        guarded.validate_parameters = flow.validate_parameters  # type: ignore[method-assign]
        return guarded

    def _guard_sync(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        @functools.wraps(flow.fn)
        def body(*args: Any, **kwargs: Any) -> Any:
            try:
                result = None if self._begins_cancelled() else flow.fn(*args, **kwargs)
            except asyncio.CancelledError:  # nobody can cancel a thread
                self._has_leaked = self._child.cancel_reason is None
                raise
            except Exception:
                if self._child.cancel_reason is None:
                    raise
                logger.debug("%r raised while it was being cancelled", flow.name, exc_info=True)
                result = None
            if self._child.cancel_reason is None:
                return result
            _compat.run_coroutine(run_cancellation_hooks(flow, self._run, self._message()))
            return self._cancelled_state()

        return body

    def _guard_async(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        @functools.wraps(flow.fn)
        async def body(*args: Any, **kwargs: Any) -> Any:
            started = _clock.monotonic()
            self._in_body = True
            try:
                if not self._begins_cancelled():
                    return await flow.fn(*args, **kwargs)
            except asyncio.CancelledError:
                if _own_timeout(flow, started) or self._engine_handles_it():
                    raise
                if self._child.cancel_reason is None and not is_cancelled_itself():
                    self._has_leaked = True
                    raise
                uncancel()
            finally:
                self._in_body = False
            await run_cancellation_hooks(flow, self._run, self._message())
            return self._cancelled_state()

        return body

    def _begins_cancelled(self) -> bool:
        """Take note that the body begins, and tell whether it should end at once."""
        self._began = True
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None and context.flow_run.state:
            self._child.observe(context.flow_run.state)
        return self._child.cancel_reason is not None

    def _engine_handles_it(self) -> bool:
        """Whether a runner cancels the whole process, which Prefect's engine does right."""
        return self._child.cancel_reason is None and self._host.termination_intent() is not None

    def _message(self) -> str:
        reason = self._child.cancel_reason
        return f"Cancelled because {reason}" if reason else "Cancelled together with its parent"

    def _cancelled_state(self) -> State[Any]:
        return Cancelled(message=self._message())


def _own_timeout(flow: Flow[..., Any], started: float) -> bool:
    limit = flow.timeout_seconds
    return limit is not None and _clock.monotonic() - started >= limit - min(0.25, limit / 10)


def refused(
    child: Child[Any],
    flow: Flow[..., Any],
    parameters: Mapping[str, Any],
    cause: ParameterTypeError,
) -> ParametersError:
    """Return our own exception for parameters that a flow's types refuse."""
    error = ParametersError(
        f"Parameters {sorted(parameters)} do not fit flow {flow.name!r}: {cause}", child=child.name
    )
    error.__cause__ = cause
    return error


def is_cancelled_itself() -> bool:
    """Whether this task was cancelled, and not something that it has waited for."""
    task: Any = asyncio.current_task()
    counts = hasattr(task, "cancelling")  # since Python 3.11; before, nobody knows
    return not counts or bool(task.cancelling())


def uncancel() -> None:
    """Take the cancellation as answered (Python 3.11 counts them)."""
    task: Any = asyncio.current_task()
    if task is not None and hasattr(task, "uncancel"):
        task.uncancel()


async def run_cancellation_hooks(flow: Flow[..., Any], run: FlowRun, message: str) -> None:
    """Run a flow's `on_cancellation` hooks as the engine would.

    The engine runs them only for the cancellations that it hears of itself.
    """
    await run_hooks(flow.on_cancellation_hooks, flow, run, Cancelling(message=message))


async def run_hooks(
    hooks: Sequence[Callable[..., Any]], flow: Flow[..., Any], run: FlowRun, state: State[Any]
) -> None:
    """Run some of a flow's hooks as the engine would."""
    if not hooks:
        return
    log = run_logger(run, flow)
    for hook in hooks:
        name = getattr(hook, "__name__", type(hook).__name__)
        log.info("Running hook %r in response to entering state %r", name, state.name)
        try:
            result: Any = hook(flow, run, state)
            if inspect.isawaitable(result):
                await result
        except Exception:
            log.exception("An error was encountered while running hook %r", name)
        else:
            log.info("Hook %r finished running successfully", name)
