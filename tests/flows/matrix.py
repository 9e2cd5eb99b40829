"""A tree with a child in every state at every depth, for the kill matrix.

`python matrix.py RUNNER` serves it. The folder's `go` file makes every node launch the children
that are to be starting, and cancel those that are to be in the middle of it, when the end comes.
"""

import asyncio
import sys
import time
from datetime import timedelta

import prefect
from prefect import flow, suspend_flow_run
from prefect.types._datetime import now
from tree import asked, mark

from supervised import supervised_flow, supervisor

DEPTH = 3
LINGER_SECONDS = 2.0
TIMEOUT_SECONDS = 45.0


@flow(name="matrix-leaf")
def leaf(folder: str, state: str, depth: int) -> None:
    """Run until it is ended; one that is being cancelled takes its time."""
    mark(folder)
    try:
        while True:
            time.sleep(0.05)  # in slices, because a signal enters between two of them
    finally:
        if state == "cancelling":
            time.sleep(LINGER_SECONDS)  # so that the end comes while it is being cancelled


def spawn(folder: str, state: str, depth: int, **options: object):
    """Spawn a leaf whose name says what state it is to be in, and at what depth."""
    name = f"{state}-{depth}"
    given = {"folder": folder, "state": state, "depth": depth}
    return supervisor.spawn("matrix-leaf/matrix", given, name=name, key=name, **options)


async def node(folder: str, depth: int) -> None:
    """Launch a child in every state, and the next node."""
    mark(folder)
    later = now("UTC") + timedelta(hours=1)
    spawn(folder, "running", depth)
    cancelling = spawn(folder, "cancelling", depth)
    spawn(folder, "queued", depth, scheduled_time=later)
    if depth < DEPTH:
        given = {"folder": folder, "depth": depth + 1}
        supervisor.spawn("matrix-mid/matrix", given, name=f"mid-{depth}", key=f"mid-{depth}")
    while not asked(folder, "go"):
        await asyncio.sleep(0.05)
    cancelling.cancel("it is to be in the middle of it")
    spawn(folder, "starting", depth)
    while not asked(folder, "raise"):
        if asked(folder, "suspend") and depth == 1:
            await suspend_flow_run(timeout=600)
        await asyncio.sleep(0.05)
    if depth == 1:
        raise ValueError("the body failed")
    await asyncio.sleep(600)


@supervised_flow(name="matrix-mid", lease_seconds=8)
async def mid(folder: str, depth: int) -> None:
    """A node below the root."""
    await node(folder, depth)


@supervised_flow(name="matrix-root", lease_seconds=8)
async def root(folder: str, depth: int = 1) -> None:
    """The root."""
    await node(folder, depth)


@supervised_flow(name="matrix-root-timeout", lease_seconds=8, timeout_seconds=TIMEOUT_SECONDS)
async def root_timeout(folder: str, depth: int = 1) -> None:
    """The root that times out."""
    await node(folder, depth)


if __name__ == "__main__":
    flows = [leaf, mid] if sys.argv[1] == "matrix" else [root, root_timeout]
    prefect.serve(*(each.to_deployment(sys.argv[1]) for each in flows), limit=64)
