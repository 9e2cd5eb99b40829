"""Events that are dropped, late, told twice or cut off cost time, and change no outcome."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from prefect import flow

from supervised import Restart, supervised_flow, supervisor
from supervised.testing import FakePrefect, Faults

CHILDREN = 20
FAULTS = {
    "dropped": Faults(dropped_events=1.0),
    "late": Faults(event_seconds=60.0),
    "told twice": Faults(repeated_events=1.0),
    "in any order, twice or never": Faults(
        dropped_events=0.3, repeated_events=0.7, event_seconds=30.0
    ),
    "cut off": Faults(closed_streams=0.2),
}
attempts: Counter[int] = Counter()


@flow(persist_result=True)
async def square(part: int) -> int:
    """Return the square, a moment later for each."""
    await asyncio.sleep(part % 7)
    return part * part


@flow(persist_result=True)
async def flaky(part: int) -> int:
    """Fail twice, and return the square the third time."""
    attempts[part] += 1
    await asyncio.sleep(part % 7)
    if attempts[part] <= 2:
        raise ValueError(f"part {part} is bad")
    return part * part


@supervised_flow(persist_result=True)
async def of_squares() -> tuple[list[int], list[int], list[str]]:
    """Wait for children in two ways; return what they have returned, and how they have ended."""
    children = supervisor.map("square/test", [{"part": part} for part in range(CHILDREN)])
    came = [await child async for child in supervisor.as_completed(children)]
    results = await supervisor.gather(*children)
    return results, came, [str(child.outcome) for child in children]


@supervised_flow(persist_result=True)
async def of_flaky() -> list[int]:
    """Wait for children that have to be restarted twice."""
    again = Restart(max=100, within_seconds=600, backoff=1)
    parts = [{"part": part} for part in range(CHILDREN)]
    return await supervisor.gather(*supervisor.map("flaky/test", parts, restart=again))


def returned(root, name, child, faults):
    """Run a root to its end; return what it has returned, and the runs below it."""
    with FakePrefect(faults=faults) as prefect:
        prefect.deploy(name, child)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=3600)
        assert run.state.is_completed(), run.state
        return run.state.data.result, run.below


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_each_child_returns_its_own_and_ends_once(faults):
    squares = [part * part for part in range(CHILDREN)]
    (results, came, outcomes), below = returned(of_squares, "square/test", square, faults)
    assert results == squares
    assert sorted(came) == squares
    assert outcomes == ["completed"] * CHILDREN
    assert len(below) == CHILDREN


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_the_end_of_an_earlier_run_of_a_child_is_not_taken_for_the_end_of_the_next(faults):
    attempts.clear()
    results, below = returned(of_flaky, "flaky/test", flaky, faults)
    assert results == [part * part for part in range(CHILDREN)]
    assert attempts == dict.fromkeys(range(CHILDREN), 3)
    assert len(below) == 3 * CHILDREN
