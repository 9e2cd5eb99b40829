"""Which children begin when: predecessors, and limits that are shared fairly."""

import asyncio
from datetime import datetime, timedelta, timezone

import pytest

from supervised import ChildCancelled, SpawnError, _clock, supervised_flow, supervisor
from supervised.testing import FakePrefect


def running(run):
    return sum(child.state.is_running() for child in run.below)


def test_a_child_begins_after_others_have_completed():
    order = []

    @supervised_flow
    async def step(name):
        order.append(name)

    @supervised_flow
    async def root():
        first = supervisor.spawn("score/gpu")
        second = supervisor.spawn(step, {"name": "second"}, after=[first])
        await supervisor.spawn(step, {"name": "third"}, after=[first, second])

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=100)
        run = prefect.start(root)
        prefect.advance(90)
        assert len(run.below) == 1, "the others have no run yet"
        prefect.until(lambda: not prefect.alive)
        assert order == ["second", "third"]


def test_a_child_does_not_begin_after_one_that_failed():
    reasons = []

    @supervised_flow(on_child_failure="ignore")
    async def root():
        first = supervisor.spawn("score/gpu", name="first")
        second = supervisor.spawn("sleep/test", after=[first])
        third = supervisor.spawn("sleep/test", after=[second])
        for child in (second, third):
            try:
                await child
            except ChildCancelled as exc:
                reasons.append(exc.reason)

    with FakePrefect() as prefect:
        prefect.deploy("score/gpu", takes=10, fails=True)
        prefect.deploy("sleep/test", takes=10)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert len(run.below) == 1
    assert [reason.source for reason in reasons] == ["predecessor_failed"] * 2
    assert "'first', which comes before it, failed" in str(reasons[0])


def test_a_child_that_waits_for_others_is_cancelled_without_a_request():
    @supervised_flow
    async def root():
        first = supervisor.spawn("sleep/test")
        supervisor.spawn("sleep/test", after=[first])
        await asyncio.sleep(3600)

    with FakePrefect() as prefect:
        prefect.deploy("root/test", root)
        prefect.deploy("sleep/test", takes=7200)
        run = prefect.start("root/test")
        prefect.until(lambda: running(run) == 1)
        run.cancel()
        prefect.until(lambda: not prefect.alive, within=20)
        assert len(run.below) == 1


def test_a_map_has_a_limit_of_its_own():
    @supervised_flow
    async def root():
        children = supervisor.map("sleep/test", [{"part": i} for i in range(6)], max_concurrent=2)
        supervisor.spawn("sleep/test")
        await children

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=100)
        run = prefect.start(root)
        seen = set()

        def over():
            seen.add(running(run))
            return not prefect.alive

        prefect.until(over, within=3600)
        assert max(seen) == 3
        assert len(run.below) == 7


def test_a_large_map_does_not_keep_a_later_child_waiting():
    began = []

    @supervised_flow
    async def part(number):
        began.append(number)
        await asyncio.sleep(10)

    @supervised_flow(max_concurrent=2)
    async def root():
        many = supervisor.map(part, [{"number": i} for i in range(20)])
        supervisor.spawn(part, {"number": "late"})
        await many

    with FakePrefect() as prefect:
        prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=3600)
    assert began.index("late") < 5


def test_the_children_of_a_map_can_be_named():
    names = []

    @supervised_flow
    async def root():
        children = supervisor.map("sleep/test", [{}, {}], name="part", key="part")
        names.extend((child.name, child.key) for child in children)
        await children

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=1)
        prefect.start(root)
        prefect.until(lambda: not prefect.alive)
    assert names == [("part-0", "part-0"), ("part-1", "part-1")]


def test_an_inline_child_whose_time_has_not_come_holds_no_slot():
    seen = []

    @supervised_flow
    async def part():
        seen.append("part")

    @supervised_flow(max_concurrent=1)
    async def root():
        later = _clock.utc_now() + timedelta(minutes=5)
        scheduled = supervisor.spawn(part, scheduled_time=later)
        await supervisor.spawn("sleep/test")
        seen.append("other")
        await scheduled

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=20)
        run = prefect.start(root)
        prefect.advance(60)
        assert seen == ["other"]
        assert len(run.below) == 1
        prefect.until(lambda: not prefect.alive, within=300)
        assert seen == ["other", "part"]
        assert prefect.seconds >= 300
        assert run.state.is_completed()


# -- what is refused ------------------------------------------------------------------------------


def refusals(spawn):
    """Return what a flow's body is told when it spawns; and see that nothing was launched."""
    told = []

    @supervised_flow
    async def part():
        """Do nothing."""

    @supervised_flow
    async def root():
        for target in (part, "sleep/test"):
            try:
                spawn(target)
            except Exception as exc:
                told.append(exc)
        await asyncio.sleep(5)

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=1)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()
        assert not run.below
    return told


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("scheduled_time", datetime(2030, 1, 1), ValueError),  # noqa: DTZ001 - it is the point
        ("scheduled_time", "tomorrow", SpawnError),
        ("scheduled_time", 5, SpawnError),
        ("key", "", SpawnError),
        ("key", 5, SpawnError),
        ("name", 5, SpawnError),
        ("name", "", SpawnError),
        ("work_queue_name", 5, SpawnError),
        ("job_variables", [1], SpawnError),
        ("job_variables", "cpu=1", SpawnError),
        ("timeout_seconds", True, ValueError),
        ("timeout_seconds", "5", ValueError),
        ("timeout_seconds", -1, ValueError),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(option, value, error):
    told = refusals(lambda target: supervisor.spawn(target, **{option: value}))
    assert [type(exc) for exc in told] == [error] * 2
    assert all(option in str(exc) for exc in told)


def test_a_time_with_a_zone_is_taken():
    @supervised_flow
    async def root():
        moment = datetime(2000, 1, 1, tzinfo=timezone(timedelta(hours=2)))
        await supervisor.spawn("sleep/test", scheduled_time=moment)

    with FakePrefect() as prefect:
        prefect.deploy("sleep/test", takes=1)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()


def test_a_map_refuses_options_that_there_are_not():
    told = refusals(lambda target: supervisor.map(target, [{}, {}], timeout=3, tagz=["a"]))
    assert [str(exc) for exc in told] == ["map() got unexpected options: tagz, timeout"] * 2
    assert all(isinstance(exc, TypeError) for exc in told)
