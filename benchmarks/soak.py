"""Random kills, one after another: `python benchmarks/soak.py [--kills 200] [--seed 1]`.

Starts a throw-away server, a runner for the roots, one for everything else, and a guard. Then it
starts trees of three levels, and sends SIGKILL to a random process of each, or to the roots and
their runner. A kill is survived if nothing that had to end is left a minute later. Prints the
seconds that each took, and exits non-zero if there was an orphan.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time

import psutil
from prefect.client.schemas.objects import FlowRun
from stage import Stage, console, open_stage, spread
from support.world import World, eventually

BOUND = 60.0
TREES = 4
SUPERVISED = ["mid/test"]
PLAIN = ["mid-plain/test", "leaf/test"]
PROCESSES = 5  # of either tree: the mid has three leaves, the plain one two


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    times: list[float] = []
    with open_stage() as stage, stage.guard():
        runner = stage.serve("second")
        while len(times) < options.kills:
            if not is_alive(runner):
                runner = stage.serve("second")
            times += kill_some(stage, runner, dice)
            console.print(f"{len(times)} kills, {times[-TREES:]} s", style="dim")
    console.print(f"{len(times)} kills, no orphan; seconds until all was over: {spread(times)}")
    return 0


def is_alive(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE


def kill_some(stage: Stage, runner: psutil.Process, dice: random.Random) -> list[float]:
    """Start some trees, kill one process of each, and return how long each took to be over.

    Raises:
        AssertionError: If something is left.
    """
    worlds = []
    for _ in range(TREES):
        world = stage.world()
        children = dice.choice([SUPERVISED, PLAIN])
        worlds.append((world, world.start("root/second", children=children)))
    for world, _ in worlds:
        world.wait_for_start(PROCESSES, seconds=180)
    with_runner = dice.random() < 0.3
    if with_runner:
        runner.kill()
    began = time.monotonic()
    times = []
    for world, root in worlds:
        kill_one(world, root, dice, the_root=with_runner)
    for world, root in worlds:
        eventually(lambda: over(world, root), seconds=BOUND, what=f"{root.name} is over")  # noqa: B023
        times.append(round(time.monotonic() - began, 1))
    return times


def kill_one(world: World, root: FlowRun, dice: random.Random, *, the_root: bool) -> None:
    """Kill a process whose end is the end of its tree: `mid_plain` goes on without its leaves."""
    tree = [root] if the_root else world.tree(root.id)
    if root.parameters["children"] != SUPERVISED:
        tree = tree[: 1 + len(PLAIN)]
    os.kill(world.pids()[str(dice.choice(tree).id)], signal.SIGKILL)


def over(world: World, root: FlowRun) -> bool:
    """Whether nothing is left of a tree but a root whose state nobody could write."""
    return not world.alive() and all(
        run.state is not None and run.state.is_final() for run in world.tree(root.id)[1:]
    )


if __name__ == "__main__":
    raise SystemExit(main())
