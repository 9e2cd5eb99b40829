"""Random trees, ends and faults on a simulated Prefect: what must hold whatever happens.

A failure prints its steps; with the same steps and the same seed it happens again. The stories
are the same every time, unless pytest is given `--hypothesis-profile=explore`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from supervised import ScopeClosedError, _identity, supervised_flow, supervisor
from supervised._policy import cause_of
from supervised.testing import FakePrefect, Faults

LEASE = 20.0
GUARD = 30.0
SETTLE = 700.0  # more than the server's own 300 s, the lease, two looks of the guard, the grace
STEPS = 10_000

orders: dict = {}
ending: set = set()  # runs whose body is over
late: list = []  # children that were admitted when their scope was ending


def launch(plan):
    """Spawn what a plan says, and take note if that must not be."""
    is_banned = supervisor.is_ending
    child = spawn(plan)
    if is_banned:
        late.append(child)
    return child


def spawn(plan):
    """Spawn what a plan says."""
    options = {"on_parent": plan["on_parent"], "key": plan["key"]}
    if plan["kind"] == "inline":
        flow = {"node": node, "lenient": lenient}[plan["flow"]]
        return supervisor.spawn(flow, {"plan": plan["below"]}, **options)
    if plan["kind"] == "leaf":
        return supervisor.spawn(f"leaf/{plan['runner']}", {}, **options)
    deployment = f"{plan['flow']}/{plan['runner']}"
    return supervisor.spawn(deployment, {"plan": plan["below"]}, **options)


async def body(plan):
    """Spawn, then do as one is told."""
    try:
        await act(plan)
    finally:
        ending.add(supervisor.flow_run_id)


async def act(plan):
    """Spawn what the plan says, then follow orders."""
    children = [launch(child) for child in plan]
    for _ in range(100_000):
        order = orders.pop(str(supervisor.flow_run_id), None)
        if order == "raise":
            raise RuntimeError("told to")
        if order == "return":
            break
        if order == "detach":
            for child in children:
                if child.kind == "deployment":
                    child.detach()
        elif order is not None:
            try:
                children.append(launch(order))
            except ScopeClosedError:
                await asyncio.sleep(0)
        await asyncio.sleep(1)


@supervised_flow(lease_seconds=LEASE)
async def node(plan: list):
    """A supervised flow in which one failure ends all."""
    await body(plan)


@supervised_flow(lease_seconds=LEASE, on_child_failure="ignore")
async def lenient(plan: list):
    """A supervised flow that bears failures."""
    await body(plan)


RUNNERS = st.sampled_from(["a", "b"])
FLOWS = st.sampled_from(["node", "lenient"])
KEYS = st.sampled_from(["k1", "k2", "k3", None])
POLICIES = st.sampled_from([None, None, None, {"failed": "wait"}, {"completed": "cancel"}])
LEAVES = st.fixed_dictionaries(
    {
        "kind": st.just("leaf"),
        "runner": RUNNERS,
        "key": KEYS,
        "on_parent": st.one_of(POLICIES, st.just("detach")),
    }
)


def nodes(below, depth):
    """Plans for supervised runs, deployed and inline."""
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["node", "node", "inline"]),
            "flow": FLOWS,
            "runner": RUNNERS,
            "key": KEYS,
            "on_parent": POLICIES,
            "below": st.lists(below, max_size=3 if depth else 2, unique_by=lambda p: p["key"]),
        }
    )


LEVEL_2 = nodes(LEAVES, 0)
LEVEL_1 = nodes(st.one_of(LEAVES, LEVEL_2), 1)
CHILDREN = st.lists(
    st.one_of(LEAVES, LEVEL_1), min_size=1, max_size=4, unique_by=lambda p: p["key"]
)
FAULTS = st.sampled_from(
    [
        Faults(),
        Faults(refused=0.2, lost_answer=0.1, repeated=0.1),
        Faults(dropped_events=0.5, repeated_events=0.3, event_seconds=5.0),
        Faults(latency_seconds=3.0),
        Faults(refused=0.1, lost_answer=0.1, dropped_events=0.2, closed_streams=0.1),
    ]
)


class Trees(RuleBasedStateMachine):
    """A tree of runs, to which things happen."""

    steps: ClassVar[int] = 0

    @initialize(seed=st.integers(0, 2**16), plan=CHILDREN, flow=FLOWS, has_runner=st.booleans())
    def begin(self, seed, plan, flow, has_runner):
        orders.clear()
        ending.clear()
        late.clear()
        self.prefect = FakePrefect(seed=seed)
        self.prefect.__enter__()
        self.serve("a")
        self.serve("b")
        self.foreign = []
        self.spared = set()
        self.asked = set()
        self.prefect.guard(GUARD)
        if has_runner:
            self.prefect.start(f"{flow}/a", {"plan": plan})
        else:
            self.prefect.start({"node": node, "lenient": lenient}[flow], {"plan": plan})
        self.prefect.advance(8)

    def serve(self, runner):
        self.prefect.deploy(f"node/{runner}", node, runner=runner)
        self.prefect.deploy(f"lenient/{runner}", lenient, runner=runner)
        self.prefect.deploy(f"leaf/{runner}", runner=runner)

    # -- what happens ---------------------------------------------------------------------------

    def pick(self, index, runs):
        return runs[index % len(runs)] if runs else None

    @rule(seconds=st.one_of(st.floats(0.05, 5), st.floats(5, 40)))
    def time_passes(self, seconds):
        self.prefect.advance(seconds)

    @rule(index=st.integers(0, 20), order=st.one_of(LEAVES, LEVEL_2))
    def a_body_spawns(self, index, order):
        if run := self.pick(index, self.live_scopes()):
            orders[str(run.id)] = order
            self.prefect.advance(1.5)

    @rule(index=st.integers(0, 20), order=st.sampled_from(["raise", "return", "detach"]))
    def a_body_does_something(self, index, order):
        if run := self.pick(index, self.live_scopes()):
            orders[str(run.id)] = order
            self.prefect.advance(1.5)

    @rule(index=st.integers(0, 20), how=st.sampled_from(["cancel", "kill", "terminate"]))
    def a_run_is_ended(self, index, how):
        live = [run for run in self.prefect.alive if not self.is_untouchable(run)]
        if run := self.pick(index, live):
            self.asked.add(run.id)
            getattr(run, how)()

    @rule(runner=RUNNERS, with_processes=st.booleans())
    def a_runner_dies(self, runner, with_processes):
        found = self.prefect.runners[runner]
        if found.is_alive:
            found.kill()
            for process in list(found.processes.values()):
                if with_processes:
                    process.kill()

    @rule(runner=RUNNERS)
    def a_runner_is_started_again(self, runner):
        if not self.prefect.runners[runner].is_alive:
            self.prefect.replace_runner(runner)

    @rule(seconds=st.floats(0.5, 40))
    def the_server_is_restarted(self, seconds):
        self.prefect.restart(seconds)

    @rule()
    def streams_are_closed(self):
        self.prefect.close_streams()

    @rule(faults=FAULTS)
    def things_go_wrong(self, faults):
        self.prefect.faults = faults

    @precondition(lambda self: len(self.foreign) < 2)
    @rule(index=st.integers(0, 20))
    def somebody_copies_a_run(self, index):
        ours = [run for run in self.prefect.runs if run.flow_run.idempotency_key]
        if run := self.pick(index, ours):
            self.foreign.append(self.prefect.copy(run).id)

    # -- what holds -----------------------------------------------------------------------------

    def live_scopes(self):
        return [
            run
            for run in self.prefect.alive
            if run.state.is_running() and not run.flow_run.name.startswith("leaf")
        ]

    def is_untouchable(self, run):
        return run.id in self.foreign or bool(run.flow_run.labels.get(_identity.DETACHED))

    @invariant()
    def a_step_was_made(self):
        Trees.steps += 1

    @invariant()
    def a_key_has_one_live_run(self):
        if not hasattr(self, "prefect"):
            return
        live = Counter(
            (run.flow_run.labels[_identity.PARENT], run.flow_run.labels[_identity.KEY])
            for run in self.prefect.runs
            if run.id not in self.foreign
            and _identity.KEY in run.flow_run.labels
            and not run.state.is_final()
        )
        assert [key for key, count in live.items() if count > 1] == []

    @invariant()
    def nothing_is_spawned_after_the_ban(self):
        assert late == []

    @invariant()
    def what_is_not_ours_is_left_alone(self):
        if not hasattr(self, "prefect"):
            return
        for run in self.prefect.runs:
            if run.id in self.spared:
                assert not run.state.is_cancelling()
                assert not run.state.is_cancelled()
            elif self.is_untouchable(run) and run.state.is_running() and not self.is_doomed(run):
                self.spared.add(run.id)

    def is_doomed(self, run):
        """Whether its end, or that of a run above it, has begun: letting go may come too late."""
        above = [self.prefect.run(one) for one in _identity.path_of(run.flow_run.labels)]
        return run.id in self.asked or any(
            one.id in ending | self.asked
            or one.state.is_cancelling()
            or one.state.is_final()
            or not one.host.has_process
            for one in above
        )

    @invariant()
    def a_child_has_one_receipt(self):
        if not hasattr(self, "prefect"):
            return
        for run in self.prefect.runs:
            if report := run.report:
                ids = Counter(r.flow_run_id for r in report.receipts if r.flow_run_id)
                assert [one for one, count in ids.items() if count > 1] == []

    def teardown(self):
        if not hasattr(self, "prefect"):
            return
        try:
            self.prefect.faults = Faults()
            self.prefect.server.up_from = 0.0
            self.prefect.advance(SETTLE)
            assert [self.told(run) for run in self.prefect.runs if self.is_orphan(run)] == []
            assert late == []
        finally:
            self.prefect.__exit__(None, None, None)

    def is_orphan(self, run):
        """Whether a run outlives the one above it, and nobody may say so."""
        if not run.is_alive or self.is_untouchable(run):
            return False
        parent_id = self.prefect.server.parent_of(run.flow_run)
        if parent_id is None or self.cannot_be_reached(run):
            return False
        parent = self.prefect.run(parent_id)
        if parent.state.is_final():
            cause = cause_of(parent.state)
        elif parent.has_started and not parent.host.has_process:
            cause = "crashed"
        else:
            return False
        stated = _identity.on_parent_of(run.flow_run.labels).get(cause, "cancel")
        return stated == "cancel" or (stated == "wait" and cause == "completed")

    def cannot_be_reached(self, run):
        """Whether nobody can tell that its process is gone: it was asked, and reported."""
        host = run.host
        if host.id != run.id:
            return not host.state.is_final()  # a runner that was not heard says so only once
        runner = self.prefect.runner_of(host.id)
        is_lost = runner is None or not runner.is_alive
        was_asked = (
            run.state.is_cancelling() or run.state.is_cancelled()
        )  # after the server's 300 s
        return is_lost and was_asked

    def told(self, run):
        parent = self.prefect.run(self.prefect.server.parent_of(run.flow_run))
        return f"{run} (process {run.has_process}) below {parent}"


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_no_run_outlives_its_parent_whatever_happens(caplog):
    caplog.set_level("CRITICAL")
    logging.disable(logging.CRITICAL)
    Trees.steps = 0
    run_state_machine_as_test(
        Trees,
        settings=settings(
            max_examples=400,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            # Shrinking a story takes minutes, and the blob replays it as it is.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Trees.steps >= STEPS
