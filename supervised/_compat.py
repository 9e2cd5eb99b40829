"""Everything we use of Prefect beyond its public surface, and what its versions do differently.

Each entry has a feature check and a fallback, and `tests/contract/test_prefect_internals.py`
says when Prefect changes it.

Where attrs classes are defined it is imported as `compat`: the code that attrs generates for them
looks up a `_compat` of its own, and would find this module among the globals.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prefect
import prefect.flows
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun
from prefect.results import (  # type: ignore[attr-defined,unused-ignore]
    ResultRecordMetadata,  # pyright: ignore[reportPrivateImportUsage]  # moved in 3.9
)
from prefect.utilities.asyncutils import run_coro_as_sync

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping
    from contextvars import ContextVar
    from multiprocessing.process import BaseProcess

    from prefect.client.schemas.objects import FlowRun, State, TaskRun
    from prefect.flows import Flow

try:
    from prefect.telemetry.run_telemetry import LABELS_TRACEPARENT_KEY
except ImportError:  # pragma: no cover - every Prefect since 3.1.11 has it
    LABELS_TRACEPARENT_KEY = "__OTEL_TRACEPARENT"

_RUNNER_FOLDER = str(Path(prefect.__file__).parent / "runner") + os.sep

TRACEPARENT_LABEL = LABELS_TRACEPARENT_KEY
"""The label of a run in which Prefect keeps the W3C traceparent of its span."""

ResultMetadata = ResultRecordMetadata
"""What a state says of a persisted result."""

RUN_DEPLOYMENT_TASK_KEY = "prefect.deployments.flow_runs.run_deployment."
"""What the tracking tasks of plain `run_deployment` calls start with (deployments/flow_runs.py)."""


_BoundFlow: Any = getattr(prefect.flows, "InfrastructureBoundFlow", ())  # before 3.4: none


def is_bound_to_infrastructure(flow: Flow[..., Any]) -> bool:
    """Whether a flow runs in a work pool whenever it is called."""
    return isinstance(flow, _BoundFlow)


@contextmanager
def outside_of_runs() -> Iterator[None]:
    """Make no flow run current, as far as Prefect is concerned."""
    current: ContextVar[Any] | None = getattr(FlowRunContext, "__var__", None)
    if current is None:  # pragma: no cover - every Prefect 3 has it
        yield
        return
    token = current.set(None)
    try:
        yield
    finally:
        current.reset(token)


def termination_intent() -> str | None:
    """Return why a runner is stopping this process, e.g. *cancel*; `None` if it is not."""
    try:
        from prefect._internal.control_listener import get_intent
    except ImportError:  # pragma: no cover - before 3.7.1 the module lived elsewhere
        return None
    return get_intent()


def runner_owns(flow_run_id: object) -> bool:
    """Whether a runner started this process for that very run, and will signal it.

    Subprocesses of a run inherit the variables, so an id must match; `flow.serve()` sets none.
    """
    owner = os.environ.get("PREFECT__FLOW_RUN_ID", "").lower()
    return not engine_owns_cancellation() and owner in {"", str(flow_run_id)}


def has_sigterm_bridge() -> bool:
    """Whether SIGTERM raises `TerminationSignal` in the main thread right now."""
    handler = signal.getsignal(signal.SIGTERM)
    return callable(handler) and getattr(handler, "__module__", "").startswith("prefect.")


def plain_launches(context: FlowRunContext) -> tuple[int, int]:
    """Return how often this run called `run_deployment`, and how often a flow.

    Prefect counts the tracking tasks of both in the run's context, and no other tasks, so knowing
    costs no request (_internal/engine.py, `dynamic_key_for_task_run`).
    """
    deployments = flows = 0
    for key, last in dict(context.task_run_dynamic_keys).items():
        calls = last + 1 if isinstance(last, int) else 1
        if key.startswith(RUN_DEPLOYMENT_TASK_KEY):
            deployments += calls
        else:
            flows += calls
    return deployments, flows


def run_flow_inline(flow: Flow[..., Any], flow_run: FlowRun, parameters: Mapping[str, Any]) -> Any:
    """Run a flow in this process under a flow run that exists already.

    Returns:
        Its final state; for an async flow, an awaitable of it.
    """
    from prefect.flow_engine import run_flow

    return run_flow(flow, flow_run=flow_run, parameters=dict(parameters), return_type="state")


def run_flow_in_process(
    flow: Flow[..., Any],
    flow_run: FlowRun,
    parameters: Mapping[str, Any],
    *,
    context: dict[str, Any],
    env: Mapping[str, str | None],
) -> BaseProcess:
    """Run a flow in a process of its own under a flow run that exists already.

    Returns:
        The process, started.
    """
    from prefect.flow_engine import run_flow_in_subprocess

    return run_flow_in_subprocess(
        flow, flow_run=flow_run, parameters=dict(parameters), context=context, env=dict(env)
    )


def task_run_event(task_run: TaskRun) -> dict[str, Any]:
    """Return the event from which the server records a task run that has just been made.

    Prefect 3 makes all its task runs so (utilities/engine, `emit_task_run_state_change_event`;
    server/services/task_run_recorder.py). That function sends the event by a thread of its own, and
    takes the flow run from a context that the control plane does not have.
    """
    state = task_run.state
    assert state is not None
    occurred = state.timestamp.isoformat()
    return {
        "id": str(state.id),
        "occurred": occurred,
        "event": f"prefect.task-run.{state.name}",
        "resource": {
            "prefect.resource.id": f"prefect.task-run.{task_run.id}",
            "prefect.resource.name": task_run.name,
            "prefect.run-count": str(task_run.run_count),
            "prefect.state-message": "",
            "prefect.state-name": state.name or "",
            "prefect.state-timestamp": occurred,
            "prefect.state-type": state.type.value,
            "prefect.orchestration": "client",
        },
        "related": [
            {
                "prefect.resource.id": f"prefect.flow-run.{task_run.flow_run_id}",
                "prefect.resource.role": "flow-run",
            }
        ],
        "payload": {
            "intended": {"from": None, "to": state.type.value},
            "initial_state": None,
            "validated_state": {
                "type": state.type.value,
                "name": state.name,
                "message": None,
                "state_details": {},
            },
            "task_run": task_run.model_dump(mode="json", exclude_none=True, exclude=_NOT_IN_EVENTS),
        },
    }


_NOT_IN_EVENTS = {
    "id",
    "created",
    "updated",
    "flow_run_id",
    "state_id",
    "state_type",
    "state_name",
    "state",
    "estimated_start_time_delta",
    "estimated_run_time",
}


def engine_owns_cancellation() -> bool:
    """Whether Prefect's engine, not a runner, is to run `on_cancellation` hooks here."""
    value = os.environ.get("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", "true")
    return value.lower() == "true"


def runner_runs_hooks(flow_run: FlowRun) -> bool:
    """Whether a runner runs the run's `on_cancellation` hooks: only for what it has started."""
    return flow_run.deployment_id is not None and not engine_owns_cancellation()


def is_called_by_runner() -> bool:
    """Whether the function that calls this one was called by Prefect's runner.

    Its modules run as `__main__` in the process that is started for hooks, so files are compared
    (runner/_workspace_runtime_bootstrap.py).
    """
    caller = sys._getframe(2)  # noqa: SLF001 - as the standard library does for namedtuple
    return caller.f_code.co_filename.startswith(_RUNNER_FOLDER)


def run_coroutine(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine from sync code, whether or not a loop runs in this thread."""
    run_coro_as_sync(coroutine)


class _ExpectsCancellation(logging.Filter):
    """Keeps quiet of a cancelled run what Prefect says of one that has broken its engine."""

    def filter(self, record: logging.LogRecord) -> bool:
        exc = record.exc_info[1] if record.exc_info else None
        return not (isinstance(exc, CancelledRun) and _UNEXPECTED in record.getMessage())


_EXPECTS_CANCELLATION = _ExpectsCancellation()  # a logger takes one and the same once
_UNEXPECTED = "exited with unexpected exception"


def expect_cancellation() -> None:
    """Let Prefect not log as an error, with a traceback, that this run has ended `Cancelled`.

    It does where a run's process begins (3.9.1, `run_flow` in flow_engine.py and
    `handle_engine_signals` in engine.py): of a flow that returns the state, not of a plain one.
    """
    for name in ("prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_EXPECTS_CANCELLATION)


def state_result(state: State[Any]) -> Any:
    """Return a state's result, or its exception, from sync code.

    `State.result` guesses from the calling frame whether to return an awaitable; this does not.
    """
    return run_coro_as_sync(state.aresult(raise_on_failure=False))
