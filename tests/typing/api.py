"""Checked by mypy and pyright, never run: users see for `supervised_flow` what `flow` shows."""

from collections.abc import Coroutine
from typing import Any
from uuid import UUID

from prefect import Flow, flow
from prefect.client.schemas.objects import State
from typing_extensions import assert_type

from supervised import Child, SupervisedFlow, TeardownReport, supervised_flow, supervisor


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
