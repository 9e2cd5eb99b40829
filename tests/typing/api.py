"""Checked by mypy and pyright, never run: users see for `supervised_flow` what `flow` shows."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from typing_extensions import assert_type

from supervised import (
    AsCompleted,
    CancelReason,
    Child,
    ChildCancelled,
    ChildCrashed,
    ChildError,
    ChildFailed,
    Children,
    ChildTimedOut,
    DeploymentNotFoundError,
    DeploymentPausedError,
    DuplicateKeyError,
    Finalizer,
    InvalidTargetError,
    Join,
    NoApiError,
    NoSupervisorError,
    ParametersError,
    Receipt,
    Restart,
    RunNotFoundError,
    ScopeClosedError,
    ScopeTimeoutError,
    ServerUnreachableError,
    SpawnError,
    SupervisedError,
    SupervisedFlow,
    Supervisor,
    TeardownError,
    TeardownReport,
    cancelled,
    supervised_flow,
    supervisor,
)
from supervised._restart import Strategy
from supervised._types import (
    Action,
    Cause,
    Kind,
    Outcome,
    ReceiptStatus,
    ScopeOptions,
    Source,
)


@supervised_flow
def bare(x: int) -> str:
    return str(x)


@supervised_flow(name="called", retries=2, grace_seconds=5, on_child_failure="wait")
def called(x: int, y: str = "") -> list[int]:
    return [x]


@supervised_flow(log_prints=True, on_parent={"failed": "wait"}, max_concurrent=3)
async def asynchronous(x: int) -> float:
    return float(x)


@flow
def plain(x: int) -> str:
    return str(x)


@flow
async def plain_async(x: int) -> float:
    return float(x)


async def calls() -> None:
    assert_type(bare(1), str)
    assert_type(called(1, y="a"), list[int])
    coroutine: Coroutine[Any, Any, float] = asynchronous(1)
    assert_type(await coroutine, float)
    assert_type(await asynchronous(1), float)
    assert_type(bare(1, return_state=True), State[str])
    renamed = bare.with_options(name="other")
    assert_type(renamed(1), str)
    supervised: SupervisedFlow[..., str] = renamed
    as_flow: Flow[..., str] = supervised
    assert_type(as_flow(1), str)
    assert_type(supervised.scope_options, ScopeOptions)
    function: Callable[..., str] = supervised.unsupervised_fn
    bare.with_options(
        grace_seconds=5,
        on_parent={"failed": "wait"},
        on_child_failure="ignore",
        max_concurrent=3,
        lease_seconds=60,
        restart=Restart(),
        deadline_seconds=60,
        requests_per_minute=100,
    )
    supervised_flow.from_source("https://github.com/org/repo.git", "flows.py:nightly")
    function(1)


@supervised_flow
async def spawns() -> None:
    assert_type(supervisor.spawn(plain, {"x": 1}), Child[str])
    assert_type(supervisor.spawn(bare, {"x": 1}), Child[str])
    assert_type(supervisor.spawn(plain_async, {"x": 1}), Child[float])
    assert_type(supervisor.spawn(asynchronous, {"x": 1}), Child[float])
    assert_type(supervisor.spawn("flow/deployment"), Child[Any])
    child = supervisor.spawn(plain_async, {"x": 1}, on_parent="cancel", timeout_seconds=3)
    assert_type(await child, float)
    assert_type(await child.aresult(), float)
    assert_type(child.result(timeout=1), float)
    assert_type(child.flow_run_id, UUID | None)
    assert_type(supervisor.report, TeardownReport | None)


@supervised_flow(
    restart=Restart(max=5, within_seconds=30, backoff=[1, 10], strategy="one_for_all"),
    deadline_seconds=60,
    requests_per_minute=100,
)
async def keeps_its_word() -> None:
    first = supervisor.spawn(plain, {"x": 1}, reuse="completed", isolation="process")
    second = supervisor.spawn(
        plain,
        {"x": 2},
        after=[first],
        restart=Restart(),
        scheduled_time=datetime.now(timezone.utc),
    )
    assert_type(await supervisor.gather(first, second), list[str])
    assert_type(supervisor.first_success(first, second), Join[str])
    assert_type(await supervisor.first_completed(first, second, timeout=3), str)
    assert_type(supervisor.quorum(1, first, second).result(), list[str])
    assert_type(supervisor.first_success(first).winners, tuple[Child[Any], ...])
    assert_type(supervisor.map(plain_async, [{"x": 1}], max_concurrent=2), Children[float])
    assert_type(await supervisor.map(plain, [{"x": 1}]), list[str])
    assert_type(supervisor.map("flow/deployment", [{}]).result(), list[Any])
    assert_type(supervisor.as_completed([first, second], timeout=3), AsCompleted[str])
    async for child in supervisor.as_completed([first]):
        assert_type(child, Child[str])
    assert_type(supervisor.adopt(UUID(int=1)).flow_run_id, UUID | None)
    assert_type(supervisor.on_teardown(print, "bye"), Finalizer)
    assert_type(supervisor.seconds_left, float | None)
    assert_type(supervisor, Supervisor)
    assert_type(cancelled(), bool)
    if (report := supervisor.report) is not None:
        assert_type(report.receipts, tuple[Receipt, ...])
        assert_type(report.finalizer_errors, tuple[str, ...])
    assert_type(first.cancel_reason, CancelReason | None)


@supervised_flow(lease_seconds=60, grace_seconds=10)
async def uses_everything() -> None:
    child = supervisor.spawn(
        "flow/deployment",
        {"x": 1},
        name="part",
        key="part-1",
        tags=["nightly"],
        job_variables={"env": {}},
        work_queue_name="gpu",
        on_parent={"failed": "detach"},
    )
    assert_type(child.name, str)
    assert_type(child.key, str)
    assert_type(child.target, str)
    assert_type(child.kind, Kind)
    assert_type(child.on_parent, Mapping[Cause, Action])
    assert_type(child.timeout_seconds, float | None)
    task_run_id: UUID = child.task_run_id
    print(task_run_id)
    assert_type(child.generation, int)
    assert_type(child.restarts, int)
    assert_type(child.state, State[Any])
    assert_type(child.flow_run_id, UUID | None)
    assert_type(child.flow_run, FlowRun | None)
    assert_type(child.url, str | None)
    assert_type(child.is_over, bool)
    assert_type(child.is_detached, bool)
    assert_type(child.exception, BaseException | None)
    assert_type(child.requested_at, datetime | None)
    assert_type(child.acknowledged_at, datetime | None)
    assert_type(child.ended_at, datetime | None)
    assert_type(child.escalations, tuple[str, ...])
    child.add_done_callback(lambda done: print(done.outcome))
    assert_type(child.result(timeout=1, raise_on_failure=False), Any)
    assert_type(await child.aresult(timeout=1, raise_on_failure=False), Any)
    child.wait(timeout=1)
    await child.wait_async(timeout=1)
    child.cancel("no longer needed")
    child.detach()


@supervised_flow
async def joins(child: Child[Any]) -> None:
    adopted: Child[Any] = supervisor.adopt(
        str(UUID(int=1)), name="found", key="found", timeout_seconds=5, on_parent="wait"
    )
    assert_type(adopted.outcome, Outcome | None)
    race = supervisor.first_success(child, adopted, timeout=5)
    assert_type(race.losers, tuple[Child[Any], ...])
    assert_type(race.is_lost, bool)
    assert_type(race.children, tuple[Child[Any], ...])
    every = supervisor.gather(child, adopted, timeout=5, return_exceptions=True)
    assert_type(await every.aresult(timeout=1), list[Any])
    assert_type(every.result(timeout=1), list[Any])
    some = supervisor.quorum(1, child, adopted, timeout=5)
    assert_type(await some, list[Any])
    several = supervisor.map(plain, [{"x": 1}], key="map", name="map")
    several.wait(timeout=1)
    assert_type(await several.aresult(raise_on_failure=False), list[str])
    for each in supervisor.as_completed(several):
        assert_type(each, Child[str])
    finalizer = supervisor.on_teardown(print, "bye", end="")
    assert_type(finalizer.name, str)
    assert_type(finalizer.callback, Callable[..., object])
    finalizer.remove()
    assert_type(supervisor.flow_run_id, UUID)
    assert_type(supervisor.flow_run, FlowRun)
    assert_type(supervisor.flow, Flow[..., Any])
    assert_type(supervisor.children, tuple[Child[Any], ...])
    assert_type(supervisor.is_ending, bool)
    supervisor.cancel("enough")


def reads(report: TeardownReport, reason: CancelReason, restart: Restart) -> None:
    assert_type(restart.max, int)
    assert_type(restart.within_seconds, float)
    assert_type(restart.backoff, float | Sequence[float] | Callable[[int], float])
    assert_type(restart.strategy, Strategy)
    Restart(max=1, within_seconds=1, backoff=0.5, strategy="rest_for_one")
    Restart(backoff=lambda number: 2.0**number)
    assert_type(report.flow_name, str)
    assert_type(report.cause, Cause)
    assert_type(report.counts(), dict[ReceiptStatus, int])
    assert_type(report.flow_run_id, UUID)
    assert_type(report.reason, str)
    assert_type(report.started_at, datetime)
    assert_type(report.seconds, float)
    assert_type(report.unverified, tuple[Receipt, ...])
    assert_type(report.ok, bool)
    assert_type(report.delegated_to, UUID | None)
    assert_type(reason.source, Source)
    assert_type(reason.message, str)
    assert_type(reason.child, str | None)
    for receipt in report.receipts:
        assert_type(receipt.name, str)
        assert_type(receipt.flow_run_id, UUID | None)
        assert_type(receipt.url, str | None)
        assert_type(receipt.status, ReceiptStatus)
        assert_type(receipt.reason, str)
        assert_type(receipt.requested_at, datetime | None)
        assert_type(receipt.acknowledged_at, datetime | None)
        assert_type(receipt.terminal_at, datetime | None)
        assert_type(receipt.depth, int)
        assert_type(receipt.seconds, float | None)
        assert_type(receipt.escalations, tuple[str, ...])


def errors(child: Child[int]) -> None:
    try:
        child.result()
    except (ChildFailed, ChildCrashed, ChildTimedOut, ChildCancelled) as ended:
        as_child: ChildError = ended
        assert_type(as_child.child, str)
        assert_type(as_child.flow_run_id, UUID | None)
        assert_type(as_child.state, State[Any] | None)
        assert_type(as_child.reason, CancelReason | None)
        assert_type(as_child.url, str | None)
    except (
        InvalidTargetError,
        DuplicateKeyError,
        ScopeClosedError,
        DeploymentNotFoundError,
        RunNotFoundError,
        DeploymentPausedError,
        ParametersError,
        NoApiError,
        ServerUnreachableError,
    ) as refused:
        as_spawn: SpawnError = refused
        assert_type(as_spawn.child, str | None)
    except TeardownError as torn:
        assert_type(torn.report, TeardownReport)
    except (NoSupervisorError, ScopeTimeoutError) as other:
        as_ours: SupervisedError = other
        print(as_ours)


def wrong() -> None:
    Restart(strategy="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
