"""How long a tree outlives a parent that was killed: `python benchmarks/lost.py [--repetitions 5]`.

Everything by default: no option of the decorator, none of the guard. Prints, for each case, the
seconds until the last process that has to end is gone; exits non-zero if one is left after two
minutes, or if what cannot be proven gone is not named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from prefect.client.schemas.objects import FlowRun
from stage import Stage, console, open_stage, spread
from support.world import World, eventually

BOUND = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    with open_stage() as stage:
        for case in options.cases:
            times = []
            for _ in range(options.repetitions):
                times.append(round(CASES[case](stage), 1))
                console.print(f"{case}: {times[-1]} s", style="dim")
            console.print(f"{case}: {spread(times)}, all {times}", soft_wrap=True)
    return 0


def parent_killed(stage: Stage) -> float:
    world = stage.world()
    root = started(world, "root/test", ["leaf/test"] * 4, 5)
    return seconds_until(world, kill(world, root), lambda: not world.alive())


def host_lost_supervised(stage: Stage) -> float:
    world = stage.world()
    with lost_with_its_runner(stage, world, ["mid/test"] * 2, 9) as killed:
        return seconds_until(world, killed, lambda: not world.alive())


def host_lost_plain_with_guard(stage: Stage) -> float:
    world = stage.world()
    with (
        stage.guard(),
        lost_with_its_runner(stage, world, ["mid-plain/test", "leaf/test"], 5) as killed,
    ):
        return seconds_until(world, killed, lambda: not world.alive())


def all_runners_lost(stage: Stage) -> float:
    """The supervised child ends itself and its leaves; the plain one is named by the guard."""
    world = stage.world()
    third = stage.serve("third")
    with (
        stage.guard() as log,
        lost_with_its_runner(stage, world, ["mid/third", "leaf/third"], 6, third.kill) as killed,
    ):
        below = world.tree(killed.id)[1:3]
        (plain,) = [run for run in below if "part" in run.parameters]
        try:
            return seconds_until(
                world,
                killed,
                lambda: (
                    set(world.alive()) == {str(plain.id)}
                    and "unverified" in log.read_text()
                    and plain.name in log.read_text()
                ),
            )
        finally:
            world.end_all()


CASES: dict[str, Callable[[Stage], float]] = {
    "parent killed, 4 leaves": parent_killed,
    "parent and runner killed, 2 supervised children of 3 leaves": host_lost_supervised,
    "parent and runner killed, plain children, a guard": host_lost_plain_with_guard,
    "all runners killed, a supervised and a plain child, a guard": all_runners_lost,
}


@contextlib.contextmanager
def lost_with_its_runner(
    stage: Stage,
    world: World,
    children: list[str],
    processes: int,
    kill_more: Callable[[], None] = lambda: None,
) -> Iterator[FlowRun]:
    """Start a tree whose root has a runner of its own, and kill both."""
    runner = stage.serve("second")
    root = started(world, "root/second", children, processes)
    runner.kill()
    kill_more()
    yield kill(world, root)


def started(world: World, deployment: str, children: list[str], processes: int) -> FlowRun:
    root = world.start(deployment, children=children)
    world.wait_for_start(processes, seconds=180)
    time.sleep(1)  # past the start-up of the last leaf
    return root


def kill(world: World, root: FlowRun) -> FlowRun:
    os.kill(world.pids()[str(root.id)], signal.SIGKILL)
    return root


def seconds_until(world: World, root: FlowRun, condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    try:
        eventually(condition, seconds=BOUND, what=f"what {root.name} left behind is gone")
    except AssertionError:
        console.print(world.states(root.id), world.alive())
        raise
    return time.monotonic() - began


if __name__ == "__main__":
    raise SystemExit(main())
