"""A sync parent whose inline children run in threads, and stop when they are told to.

    python flow.py

It needs a Prefect server, and PREFECT_API_URL to say where it is.
"""

import time

from prefect import flow
from prefect.futures import as_completed

import supervised
from supervised import supervised_flow, supervisor

SHARD = 3000
STEP_SECONDS = 0.01


@flow
def search(start: int, needle: int) -> int | None:
    """Look through one shard. A thread cannot be ended from outside, so the loop asks."""
    for number in range(start, start + SHARD):
        if supervised.cancelled():
            return None
        if number == needle:
            return number
        time.sleep(STEP_SECONDS)
    return None


@supervised_flow
def find(needle: int) -> int | None:
    """Search three shards at once, and give up the others when one has found it."""
    children = [
        supervisor.spawn(search, {"start": start, "needle": needle}, name=f"search-{start}")
        for start in range(0, 3 * SHARD, SHARD)
    ]
    found = next(child.result() for child in as_completed(children))
    for child in children:
        child.cancel("another shard has it")
    for child in children:
        child.wait()
        print(f"{child.name}: {child.outcome}")
    return found


if __name__ == "__main__":
    print("found:", find(SHARD + 100))
