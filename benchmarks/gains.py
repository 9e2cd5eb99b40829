"""What each part gains, by doing without it: `python benchmarks/gains.py [--children 200]`.

Each row is one figure, as it is and with one part switched off, in turns and on servers that are
new every time. What replaced something else, and so cannot be switched off, is not here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock
from uuid import UUID

import attrs
import growth
import launch
import sweep
from meter import in_a_process_of_its_own
from overhead import bytecode, import_seconds
from stage import deploy_child, only_server, parser

from supervised import _batch, _bulk, _child, _writers
from supervised._api import PrefectOrchestrator
from supervised._bulk import BulkCreation
from supervised._finished import Finished
from supervised._pace import Pace
from supervised._schema import ParameterSchema

Switch = Callable[[], contextlib.AbstractContextManager[Any]]
LAZY = "from supervised import supervised_flow"
EAGER = f"{LAZY}, Supervisor"


@attrs.frozen
class Part:
    """One part that can be done without.

    Args:
        what: What it is.
        figure: What is measured.
        off: Switches it off.
    """

    what: str
    figure: str
    off: Switch


# -- how to do without ----------------------------------------------------------------------------


async def _track_one_by_one(
    self: BulkCreation, deployment: Any, requests: Sequence[Any]
) -> set[UUID]:
    """Create tracking task runs by a request each, as `run_deployment` does."""
    task = self._tracking_task(deployment)
    for request in requests:
        await self._client.create_task_run(
            task=task,
            flow_run_id=request.parent_run_id,
            dynamic_key=request.tracking_key,
            id=request.tracking_id,
            state=_bulk.Pending(),
        )
    return {request.tracking_id for request in requests}


def _one_by_one() -> contextlib.AbstractContextManager[Any]:
    """Cancel by a request a run."""
    begin = PrefectOrchestrator.__init__

    def begin_without_bulk(self: PrefectOrchestrator, *given: Any) -> None:
        begin(self, *given)
        self._bulk = False

    return mock.patch.object(PrefectOrchestrator, "__init__", begin_without_bulk)


PARTS = [
    Part("runs created in bulk", "launch", lambda: mock.patch.object(_bulk, "_FEW", 10**9)),
    Part(
        "tracking task runs recorded from events",
        "launch",
        lambda: mock.patch.object(BulkCreation, "_track", _track_one_by_one),
    ),
    Part(
        "parameters that fit are not checked by the server",
        "launch",
        lambda: mock.patch.object(ParameterSchema, "fits", return_value=False),
    ),
    Part("two batches overlap", "launch", lambda: mock.patch.object(_batch, "_AT_ONCE", 1)),
    Part(
        "two creations at a time, where that is quicker",
        "launch of many",
        lambda: mock.patch.object(_writers, "_WIDE", 1),
    ),
    Part("runs cancelled in bulk", "cancel", _one_by_one),
    Part(
        "several requests at a time, where that is quicker",
        "cancel",
        lambda: mock.patch.object(Pace, "note", return_value=None),
    ),
    Part(
        "of a child that is over only the receipt is kept",
        "finished",
        lambda: mock.patch.object(Finished, "of", return_value=None),
    ),
    Part(
        "runs and states share what they have in common",
        "live",
        lambda: mock.patch.object(_child, "lean", lambda model: model),
    ),
]


# -- what is measured -----------------------------------------------------------------------------


def main() -> int:
    options = arguments()
    rows = []
    for row in measure(options):
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--children", type=int, default=200)
    made.add_argument("--repetitions", type=int, default=2)
    return made.parse_args()


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row a part, and a database where there is one."""
    for database in options.databases:
        for part in PARTS:
            if part.figure in SECONDS:
                yield time_one(database, part, options)
    for part in PARTS:
        if part.figure in BYTES:
            yield weigh_one(part, options)
    with bytecode():
        import_seconds(EAGER)  # which compiles
        values = [[import_seconds(code)[0] for _ in range(9)] for code in (LAZY, EAGER)]
    yield row("modules imported when they are first used", "import", "s", values)


def time_one(database: str, part: Part, options: argparse.Namespace) -> dict[str, Any]:
    with_it, without = [], []
    for _ in range(options.repetitions):
        with_it.append(on_a_server(database, part.figure, options.children, contextlib.nullcontext))
        without.append(on_a_server(database, part.figure, options.children, part.off))
    return row(part.what, part.figure, "s", (with_it, without), database)


def weigh_one(part: Part, options: argparse.Namespace) -> dict[str, Any]:
    children = options.children * 10
    values = [
        [in_a_process_of_its_own(weigh, part.what, children, is_off)] for is_off in (False, True)
    ]
    return row(part.what, part.figure, "bytes a child", values)


def row(
    what: str, figure: str, unit: str, values: Sequence[list[float]], database: str | None = None
) -> dict[str, Any]:
    told = {"database": database, "part": what, "figure": figure, "unit": unit}
    return {**told, "with": values[0], "without": values[1]}


def on_a_server(database: str, figure: str, children: int, switch: Switch) -> float:
    of, times = SECONDS[figure]
    with only_server(database), switch():
        asyncio.run(deploy_child())
        return asyncio.run(of(children * times))


async def launching(children: int) -> float:
    _, meter = await launch.ours(children)
    return round(meter.seconds, 2)


async def cancelling(children: int) -> float:
    return round((await sweep.ours(children))["seconds"], 2)


# What is measured, and of how many times as many children: the pace is found out on the way.
SECONDS = {"launch": (launching, 1), "launch of many": (launching, 3), "cancel": (cancelling, 2)}
BYTES = {"live", "finished"}  # of benchmarks/growth.py


def weigh(what: str, children: int, is_off: bool) -> int:
    """Return the bytes that a child takes in the parent."""
    part = next(each for each in PARTS if each.what == what)
    with part.off() if is_off else contextlib.nullcontext():
        return growth.weigh(part.figure, children)


if __name__ == "__main__":
    sys.exit(main())
