"""The flows that the server tests deploy. Every process leaves a marker with its pid."""

import asyncio
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import prefect.runtime
from prefect import flow, suspend_flow_run, task
from prefect.deployments import run_deployment

from supervised import supervised_flow, supervisor


def mark(folder: str) -> None:
    run_id = prefect.runtime.flow_run.id
    (Path(folder) / f"{run_id}.pid").write_text(str(os.getpid()))


def asked(folder: str, what: str) -> bool:
    """Whether the test has said so, with `World.tell`."""
    return (Path(folder) / what).exists()


@flow
def leaf(folder: str, seconds: float = 300, part: int = 0) -> int:
    mark(folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked(folder, f"finish-{part}"):
        if asked(folder, f"fail-{part}"):
            raise ValueError(f"part {part} is bad")
        time.sleep(0.05)
    return part


@flow(persist_result=True)
def persisted(folder: str, part: int = 0, waits: bool = False) -> int:
    mark(folder)
    while waits and not asked(folder, f"finish-{part}"):
        time.sleep(0.05)
    return part * 10


@supervised_flow(persist_result=True)
async def suspends(folder: str) -> int:
    mark(folder)
    child = supervisor.spawn("persisted/test", {"folder": folder, "part": 3, "waits": True})
    local = supervisor.spawn(sleeps_here, {"folder": folder}, isolation="process")
    while child.flow_run_id is None or local.flow_run_id is None:
        await asyncio.sleep(0.05)
    with (Path(folder) / "children").open("a") as found:
        found.write(f"{child.flow_run_id}\n")
    if not asked(folder, "resumed"):
        while not asked(folder, "local"):
            await asyncio.sleep(0.05)
        await suspend_flow_run(timeout=600)
    result = await child
    local.cancel()
    return result


@supervised_flow
async def nests(folder: str, depth: int = 1) -> None:
    mark(folder)
    if depth:
        await supervisor.spawn("nests/test", {"folder": folder, "depth": depth - 1})


@flow
def sleeps_here(folder: str) -> None:
    """Run until it is ended, in a process that its parent has started."""
    (Path(folder) / "local").write_text(str(os.getpid()))
    time.sleep(3600)


@flow
async def inline_leaf(folder: str, part: int = 0) -> int:
    while not asked(folder, f"finish-{part}"):
        await asyncio.sleep(0.05)
    return part


def _leaf(folder: str, part: int) -> dict[str, object]:
    return {"folder": folder, "part": part}


@supervised_flow
async def mid(folder: str, leaves: int = 3) -> None:
    mark(folder)
    for part in range(leaves):
        supervisor.spawn("leaf/test", {"folder": folder, "part": part})


@supervised_flow
def mid_sync(folder: str, leaves: int = 3) -> None:
    mark(folder)
    children = [
        supervisor.spawn("leaf/test", {"folder": folder, "part": part}) for part in range(leaves)
    ]
    for child in children:
        child.result()


@flow
def mid_plain(folder: str, leaves: int = 2) -> None:
    mark(folder)
    for part in range(leaves):
        run_deployment("leaf/test", parameters=_leaf(folder, part), timeout=0)
    while not asked(folder, "finish"):
        time.sleep(0.05)


@task
def spawn_in_task(folder: str, part: int) -> str:
    return supervisor.spawn("leaf/test", {"folder": folder, "part": part}).key


@flow
def launches_plainly(folder: str, part: int) -> None:
    run_deployment("leaf/test", parameters=_leaf(folder, part), timeout=0)


def _launch(folder: str, part: int, target: str) -> object:
    """Launch one child in the way that *target* names; what it returns may have to be awaited."""
    given = _leaf(folder, part)
    ways: dict[str, Callable[[], object]] = {
        "inline": lambda: supervisor.spawn(inline_leaf, given).key,
        "plain": lambda: run_deployment("leaf/test", parameters=given, timeout=0),
        "within-plain": lambda: launches_plainly(folder, part),
        "detached": lambda: supervisor.spawn("leaf/test", given, on_parent="detach").key,
        "detached mid": lambda: (
            supervisor.spawn("mid/test", {"folder": folder, "leaves": 2}, on_parent="detach").key
        ),
        "waited": lambda: (
            supervisor.spawn("mid/test", {"folder": folder}, on_parent={"failed": "wait"}).key
        ),
        "task": lambda: spawn_in_task(folder, part),
    }
    if target in ways:
        return ways[target]()
    return supervisor.spawn(target, given if target.startswith("leaf") else {"folder": folder}).key


async def _body(folder: str, children: list[str]) -> None:
    mark(folder)
    for part, target in enumerate(children):
        launched = _launch(folder, part, target)
        if inspect.isawaitable(launched):
            await launched
    while not asked(folder, "finish"):
        if asked(folder, "raise"):
            raise ValueError("the body failed")
        await asyncio.sleep(0.05)


@supervised_flow
async def root(folder: str, children: list[str]) -> None:
    await _body(folder, children)


@supervised_flow
def root_sync(folder: str, children: list[str]) -> None:
    mark(folder)
    for part, target in enumerate(children):
        _launch(folder, part, target)
    while not asked(folder, "finish"):
        if asked(folder, "raise"):
            raise ValueError("the body failed")
        time.sleep(0.05)


@supervised_flow
async def top(folder: str) -> None:
    mark(folder)
    supervisor.spawn("root/test", {"folder": folder, "children": ["mid/test", "inline"]})


# Functions of their own: a runner loads a flow by its function, without `with_options`.
@supervised_flow(timeout_seconds=45)
async def root_timeout(folder: str, children: list[str]) -> None:
    await _body(folder, children)


@supervised_flow(timeout_seconds=45)
def root_sync_timeout(folder: str, children: list[str]) -> None:
    root_sync.unsupervised_fn(folder, children)


@supervised_flow(on_child_failure="ignore")
async def lenient(folder: str, children: list[str]) -> None:
    await _body(folder, children)


@supervised_flow(lease_seconds=10)
async def root_brief(folder: str, children: list[str]) -> None:
    await _body(folder, children)


CLEANING_SECONDS = 8


@supervised_flow
async def tidies(folder: str) -> None:
    supervisor.spawn("leaf/test", {"folder": folder})
    mark(folder)
    try:
        await asyncio.sleep(300)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(CLEANING_SECONDS)
        (Path(folder) / "tidied").touch()


@supervised_flow
def tidies_sync(folder: str) -> None:
    supervisor.spawn("leaf/test", {"folder": folder})
    mark(folder)
    try:
        time.sleep(300)
    finally:
        time.sleep(CLEANING_SECONDS)
        (Path(folder) / "tidied-sync").touch()


SERVED = [
    tidies,
    tidies_sync,
    top,
    leaf,
    persisted,
    suspends,
    nests,
    mid,
    mid_sync,
    mid_plain,
    root,
    root_sync,
    root_timeout,
    root_sync_timeout,
    root_brief,
    lenient,
]
