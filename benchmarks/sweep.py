"""What it costs to cancel 500 live runs on the server: `python benchmarks/sweep.py [--runs 500]`.

A tree of runs without processes: from the call until the server has taken every request. Ours asks
for what it has launched, then searches the tree for what else there is, and verifies all of it. The
floor knows the ids: the same states, written raw, 50 a request, one request after another, and four
at a time. And for how long the server is busy each time that it looks of its own accord whether the
parents of so many live children have been cancelled; while the others are measured it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID

import anyio
import psutil
from launch import Enough, create_all
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run
from stage import DEPLOYMENT, deploy_child, only_server, parser, set_children

from supervised import supervised_flow, supervisor

BULK = 50
_PAGE = 200
_FEW = 20
_IDLE = 0.15  # of a core; a server without anything to do takes 0.03
_IDLE_SECONDS = 6  # events may be recorded 5 s late, so fewer tell nothing
_MOST_SETTLING_SECONDS = 300
_RECORDED_SECONDS = 10  # a server that looks is not idle for long enough
_LOOK_SECONDS = 20  # how often it looks, by default
_LOOKS = 3


def main() -> int:
    options = arguments()
    rows = []
    for database in options.databases:
        for _ in range(options.repetitions):
            with only_server(database):
                asyncio.run(deploy_child())
                for name, contender in random.sample(list(CONTENDERS.items()), len(CONTENDERS)):
                    row = {"database": database, "contender": name, "runs": options.runs}
                    rows.append({**row, **asyncio.run(contender(options.runs))})
                    sys.stderr.write(f"{rows[-1]}\n")
        with only_server(database, cascades=True):
            asyncio.run(deploy_child())
            row = {"database": database, "contender": "the server's own look", "runs": options.runs}
            rows.append({**row, **asyncio.run(own_look(options.runs))})
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__, repetitions=7)
    made.add_argument("--runs", type=int, default=500)
    return made.parse_args()


async def ours(runs: int) -> dict[str, float]:
    """A body that raises."""
    marks: dict[str, Any] = {}

    @supervised_flow(grace_seconds=1)
    async def parent() -> None:
        marks["run"] = flow_run.id
        children = [supervisor.spawn(DEPLOYMENT, {"part": part}) for part in range(runs)]
        while any(each.flow_run_id is None for each in children):
            await asyncio.sleep(0.1)
        async with get_client() as client:
            await set_children(client, flow_run.id, "SCHEDULED", "RUNNING", runs)
            marks["settling"] = await settle()
        marks["began"] = time.time()
        raise Enough

    await parent(return_state=True)
    seconds = await last_request(marks["run"], runs) - marks["began"]
    return {"seconds": seconds, "settling": marks["settling"]}


async def floor(runs: int, width: int = 1) -> dict[str, float]:
    """The same states, written raw; and what reading the runs, and one of them, took before."""

    @flow
    async def parent() -> dict[str, float]:
        async with get_client() as client:
            await make_running(client, runs)
            settling = await settle()
            began = time.time()
            ids = [run.id for run in await read_children(client, flow_run.id, runs)]
            reading = time.time() - began
            request = await time_of_one(client, ids)
            began = time.time()
            chunks = iter([ids[start : start + BULK] for start in range(0, runs, BULK)])
            async with anyio.create_task_group() as writers:
                for _ in range(width):
                    writers.start_soon(cancel_all, client, chunks)
            return {
                "seconds": await last_request(flow_run.id, runs) - began,
                "reading": reading,
                "request": request,
                "settling": settling,
            }

    return await parent()


async def make_running(client: PrefectClient, runs: int) -> None:
    """Give the flow run that this is called in so many children that run."""
    found = await client.read_deployment_by_name(DEPLOYMENT)
    await create_all(client, found.id, runs)
    await set_children(client, flow_run.id, "SCHEDULED", "RUNNING", runs)


async def own_look(runs: int) -> dict[str, float]:
    """For how long the server is busy with one look at them, while nobody asks for anything."""

    @flow
    async def parent() -> dict[str, float]:
        async with get_client() as client:
            await make_running(client, runs)
        await asyncio.sleep(_RECORDED_SECONDS)
        seconds = [await is_busy() for _ in range(_LOOKS * _LOOK_SECONDS)]
        return {"seconds": sum(seconds) / _LOOKS}

    return await parent()


async def settle() -> float:
    """Wait until the server is done with what led here, such as events; return the seconds."""
    began = idle_since = time.monotonic()
    while time.monotonic() - idle_since < _IDLE_SECONDS:
        assert time.monotonic() - began < _MOST_SETTLING_SECONDS, "the server is never done"
        if await is_busy():
            idle_since = time.monotonic()
    return time.monotonic() - began


async def is_busy() -> bool:
    """Tell whether the server has had anything to do for a second."""
    before = cpu_seconds()
    await asyncio.sleep(1)
    return cpu_seconds() - before > _IDLE


def cpu_seconds() -> float:
    """Return what the server, and its database, have used so far."""
    used = 0.0
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # a worker of PostgreSQL that has ended meanwhile
            times = each.cpu_times()
            used += times.user + times.system
    return used


async def time_of_one(client: PrefectClient, ids: list[UUID]) -> float:
    """Return the seconds of a request that reads one run."""
    began = time.perf_counter()
    for run_id in ids[:_FEW]:
        await client.read_flow_run(run_id)
    return (time.perf_counter() - began) / _FEW


async def cancel_all(client: PrefectClient, chunks: Iterator[list[UUID]]) -> None:
    """Cancel what chunks are left, one after another."""
    for chunk in chunks:
        body = {
            "flow_runs": {"id": {"any_": [str(run_id) for run_id in chunk]}},
            "state": {"type": "CANCELLING", "name": "Cancelling"},
        }
        await client.request("POST", "/flow_runs/bulk_set_state", json=body)


async def last_request(parent: str, runs: int) -> float:
    """Return when the server has set the last child to `Cancelling`."""
    async with get_client() as client:
        found = await read_children(client, parent, runs)
    assert {run.state.type.value for run in found} == {"CANCELLING"}
    return max(run.state.timestamp.timestamp() for run in found)


async def read_children(client: PrefectClient, parent: str, runs: int) -> list:
    below = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [parent]}})
    found = []
    while len(found) < runs:
        found += await client.read_flow_runs(flow_run_filter=below, limit=_PAGE, offset=len(found))
    return found


CONTENDERS: dict[str, Callable[[int], Awaitable[dict[str, float]]]] = {
    "supervised": ours,
    "floor": floor,
    "floor, 4 at a time": functools.partial(floor, width=4),
}

if __name__ == "__main__":
    sys.exit(main())
