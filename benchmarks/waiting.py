"""What waiting costs: `python benchmarks/waiting.py [--children 200] [--minutes 10]`.

Counts the requests of a parent while its children run, from the moment in which all of them do. The
children are runs that nobody serves and that are set to `Running` from outside. Plain Prefect and
ours wait at the same time, each in a process of its own: what is counted is not a matter of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from meter import metered
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.deployments import arun_deployment
from prefect.runtime import flow_run
from stage import (
    DEPLOYMENT,
    children_in,
    deploy_child,
    only_server,
    parser,
    set_children,
)

from supervised import supervised_flow, supervisor

_BETWEEN_SECONDS = 0.4


def main() -> int:
    options = arguments()
    if options.one:
        row = asyncio.run(CONTENDERS[options.one](options.children, options.minutes))
        json.dump({"contender": options.one, **row}, sys.stdout)
        return 0
    rows = []
    for database in options.databases:
        with only_server(database) as server:
            asyncio.run(deploy_child())
            numbers = ["--children", str(options.children), "--minutes", str(options.minutes)]
            both = [
                subprocess.Popen(
                    [sys.executable, __file__, "--one", name, *numbers],
                    stdout=subprocess.PIPE,
                    env=dict(server.env),
                )
                for name in CONTENDERS
            ]
            for process in both:
                output, _ = process.communicate()
                rows.append({"database": database, **json.loads(output)})
                sys.stderr.write(f"{rows[-1]}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--children", type=int, default=200)
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return made.parse_args()


async def plain(children: int, minutes: float) -> dict[str, Any]:
    """Wait for `arun_deployment`, as often."""

    @flow
    async def parent() -> dict[str, Any]:
        waiting = []
        for part in range(children):  # at once, on SQLite, some of them would fail
            waiting.append(
                asyncio.create_task(arun_deployment(DEPLOYMENT, parameters={"part": part}))
            )
            await asyncio.sleep(_BETWEEN_SECONDS)
        counted = await count(children, minutes)
        await asyncio.gather(*waiting)
        return counted

    return await parent()


async def ours(children: int, minutes: float) -> dict[str, Any]:
    """Wait for spawned children, as often."""

    @supervised_flow
    async def parent() -> dict[str, Any]:
        for part in range(children):
            supervisor.spawn(DEPLOYMENT, {"part": part})
        return await count(children, minutes)

    return await parent()


async def count(children: int, minutes: float) -> dict[str, Any]:
    """Let all children run, count for some time, and complete them."""
    async with get_client() as client:
        while len(await live_children(client, "SCHEDULED")) < children:
            await asyncio.sleep(1)
        await set_children(client, flow_run.id, "SCHEDULED", "RUNNING", children)
        with metered() as meter:
            await asyncio.sleep(minutes * 60)
        await set_children(client, flow_run.id, "RUNNING", "COMPLETED", children)
    return {
        "children": children,
        "minutes": minutes,
        "requests": meter.requests.total(),
        "by path": dict(meter.requests.most_common(5)),
    }


async def live_children(client: PrefectClient, state: str) -> list[Any]:
    body = {"flow_runs": children_in(state, flow_run.id), "limit": 200}
    return (await client.request("POST", "/flow_runs/filter", json=body)).json()


CONTENDERS: dict[str, Callable[[int, float], Awaitable[dict[str, Any]]]] = {
    "plain Prefect": plain,
    "supervised": ours,
}

if __name__ == "__main__":
    sys.exit(main())
