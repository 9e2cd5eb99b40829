"""Checked by mypy and pyright, never run: users see for `supervised_flow` what `flow` shows."""

from collections.abc import Coroutine
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

from prefect import Flow, flow
from prefect.client.schemas.objects import State
from typing_extensions import assert_type

from supervised import (
    AsCompleted,
    CancelReason,
    Child,
    Children,
    Finalizer,
    Join,
    Receipt,
    Restart,
    SupervisedFlow,
    Supervisor,
    TeardownReport,
    cancelled,
    supervised_flow,
    supervisor,
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


def wrong() -> None:
    Restart(strategy="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
