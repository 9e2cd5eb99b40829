"""Trees of processes that run until they are ended, written in three ways; serves them all.

`python trees.py` serves *plain/bench*, *recipe/bench* and *supervised/bench*. Each takes a folder,
in which its process leaves its pid, and the widths of the levels below it.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from prefect import flow, serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.deployments import arun_deployment
from prefect.runtime import flow_run
from prefect.states import Cancelling

from supervised import supervised_flow, supervisor

FOREVER = 3600


async def live(folder: str) -> None:
    """Leave this process's pid, and be there until it is ended."""
    path = Path(folder) / f"{flow_run.id}.pid"
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)


async def launch(name: str, folder: str, widths: list[int]) -> None:
    """Launch the next level as Prefect's users do, and wait for it."""
    await live(folder)
    if not widths:
        await asyncio.sleep(FOREVER)
    below = {"folder": folder, "widths": widths[1:]}
    await asyncio.gather(*(arun_deployment(name, parameters=below) for _ in range(widths[0])))


@flow
async def plain(folder: str, widths: list[int]) -> None:
    """Children are left to Prefect."""
    await launch("plain/bench", folder, widths)


async def cancel_children(flow, flow_run, state) -> None:  # noqa: ARG001 - as hooks are called
    """Do what the forum's recipe does, with the parent link that makes it work."""
    async with get_client() as client:
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run.id]))
        for child in await client.read_flow_runs(flow_run_filter=below):
            await client.set_flow_run_state(child.id, Cancelling())


@flow(on_cancellation=[cancel_children])
async def recipe(folder: str, widths: list[int]) -> None:
    """Every level cancels the next one, from a hook."""
    await launch("recipe/bench", folder, widths)


@supervised_flow
async def supervised(folder: str, widths: list[int]) -> None:
    """Children are supervised."""
    await live(folder)
    if not widths:
        await asyncio.sleep(FOREVER)
    below = {"folder": folder, "widths": widths[1:]}
    for part in range(widths[0]):
        supervisor.spawn("supervised/bench", below, key=f"part-{part}")


if __name__ == "__main__":
    serve(*(each.to_deployment("bench") for each in (plain, recipe, supervised)), limit=100)
