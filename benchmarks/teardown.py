"""How long a tree outlives its parent: `python benchmarks/teardown.py [--repetitions 10]`.

Starts a throw-away server and one `serve` runner, ends a parent in each of the ways that matter,
and measures from outside when the last process below the parent is gone, when the parent's own is
too, and when the last run is terminal. Prints a table, and JSON with `--json`; exits non-zero if
anything is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
from uuid import UUID

import prefect
import psutil
from rich.table import Table
from stage import console, open_stage, spread
from support.world import World

LEAVES = ["leaf/test"] * 4
MIDS = ["mid/test"] * 2
CASES = {
    "4 leaves": ("root", LEAVES, 5),
    "2 mids of 3 leaves": ("root", MIDS, 9),
}
ENDINGS = ("cancelled", "failed", "timed out", "SIGTERM")


def main() -> int:
    options = arguments()
    rows = []
    with open_stage() as stage:
        for tree in options.trees:
            root, children, processes = CASES[tree]
            for ending in options.endings:
                times = []
                for repetition in range(options.repetitions):
                    times.append(measure(stage.world(), root, children, processes, ending))
                    console.print(f"{tree}, {ending}, {repetition + 1}: {times[-1]}", style="dim")
                rows.append({"tree": tree, "ending": ending, "times": times})
        left = left_over(stage.client)
    report = {
        "prefect": prefect.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "left_over": left,
        "rows": rows,
    }
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    show(report)
    return 1 if left else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--trees", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--endings", nargs="*", default=ENDINGS, choices=ENDINGS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(
    world: World, root: str, children: list[str], processes: int, ending: str
) -> dict[str, float]:
    """End one tree; return seconds until its processes are gone and its last run is terminal."""
    name = f"{root}-timeout/test" if ending == "timed out" else f"{root}/test"
    run = world.start(name, children=children)
    world.wait_for_start(processes, seconds=180)
    began = end_it(world, run.id, ending)
    gone: dict[str, float] = {}
    while len(gone) < 2 or not world.is_over(run.id):
        alive = world.alive()
        seconds = round(time.monotonic() - began, 2)
        if not alive.keys() - {str(run.id)}:
            gone.setdefault("children", seconds)
        if not alive:
            gone.setdefault("processes", seconds)
        if time.monotonic() - began > 120:
            raise SystemExit(f"still alive: {world.alive()}, {world.states(run.id)}")
        # Watching costs the two cores that the processes need to end with.
        time.sleep(0.1)
    over = max(run.state.timestamp.timestamp() for run in world.tree(run.id)) - time.time()
    return {**gone, "runs": round(over + time.monotonic() - began, 2)}


def end_it(world: World, run_id: UUID, ending: str) -> float:
    if ending == "timed out":
        # The clock starts when the flow's own does: the deadline is 25 s after its start.
        start = world.run(run_id).start_time
        return time.monotonic() + (start.timestamp() + 25 - time.time())
    time.sleep(1)  # past the start-up of the last leaf
    began = time.monotonic()
    if ending == "cancelled":
        world.cancel(run_id)
    elif ending == "failed":
        world.tell("raise")
    else:
        os.kill(world.pids()[str(run_id)], signal.SIGTERM)
    return began


def left_over(client) -> list[str]:
    runs = client.read_flow_runs()
    names = [f"run {run.name} {run.state_name}" for run in runs if not run.state.is_final()]
    ours = [p for p in psutil.process_iter() if is_engine(p)]
    return names + [f"process {process.pid}" for process in ours]


def is_engine(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        parents = process.parents()
        mine = any(parent.pid == os.getpid() for parent in parents)
        return mine and "prefect.engine" in " ".join(process.cmdline())
    return False


def show(report: dict) -> None:
    table = Table(title=f"Prefect {report['prefect']}, Python {report['python']}")
    columns = {
        "children": "children's processes gone (s)",
        "processes": "the parent's too (s)",
        "runs": "runs terminal (s)",
    }
    for heading in ("tree", "ending", *columns.values()):
        table.add_column(heading)
    for row in report["rows"]:
        cells = [spread([each[what] for each in row["times"]]) for what in columns]
        table.add_row(row["tree"], row["ending"], *cells)
    console.print(table)
    console.print(f"left over: {report['left_over'] or 'nothing'}")


if __name__ == "__main__":
    raise SystemExit(main())
