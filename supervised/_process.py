"""Running a child's flow in a process of its own, which can be ended whatever its code does.

Prefect starts the process and runs the flow in it. What is added: its result comes back through a
file, a SIGTERM ends it `Cancelled`, and it does not outlive the process that started it.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import cloudpickle  # type: ignore[import-untyped]
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, serialize_context
from prefect.exceptions import ParameterTypeError, TerminationSignal
from prefect.states import Cancelled

from supervised import _compat as compat
from supervised._control import wait_in_slices
from supervised._errors import SpawnError
from supervised._inline import (
    is_cancelled_itself,
    refused,
    run_cancellation_hooks,
    run_hooks,
    uncancel,
)
from supervised._log import get_logger
from supervised._policy import outcome_of
from supervised._text import text_of

if TYPE_CHECKING:
    import concurrent.futures
    import contextvars
    import multiprocessing.process
    from collections.abc import Callable, Mapping

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow

    from supervised._child import Child
    from supervised._types import Outcome

logger = get_logger("prefect.supervised.process")

_LOOK_SECONDS = 1.0
_TERM_SHARE = 0.8  # of the grace, for what the process does on SIGTERM; the rest is for the report
_RESULT = "result"
_REASON = "reason"


@attrs.frozen
class Exit:
    """How a child's process ended.

    Args:
        code: Its exit code; negative if a signal ended it.
        value: What the flow returned, if it did.
        exception: What it raised, if it did.
        has_value: Whether the flow has returned.
    """

    code: int | None
    value: Any = None
    exception: BaseException | None = None
    has_value: bool = False


class ProcessRun:
    """One child's process, from its start to its end; owned by a thread of this one.

    Args:
        child: The child.
        flow: Its flow.
        run: Its run.
        parameters: The flow's parameters by name.
        context: The context that it was spawned in.
        grace_seconds: Seconds in which it has to end once this process is gone.
        conclude: Called when the process is gone; the future gives the run's last state.
    """

    def __init__(
        self,
        child: Child[Any],
        flow: Flow[..., Any],
        run: FlowRun,
        parameters: Mapping[str, Any],
        *,
        context: contextvars.Context,
        grace_seconds: float,
        conclude: Callable[[Exit], concurrent.futures.Future[State[Any]]],
    ) -> None:
        self._child = child
        self._flow = flow
        self._run = run
        self._parameters = parameters
        self._context = context
        self._grace_seconds = grace_seconds
        self._conclude = conclude
        self._folder = Path(tempfile.mkdtemp(prefix="supervised-process-"))
        self._process: multiprocessing.process.BaseProcess | None = None
        self._lock = threading.Lock()
        self._is_stopped = self._is_signalled = False
        self._kill_at: float | None = None
        self._attempt = child.attempt
        self._attempt.interrupt = self.interrupt

    def start(self) -> None:
        """Start the process, and the thread that waits for its end."""
        threading.Thread(
            target=self._context.run,
            args=(self._own_process,),
            name=f"supervised-{self._child.name}",
            daemon=True,
        ).start()

    def interrupt(self, *, hard: bool = False) -> None:
        """Send the process SIGTERM, once; *hard*, SIGKILL. It is killed when the grace runs out."""
        self._is_stopped = True
        if self._process is not None:  # else who starts it looks, which may take seconds
            self._stop(self._process, hard=hard)

    def _stop(self, process: multiprocessing.process.BaseProcess, *, hard: bool = False) -> None:
        with self._lock:
            is_first, self._is_signalled = not self._is_signalled, True
            if not process.is_alive():
                return
            if hard:
                process.kill()
            elif is_first:
                with suppress(OSError):
                    reason = self._child.cancel_reason
                    (self._folder / _REASON).write_text(str(reason or ""))
                process.terminate()
                self._kill_at = time.monotonic() + self._grace_seconds * _TERM_SHARE

    def _own_process(self) -> None:
        try:
            end = self._run_to_its_end()
        except SpawnError as exc:
            end = Exit(None, exception=exc)
        except Exception as exc:
            failure = SpawnError(
                f"Child {self._child.name!r} could not be given a process: {exc!r}. What goes in "
                "must be picklable: the flow, its parameters, and the context that it needs.",
                child=self._child.name,
            )
            failure.__cause__ = exc
            end = Exit(None, exception=failure)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        future = self._conclude(end)
        wait_in_slices(future)
        has_state = not future.cancelled() and future.exception() is None
        self._settle(end, future.result() if has_state else None)

    def _settle(self, end: Exit, state: State[Any] | None) -> None:
        asked = self._child.cancel_reason is not None
        if state is not None and state.is_crashed() and not isinstance(end.exception, SpawnError):
            self._run_crash_hooks(state)
        outcome: Outcome = "cancelled" if asked else "crashed"
        if isinstance(end.exception, SpawnError):
            outcome = "failed"
        elif state is not None:
            outcome = outcome_of(state, asked=asked) or "crashed"
        elif end.has_value:
            outcome = "completed"  # the server did not tell, but the process has
        if outcome == "completed" and end.has_value:
            self._child.settle(outcome, state=state, value=end.value, of=self._attempt)
        elif outcome == "completed" and end.exception is not None:
            # It has completed there, but what it returned cannot be had here.
            self._child.settle("failed", state=state, exception=end.exception, of=self._attempt)
        else:
            self._child.settle(outcome, state=state, exception=end.exception, of=self._attempt)

    def _run_crash_hooks(self, state: State[Any]) -> None:
        try:
            asyncio.run(run_hooks(self._flow.on_crashed_hooks, self._flow, self._run, state))
        except BaseException:  # even SystemExit: the child must be settled
            logger.exception("A hook of child %r raised", self._child.name)

    def _run_to_its_end(self) -> Exit:
        process = self._begin()
        if process is None:
            return Exit(None)
        while process.is_alive():
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._child.note_escalation("killed")
                process.kill()
                process.join()
            process.join(_LOOK_SECONDS / 2)
        return self._read_exit(process.exitcode)

    def _begin(self) -> multiprocessing.process.BaseProcess | None:
        if self._is_stopped:
            return None
        process = self._process = self._start(self._validated())
        if self._is_stopped:
            self._stop(process)
        return process

    def _start(self, validated: Mapping[str, Any]) -> multiprocessing.process.BaseProcess:
        """Start the process with as much of what it is to be given as can be pickled."""
        with suppress(Exception):
            return self._start_process(validated)
        # The context has the parent's flow in it, with everything that its body uses.
        with compat.outside_of_runs():
            with suppress(Exception):
                return self._start_process(validated)
            # A model may have been given a lock, where what was passed has none.
            return self._start_process(
                self._parameters, validates=self._flow.should_validate_parameters
            )

    def _start_process(
        self, parameters: Mapping[str, Any], *, validates: bool = False
    ) -> multiprocessing.process.BaseProcess:
        return compat.run_flow_in_process(
            self._prepared(validates=validates),
            self._run,
            parameters,
            context=serialize_context(),
            env={"PREFECT__FLOW_RUN_ID": str(self._run.id)},
        )

    def _validated(self) -> Mapping[str, Any]:
        """Return the parameters as the flow's types want them.

        Here, where a refusal can be told from the flow's failure, and where the names stand for
        something that its annotations use: a function that is pickled leaves them behind.

        Raises:
            ParametersError: If the flow's types refuse them.
        """
        if not self._flow.should_validate_parameters:
            return self._parameters
        try:
            return self._flow.validate_parameters(dict(self._parameters))
        except ParameterTypeError as exc:
            raise refused(self._child, self._flow, self._parameters, exc) from exc

    def _prepared(self, *, validates: bool) -> Flow[..., Any]:
        """Return a copy of the flow whose function works with this side."""
        flow = copy.copy(self._flow)
        if self._child.run_name is not None:
            flow.flow_run_name = None  # an explicit name wins over the flow's template
        flow.should_validate_parameters = validates
        body = _Body(str(self._folder), os.getpid(), self._grace_seconds)
        flow.fn = body.around_async(self._flow) if flow.isasync else body.around_sync(self._flow)
        return flow

    def _read_exit(self, code: int | None) -> Exit:
        try:
            kind, what = cloudpickle.loads((self._folder / _RESULT).read_bytes())
        except FileNotFoundError:
            return Exit(code)
        except Exception as exc:
            unreadable = TypeError(
                f"What the flow returned cannot be read in this process: {exc!r}"
            )
            unreadable.__cause__ = exc
            return Exit(code, exception=unreadable)
        if kind == "raised":
            return Exit(code, exception=what)
        return Exit(code, value=what, has_value=True)


@attrs.frozen
class _Body:
    """What surrounds the flow's function in its process; it is pickled.

    Args:
        folder: Where the two sides leave each other messages.
        parent: The process that has started this one.
        grace_seconds: Seconds in which this one has to end once that is gone.
    """

    folder: str
    parent: int
    grace_seconds: float

    def around_sync(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        """Return the function of a sync flow, as the process is to run it."""
        fn = flow.fn

        @functools.wraps(fn)
        def body(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            try:
                value = fn(*args, **kwargs)
                is_state = isinstance(value, State)
                self._returned(value, compat.state_result(value) if is_state else value)
            except Exception as exc:
                self._raised(exc)
                raise
            except TerminationSignal:
                compat.run_coroutine(_run_hooks(flow, self._message()))
                return self._cancelled_state()
            return value

        return body

    def around_async(self, flow: Flow[..., Any]) -> Callable[..., Any]:
        """Return the function of an async flow, as the process is to run it."""
        fn = flow.fn

        @functools.wraps(fn)
        async def body(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            try:
                value = await fn(*args, **kwargs)
                is_state = isinstance(value, State)
                self._returned(
                    value, await value.aresult(raise_on_failure=False) if is_state else value
                )
            except Exception as exc:
                self._raised(exc)
                raise
            except (TerminationSignal, asyncio.CancelledError) as exc:
                if isinstance(exc, asyncio.CancelledError):
                    if not is_cancelled_itself():
                        raise
                    uncancel()
                await _run_hooks(flow, self._message())
                return self._cancelled_state()
            return value

        return body

    def _returned(self, value: Any, result: Any) -> None:
        if isinstance(value, State) and isinstance(result, Exception):
            self._raised(result)
            return
        try:
            self._write(("returned", result))
        except Exception as exc:
            raise TypeError(
                f"The flow returned {type(result).__name__}, which cannot be pickled, so it cannot "
                f"leave its process: {exc}"
            ) from exc

    def _raised(self, exc: Exception) -> None:
        try:
            self._write(("raised", exc))
        except Exception:  # a stand-in is better than nothing
            with suppress(Exception):
                self._write(("raised", RuntimeError(f"{type(exc).__name__}: {text_of(exc)}")))

    def _write(self, what: tuple[str, Any]) -> None:
        pickled = cloudpickle.dumps(what)
        cloudpickle.loads(pickled)  # or it would be lost on the other side
        if os.getppid() != self.parent:
            return
        path = Path(self.folder) / _RESULT
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(pickled)
        unfinished.replace(path)

    def _message(self) -> str:
        with suppress(OSError):
            if reason := (Path(self.folder) / _REASON).read_text():
                return f"Cancelled because {reason}"
        return "Cancelled together with its parent"

    def _cancelled_state(self) -> State[Any]:
        return Cancelled(message=self._message())

    def _begin(self) -> None:
        with suppress(OSError):  # of a try that the engine has repeated
            (Path(self.folder) / _RESULT).unlink(missing_ok=True)
        threading.Thread(target=self._end_with_parent, daemon=True).start()

    def _end_with_parent(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(_LOOK_SECONDS)  # no portable event tells of a parent's death
        shutil.rmtree(self.folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.grace_seconds)  # for the main thread, which the signal interrupts
        if sys.platform != "win32":
            os.kill(os.getpid(), signal.SIGKILL)


async def _run_hooks(flow: Flow[..., Any], message: str) -> None:
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        await run_cancellation_hooks(flow, context.flow_run, message)
