"""What a child costs the garbage collector, and what is not read of one that tells itself."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow

from supervised import supervised_flow, supervisor
from supervised.testing import FakePrefect, Faults
from supervised.testing._client import FakeOrchestrator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import growth
from meter import in_a_process_of_its_own

CHILDREN = 200
tracked = {}


@supervised_flow(on_child_failure="ignore")
async def launching(children: int) -> None:
    before = len(gc.get_objects())
    for part in range(children):
        supervisor.spawn("score/gpu", {"part": part})
    tracked["spawned"] = (len(gc.get_objects()) - before) / children
    await asyncio.sleep(1_000)


def launch(prefect, children):
    prefect.deploy("root/test", launching, runner="root")
    prefect.deploy("score/gpu", runner="nobody")
    prefect.runners["nobody"].kill()
    prefect.start("root/test", {"children": children})
    prefect.until(lambda: len(prefect.server.runs) == children + 1)
    prefect.advance(1)


def weigh():
    """Return how many objects a child leaves: at its spawn, when it has a run, and in cycles."""
    gc.disable()
    with FakePrefect() as prefect:
        launch(prefect, 10)  # imports, caches
    gc.collect()
    with FakePrefect() as prefect:
        before = len(gc.get_objects())
        launch(prefect, CHILDREN)
        alive = (len(gc.get_objects()) - before) / CHILDREN
        return {**tracked, "alive": alive, "in cycles": gc.collect() / CHILDREN}


def test_a_launch_leaves_no_cycles_to_the_collector():
    # In a process of its own: what another test has left may become garbage at any time.
    done = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["spawned"] < 35  # 45 with a future for each
    assert found["alive"] < 65  # the simulated server's among them; 126 with the cycles
    assert found["in cycles"] < 15  # 75 with retries that nothing needed


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "of", "most"), [("live", 500, 10 * 1024), ("finished", 2000, 1024)]
)
def test_a_child_takes_ten_kibibytes_while_it_lives_and_one_when_it_is_over(how, of, most):
    # Of so many; what the scope takes by itself is a part of it.
    assert in_a_process_of_its_own(growth.weigh, how, of) <= most


@flow
async def quick() -> int:
    return 1


@supervised_flow
async def inline() -> None:
    await supervisor.spawn(quick, key="quick")
    await asyncio.sleep(60)


def test_an_inline_child_that_is_over_is_not_read_again(monkeypatch):
    read, asked = FakeOrchestrator.read_runs, []

    async def noted(self, run_ids):
        asked.extend(run_ids := list(run_ids))
        return await read(self, run_ids)

    monkeypatch.setattr(FakeOrchestrator, "read_runs", noted)
    with FakePrefect(faults=Faults(dropped_events=1.0)) as prefect:
        prefect.deploy("root/test", inline, runner="root")
        root = prefect.start("root/test")
        prefect.until(lambda: [run for run in prefect.server.runs.values() if over(run)])
        (child,) = (run.id for run in prefect.server.runs.values() if over(run))
        prefect.advance(1)
        asked.clear()
        prefect.advance(30)
        assert root.id in asked
        assert child not in asked


def over(run):
    return run.state is not None and run.state.is_completed()


if __name__ == "__main__":
    print(json.dumps(weigh()))
