"""How soon a parent hears that a child has completed: `python benchmarks/noticing.py`.

From the request that sets a child's run to `Completed` until the parent's `await` returns, with the
event stream and without it. Plain Prefect asks every 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.deployments import arun_deployment
from prefect.runtime import flow_run
from prefect.states import Completed, Pending, Running
from stage import DEPLOYMENT, deploy_child, only_server, parser

from supervised import supervised_flow, supervisor
from supervised._api import PrefectOrchestrator

POLL_SECONDS = 5.0  # of plain Prefect: the moment of the end is spread over it


def main() -> int:
    options = arguments()
    rows: list[dict[str, object]] = []
    for database in options.databases:
        with only_server(database):
            asyncio.run(deploy_child())
            for name, contender in CONTENDERS.items():
                seconds = asyncio.run(contender(options.children))
                rows.append({"database": database, "contender": name, "seconds": seconds})
                sys.stderr.write(f"{database}, {name}: {sorted(seconds)}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--children", type=int, default=15)
    return made.parse_args()


async def plain(children: int) -> list[float]:
    """`await arun_deployment(...)`."""

    @flow
    async def parent() -> list[float]:
        return [
            await timed(
                asyncio.create_task(arun_deployment(DEPLOYMENT, flow_run_name=f"plain-{number}"))
            )
            for number in range(children)
        ]

    return await parent()


async def ours(children: int) -> list[float]:
    """`await supervisor.spawn(...)`."""

    @supervised_flow
    async def parent() -> list[float]:
        found = []
        for number in range(children):
            child = supervisor.spawn(DEPLOYMENT, name=f"ours-{number}", key=str(number))
            found.append(await timed(asyncio.create_task(child.wait_async())))
        return found

    return await parent()


async def without_events(children: int) -> list[float]:
    """The same where nothing is heard."""

    @asynccontextmanager
    async def deaf(*_: object) -> AsyncIterator[None]:
        raise ConnectionError("no events here")
        yield

    subscribe = PrefectOrchestrator.subscribe
    PrefectOrchestrator.subscribe = deaf
    try:
        return await ours(children)
    finally:
        PrefectOrchestrator.subscribe = subscribe


async def timed(waiting: asyncio.Task[object]) -> float:
    """Complete the only child that there is, and return the seconds until that is known."""
    async with get_client() as client:
        child = await find_child(client)
        await client.set_flow_run_state(child, Pending(), force=True)
        await client.set_flow_run_state(child, Running(), force=True)
        await asyncio.sleep(1 + random.random() * POLL_SECONDS)
        began = time.perf_counter()
        await client.set_flow_run_state(child, Completed(), force=True)
        await waiting
    return round(time.perf_counter() - began, 3)


async def find_child(client: PrefectClient) -> UUID:
    below = FlowRunFilter.model_validate(
        {
            "parent_flow_run_id": {"any_": [flow_run.id]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
        }
    )
    while not (runs := await client.read_flow_runs(flow_run_filter=below)):
        await asyncio.sleep(0.05)
    return runs[0].id


CONTENDERS: dict[str, Callable[[int], Awaitable[list[float]]]] = {
    "plain Prefect": plain,
    "supervised": ours,
    "supervised, without events": without_events,
}

if __name__ == "__main__":
    sys.exit(main())
