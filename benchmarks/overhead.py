"""What a supervised flow costs that launches nothing, and what one inline child costs.

`python benchmarks/overhead.py [--flows 40]`. Flows are run in turns, plain and supervised, against
one server, so that both see the same machine; the import is timed in processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from meter import metered
from prefect import flow
from stage import only_server, parser

from supervised import supervised_flow, supervisor

IMPORT = "import time, sys; t = time.perf_counter(); {0}; print(time.perf_counter() - t)"
IMPORTS = ("from prefect import flow", "from prefect import flow; import supervised")


def main() -> int:
    options = arguments()
    rows: list[dict[str, Any]] = []
    for name in IMPORTS * 15:
        row = {"figure": "import", "contender": name, "seconds": import_seconds(name)}
        rows.append({"database": None, **row})
    for database in options.databases:
        with only_server(database):
            for _ in range(3):  # the first ones open connections
                plain()
                ours()
            for _ in range(options.flows):
                rows += [{"database": database, **row} for row in compare_flows()]
            rows += [{"database": database, **row} for row in compare_children(options.flows)]
    json.dump(rows, sys.stdout, indent=2)
    show(rows)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--flows", type=int, default=40)
    return made.parse_args()


def import_seconds(statement: str) -> float:
    """Import in a process of its own."""
    code = IMPORT.format(statement)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


@flow
def plain() -> int:
    """Do nothing."""
    return threading.active_count()


@supervised_flow
def ours() -> int:
    """Do nothing, and be ready for more."""
    return threading.active_count()


def compare_flows() -> list[dict[str, Any]]:
    rows = []
    for name, each in (("plain Prefect", plain), ("supervised", ours)):
        with metered() as meter:
            threads = each()
        row = {"seconds": meter.seconds, "requests": meter.requests.total(), "threads": threads}
        rows.append({"figure": "no spawn", "contender": name, **row})
    return rows


@flow
async def started() -> float:
    """Tell when the body begins."""
    return time.perf_counter()


def compare_children(count: int) -> list[dict[str, Any]]:
    """From the call, or the spawn, until the child's body begins: in turns, in one parent."""

    @supervised_flow
    async def parent() -> list[dict[str, Any]]:
        await started()
        await supervisor.spawn(started, key="first")
        rows = []
        for number in range(count):
            began = time.perf_counter()
            direct = await started() - began
            began = time.perf_counter()
            spawned = await supervisor.spawn(started, key=str(number)) - began
            rows += [
                {"figure": "inline", "contender": "plain Prefect", "seconds": direct},
                {"figure": "inline", "contender": "supervised", "seconds": spawned},
            ]
        return rows

    return asyncio.run(parent())


def show(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = (row["database"], row["figure"], row["contender"])
        groups.setdefault(key, []).append(row["seconds"])
    for key, values in groups.items():
        sys.stderr.write(f"{key}: {statistics.median(values):.4f} s\n")


if __name__ == "__main__":
    sys.exit(main())
