"""What a child costs in trees of 10 to 10,000: `python benchmarks/growth.py`.

CPU time of this process, on a simulated server, so that only the code of supervision and of the
simulation counts: launching the children, hearing of their ends, and cancelling as many. Without
Python's garbage collector, and with it: that looks through all objects now and then, and most of
them are the simulated server's. Memory is what is left when that has forgotten its runs, while the
children live and when they have ended in one of three ways; for that its answers are parsed from
JSON, as those of a real one are, and every child that completes persists a result.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import logging
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from meter import in_a_process_of_its_own
from prefect.client.schemas.objects import FlowRun, State
from prefect.results import ResultRecordMetadata
from prefect.states import Cancelled, Completed, Failed, Pending, Running

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect
from supervised.testing._client import FakeOrchestrator
from supervised.testing._fake import FakeRun

LONG = 10**6


def main() -> int:
    options = arguments()
    logging.disable(logging.CRITICAL)
    grow(10, cancel=False)  # imports, caches
    rows = []
    for children, cancel in itertools.product(options.children, (False, True)):
        for collector in (False, True):
            gc.enable() if collector else gc.disable()
            for _ in range(options.repetitions):
                row = {"children": children, "collector": collector}
                rows.append({**row, **grow(children, cancel=cancel)})
                sys.stderr.write(f"{rows[-1]}\n")
    for of in ENDS:
        weight = in_a_process_of_its_own(weigh, of, options.memory)
        rows.append({"memory": options.memory, "of": of, "bytes": weight})
        sys.stderr.write(f"{rows[-1]}\n")
    json.dump(rows, sys.stdout, indent=2)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, nargs="*", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", type=int, default=5_000, help="children in the tree weighed")
    return parser.parse_args()


@supervised_flow(on_child_failure="ignore")
async def parent(children: int) -> None:
    """Launch children and keep no handle."""
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    await asyncio.sleep(LONG)


def grow(children: int, *, cancel: bool) -> dict[str, float]:
    """Play one tree; return the seconds of CPU a child."""
    with tree(children) as (prefect, root, others, started):
        began = time.process_time()
        launch = began - started
        if cancel:
            root.cancel()
            prefect.until(lambda: not root.is_alive, within=LONG)
        else:
            end(prefect, others, "finished")
        ended = time.process_time() - began
    return {"launch": launch / children, "cancel" if cancel else "finish": ended / children}


def weigh(of: str, children: int) -> int:
    """Weigh the children of one tree when the simulated server has forgotten its runs."""
    logging.disable(logging.CRITICAL)
    grow(10, cancel=False)
    answer_in_json()
    tracemalloc.start(1)
    before = traced()
    with tree(children) as (prefect, _, others, _):
        end(prefect, others, of)
        forget(prefect, others)
        others.clear()
        return round((traced() - before) / children)


@contextmanager
def tree(children: int) -> Iterator[tuple[FakePrefect, FakeRun, list[UUID], float]]:
    """Launch a parent with its children, whom nobody serves; the CPU time says since when."""
    with FakePrefect() as prefect:
        prefect.deploy("root/test", parent, runner="root")
        prefect.deploy("score/gpu", runner="nobody")
        prefect.runners["nobody"].kill()
        started = time.process_time()
        root = prefect.start("root/test", {"children": children})
        prefect.until(lambda: len(prefect.server.runs) == children + 1, within=LONG)
        prefect.advance(1)
        others = [run_id for run_id in prefect.server.runs if run_id != root.id]
        yield prefect, root, others, started


def end(prefect: FakePrefect, runs: list[UUID], how: str) -> None:
    """Set runs to what they go through, and have their parent hear of it."""
    for run_id in runs:
        for state in ENDS[how](run_id):
            prefect.server.propose(run_id, state)
    prefect.advance(30)


ENDS: dict[str, Callable[[UUID], list[State]]] = {
    "live": lambda _: [Pending(), Running()],
    "finished": lambda run_id: [Pending(), Running(), Completed(data=result(run_id))],
    "failed": lambda run_id: [Pending(), Running(), Failed(message=f"part {run_id} is bad")],
    "cancelled": lambda _: [Cancelled(message="Cancelled by hand.")],
}


def result(run_id: UUID) -> ResultRecordMetadata:
    """Return what a state says of a persisted result."""
    return ResultRecordMetadata(
        storage_key=f"/home/somebody/.prefect/storage/{run_id.hex}",
        expiration=None,
        serializer={"type": "pickle", "picklelib": "cloudpickle"},
    )


def answer_in_json() -> None:
    """Have the simulated server's answers parsed."""
    create, read = FakeOrchestrator.create_deployment_run, FakeOrchestrator.read_runs

    async def parsed_create(self: FakeOrchestrator, *given: Any) -> FlowRun | None:
        run = await create(self, *given)
        return run and parsed(run)

    async def parsed_read(self: FakeOrchestrator, *given: Any) -> list[FlowRun]:
        return [parsed(run) for run in await read(self, *given)]

    FakeOrchestrator.create_deployment_run = parsed_create
    FakeOrchestrator.read_runs = parsed_read


def parsed(run: FlowRun) -> FlowRun:
    return FlowRun.model_validate_json(run.model_dump_json())


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def forget(prefect: FakePrefect, runs: list[Any]) -> None:
    """Have the simulated server forget what it knows of runs."""
    gone = set(runs)
    for known in vars(prefect.server).values():
        if isinstance(known, dict) and len(known) >= len(runs):
            others = {key: value for key, value in known.items() if key not in gone}
            known.clear()  # or the table would keep its size
            known.update(others if len(others) < len(gone) else {})


if __name__ == "__main__":
    sys.exit(main())
