"""Signals that another task swallows: `python benchmarks/signals.py [--repetitions 20]`.

Starts a throw-away server and a runner, and again and again an async parent whose loop a background
task keeps busy, with three children. Sends it SIGTERM, and prints the seconds until the last
process of its tree is gone. Exits non-zero if one is left a minute later.
"""

from __future__ import annotations

import argparse
import sys
import time

from stage import TESTS, Stage, console, open_stage, spread
from support.world import eventually

from supervised.testing import running

BOUND = 60.0
PROCESSES = 3  # the parent, and two deployed children; the third runs inline


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    times = []
    with open_stage() as stage:
        for repetition in range(options.repetitions):
            times.append(measure(stage))
            console.print(f"{repetition + 1}: {times[-1]:.1f} s", style="dim")
    console.print(f"{len(times)} signals; seconds until all processes were gone: {spread(times)}")
    return 0


def measure(stage: Stage) -> float:
    """Start one tree, send its parent SIGTERM, and return how long the tree took to be gone."""
    world = stage.world()
    command = [sys.executable, "alone.py", "crowded", str(world.folder)]
    log = world.folder / "alone.log"
    with running(command, env=stage.server.env, log=log, cwd=TESTS / "flows") as process:
        world.wait_for_start(PROCESSES)
        time.sleep(1)  # past the start-up of the last child
        began = time.monotonic()
        process.terminate()
        eventually(lambda: not world.alive(), seconds=BOUND, what="all processes are gone")
        return time.monotonic() - began


if __name__ == "__main__":
    raise SystemExit(main())
