"""What we rely on of Prefect beyond its public surface: these say when Prefect changes it."""

import asyncio
import inspect
import logging
import signal

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.flow_engine import run_flow, run_flow_in_subprocess
from prefect.states import Cancelled
from prefect.utilities.engine import capture_sigterm

from supervised import _compat


def test_the_traceparent_label_has_prefects_name():
    from prefect.telemetry.run_telemetry import LABELS_TRACEPARENT_KEY

    assert _compat.TRACEPARENT_LABEL == LABELS_TRACEPARENT_KEY == "__OTEL_TRACEPARENT"


def test_run_flow_takes_a_flow_run_and_returns_a_state():
    parameters = inspect.signature(run_flow).parameters
    assert {"flow", "flow_run", "parameters", "return_type"} <= set(parameters)


def test_a_flow_can_be_run_in_a_process_of_its_own_under_a_run_that_exists():
    parameters = inspect.signature(run_flow_in_subprocess).parameters
    assert {"flow", "flow_run", "parameters", "context", "env"} <= set(parameters)


def test_the_intent_of_a_runner_can_be_read():
    assert _compat.termination_intent() is None


def test_prefects_bridge_turns_sigterm_into_an_exception_in_the_main_thread():
    assert not _compat.has_sigterm_bridge()
    with capture_sigterm():
        assert _compat.has_sigterm_bridge()
        assert callable(signal.getsignal(signal.SIGTERM))
    assert not _compat.has_sigterm_bridge()


@pytest.mark.parametrize(
    ("hooks", "owner", "expected"),
    [("true", "run", False), ("false", "run", True), ("false", "", True), ("false", "x", False)],
)
def test_a_runner_is_recognised_by_what_it_sets(monkeypatch, hooks, owner, expected):
    monkeypatch.setenv("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS", hooks)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", owner)
    assert _compat.runner_owns("run") is expected


def test_prefect_counts_the_tracking_tasks_of_run_deployment_and_of_flows(deployed, tmp_path):
    @task
    def in_a_task():
        run_deployment("persisted/test", parameters={"folder": str(tmp_path)}, timeout=0)

    @task
    def harmless():
        return 1

    @flow
    def inner():
        return 1

    @flow
    def plain(by_task: bool):
        harmless()
        assert _compat.plain_launches(FlowRunContext.get()) == (0, 0)
        inner()
        inner()
        if by_task:
            in_a_task()
        else:
            run_deployment("persisted/test", parameters={"folder": str(tmp_path)}, timeout=0)
        return _compat.plain_launches(FlowRunContext.get())

    assert plain(by_task=False) == (1, 2)
    assert plain(by_task=True) == (1, 2)


def test_a_run_that_was_created_first_runs_under_its_own_id(server):
    from prefect.client.orchestration import get_client

    @flow
    def answer(x: int):
        return x, FlowRunContext.get().flow_run.id

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(answer, parameters={"x": 7})
    state = _compat.run_flow_inline(answer, run, {"x": 7})
    assert state.type == StateType.COMPLETED
    assert _compat.state_result(state) == (7, run.id)


def test_a_returned_state_becomes_the_state_of_the_run(server):
    """Inline children end `Cancelled` by returning it, because Prefect crashes cancelled tasks."""

    @flow
    def ends_cancelled():
        return State(type=StateType.CANCELLED, name="Cancelled", message="so it was")

    state = ends_cancelled(return_state=True)
    assert state.is_cancelled()
    assert state.message == "so it was"


def test_a_runner_sees_our_hook_and_nobody_else(server, caplog):
    from prefect.client.orchestration import get_client
    from prefect.runner._hook_runner import HookRunner
    from prefect.states import Crashed

    from supervised import supervised_flow

    called = []

    def mine(flow, flow_run, state):
        called.append(flow.on_crashed_hooks)

    @supervised_flow(on_crashed=[mine])
    def parent():
        pass

    async def resolve(_):
        return parent

    async def run_hooks(run):
        await HookRunner(resolve_flow=resolve).run_crashed_hooks(run, Crashed())

    assert parent.on_crashed_hooks == [mine]
    with get_client(sync_client=True) as client:
        asyncio.run(run_hooks(client.create_flow_run(parent)))
    assert called == [[mine]]
    assert "Hook 'end_what_is_left' finished running successfully" in caplog.text


def test_what_prefect_logs_of_a_cancelled_run_is_known_by_its_words(server, caplog):
    @flow
    def broken():
        raise ValueError("broken")

    @flow
    def cancelled():
        return Cancelled()

    _compat.expect_cancellation()
    logger = logging.getLogger("prefect.flow_runs")
    for each, is_told in [(broken, True), (cancelled, False)]:
        caplog.clear()
        with pytest.raises(Exception):  # noqa: B017 - whatever it is
            run_flow(each, error_logger=logger)
        told = "Engine execution exited with unexpected exception" in caplog.text
        assert told == is_told


def test_a_block_can_be_outside_of_all_runs():
    seen = []

    @flow
    def run():
        with _compat.outside_of_runs():
            seen.append(FlowRunContext.get())
        seen.append(FlowRunContext.get())

    with FlowRunContext.model_construct(flow=run, flow_run=None, parameters={}):
        run.fn()
    assert seen[0] is None
    assert seen[1].flow is run


def test_what_a_state_says_of_a_persisted_result_is_a_model_with_a_storage_key():
    assert "storage_key" in _compat.ResultMetadata.model_fields
