"""Entering and leaving a scope: what a supervised flow's function is wrapped in.

The body's side only waits. A wait that follows a body which returned may be interrupted like the
body itself; a wait for a teardown is shielded, and bounded by the grace.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import signal
from typing import TYPE_CHECKING, Any

import anyio
import attrs
from prefect.exceptions import Abort, CancelledRun, Pause, TerminationSignal
from prefect.states import Cancelled

from supervised import _clock, _inline, _telemetry
from supervised import _compat as compat
from supervised._context import current_child, current_supervisor, ended_supervisor
from supervised._control import SLICE_SECONDS, wait_in_slices
from supervised._errors import (
    ChildCancelled,
    ChildError,
    ScopeClosedError,
    TeardownError,
)
from supervised._launch import SUPERSEDED
from supervised._policy import HARD_CAUSES, parent_reason
from supervised._text import first_line, headline, text_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence

    from supervised._child import Child
    from supervised._supervisor import Supervisor
    from supervised._types import Cause

try:
    from builtins import ExceptionGroup  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    from exceptiongroup import ExceptionGroup

# A signal mostly ends the loop, which cancels its tasks; but its exception is raised wherever the
# main thread is, and that may be in the very step of the task that waits.
_INTERRUPTS = (asyncio.CancelledError, TerminationSignal, KeyboardInterrupt)

# What a teardown may take beyond its grace: one last read, and the report.
_SLACK_SECONDS = 5.0
_CLOSE_SECONDS = 3.0
_LOAD_SECONDS = 10.0
_CHECK_SECONDS = 2.0


def run_sync(supervisor: Supervisor, body: Callable[[], Any]) -> Any:
    """Run a sync body in its scope; return or raise what its end comes to."""
    with _entered(supervisor):
        try:
            with supervisor.body.running(), _current(supervisor):
                result = body()
        except BaseException as exc:
            if not _needs_ending(supervisor, exc):
                raise
            return _leave_sync(supervisor, None, exc)
        if supervisor.close_if_unused():
            return result
        return _leave_sync(supervisor, result, None)


async def run_async(supervisor: Supervisor, body: Callable[[], Awaitable[Any]]) -> Any:
    """Run an async body in its scope; return or raise what its end comes to."""
    supervisor.body.loop = asyncio.get_running_loop()
    supervisor.body.task = asyncio.current_task()
    with _entered(supervisor):
        try:
            with supervisor.body.running(), _current(supervisor):
                result = await body()
        except BaseException as exc:
            if not _needs_ending(supervisor, exc):
                raise
            return await _leave_async(supervisor, None, _swallowed(supervisor, exc))
        if supervisor.close_if_unused():
            return result
        return await _leave_async(supervisor, result, None)


def run_generator(
    supervisor: Supervisor, generator: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """Run a sync generator body in its scope.

    The supervisor is current only while the generator's own code runs: what is set across a
    `yield` leaks into whoever iterates.
    """

    def step(resume: Callable[[], Any]) -> Any:
        with supervisor.body.running(), _current(supervisor):
            return resume()

    with _entered(supervisor):
        try:
            resume: Callable[[], Any] = _sender(generator, None)
            while True:
                item = step(resume)
                try:
                    sent = yield item
                except BaseException as thrown:
                    resume = _thrower(generator, thrown)
                else:
                    resume = _sender(generator, sent)
        except StopIteration as stop:
            if supervisor.close_if_unused():
                return stop.value
            return _leave_sync(supervisor, stop.value, None)
        except BaseException as exc:
            if not _needs_ending(supervisor, exc):
                raise
            return _leave_sync(supervisor, None, exc)


async def run_async_generator(
    supervisor: Supervisor, generator: AsyncGenerator[Any, Any]
) -> AsyncGenerator[Any, Any]:
    """Run an async generator body in its scope; see `run_generator`."""
    supervisor.body.loop = asyncio.get_running_loop()

    async def step(resume: Callable[[], Awaitable[Any]]) -> Any:
        supervisor.body.task = asyncio.current_task()
        with supervisor.body.running(), _current(supervisor):
            return await resume()

    with _entered(supervisor):
        try:
            resume: Callable[[], Awaitable[Any]] = generator.__anext__
            while True:
                item = await step(resume)
                try:
                    sent = yield item
                except BaseException as thrown:
                    resume = _async_thrower(generator, thrown)
                else:
                    resume = _async_sender(generator, sent)
        except StopAsyncIteration:
            if not supervisor.close_if_unused():
                await _leave_async(supervisor, None, None)
        except BaseException as exc:
            if not _needs_ending(supervisor, exc):
                raise
            await _leave_async(supervisor, None, _swallowed(supervisor, exc))


def _sender(generator: Generator[Any, Any, Any], value: Any) -> Callable[[], Any]:
    return lambda: generator.send(value)


def _thrower(generator: Generator[Any, Any, Any], exc: BaseException) -> Callable[[], Any]:
    def throw() -> Any:
        if isinstance(exc, GeneratorExit):
            generator.close()
            raise exc
        return generator.throw(exc)

    return throw


def _async_sender(generator: AsyncGenerator[Any, Any], value: Any) -> Callable[[], Awaitable[Any]]:
    return lambda: generator.asend(value)


def _async_thrower(
    generator: AsyncGenerator[Any, Any], exc: BaseException
) -> Callable[[], Awaitable[Any]]:
    async def throw() -> Any:
        if isinstance(exc, GeneratorExit):
            await generator.aclose()
            raise exc
        return await generator.athrow(exc)

    return throw


# -- leaving ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _entered(supervisor: Supervisor) -> Iterator[None]:
    outer = supervisor.outer
    supervisor.arm_deadline()
    if outer is None:
        supervisor.link()
        try:
            yield
        finally:
            supervisor.unlink()
        return
    outer.nested.add(supervisor)
    try:
        yield
    finally:
        outer.nested.discard(supervisor)
        child = current_child.get()
        was_spawned = child is not None and child.flow_run_id == supervisor.flow_run_id
        if not was_spawned and not supervisor.launched_plainly:
            outer.harmless_calls.add(supervisor.flow_run_id)


@contextlib.contextmanager
def _current(supervisor: Supervisor) -> Iterator[None]:
    token = current_supervisor.set(supervisor)
    try:
        with _telemetry.in_trace_of(supervisor.flow_run.labels, compat.TRACEPARENT_LABEL):
            yield
    finally:
        current_supervisor.reset(token)
        # Prefect's engine runs the flow's hooks in this context, after the scope.
        ended_supervisor.set(supervisor)


def _needs_ending(supervisor: Supervisor, exc: BaseException) -> bool:
    """Whether there is anything to end: a flow that launched nothing costs nothing.

    One that a supervisor has launched has its own end to tell when it is cancelled: to leave that
    to its runner kept its parent waiting for the runner's look, 3 s later.
    """
    if not supervisor.is_own_process:
        return False
    if supervisor.is_engaged:
        return True
    if supervisor.launched_plainly:
        return classify(supervisor, exc) is not None
    return supervisor.is_linked and classify(supervisor, exc) == "cancelled"


def _swallowed(supervisor: Supervisor, exc: BaseException) -> BaseException:
    """Return the signal in place of the cancellation by which it reached the body after all."""
    if not (supervisor.body.swallowed_signal and isinstance(exc, asyncio.CancelledError)):
        return exc
    _inline.uncancel()
    return TerminationSignal(signal=signal.SIGTERM)


def classify(
    supervisor: Supervisor, exc: BaseException, *, ended_body: bool = True
) -> Cause | None:
    """Return how the run ends with this exception; `None` if it will go on elsewhere or later.

    Args:
        supervisor: The scope.
        exc: The exception.
        ended_body: Whether it ended the body. One that arrives later is no timeout: the body's
            had its chance.
    """
    if isinstance(exc, (Pause, Abort)):
        return None
    intent = supervisor.host.termination_intent()
    if isinstance(exc, (asyncio.CancelledError, TerminationSignal)):
        if intent not in {None, "cancel"}:
            return None
        if intent is None and ended_body and _timed_out(supervisor, exc):
            return "timed_out"
        asked = intent == "cancel" or supervisor.own.cancellation is not None
        return "cancelled" if asked or _cancelled_from_above(supervisor) else "crashed"
    if isinstance(exc, GeneratorExit):
        return "cancelled"
    return "failed" if isinstance(exc, Exception) else "crashed"


def _timed_out(supervisor: Supervisor, exc: BaseException) -> bool:
    limit = supervisor.flow.timeout_seconds
    if limit is None or not isinstance(exc, asyncio.CancelledError):
        return False
    # The engine's clock started a little before ours.
    return _clock.monotonic() - supervisor.started >= limit - min(0.25, limit / 10)


def _cancelled_from_above(supervisor: Supervisor) -> bool:
    child = current_child.get()
    own_child = child is not None and child.flow_run_id == supervisor.flow_run_id
    if own_child and child is not None and child.cancel_reason is not None:
        return True
    return supervisor.outer is not None and supervisor.outer.is_ending


@attrs.define
class _Exit:
    """What has been learned while leaving."""

    supervisor: Supervisor
    exc: BaseException | None
    cause: Cause | None = None
    is_given_up: bool = False
    ended_body: bool = True

    def interrupted_by(self, exc: BaseException) -> None:
        """Take note of what arrived while waiting; a second Ctrl-C gives the waiting up."""
        if self._is_repeated(exc):
            self.is_given_up = True
        is_late_timeout = isinstance(self.exc, Exception) and _timed_out(self.supervisor, exc)
        if not is_late_timeout and (self.exc is None or not isinstance(exc, Exception)):
            self.exc = exc
            self.ended_body = self.cause is None
        if self.cause not in {None, *HARD_CAUSES}:
            self.begin()  # a run that was failing is now being cancelled, say

    def _is_repeated(self, exc: BaseException) -> bool:
        """Whether somebody insists: asyncio turns every Ctrl-C into a `CancelledError`."""
        if isinstance(exc, KeyboardInterrupt):
            return isinstance(self.exc, KeyboardInterrupt)
        is_cancelled = isinstance(self.exc, asyncio.CancelledError)
        return isinstance(exc, asyncio.CancelledError) and is_cancelled and self.cause == "crashed"

    def gives_up(self, deadline: _Deadline) -> bool:
        """Whether to leave what is still being torn down to the report's reader."""
        if not (self.is_given_up or deadline.is_over(self.supervisor)):
            return False
        self.supervisor.log_given_up()
        self.is_given_up = True
        return True

    def begin(self) -> concurrent.futures.Future[None] | None:
        """Begin the teardown that the body's end calls for, if it calls for one."""
        ending = self.supervisor.ending
        if self.exc is None:
            self.cause = ending[0] if ending else "completed"
            if ending is None:
                return None
        elif ending is not None and _answers_interrupt(self):
            self.cause = ending[0]  # what it answers is why it ends
        else:
            self.cause = classify(self.supervisor, self.exc, ended_body=self.ended_body)
            if self.cause is None:
                return None
        detail = _detail(self.exc)
        reason = parent_reason(self.cause, self.supervisor.flow.name, detail)
        return self.supervisor.begin_teardown(self.cause, reason)


def _leave_sync(supervisor: Supervisor, result: Any, exc: BaseException | None) -> Any:
    leaving = _Exit(supervisor, exc)
    if exc is None:
        try:
            supervisor.prepare_completion()
            while not supervisor.seal():
                wait_in_slices(supervisor.children_over())
        except BaseException as interrupt:  # it decides what becomes of the children
            leaving.interrupted_by(interrupt)
    while (teardown := leaving.begin()) is not None:
        deadline = _Deadline(supervisor.grace_seconds + _SLACK_SECONDS)
        while not teardown.done() and not leaving.gives_up(deadline):
            try:
                concurrent.futures.wait([teardown], timeout=SLICE_SECONDS)
            except BaseException as interrupt:  # the teardown goes on; a second one gives it up
                leaving.interrupted_by(interrupt)
        if leaving.is_given_up or not supervisor.launched_since_teardown:
            break
    try:
        _tidy_sync(leaving)
    except BaseException as interrupt:  # raised by the conclusion
        leaving.interrupted_by(interrupt)
    return _conclude_sync(leaving, result)


async def _leave_async(supervisor: Supervisor, result: Any, exc: BaseException | None) -> Any:
    leaving = _Exit(supervisor, exc)
    if exc is None:
        try:
            supervisor.prepare_completion()
            with supervisor.body.waiting():
                while not supervisor.seal():
                    # `wait`, because awaiting the future itself would cancel it with us.
                    await asyncio.wait([asyncio.wrap_future(supervisor.children_over())])
        except BaseException as interrupt:
            leaving.interrupted_by(_swallowed(supervisor, interrupt))
    while (teardown := leaving.begin()) is not None:
        deadline = _Deadline(supervisor.grace_seconds + _SLACK_SECONDS)
        await _wait_shielded(leaving, teardown, functools.partial(leaving.gives_up, deadline))
        if leaving.is_given_up or not supervisor.launched_since_teardown:
            break
    try:
        await _tidy_async(leaving)
    except _INTERRUPTS as interrupt:
        leaving.interrupted_by(interrupt)
    return await _conclude_async(leaving, result)


def _tidy_sync(leaving: _Exit) -> None:
    """See what must be seen while the control plane is there."""
    concurrent.futures.wait([leaving.supervisor.attempt_checked()], timeout=_CHECK_SECONDS)
    if leaving.cause is None:
        for child in leaving.supervisor.end_processes():
            child.wait(leaving.supervisor.grace_seconds)
    for child in leaving.supervisor.unheard:
        child.load_exception()


async def _tidy_async(leaving: _Exit) -> None:
    """See what must be seen while the control plane is there."""
    checked = asyncio.wrap_future(leaving.supervisor.attempt_checked())
    with anyio.CancelScope(shield=True):
        await asyncio.wait([checked], timeout=_CHECK_SECONDS)
    if leaving.cause is None:
        with anyio.CancelScope(shield=True):
            for child in leaving.supervisor.end_processes():
                await child.wait_async(leaving.supervisor.grace_seconds)
    with anyio.move_on_after(_LOAD_SECONDS, shield=True):
        for child in leaving.supervisor.unheard:
            await child.aload_exception()


async def _wait_shielded(
    leaving: _Exit, future: concurrent.futures.Future[None], gives_up: Callable[[], bool]
) -> None:
    """Wait out a future under cancellation: anyio scopes are shielded off, signals remembered."""
    with anyio.CancelScope(shield=True):
        while True:
            try:
                if future.done() or gives_up():
                    return
                await asyncio.wait([asyncio.wrap_future(future)], timeout=SLICE_SECONDS)
            except _INTERRUPTS as interrupt:
                leaving.interrupted_by(interrupt)


class _Deadline:
    """When to stop waiting for a teardown: never while that waits for children on purpose.

    Args:
        seconds: What the teardown may take otherwise.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = _clock.monotonic() + seconds

    def is_over(self, supervisor: Supervisor) -> bool:
        if supervisor.is_waiting:
            self._at = _clock.monotonic() + self._seconds
        self._at = max(self._at, supervisor.teardown_began + self._seconds)
        return _clock.monotonic() > self._at + supervisor.seconds_to_ask


def _conclude_sync(leaving: _Exit, result: Any) -> Any:
    verdict = _judge(leaving, result)
    stopped = _close(leaving, verdict)
    if stopped is not None:
        concurrent.futures.wait([stopped], timeout=_CLOSE_SECONDS)
    if verdict.cancelled is not None and not _runner_runs_hooks(leaving.supervisor):
        hooks = _inline.run_cancellation_hooks(
            leaving.supervisor.flow, leaving.supervisor.flow_run, verdict.cancelled
        )
        compat.run_coroutine(hooks)
    return verdict.unwrap()


async def _conclude_async(leaving: _Exit, result: Any) -> Any:
    leaving.supervisor.body.unlisten()
    verdict = _judge(leaving, result)
    is_interrupted = leaving.supervisor.body.was_interrupted or _is_cancelled_by_runner(leaving)
    if is_interrupted and verdict.answers_interrupt:
        _inline.uncancel()
    stopped = _close(leaving, verdict)
    if stopped is not None:
        closing = _clock.monotonic() + _CLOSE_SECONDS
        await _wait_shielded(leaving, stopped, lambda: _clock.monotonic() > closing)
    if verdict.cancelled is not None and not _runner_runs_hooks(leaving.supervisor):
        await _inline.run_cancellation_hooks(
            leaving.supervisor.flow, leaving.supervisor.flow_run, verdict.cancelled
        )
    return verdict.unwrap()


def _close(leaving: _Exit, verdict: _Verdict) -> concurrent.futures.Future[None] | None:
    """Close the scope; return what to wait for.

    If nothing was launched, that is nothing: the control plane has only watched. To wait for its
    end took each of eight leaves, on two busy cores, a quarter of a second.
    """
    has_launched = leaving.supervisor.is_engaged
    stopped = leaving.supervisor.close(_outcome(leaving, verdict), verdict.raised)
    return stopped if has_launched else None


def _runner_runs_hooks(supervisor: Supervisor) -> bool:
    return supervisor.host.runner_runs_hooks(supervisor.flow_run)


def _outcome(leaving: _Exit, verdict: _Verdict) -> Cause:
    cause = leaving.cause or "completed"
    # A body may return while a child's failure is still to be raised.
    return "failed" if cause == "completed" and verdict.raised is not None else cause


# -- what it comes to ---------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class _Verdict:
    """What the flow's function returns or raises to Prefect's engine."""

    result: Any = None
    exc: BaseException | None = None
    cancelled: str | None = None

    @property
    def raised(self) -> BaseException | None:
        """What stands on the span: a cancellation is no error."""
        return self.exc if isinstance(self.exc, Exception) else None

    @property
    def answers_interrupt(self) -> bool:
        """Whether a cancellation ends here, in a state or an ordinary exception."""
        return self.exc is None or isinstance(self.exc, Exception)

    def unwrap(self) -> Any:
        if self.cancelled is not None:
            # A returned state becomes the run's state; a raised CancelledError would crash it.
            compat.expect_cancellation()
            return Cancelled(message=self.cancelled)
        if self.exc is not None:
            raise self.exc
        return self.result


def _judge(leaving: _Exit, result: Any) -> _Verdict:
    supervisor, exc = leaving.supervisor, leaving.exc
    if supervisor.own.is_superseded:
        # Its run belongs to the later attempt: a state, or a retry, would end or fence off that.
        return _Verdict(exc=Abort(f"The end of this attempt counts no more: {SUPERSEDED}"))
    if (message := _cancellation(leaving)) is not None:
        return _Verdict(cancelled=message + _unverified(supervisor))
    if _is_interrupt(exc) and not _answers_interrupt(leaving):
        return _Verdict(exc=exc)
    errors = _errors(supervisor, exc)
    timeout = supervisor.timed_out
    if not errors:
        return _Verdict(result=result, exc=timeout or exc)
    if len(errors) == 1 and (errors[0] is exc or timeout is not None):
        error = errors[0]
    else:
        error = ExceptionGroup(_summary(supervisor.flow.name, errors), errors)
        error.__cause__ = exc if exc not in errors else None
    if timeout is not None:
        timeout.__cause__ = error  # not in its place: by its type the engine knows a timeout
    return _Verdict(exc=timeout or error)


def _cancellation(leaving: _Exit) -> str | None:
    """Return what the run's state is to say of its cancellation, if that is how it ends here."""
    supervisor = leaving.supervisor
    if _is_cancelled_by_runner(leaving):
        return supervisor.own.cancellation or "Cancelled by its runner"
    if _is_interrupt(leaving.exc) and not _answers_interrupt(leaving):
        return None
    if supervisor.own.cancellation is not None:
        return supervisor.own.cancellation
    if _answers_interrupt(leaving) and not supervisor.failures and not supervisor.timed_out:
        return "Cancelled together with its parent"
    return None


def _is_interrupt(exc: BaseException | None) -> bool:
    return exc is not None and not isinstance(exc, Exception)


def _unverified(supervisor: Supervisor) -> str:
    """Return what a cancelled run has to say of survivors: it raises nothing that could."""
    report = supervisor.report
    return f". {TeardownError(report)}" if report is not None and not report.ok else ""


def _is_cancelled_by_runner(leaving: _Exit) -> bool:
    """Whether a runner ends this process because the run is being cancelled.

    Then the run's state is written here. Prefect's engine leaves that to the runner, which looks
    for the process 3 s later, and once more every 3 s (runner/_process_manager.py, `kill`).
    """
    supervisor = leaving.supervisor
    return (
        leaving.cause == "cancelled"
        and isinstance(leaving.exc, (asyncio.CancelledError, TerminationSignal))
        and supervisor.outer is None
        and supervisor.host.termination_intent() == "cancel"
        and supervisor.host.runner_owns(supervisor.flow_run)
    )


def _answers_interrupt(leaving: _Exit) -> bool:
    """Whether the body ended because a scope of ours had interrupted it."""
    if not isinstance(leaving.exc, (asyncio.CancelledError, TerminationSignal)):
        return False
    if not leaving.ended_body:
        return False  # we interrupt bodies only, so it is somebody else's
    host = leaving.supervisor.host
    if host.termination_intent() is not None or _timed_out(leaving.supervisor, leaving.exc):
        return False
    scope: Supervisor | None = leaving.supervisor
    while scope is not None:
        if scope.body.was_interrupted:
            return True
        scope = scope.outer
    return False


def _errors(supervisor: Supervisor, exc: BaseException | None) -> list[Exception]:
    """Return what the scope has to raise, the body's own exception first."""
    errors = [
        child.error(child.exception)
        for child in supervisor.failures
        if child in supervisor.unheard or (child.used_up_restarts and not _tells_of(exc, child))
    ]
    raised: list[Exception] = [error for error in errors if isinstance(error, Exception)]
    lost = [race.error() for race in supervisor.lost_races]
    raised += [error for error in lost if isinstance(error, Exception)]
    report = supervisor.report
    if report is not None and not report.ok:
        raised.append(TeardownError(report))
    has_failed = bool(raised) or supervisor.timed_out is not None
    if isinstance(exc, Exception) and not (has_failed and _is_consequence(exc)):
        raised.insert(0, exc)
    return raised


def _summary(name: str, errors: Sequence[Exception]) -> str:
    """Return the text of a group, all that Prefect puts into the state of the run."""
    # What may still be alive first: it has to be looked after.
    first = sorted(errors, key=lambda error: not isinstance(error, TeardownError))
    return f"{len(errors)} failure(s) in supervised flow '{name}': {headline(first)}"


def _tells_of(exc: BaseException | None, child: Child[Any]) -> bool:
    """Whether the body's exception, or one in its group, says how a child ended."""
    if isinstance(exc, ExceptionGroup):
        return any(_tells_of(each, child) for each in exc.exceptions)  # type: ignore[attr-defined,unused-ignore]
    return isinstance(exc, ChildError) and exc.flow_run_id == child.flow_run_id


def _is_consequence(exc: Exception) -> bool:
    """Whether the body's exception only tells that the scope was already failing."""
    if isinstance(exc, ExceptionGroup):
        members: Sequence[Exception] = exc.exceptions  # type: ignore[attr-defined,unused-ignore]
        return all(_is_consequence(each) for each in members)
    if isinstance(exc, ChildCancelled):
        consequences = {"sibling_failed", "parent_timed_out"}
        return exc.reason is not None and exc.reason.source in consequences
    return isinstance(exc, (ScopeClosedError, CancelledRun))


def _detail(exc: BaseException | None) -> str:
    if exc is None or not isinstance(exc, Exception):
        return ""
    first = first_line(text_of(exc))
    return f"{type(exc).__name__}: {first}" if first else type(exc).__name__
