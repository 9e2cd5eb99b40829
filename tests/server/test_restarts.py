"""Restarts on a real server. Nobody serves the deployments: the tests say how their runs end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prefect import flow
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Cancelled, Completed, Failed, Running
from support.world import eventually

from supervised import (
    ChildError,
    ChildFailed,
    ChildTimedOut,
    Restart,
    _telemetry,
    supervised_flow,
    supervisor,
)

SOON = 60
BACKOFF = 1.0
TIMEOUT = 10.0
LABEL = "__OTEL_TRACEPARENT"


@flow
def nobody() -> None:
    """What the runs of the deployment would run."""


@flow
async def broken() -> None:
    raise ValueError("broken part")


@pytest.fixture
def queue(world):
    """The name of a deployment that nobody serves."""
    name = f"queue-{uuid4()}"
    world.client.create_deployment(world.client.create_flow(nobody), name)
    return f"nobody/{name}"


@pytest.fixture
def spans(monkeypatch):
    """Returns the spans of the library that have ended."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # Not as the global one: a process takes one only once, and other tests bring theirs.
    monkeypatch.setattr(_telemetry, "_tracer", provider.get_tracer("supervised"))
    return exporter.get_finished_spans


def succeeds_at(number, seconds=0.0):
    """Make a flow that fails until it is run for the n-th time."""
    tries = []

    @flow
    async def unreliable():
        tries.append(1)
        await asyncio.sleep(seconds)
        if len(tries) < number:
            raise ValueError(f"try {len(tries)}")
        return len(tries)

    return unreliable


def attempt(child, generation=0):
    """Return the run of an attempt, once there is one."""
    eventually(
        lambda: child.generation == generation and child.flow_run_id is not None,
        seconds=SOON,
        what=f"attempt {generation} at {child.name!r} has a run",
    )
    return child.flow_run_id


def set_state(world, run_id, *states):
    for state in states:
        world.client.set_flow_run_state(run_id, state, force=True)


def begin(world, child, generation=0):
    """Have the run of an attempt begin; return it once the parent knows."""
    run_id = attempt(child, generation)
    set_state(world, run_id, Running())
    eventually(lambda: child.state.is_running(), seconds=SOON, what=f"{child.name!r} runs")
    return run_id


def attempts(world, parent):
    """Return the runs of every child by its key, in the order of their generations."""
    found = defaultdict(list)
    below = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": [str(parent)]}})
    for run in world.client.read_flow_runs(flow_run_filter=below):
        found[run.labels["supervised.key"]].append(run)
    for runs in found.values():
        runs.sort(key=lambda run: run.labels["supervised.generation"])
        assert [run.labels["supervised.generation"] for run in runs] == list(range(len(runs)))
    return found


def states(runs):
    return [run.state_name for run in runs]


# -- when ---------------------------------------------------------------------------------------


def test_a_restart_waits_for_its_backoff(world):
    @supervised_flow
    async def parent():
        child = supervisor.spawn(succeeds_at(3), key="k", restart=Restart(backoff=[BACKOFF, 0.5]))
        assert await child == 3
        return supervisor.flow_run_id

    first, second, third = attempts(world, asyncio.run(parent()))["k"]
    assert states([first, second, third]) == ["Failed", "Failed", "Completed"]
    assert (second.created - first.end_time).total_seconds() >= BACKOFF
    assert (third.created - second.end_time).total_seconds() >= 0.5


def test_old_restarts_no_longer_count(world):
    @supervised_flow
    async def parent():
        restart = Restart(max=1, within_seconds=0.001)  # a restart takes longer than that
        child = supervisor.spawn(succeeds_at(4), key="k", restart=restart)
        assert await child == 4
        return supervisor.flow_run_id

    runs = attempts(world, asyncio.run(parent()))["k"]
    assert states(runs) == ["Failed", "Failed", "Failed", "Completed"]


# -- how often ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cancel_siblings", "wait", "ignore"])
def test_one_restart_too_many_fails_the_scope_though_the_body_catches_it(world, queue, policy):
    caught, ids = [], []

    @supervised_flow(on_child_failure=policy)
    async def parent():
        ids.append(supervisor.flow_run_id)
        sibling = supervisor.spawn(queue, key="sibling")
        await asyncio.to_thread(attempt, sibling)
        child = supervisor.spawn(broken, key="broken", restart=Restart(max=1))
        try:
            await child
        except ChildError as exc:
            caught.append(str(exc))

    with pytest.raises(Exception, match="1 failure"):
        asyncio.run(parent())
    assert "after 1 restart(s): ValueError: broken part" in caught[0]
    assert world.run(ids[0]).state_name == "Failed"
    runs = attempts(world, ids[0])
    assert states(runs["broken"]) == ["Failed", "Failed"]
    assert states(runs["sibling"]) == ["Cancelled"]


def test_a_failure_within_the_limits_concerns_nobody_else(world, queue):
    @supervised_flow(on_parent="cancel")
    async def parent():
        sibling = supervisor.spawn(queue, key="sibling")
        await asyncio.to_thread(attempt, sibling)
        await supervisor.spawn(succeeds_at(2), key="unreliable", restart=Restart(max=1))
        assert not sibling.is_over
        return supervisor.flow_run_id

    runs = attempts(world, asyncio.run(parent()))
    assert states(runs["unreliable"]) == ["Failed", "Completed"]
    assert len(runs["sibling"]) == 1


def test_a_deployment_that_fails_too_often_tells_its_last_end(world, queue):
    @supervised_flow(on_child_failure="ignore")
    def parent():
        child = supervisor.spawn(queue, key="k", restart=Restart(max=1))

        def fail():
            for number in range(2):
                set_state(world, attempt(child, number), Failed(message=f"end {number}"))

        with ThreadPoolExecutor() as aside:  # a body that asks too late is interrupted instead
            failing = aside.submit(fail)
            with pytest.raises(ChildFailed, match=r"after 1 restart\(s\): end 1"):
                child.result()
            failing.result()
        raise KeyError("the body's own")

    with pytest.raises(Exception, match="2 failure"):
        parent()


# -- who ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "again"),
    [("one_for_one", "b"), ("rest_for_one", "bc"), ("one_for_all", "abc")],
)
def test_who_is_restarted_with_a_child(world, queue, strategy, again):
    @supervised_flow(on_parent="cancel", restart=Restart(strategy=strategy))
    def parent():
        children = {key: supervisor.spawn(queue, key=key) for key in "abc"}
        for child in children.values():
            attempt(child)
        set_state(world, begin(world, children["b"]), Failed())
        for key in again:
            attempt(children[key], 1)
        return supervisor.flow_run_id

    runs = attempts(world, parent())
    assert sorted(runs) == ["a", "b", "c"]
    assert "".join(key for key in "abc" if len(runs[key]) == 2) == again
    assert sum(map(len, runs.values())) == 3 + len(again)
    assert states(runs["b"]) == ["Failed", "Cancelled"]
    assert all(states(runs[key])[0] == "Cancelled" for key in "ac")


def test_nobody_is_restarted_before_the_others_of_the_round_have_ended(world, queue):
    @supervised_flow(on_parent="cancel", restart=Restart(strategy="one_for_all"))
    def parent():
        culprit, slow = (supervisor.spawn(queue, key=key) for key in ("culprit", "slow"))
        run_id = begin(world, slow)
        set_state(world, begin(world, culprit), Failed())
        eventually(
            lambda: world.run(run_id).state.is_cancelling(), seconds=SOON, what="it is asked"
        )
        assert [child.generation for child in (culprit, slow)] == [0, 0]
        set_state(world, run_id, Cancelled())
        attempt(culprit, 1)
        attempt(slow, 1)
        return supervisor.flow_run_id

    runs = attempts(world, parent())
    ended = runs["slow"][0].end_time
    assert all(runs[key][1].created >= ended for key in ("culprit", "slow"))


# -- what it is ---------------------------------------------------------------------------------


def test_a_restart_is_a_new_generation_whose_span_links_to_the_one_before(world, queue, spans):
    @supervised_flow
    def parent():
        child = supervisor.spawn(queue, key="k", name="part", restart=Restart())
        set_state(world, begin(world, child), Failed())
        set_state(world, begin(world, child, 1), Completed())
        child.result()
        return supervisor.flow_run_id

    runs = attempts(world, parent())["k"]
    first, second = (span for span in spans() if span.name == "child part")
    assert [span.attributes["supervised.attempt"] for span in (first, second)] == [1, 2]
    outcomes = [span.attributes["supervised.outcome"] for span in (first, second)]
    assert outcomes == ["failed", "completed"]
    assert not first.links
    assert [link.context for link in second.links] == [first.context]
    assert first.parent == second.parent
    for span, run in zip((first, second), runs, strict=True):
        assert span.attributes["prefect.flow_run.id"] == str(run.id)
        assert run.labels[LABEL].split("-")[2] == f"{span.context.span_id:016x}"


# -- how long -----------------------------------------------------------------------------------


def test_the_time_of_an_attempt_counts_from_its_own_run(world):
    @supervised_flow
    async def parent():
        unreliable = succeeds_at(3, seconds=TIMEOUT * 0.4)
        child = supervisor.spawn(unreliable, key="k", restart=Restart(), timeout_seconds=TIMEOUT)
        assert await child == 3
        return supervisor.flow_run_id

    runs = attempts(world, asyncio.run(parent()))["k"]
    assert (runs[-1].end_time - runs[0].created).total_seconds() > TIMEOUT


def test_the_last_attempt_has_no_more_time_than_the_first(world):
    tries, ids = [], []

    @flow
    async def hangs_later():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("not yet")
        await asyncio.sleep(300)

    @supervised_flow(on_child_failure="ignore")
    async def parent():
        ids.append(supervisor.flow_run_id)
        child = supervisor.spawn(hangs_later, key="k", restart=Restart(), timeout_seconds=6)
        with pytest.raises(ChildTimedOut, match="deadline of 6 s"):
            await child

    asyncio.run(parent())
    first, second = attempts(world, ids[0])["k"]
    assert states([first, second]) == ["Failed", "Cancelled"]
    assert (second.end_time - second.created).total_seconds() >= 5.9  # two clocks
