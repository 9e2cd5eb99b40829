"""How long a cancelled parent's tree lives on: `python benchmarks/cascade.py [--repetitions 3]`.

A root is set to `Cancelling`, as Prefect's UI does, once every process of its tree runs. Measured
from then until the last process below the root is gone, until the root's own is too, and until the
last run is terminal. The floor is one bulk request that sets every run of a plain tree to
`Cancelling` in the same instant. The contenders take turns, in an order that changes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from stage import HERE, only_server, parser, served
from support.world import World

SHAPES = {
    "8 leaves": [8],
    "3 levels, 13 runs": [3, 3],
    "1 level": [1],
    "2 levels": [1, 1],
    "3 levels": [1, 1, 1],
}
CHAINS = ("1 level", "2 levels", "3 levels")  # for the recipe, whose time grows with each level
CONTENDERS = {"plain Prefect": "plain", "recipe": "recipe", "supervised": "supervised"}
CONTENDERS["floor"] = "plain"
PATIENCE_SECONDS = 600.0


def main() -> int:
    options = arguments()
    rows = []
    for database in options.databases:
        server = only_server(database, cascades=True)
        with server as started, served(started, HERE / "trees.py") as stage:
            for shape in options.shapes:
                for repetition in range(options.repetitions):
                    for contender in random.sample(options.contenders, len(options.contenders)):
                        if contender == "plain Prefect" and shape in CHAINS:
                            continue
                        if repetition and (contender, database) == ("plain Prefect", "sqlite"):
                            continue  # minutes a tree
                        seconds = measure(stage.world(), contender, SHAPES[shape])
                        row = {"database": database, "shape": shape, "contender": contender}
                        rows.append({**row, **seconds})
                        sys.stderr.write(f"{rows[-1]}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__, repetitions=3)
    made.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    made.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    return made.parse_args()


def measure(world: World, contender: str, widths: list[int]) -> dict[str, float]:
    """Cancel one tree; return the seconds that it took."""
    root = world.start(f"{CONTENDERS[contender]}/bench", widths=widths)
    world.wait_for_start(count(widths), seconds=300)
    everything = [run.id for run in world.tree(root.id)]
    began = time.monotonic()
    if contender == "floor":
        cancel_at_once(world.client, everything)
    else:
        world.cancel(root.id)
    seconds: dict[str, float] = {}
    while time.monotonic() - began < PATIENCE_SECONDS:
        alive = set(world.alive())
        now = round(time.monotonic() - began, 2)
        if not alive - {str(root.id)}:
            seconds.setdefault("children gone", now)
        if not alive:
            seconds.setdefault("all gone", now)
            if world.is_over(root.id):
                seconds["terminal"] = round(time.monotonic() - began, 2)
                return seconds
        time.sleep(0.05 if alive else 0.2)  # looking takes CPU from the processes that end
    world.end_all()
    return {**seconds, "given up": PATIENCE_SECONDS}


def count(widths: list[int]) -> int:
    """Return how many processes a tree has."""
    total = level = 1
    for width in widths:
        level *= width
        total += level
    return total


def cancel_at_once(client: SyncPrefectClient, ids: list[UUID]) -> None:
    body = {
        "flow_runs": {"id": {"any_": [str(run_id) for run_id in ids]}},
        "state": {"type": "CANCELLING", "name": "Cancelling"},
    }
    client.request("POST", "/flow_runs/bulk_set_state", json=body)


if __name__ == "__main__":
    sys.exit(main())
