"""What it costs to cancel 500 live runs on the server: `python benchmarks/sweep.py [--runs 500]`.

A tree of runs without processes: from the call until the server has taken every request. Ours finds
the tree first, by the root's id alone. The floor knows the ids: the same states, written raw, 50 a
request, one request after another, which on SQLite is the quickest way; and four at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID

import anyio
from launch import Enough, create
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run
from stage import DEPLOYMENT, deploy_child, only_server, parser, set_children

from supervised import supervised_flow, supervisor

BULK = 50
_PAGE = 200
_SETTLING_SECONDS = 15  # in which the server has recorded the events of what led here


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
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__, repetitions=3)
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
        await asyncio.sleep(_SETTLING_SECONDS)
        marks["began"] = time.time()
        raise Enough

    await parent(return_state=True)
    return {"seconds": await last_request(marks["run"], runs) - marks["began"]}


async def floor(runs: int, width: int = 1) -> dict[str, float]:
    """The same states, written raw; and what reading the runs took before."""

    @flow
    async def parent() -> dict[str, float]:
        async with get_client() as client:
            found = await client.read_deployment_by_name(DEPLOYMENT)
            for first in range(0, runs, 100):
                parts = range(first, min(runs, first + 100))
                await create(client, found.id, UUID(flow_run.id), parts)
            await set_children(client, flow_run.id, "SCHEDULED", "RUNNING", runs)
            await asyncio.sleep(_SETTLING_SECONDS)
            began = time.time()
            ids = [run.id for run in await read_children(client, flow_run.id, runs)]
            reading = time.time() - began
            began = time.time()
            chunks = iter([ids[start : start + BULK] for start in range(0, runs, BULK)])
            async with anyio.create_task_group() as writers:
                for _ in range(width):
                    writers.start_soon(cancel_all, client, chunks)
            return {
                "seconds": await last_request(flow_run.id, runs) - began,
                "reading": reading,
            }

    return await parent()


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
