"""A flow run by hand, with no runner: `python alone.py async|sync|busy|crowded FOLDER`."""

import asyncio
import sys
import time
from pathlib import Path

import tree
from prefect.exceptions import CancelledRun

from supervised import supervised_flow, supervisor


def spawn_all(folder: str) -> None:
    tree.mark(folder)
    for part in range(2):
        supervisor.spawn("leaf/test", {"folder": folder, "part": part})
    supervisor.spawn(tree.inline_leaf, {"folder": folder, "part": 2})


@supervised_flow
async def alone_async(folder: str) -> None:
    spawn_all(folder)
    await asyncio.sleep(3600)


@supervised_flow
def alone_sync(folder: str) -> None:
    spawn_all(folder)
    time.sleep(3600)


@supervised_flow
async def alone_busy(folder: str) -> None:
    """A loop that never idles: a signal lands in the background task, not in the body."""
    spawn_all(folder)

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    task = asyncio.create_task(spin())
    await asyncio.sleep(3600)
    await task


@supervised_flow
async def alone_crowded(folder: str) -> None:
    """A background task that has nearly all of the time: it gets the signal's exception."""
    spawn_all(folder)

    async def compute() -> None:
        while True:
            sum(number for number in range(100_000))
            await asyncio.sleep(0)

    task = asyncio.create_task(compute())
    await asyncio.sleep(3600)
    await task


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    (Path(folder) / "started").touch()
    try:
        if kind == "async":
            asyncio.run(alone_async(folder))
        elif kind == "busy":
            asyncio.run(alone_busy(folder))
        elif kind == "crowded":
            asyncio.run(alone_crowded(folder))
        else:
            alone_sync(folder)
    except CancelledRun:
        print("ended as CancelledRun")
