"""Restarts: what is counted, who is restarted, and what becomes of it on a fake Prefect."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised import (
    ChildCrashed,
    ChildFailed,
    Restart,
    _identity,
    supervised_flow,
    supervisor,
)
from supervised._restart import STRATEGIES, Intensity, restarted_with
from supervised.testing import FakePrefect, Faults
from supervised.testing._client import FakeOrchestrator

# -- decisions ----------------------------------------------------------------------------------


@given(
    limit=st.integers(0, 4),
    within=st.floats(1, 100),
    gaps=st.lists(st.floats(0, 50), max_size=30),
)
def test_never_more_restarts_than_allowed_in_any_span_of_time(limit, within, gaps):
    intensity, now, allowed = Intensity(Restart(max=limit, within_seconds=within)), 0.0, []
    for gap in gaps:
        now += gap
        if intensity.count(now) is not None:
            allowed.append(now)
    for moment in allowed:
        assert sum(1 for other in allowed if 0 <= moment - other <= within) <= limit


@given(
    strategy=st.sampled_from(STRATEGIES),
    live=st.sets(st.integers(0, 9)).map(sorted),
    position=st.integers(0, 9),
)
def test_who_is_restarted_with_a_child(strategy, live, position):
    others = restarted_with(strategy, position, live)
    assert position not in others
    assert set(others) <= set(live)
    if strategy == "one_for_one":
        assert not others
    elif strategy == "one_for_all":
        assert set(others) == set(live) - {position}
    else:
        assert set(others) == {each for each in live if each > position}


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [(2, [2, 2, 2]), ([1, 5], [1, 5, 5]), (lambda number: 2.0**number, [2, 4, 8])],
)
def test_how_long_a_restart_waits(backoff, delays):
    restart = Restart(backoff=backoff)
    assert [restart.delay(number) for number in (1, 2, 3)] == delays


@pytest.mark.parametrize(
    "options",
    [
        {"max": -1},
        {"max": 1.5},
        {"max": True},
        {"within_seconds": 0},
        {"backoff": -1},
        {"backoff": []},
        {"backoff": [1, -1]},
        {"backoff": "1"},
        {"backoff": b"1"},
        {"backoff": None},
        {"backoff": [1, None]},
        {"strategy": "one_for_none"},
    ],
)
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises((ValueError, TypeError)):
        Restart(**options)


# -- on a fake Prefect --------------------------------------------------------------------------


def names(runs):
    return [run.flow_run.labels["supervised.generation"] for run in runs]


def test_a_child_that_crashes_is_a_new_run_under_its_old_handle():
    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu", restart=Restart(max=2, backoff=5))
        assert await child == "done"
        assert child.restarts == 1

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=60, returns="done")
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        run.below[0].kill()
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert names(run.below) == [0, 1]
        assert [child.state.type.value for child in run.below] == ["CRASHED", "COMPLETED"]


@pytest.mark.parametrize("policy", ["cancel_siblings", "wait", "ignore"])
def test_one_restart_too_many_is_the_scopes_failure(policy):
    @supervised_flow(on_child_failure=policy)
    async def root():
        supervisor.spawn("sleep/test")
        supervisor.spawn("score/gpu", restart=Restart(max=2))
        await asyncio.sleep(3600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("sleep/test", takes=7200)
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive, within=300)
        assert run.state.is_failed()
        assert "failed after 2 restart(s)" in run.report.reason
        assert sum(child.state.is_failed() for child in run.below) == 3


def test_a_scopes_limits_are_shared_by_its_children():
    @supervised_flow(restart=Restart(max=3))
    async def root():
        for _ in range(2):
            supervisor.spawn("score/gpu")
        await asyncio.sleep(3600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive, within=300)
        assert run.state.is_failed()
        assert len(run.below) <= 2 + 3


@pytest.mark.parametrize(
    ("strategy", "again"),
    [
        ("one_for_one", ["b"]),
        ("rest_for_one", ["b", "c"]),
        ("one_for_all", ["a", "b", "c"]),
    ],
)
def test_who_is_restarted_together(strategy, again):
    @supervised_flow(restart=Restart(strategy=strategy))
    async def root():
        for name in "abc":
            supervisor.spawn("sleep/test", name=name, key=name)
        await asyncio.sleep(3600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("sleep/test", takes=7200)
        run = prefect.start("root/test")
        prefect.until(lambda: sum(child.state.is_running() for child in run.below) == 3)
        by_key = {child.flow_run.labels["supervised.key"]: child for child in run.below}
        by_key["b"].kill()
        prefect.advance(60)
        second = [child for child in run.below if child.flow_run.labels["supervised.generation"]]
        assert sorted(child.flow_run.labels["supervised.key"] for child in second) == again
        assert sum(child.is_alive for child in run.below) == 3
        run.cancel()
        prefect.until(lambda: not prefect.alive)


def test_a_child_that_waits_for_its_restart_is_cancelled_at_once():
    @supervised_flow
    async def root():
        supervisor.spawn("score/gpu", restart=Restart(backoff=3600))
        await asyncio.sleep(7200)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_failed())
        prefect.advance(10)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=15)
        assert run.state.is_cancelled()
        assert len(run.below) == 1


def test_a_child_that_somebody_cancels_is_not_restarted():
    @supervised_flow
    async def root():
        child = supervisor.spawn("sleep/test", restart=Restart())
        await asyncio.sleep(30)
        child.cancel()
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("sleep/test", takes=7200)
        run = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive)
        assert len(run.below) == 1
        assert run.state.is_completed()


def test_a_wish_to_end_it_for_good_beats_a_restart_under_way():
    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        sibling = supervisor.spawn("sleep/test", key="sibling")
        supervisor.spawn("score/gpu")
        await asyncio.sleep(40)
        sibling.cancel()
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("sleep/test", takes=7200)
        prefect.deploy("score/gpu", takes=37, fails=True)
        run = prefect.start("root/test")
        prefect.advance(80)
        siblings = [
            each for each in run.below if each.flow_run.labels["supervised.key"] == "sibling"
        ]
        assert not any(each.is_alive for each in siblings)
        run.cancel()
        prefect.until(lambda: not prefect.alive)


def test_an_inline_child_is_restarted_too():
    tries = []

    @supervised_flow
    async def part():
        tries.append(1)
        if len(tries) < 3:
            raise ValueError("not yet")
        return len(tries)

    @supervised_flow
    async def root():
        return await supervisor.spawn(part, restart=Restart(max=2))

    with FakePrefect() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert len(tries) == 3


def test_a_failure_says_how_often_it_was_tried():
    @supervised_flow
    async def root():
        with pytest.raises((ChildFailed, ChildCrashed), match=r"after 1 restart\(s\)"):
            await supervisor.spawn("score/gpu", restart=Restart(max=1))

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("score/gpu", takes=1, fails=True)
        run = prefect.start("root/test")
        prefect.until(lambda: not prefect.alive)
        assert len(run.below) == 2


# -- who takes part in a round --------------------------------------------------------------------


def fails_once(takes=5.0, then=100.0):
    """Make a flow that fails when it is run first."""
    tries = []

    @supervised_flow
    async def flaky():
        tries.append(1)
        if len(tries) == 1:
            await asyncio.sleep(takes)
            raise ValueError("not yet")
        await asyncio.sleep(then)

    return flaky


def generations(run):
    """Return, for each key, which attempts at it have a run."""
    found = {}
    for child in run.below:
        labels = child.flow_run.labels
        found.setdefault(labels["supervised.key"], []).append(labels["supervised.generation"])
    return found


def until_over(prefect, run):
    """Let time pass until all is over; return the most live runs that any key has had."""
    most = Counter()

    def over():
        live = Counter(
            child.flow_run.labels["supervised.key"] for child in run.below if child.is_alive
        )
        for key, count in live.items():
            most[key] = max(most[key], count)
        return not prefect.alive

    prefect.until(over, within=5000)
    return max(most.values())


def test_an_inline_child_that_is_restarted_is_not_interrupted_for_its_earlier_attempt():
    ends = []

    @supervised_flow
    async def steady():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ends.append("interrupted")
            raise
        ends.append("returned")

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        await supervisor.gather(supervisor.spawn(steady), supervisor.spawn(fails_once()))

    with FakePrefect() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert ends == ["interrupted", "returned"]


@pytest.mark.parametrize("kind", ["inline", "deployment"])
def test_who_waits_for_a_slot_is_not_restarted_with_others(kind):
    flaky, began = fails_once(), []

    @supervised_flow
    async def part(number):
        began.append(number)
        await asyncio.sleep(20)

    @supervised_flow(restart=Restart(strategy="one_for_all"), max_concurrent=1)
    async def root():
        target = part if kind == "inline" else "part/test"
        first = supervisor.spawn(flaky, key="flaky")
        others = [supervisor.spawn(target, {"number": i}, key=f"part-{i}") for i in range(2)]
        await supervisor.gather(first, *others)

    with FakePrefect() as prefect:
        prefect.deploy("part/test", part)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert generations(run) == {"flaky": [0, 1], "part-0": [0], "part-1": [0]}
        assert sorted(began) == [0, 1]


def test_who_waits_for_a_predecessor_is_not_restarted_with_others():
    flaky, order = fails_once(), []

    @supervised_flow
    async def first():
        await asyncio.sleep(60)
        order.append("first ends")

    @supervised_flow
    async def second():
        order.append("second begins")

    @supervised_flow(restart=Restart(strategy="rest_for_one"))
    async def root():
        before = supervisor.spawn(first)
        supervisor.spawn(flaky)
        await supervisor.spawn(second, after=[before])

    with FakePrefect() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert order == ["first ends", "second begins"]


def test_who_waited_when_others_were_restarted_has_no_more_time_than_it_was_given():
    flaky, began, outcomes = fails_once(then=5), [], []

    @supervised_flow
    async def part():
        began.append(1)
        await asyncio.sleep(500)

    @supervised_flow(
        restart=Restart(strategy="one_for_all"), max_concurrent=1, on_child_failure="ignore"
    )
    async def root():
        supervisor.spawn(flaky)
        child = supervisor.spawn(part, timeout_seconds=100)
        await supervisor.gather(child, return_exceptions=True)
        outcomes.append(child.outcome)

    with FakePrefect() as prefect:
        prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=200)
    assert outcomes == ["timed_out"]
    assert len(began) == 1


def test_who_is_being_launched_when_others_are_restarted_has_one_run_at_a_time():
    flaky = fails_once(takes=30)

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        culprit = supervisor.spawn(flaky)
        supervisor.spawn("sleep/test", key="steady")
        while not culprit.state.is_running():
            await asyncio.sleep(0.01)
        await asyncio.sleep(30.2)
        for number in range(3):
            supervisor.spawn("sleep/test", key=f"late-{number}")

    with FakePrefect(faults=Faults(latency_seconds=0.3)) as prefect:
        prefect.deploy("sleep/test", takes=50)
        run = prefect.start(root)
        assert until_over(prefect, run) == 1
        assert run.state.is_completed()
        assert generations(run)["steady"] == [0, 1]


def make_slow(monkeypatch, name, slow):
    """Have a call of the seam take nine seconds longer while there is something in *slow*."""
    call = getattr(FakeOrchestrator, name)

    async def slowly(self, *given):
        await asyncio.sleep(9 if slow else 0)
        return await call(self, *given)

    monkeypatch.setattr(FakeOrchestrator, name, slowly)


def test_a_slow_launch_that_others_do_not_wait_for_makes_no_second_run(monkeypatch):
    flaky, slow = fails_once(takes=30), []
    make_slow(monkeypatch, "read_deployment", slow)

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        culprit = supervisor.spawn(flaky)
        steady = supervisor.spawn("sleep/test", key="steady")
        while not (culprit.state.is_running() and steady.state.is_running()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(22)
        slow.append(True)
        supervisor.spawn("sleep/test", key="late")
        await asyncio.sleep(10)
        slow.clear()

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=50)
        run = prefect.start(root)
        assert until_over(prefect, run) == 1
        assert run.state.is_completed()
        assert generations(run)["steady"] == [0, 1]


def test_an_inline_child_that_is_slow_to_launch_runs_once_at_a_time(monkeypatch):
    flaky, slow, running, most = fails_once(takes=30), [], [], []
    make_slow(monkeypatch, "create_inline_run", slow)

    @supervised_flow
    async def late():
        running.append(1)
        most.append(len(running))
        try:
            await asyncio.sleep(50)
        finally:
            running.pop()

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        culprit = supervisor.spawn(flaky)
        while not culprit.state.is_running():
            await asyncio.sleep(0.01)
        await asyncio.sleep(22)
        slow.append(True)
        supervisor.spawn(late)
        await asyncio.sleep(20)
        slow.clear()

    with FakePrefect() as prefect:
        run = prefect.start(root)
        assert until_over(prefect, run) == 1
        assert run.state.is_completed()
        assert set(most) == {1}


@pytest.mark.parametrize("kind", ["inline", "deployment"])
def test_a_launch_that_a_restart_has_overtaken_leaves_the_next_attempts_run_alone(
    kind, monkeypatch
):
    """It was about to request a run, and the restart was over before it did."""
    flaky, slow, outcomes = fails_once(takes=30), [], []
    make_slow(monkeypatch, "read_deployment", slow)
    make_slow(monkeypatch, "create_inline_run", slow)

    @supervised_flow
    async def part():
        await asyncio.sleep(20)

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        culprit = supervisor.spawn(flaky)
        while not culprit.state.is_running():
            await asyncio.sleep(0.01)
        await asyncio.sleep(22)
        slow.append(True)
        late = supervisor.spawn(part if kind == "inline" else "part/test", key="late")
        await late.wait_async(120)
        outcomes.append(late.outcome)
        slow.clear()

    with FakePrefect() as prefect:
        prefect.deploy("part/test", part)
        run = prefect.start(root)
        assert until_over(prefect, run) == 1
        assert run.state.is_completed()
        assert outcomes == ["completed"]
        assert generations(run)["late"] == [1]


@pytest.mark.usefixtures("answers_late")
def test_a_run_that_is_answered_after_its_attempt_was_replaced_is_ended_and_is_nobodys():
    flaky, handles, known = fails_once(takes=30), [], set()

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        culprit = supervisor.spawn(flaky)
        while not culprit.state.is_running():
            await asyncio.sleep(0.01)
        await asyncio.sleep(25)
        late = supervisor.spawn("score/gpu", key="late")
        handles.append(late)
        while not late.is_over:
            await asyncio.sleep(0.1)
            known.add(late.flow_run_id)
        return late.outcome

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=20)
        run = prefect.start(root)
        prefect.until(lambda: generations(run).get("late"))
        (late,) = handles
        prefect.until(lambda: late.cancel_reason is not None)
        assert late.settle("cancelled", of=late.attempt) is False
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        first, second = (
            each for each in run.below if each.flow_run.labels["supervised.key"] == "late"
        )
        assert [first.state.name, second.state.name] == ["Cancelled", "Completed"]
        assert known == {None, second.id}
        assert late.outcome == "completed"


# -- restarts and other ends ----------------------------------------------------------------------


def test_nothing_is_restarted_while_a_scope_waits_for_its_children_to_end():
    @supervised_flow(on_parent={"failed": "wait"}, persist_result=True)
    async def root():
        supervisor.spawn("sleep/test", key="steady")
        supervisor.spawn("flaky/test", key="flaky", restart=Restart(backoff=20))
        await asyncio.sleep(20)
        raise KeyError("the body's own")

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=100)
        prefect.deploy("flaky/test", takes=5, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert [type(exc) for exc in run.state.data.exceptions] == [KeyError, ChildFailed]
        assert generations(run) == {"steady": [0], "flaky": [0]}
        steady = next(child for child in run.below if child.flow_run.name.startswith("sleep"))
        assert steady.state.is_completed()


@pytest.mark.parametrize(("later", "within"), [(0.5, 10), (60, 2)])
def test_a_run_that_is_cancelled_amid_a_restart_of_all_begins_nothing(later, within):
    """While the others are being cancelled for it, and when all wait for it."""

    @supervised_flow(restart=Restart(strategy="one_for_all", backoff=3600))
    async def root():
        supervisor.spawn("sleep/test", key="steady")
        supervisor.spawn("flaky/test", key="flaky")
        await asyncio.sleep(7200)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("sleep/test", takes=7200)
        prefect.deploy("flaky/test", takes=5, fails=True)
        run = prefect.start("root/test")
        prefect.until(lambda: any(child.state.is_failed() for child in run.below))
        prefect.advance(later)
        assert any(child.is_alive for child in run.below) is (later < 1)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=within)
        assert run.state.is_cancelled()
        assert generations(run) == {"steady": [0], "flaky": [0]}


def test_an_adopted_child_that_fails_is_not_restarted():
    caught = []

    @supervised_flow(restart=Restart())
    async def root(run_id):
        try:
            await supervisor.adopt(run_id)
        except ChildFailed as exc:
            caught.append(exc)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=10, fails=True)
        adopted = prefect.start("score/gpu")
        prefect.advance(1)
        run = prefect.start(root, {"run_id": str(adopted.id)})
        prefect.until(lambda: not prefect.alive, within=60)
        assert run.state.is_completed()
        assert len(caught) == 1
        assert len(prefect.runs) == 2


def test_an_adopted_child_goes_on_when_all_others_are_restarted():
    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root(run_id):
        supervisor.adopt(run_id)
        supervisor.spawn("flaky/test", key="flaky")
        supervisor.spawn("sleep/test", key="steady")
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=300)
        prefect.deploy("flaky/test", fails_once())
        adopted = prefect.start("sleep/test")
        prefect.advance(1)
        run = prefect.start(root, {"run_id": str(adopted.id)})
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert generations(run) == {"flaky": [0, 1], "steady": [0, 1]}
        assert adopted.state.is_completed()
        assert adopted.flow_run.run_count == 1


def test_a_child_that_is_detached_before_its_restart_is_restarted_as_nobodys():
    @supervised_flow
    async def root():
        child = supervisor.spawn("flaky/test", restart=Restart(backoff=60))
        await asyncio.sleep(30)
        child.detach()
        await asyncio.sleep(60)

    with FakePrefect() as prefect:
        prefect.deploy("flaky/test", fails_once(then=300))
        run = prefect.start(root)
        prefect.until(lambda: not run.is_alive, within=120)
        assert run.state.is_completed()
        second = prefect.runs[-1]
        assert second.flow_run.labels[_identity.DETACHED]
        prefect.until(lambda: not prefect.alive)
        assert second.state.is_completed()
        assert len(prefect.runs) == 3


def test_a_run_whose_only_child_waits_for_its_restart_is_cancelled_in_an_instant():
    @supervised_flow
    async def root():
        await supervisor.spawn("score/gpu", restart=Restart(backoff=3600))

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=5, fails=True)
        run = prefect.start("root/test")
        prefect.advance(30)
        assert len(prefect.alive) == 1
        run.cancel()
        prefect.until(lambda: run.state.is_final(), within=2)
        assert run.state.is_cancelled()
        assert len(run.below) == 1


def test_a_child_that_is_cancelled_before_its_restart_is_over_in_an_instant():
    waited = []

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu", restart=Restart(backoff=3600))
        await asyncio.sleep(30)
        child.cancel()
        await child.wait_async(1)
        waited.append(child.outcome)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=5, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=60)
        assert waited == ["cancelled"]
        assert run.state.is_completed()
        assert len(run.below) == 1


def test_two_that_fail_shortly_after_one_another_are_both_restarted():
    """The second is being cancelled for the first when it fails: it belongs to one round only."""

    @supervised_flow(restart=Restart(max=5, strategy="rest_for_one"))
    async def root():
        names = ["b", "a", "slow"]
        await supervisor.gather(*(supervisor.spawn(f"{name}/test") for name in names))

    with FakePrefect() as prefect:
        for name in ("b", "a", "slow"):
            prefect.deploy(f"{name}/test", takes=100)
        run = prefect.start(root)
        prefect.until(lambda: sum(one.state.is_running() for one in run.below) == 3)
        one = {each.flow_run.name.split("-")[0]: each for each in run.below}
        one["a"].kill()
        prefect.advance(5)
        one["b"].kill()
        prefect.until(lambda: run.state.is_completed(), within=600)


@pytest.mark.parametrize("gathered", [False, True])
def test_one_restart_too_many_is_the_scopes_failure_though_the_body_has_caught_it(gathered):
    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu", restart=Restart(max=0))
        if gathered:
            await supervisor.gather(child, return_exceptions=True)
            return
        with pytest.raises(ChildCrashed):
            await child

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=60)
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        run.below[0].kill()
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_failed()
        assert "1 failure(s)" in run.state.message


def test_the_time_of_a_restarted_child_is_that_of_its_present_run():
    @supervised_flow
    async def root():
        return await supervisor.spawn("score/gpu", restart=Restart(), timeout_seconds=60)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=40, returns="done")
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        prefect.advance(30)
        run.below[0].kill()
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert names(run.below) == [0, 1]


def test_the_deadline_of_an_attempt_that_is_over_does_not_end_the_child_that_waits_for_the_next():
    flaky = fails_once(takes=55, then=20)

    @supervised_flow
    async def stubborn():
        try:
            await asyncio.sleep(90)
        except asyncio.CancelledError:
            await asyncio.sleep(15)
            raise

    @supervised_flow(restart=Restart(strategy="one_for_all"))
    async def root():
        child = supervisor.spawn("flaky/test", key="flaky", timeout_seconds=60)
        supervisor.spawn("stubborn/test", key="stubborn")
        return await child

    with FakePrefect() as prefect:
        prefect.deploy("flaky/test", flaky)
        prefect.deploy("stubborn/test", stubborn)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert generations(run) == {"flaky": [0, 1], "stubborn": [0, 1]}


def test_a_backoff_that_cannot_be_told_delays_nothing_and_hides_nothing():
    def backoff(number):
        raise KeyError(number)

    @supervised_flow
    async def root():
        child = supervisor.spawn("score/gpu", restart=Restart(backoff=backoff))
        assert await child == "done"

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root, runner="root")
        prefect.deploy("score/gpu", takes=40, returns="done")
        run = prefect.start("root/test")
        prefect.until(lambda: run.below and run.below[0].state.is_running())
        run.below[0].kill()
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
