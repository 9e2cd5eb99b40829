"""What Prefect's flow engine does with a run, as far as supervision can tell."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import threading
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.loggers import flow_run_logger
from prefect.results import ResultRecord  # type: ignore[attr-defined]  # it re-exports it
from prefect.states import AwaitingRetry, Completed, Crashed, Failed, Running
from prefect.utilities.callables import get_call_parameters

from supervised._context import ended_supervisor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prefect.client.schemas.objects import FlowRun
    from prefect.flows import Flow

    from supervised._supervisor import Supervisor
    from supervised.testing._processes import FakeProcess

_RETRY_SECONDS = 1.0
_CRASHED = "Execution was cancelled by the runtime environment."


class Engine:
    """Executes flow runs in a simulated process.

    Args:
        process: The process.
    """

    def __init__(self, process: FakeProcess) -> None:
        self._process = process
        self.supervisor: Supervisor | None = None
        """The scope of the process's own run, once its flow is over."""

    async def execute(self, flow: Flow[..., Any], run: FlowRun) -> int:
        """Run the process's own flow; return the exit code."""
        parameters = get_call_parameters(flow.fn, (), run.parameters)
        if flow.isasync:
            state = await self.run(flow, run, parameters)
        else:
            state = await self._in_thread(flow, run, parameters)
        return 0 if state.is_final() else 1

    async def run(
        self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]
    ) -> State[Any]:
        """Run an async flow under a run that exists, with its retries; return its state."""
        while True:
            begun = await self._begin(run)
            if isinstance(begun, State):
                return begun
            try:
                final = await self._call(flow, begun, parameters)
                self._note_scope(run)
            except asyncio.CancelledError:
                self._note_scope(run)
                if self._process.intent != "cancel":
                    await self._end(flow, begun, Crashed(message=_CRASHED))
                raise
            if not final.is_failed() or begun.run_count > (flow.retries or 0):
                return await self._end(flow, begun, final)
            await self._propose(run, AwaitingRetry())
            await anyio.sleep(float(flow.retry_delay_seconds or 0))

    def run_in_thread(
        self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]
    ) -> State[Any]:
        """Run a sync flow in this thread."""
        begun = self._from_thread(self._begin(run))
        if isinstance(begun, State):
            return begun
        with _context(flow, begun, parameters):
            try:
                final = _state_of(flow.fn(**parameters))
            except Exception as exc:
                final = _failed(exc)
        self._note_scope(run)
        state: State[Any] = self._from_thread(self._end(flow, begun, final))
        return state

    async def _in_thread(
        self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]
    ) -> State[Any]:
        # A thread that ends, because the virtual clock goes slowly while there are others.
        future: concurrent.futures.Future[State[Any]] = concurrent.futures.Future()
        context = contextvars.copy_context()

        def main() -> None:
            try:
                future.set_result(context.run(self.run_in_thread, flow, run, parameters))
            except BaseException as exc:
                # Whatever it is, SystemExit too: whoever waits for the thread is to hear of it.
                future.set_exception(exc)

        threading.Thread(target=main, name=f"fake-{run.name}", daemon=True).start()
        return await asyncio.wrap_future(future)

    def _note_scope(self, run: FlowRun) -> None:
        if run.id == self._process.run.id:
            self.supervisor = ended_supervisor.get()

    def _from_thread(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._process.loop).result()

    async def _begin(self, run: FlowRun) -> FlowRun | State[Any]:
        """Propose `Running`; return the run as it is then, or the state that it has instead."""
        state = await self._propose(run, Running())
        if not state.is_running():
            return state
        (begun,) = await self._process.api.read_runs([run.id])
        return begun

    async def _call(
        self, flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]
    ) -> State[Any]:
        seconds = flow.timeout_seconds
        with _context(flow, run, parameters), anyio.move_on_after(seconds) as scope:
            try:
                return _state_of(await flow.fn(**parameters))
            except TimeoutError as exc:
                message = f"Flow run failed due to timeout: {exc!r}"
                return Failed(name="TimedOut", message=message, data=exc)
            except Exception as exc:
                return _failed(exc)
        assert scope.cancelled_caught
        message = f"Flow run exceeded timeout of {seconds} second(s)"
        return Failed(name="TimedOut", message=message)

    async def _end(self, flow: Flow[..., Any], run: FlowRun, state: State[Any]) -> State[Any]:
        # Only a persisted result reaches others.
        told = state if flow.persist_result else state.model_copy(update={"data": None})
        answer = await self._propose(run, told)
        with _context(flow, run, run.parameters):
            await run_hooks(_hooks(flow, answer), flow, run, answer)
        # What the server answers has lost what the flow returned or raised.
        return state if answer.type == state.type else answer

    async def _propose(self, run: FlowRun, state: State[Any]) -> State[Any]:
        """Propose a state for as long as it takes."""
        while True:
            try:
                return await self._process.api.propose(run.id, state)
            except (httpx.TransportError, PrefectHTTPStatusError):
                await anyio.sleep(_RETRY_SECONDS)


def _context(flow: Flow[..., Any], run: FlowRun, parameters: Mapping[str, Any]) -> FlowRunContext:
    # Not validated, because there is no client, no task runner, and no result store.
    return FlowRunContext.model_construct(
        flow=flow, flow_run=run, parameters=dict(parameters), task_run_dynamic_keys={}
    )


def _state_of(result: Any) -> State[Any]:
    if isinstance(result, State):
        return result
    # As the engine keeps it: `None` is a result too.
    record: ResultRecord[Any] = ResultRecord.model_construct(result=result)
    return Completed(data=record)


def _failed(exc: Exception) -> State[Any]:
    message = f"Flow run encountered an exception: {type(exc).__name__}: {exc}"
    return State(type=StateType.FAILED, name="Failed", message=message, data=exc)


def _hooks(flow: Flow[..., Any], state: State[Any]) -> Iterable[Any]:
    if state.is_completed():
        return flow.on_completion_hooks
    if state.is_failed():
        return flow.on_failure_hooks
    return ()


async def run_hooks(
    hooks: Iterable[Any], flow: Flow[..., Any], run: FlowRun, state: State[Any]
) -> None:
    """Call a flow's hooks; what they raise is logged."""
    for hook in list(hooks):
        try:
            result = hook(flow, run, state)
            if inspect.isawaitable(result):
                await result
        except Exception:
            flow_run_logger(run, flow).exception("An error was encountered while running a hook")
