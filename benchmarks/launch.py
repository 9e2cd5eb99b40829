"""How long 200 deployed children take to launch: `python benchmarks/launch.py [--children 200]`.

From the first call until every child has a run on the server. Nothing serves the deployment, so
that only the launch is measured. The contenders take turns, each in a flow run of its own, on a
server that is new every time.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timezone
from uuid import UUID, uuid4

import anyio
from meter import Meter, metered
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.deployments import arun_deployment
from prefect.runtime import flow_run
from stage import DEPLOYMENT, deploy_child, only_server, parser

from supervised import supervised_flow, supervisor
from supervised._bulk import Look, Looks


class Enough(Exception):
    """Ends a flow whose children nobody serves."""


def main() -> int:
    options = arguments()
    rows = []
    for database in options.databases:
        for repetition in range(options.repetitions):
            for name in random.sample(options.contenders, len(options.contenders)):
                if repetition and (name, database) == ("plain Prefect", "sqlite"):
                    continue  # minutes, all of which it waits for locks
                with only_server(database):
                    asyncio.run(deploy_child())
                    made, meter = asyncio.run(CONTENDERS[name](options.children))
                row = {"seconds": round(meter.seconds, 2), "requests": meter.requests.total()}
                row |= {"asked for": options.children, "made": made}
                rows.append({"database": database, "contender": name, **row})
                sys.stderr.write(f"{rows[-1]} {dict(meter.requests)}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__, repetitions=7)
    made.add_argument("--children", type=int, default=200)
    made.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    return made.parse_args()


async def plain(children: int) -> tuple[int, Meter]:
    """`asyncio.gather` over `arun_deployment(timeout=0)`; on SQLite not all of them succeed."""

    @flow
    async def parent() -> tuple[int, Meter]:
        with metered() as meter:
            results = await asyncio.gather(
                *(
                    arun_deployment(DEPLOYMENT, parameters={"part": part}, timeout=0)
                    for part in range(children)
                ),
                return_exceptions=True,
            )
        return sum(not isinstance(result, BaseException) for result in results), meter

    return await parent()


async def ours(children: int) -> tuple[int, Meter]:
    """`supervisor.spawn`, as often."""
    meters = []

    @supervised_flow
    async def parent() -> None:
        with metered() as meter:
            spawned = [supervisor.spawn(DEPLOYMENT, {"part": part}) for part in range(children)]
            while any(each.flow_run_id is None for each in spawned):
                await asyncio.sleep(0.005)
        meters.append(meter)
        raise Enough

    await parent(return_state=True)
    return children, meters[0]


async def floor(children: int, width: int = 1) -> tuple[int, Meter]:
    """The same runs, with their tracking task runs, in as few requests as the server allows.

    So many are created at a time once the task runs of all of those have been recorded.
    """

    @flow
    async def parent() -> tuple[int, Meter]:
        async with get_client() as client:
            with metered() as meter:
                found = await client.read_deployment_by_name(DEPLOYMENT)
                await create_all(client, found.id, children, width)
            body = {"flow_runs": {"parent_flow_run_id": {"any_": [str(flow_run.id)]}}}
            made = await client.request("POST", "/flow_runs/count", json=body)
        return made.json(), meter

    return await parent()


async def create_all(
    client: PrefectClient, deployment: UUID, children: int, width: int = 1
) -> None:
    """Create so many children of the flow run that this is called in."""
    batches, looks = batches_of(children), Looks()
    while some := list(itertools.islice(batches, width)):
        tracked = [await track(client, each, looks) for each in some]
        async with anyio.create_task_group() as creators:
            for each in tracked:
                creators.start_soon(create, client, deployment, each)


def batches_of(children: int) -> Iterator[range]:
    """Return the parts of the children, as many at a time as one request may create."""
    return iter([range(at, min(children, at + 100)) for at in range(0, children, 100)])


async def track(client: PrefectClient, parts: range, looks: Looks) -> dict[int, UUID]:
    """Have task runs recorded; return that of each part."""
    tracking = {part: uuid4() for part in parts}
    parent = UUID(flow_run.id)
    events = [tracking_event(parent, task_run) for task_run in tracking.values()]
    await client.request("POST", "/events", json=events)
    await wait_until_recorded(client, list(tracking.values()), looks)
    return tracking


async def create(client: PrefectClient, deployment: UUID, tracking: dict[int, UUID]) -> None:
    """Create the runs of these parts below their task runs."""
    parent = flow_run.id
    bodies = {
        task_run: {
            "parameters": {"part": part},
            "enforce_parameter_schema": False,  # who sends them knows that they fit, as ours does
            "state": {"type": "SCHEDULED", "name": "Scheduled"},
            "idempotency_key": str(uuid4()),
            "parent_task_run_id": str(task_run),
            "tags": ["floor", f"floor:{parent}"],  # as many as ours: each is part of each event
            "labels": {f"floor.{number}": str(parent) for number in range(10)},
        }
        for part, task_run in tracking.items()
    }
    route = f"/deployments/{deployment}/create_flow_run/bulk"
    while bodies:  # on SQLite a writer in between makes all of it fail
        response = await client.request("POST", route, json=list(bodies.values()))
        results = zip(list(bodies), response.json()["results"], strict=True)
        for task_run, result in results:
            if result["status"] == "CREATED":
                del bodies[task_run]


async def wait_until_recorded(client: PrefectClient, ids: list[UUID], looks: Looks) -> None:
    """Look when they may be there, as ours does: each look takes the server time."""
    chosen = {"task_runs": {"id": {"any_": [str(run_id) for run_id in ids]}}}
    began, seen, pause = time.monotonic(), [Look()], looks.first(len(ids))
    while True:
        await asyncio.sleep(pause)
        response = await client.request("POST", "/task_runs/count", json=chosen)
        seen.append(Look(time.monotonic() - began, response.json()))
        if seen[-1].recorded == len(ids):
            looks.learn(seen[1], seen[-1])
            return
        pause = looks.again(len(ids), *seen[-2:])


def tracking_event(parent: UUID, task_run: UUID) -> dict[str, object]:
    now = datetime.now(timezone.utc).isoformat()
    state = {"type": "PENDING", "name": "Pending", "message": None, "state_details": {}}
    return {
        "id": str(uuid4()),
        "occurred": now,
        "event": "prefect.task-run.Pending",
        "resource": {
            "prefect.resource.id": f"prefect.task-run.{task_run}",
            "prefect.state-type": "PENDING",
            "prefect.state-timestamp": now,
            "prefect.orchestration": "client",
        },
        "related": [
            {
                "prefect.resource.id": f"prefect.flow-run.{parent}",
                "prefect.resource.role": "flow-run",
            }
        ],
        "payload": {
            "validated_state": state,
            "task_run": {"name": "child", "task_key": "child", "dynamic_key": str(task_run)},
        },
    }


CONTENDERS: dict[str, Callable[[int], Awaitable[tuple[int, Meter]]]] = {
    "plain Prefect": plain,
    "supervised": ours,
    "floor": floor,
    "floor, 2 at a time": functools.partial(floor, width=2),
}

if __name__ == "__main__":
    sys.exit(main())
