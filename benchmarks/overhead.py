"""What a supervised flow costs that launches nothing, and what one inline child costs.

`python benchmarks/overhead.py [--flows 120]`. Flows are run in turns, plain and supervised, against
one server, so that both see the same machine; the import is timed in processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Iterator
from typing import Any
from unittest import mock

from meter import in_a_process_of_its_own, metered
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from prefect import flow
from stage import only_server, parser

from supervised import supervised_flow, supervisor
from supervised._telemetry import ChildSpan, SupervisorSpan

IMPORT = "from time import perf_counter as now; t = [now()]; {}; print([at - t[0] for at in t])"
IMPORTS = {  # as one imports a package, and as one imports what a flow is made with
    "import prefect": "import supervised",
    "from prefect import flow": "from supervised import supervised_flow",
}
SPANS = 2_000


def main() -> int:
    options = arguments()
    rows: list[dict[str, Any]] = []
    for has_sdk in (False, True):
        seconds = in_a_process_of_its_own(spans, has_sdk)
        for name, each in seconds.items():
            row = {"figure": "span", "sdk": has_sdk, "contender": name, "seconds": each}
            rows.append({"database": None, **row})
    rows += [{"database": None, "figure": "import", **row} for row in imports(15)]
    for database in options.databases:
        with only_server(database):
            for _ in range(3):  # the first ones open connections
                plain()
                ours()
            for number in range(options.flows):
                rows += [{"database": database, **row} for row in compare_flows(number)]
            rows += [{"database": database, **row} for row in compare_children(options.flows)]
    json.dump(rows, sys.stdout, indent=2)
    show(rows)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--flows", type=int, default=120)
    return made.parse_args()


def imports(repetitions: int) -> Iterator[dict[str, Any]]:
    """Yield how long Prefect takes to import by itself, and then with ours."""
    with bytecode():
        for number in range(repetitions + 1):
            for prefect, ours in IMPORTS.items():
                (alone,), both = import_seconds(prefect), import_seconds(prefect, ours)
                if number:  # the first ones compile
                    yield {"contender": prefect, "seconds": alone}
                    name = f"{prefect}; {ours}"
                    yield {"contender": name, "seconds": both[1], "ours": both[1] - both[0]}


@contextlib.contextmanager
def bytecode() -> Iterator[None]:
    """Have processes keep what they compile, as an installed package is."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield


def import_seconds(*statements: str) -> list[float]:
    """Return the seconds after each statement, in a process of its own."""
    code = IMPORT.format("; ".join(f"{each}; t.append(now())" for each in statements))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout))[1:]


def spans(has_sdk: bool) -> dict[str, float]:
    """Return the seconds of a bare span and of a child's, from its start to its end."""
    if has_sdk:
        trace.set_tracer_provider(TracerProvider())
    tracer = trace.get_tracer("bench")
    scope = SupervisorSpan(
        flow_name="bench",
        flow_run_id="1",
        function="bench",
        on_child_failure="ignore",
        grace_seconds=20,
        context=Context(),
        start_ns=time.time_ns(),
    )

    def bare() -> None:
        span = tracer.start_span("child", attributes={"name": "child"})
        span.add_event("running")
        span.end()

    def ours() -> None:
        span = ChildSpan(
            scope,
            name="child",
            kind="deployment",
            flow_name="score",
            deployment_name="score/gpu",
            generation=0,
            detached=False,
            start_ns=time.time_ns(),
        )
        span.created("1")
        span.running()
        span.end("completed", state=None, exception=None, end_ns=time.time_ns())

    contenders = {
        "a bare span with one event": bare,
        "a child's, with its events and metrics": ours,
    }
    return {name: timeit.timeit(make, number=SPANS) / SPANS for name, make in contenders.items()}


@flow
def plain() -> int:
    """Do nothing."""
    return threading.active_count()


@supervised_flow
def ours() -> int:
    """Do nothing, and be ready for more."""
    return threading.active_count()


def compare_flows(number: int) -> list[dict[str, Any]]:
    """Run one of each; who goes first changes every time."""
    rows = []
    both = [("plain Prefect", plain), ("supervised", ours)]
    for name, each in both if number % 2 else reversed(both):
        with metered() as meter:
            threads = each()
        row = {"seconds": meter.seconds, "requests": meter.requests.total(), "threads": threads}
        rows.append({"figure": "no spawn", "contender": name, **row})
    return rows


@flow
async def started() -> float:
    """Tell when the body begins."""
    return time.perf_counter()


async def spawned(number: int) -> float:
    return await supervisor.spawn(started, key=str(number))


def compare_children(count: int) -> list[dict[str, Any]]:
    """From the call, or the spawn, until the child's body begins: in turns, in one parent."""

    @supervised_flow
    async def parent() -> list[dict[str, Any]]:
        await started()
        await supervisor.spawn(started, key="first")
        rows = []
        for number in range(count):
            both = [("plain Prefect", started), ("supervised", functools.partial(spawned, number))]
            for name, begin in both if number % 2 else reversed(both):
                began = time.perf_counter()
                seconds = await begin() - began
                rows.append({"figure": "inline", "contender": name, "seconds": seconds})
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
