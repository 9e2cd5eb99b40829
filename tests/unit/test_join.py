import asyncio
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervised import ChildError, ChildFailed, supervised_flow, supervisor
from supervised._child import Child
from supervised._join import AsCompleted, Children, Joiners, Rule, decide
from supervised._types import DEFAULT_ON_PARENT
from supervised.testing import FakePrefect, Faults

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def make(name="child", cancelled=None):
    def cancel(child, reason):
        if child.mark_cancel(reason):
            child.settle("cancelled")

    return Child(
        name=name,
        kind="deployment",
        key=name,
        target="leaf/test",
        on_parent=DEFAULT_ON_PARENT,
        on_done=lambda _: None,
        ask_cancel=cancelled or cancel,
        ask_detach=lambda _: None,
    )


def children(count=3):
    return [make(f"child-{number}") for number in range(count)]


def complete(child, value=None):
    child.settle("completed", value=value)


def fail(child, message="bad"):
    child.settle("failed", exception=ValueError(message))


# -- what decides a join ------------------------------------------------------------------------

ends = st.lists(st.booleans(), max_size=12).map(lambda flags: list(enumerate(flags)))


@given(needed=st.integers(1, 6), tolerated=st.integers(0, 6), ends=ends)
def test_a_decision_does_not_change_with_what_comes_later(needed, tolerated, ends):
    rule = Rule(needed, tolerated)
    decided = [decide(rule, ends[:count]) for count in range(len(ends) + 1)]
    first = next((each for each in decided if each is not None), None)
    assert set(decided) <= {None, first}


@given(needed=st.integers(1, 6), tolerated=st.integers(0, 6), ends=ends)
def test_a_join_is_won_with_enough_and_lost_with_too_few(needed, tolerated, ends):
    decision = decide(Rule(needed, tolerated), ends)
    completed = sum(flag for _, flag in ends)
    if decision is None:
        assert completed < needed
        assert len(ends) - completed <= tolerated
    elif decision.won:
        assert len(decision.completed) == needed
        assert len(decision.failed) <= tolerated
    else:
        assert len(decision.failed) == tolerated + 1
        assert len(decision.completed) < needed


@given(count=st.integers(1, 8), data=st.data())
def test_every_join_is_decided_once_all_children_are_over(count, data):
    needed = data.draw(st.integers(1, count))
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    assert decide(Rule(needed, count - needed), enumerate(flags)) is not None


# -- gather -------------------------------------------------------------------------------------


def test_gather_gives_results_in_the_order_of_the_children():
    one, two = children(2)
    joined = Joiners().gather(one, two)
    complete(two, 2)
    complete(one, 1)
    assert joined.result() == [1, 2]
    assert asyncio.run(joined.aresult()) == [1, 2]


def test_gather_of_nothing_is_nothing():
    assert Joiners().gather().result() == []


def test_gather_raises_the_first_failure_and_leaves_the_others_alone():
    one, two = children(2)
    joined = Joiners().gather(one, two)
    fail(two)
    with pytest.raises(ChildFailed, match="child-1"):
        joined.result()
    assert not one.is_over


def test_gather_can_give_errors_in_place_of_results():
    one, two = children(2)
    joined = Joiners().gather(one, two, return_exceptions=True)
    fail(one)
    complete(two, 2)
    error, result = joined.result()
    assert isinstance(error, ChildFailed)
    assert result == 2


def test_a_gather_that_takes_too_long_names_who_is_late_and_leaves_them_alone():
    one, two = children(2)
    joined = Joiners().gather(one, two, timeout=0)
    complete(one)
    with pytest.raises(TimeoutError, match="within 0 s; still going on: child-1"):
        joined.result()
    with pytest.raises(TimeoutError):
        asyncio.run(joined.aresult())
    assert not two.is_over


# -- races --------------------------------------------------------------------------------------


def test_the_first_to_complete_wins_and_the_others_lose_the_race():
    one, two, three = children()
    race = Joiners().first_success(one, two, three)
    fail(one)
    complete(three, 3)
    assert race.result() == 3
    assert race.winners == (three,)
    assert two.outcome == "cancelled"
    assert two.cancel_reason.source == "lost_race"
    assert "lost the race" in str(two.error())


def test_a_race_that_nobody_wins_tells_of_all_failures():
    one, two = children(2)
    race = Joiners().first_success(one, two)
    fail(one, "bad")
    fail(two, "worse")
    with pytest.raises(ExceptionGroup) as raised:
        race.result()
    assert [str(error.__cause__) for error in raised.value.exceptions] == ["bad", "worse"]


def test_the_first_that_ends_decides_however_it_ends():
    one, two = children(2)
    race = Joiners().first_completed(one, two)
    fail(two)
    with pytest.raises(ChildFailed, match="child-1"):
        race.result()
    assert one.outcome == "cancelled"


def test_a_quorum_gives_results_in_the_order_in_which_they_came():
    one, two, three = children()
    race = Joiners().quorum(2, one, two, three)
    complete(three, 3)
    complete(one, 1)
    assert race.result() == [3, 1]
    assert two.outcome == "cancelled"


def test_a_quorum_is_lost_as_soon_as_too_many_have_failed():
    one, two, three = children()
    race = Joiners().quorum(2, one, two, three)
    fail(one)
    fail(two)
    assert race.is_lost
    assert three.outcome == "cancelled"


def test_a_race_that_takes_too_long_cancels_everybody():
    runners = children(2)
    race = Joiners().first_success(*runners, timeout=0)
    with pytest.raises(TimeoutError):
        race.result()
    assert {child.cancel_reason.source for child in runners} == {"lost_race"}


def test_a_race_of_children_that_are_over_goes_to_who_ended_first():
    one, two = children(2)
    complete(two, 2)
    complete(one, 1)
    assert Joiners().first_success(one, two).result() == 2


@pytest.mark.parametrize(("needed", "count"), [(0, 2), (3, 2), (1, 0)])
def test_a_race_that_nobody_could_win_is_refused(needed, count):
    with pytest.raises(ValueError, match="cannot complete first|needed must be"):
        Joiners().quorum(needed, *children(count))


@pytest.mark.parametrize("needed", [1.5, "2", None])
def test_a_quorum_is_a_whole_number(needed):
    with pytest.raises((ValueError, TypeError)):
        Joiners().quorum(needed, *children(3))


def test_a_child_that_is_given_twice_counts_once():
    one, two = children(2)
    with pytest.raises(ValueError, match="2 of 1 children"):
        Joiners().quorum(2, one, one)
    race = Joiners().quorum(2, one, one, two)
    complete(one, 1)
    assert not race.winners
    complete(two, 2)
    assert race.result() == [1, 2]


def test_a_race_of_one_that_nobody_wins_is_lost_like_any():
    joiners, (child,) = Joiners(), children(1)
    races = [
        joiners.first_success(child),
        joiners.first_success(child, child),
        joiners.quorum(1, child),
    ]
    fail(child)
    for race in races:
        with pytest.raises(ExceptionGroup) as raised:
            race.result()
        assert [type(error) for error in raised.value.exceptions] == [ChildFailed]


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_no_join_takes_less_than_no_time(timeout):
    joiners, runners = Joiners(), children(2)
    for join in (
        lambda: joiners.gather(*runners, timeout=timeout),
        lambda: joiners.first_completed(*runners, timeout=timeout),
        lambda: joiners.first_success(*runners, timeout=timeout),
        lambda: joiners.quorum(1, *runners, timeout=timeout),
        lambda: joiners.as_completed(runners, timeout=timeout),
    ):
        with pytest.raises(ValueError, match="timeout must be"):
            join()
    assert not any(child.is_over for child in runners)


def test_only_children_can_be_joined():
    with pytest.raises(TypeError, match="Only children"):
        Joiners().gather(*[make(), "child"])


# -- one after another --------------------------------------------------------------------------


def test_children_come_in_the_order_in_which_they_end():
    one, two = children(2)
    complete(two)
    complete(one)
    assert list(AsCompleted([one, two], None)) == [two, one]

    async def collect():
        return [child async for child in AsCompleted([one, two], None)]

    assert asyncio.run(collect()) == [two, one]


def test_a_thread_may_end_a_child_while_another_waits_for_it():
    one, two = children(2)
    complete(one)
    order = iter(AsCompleted([one, two], None))
    assert next(order) is one
    threading.Timer(0.05, fail, [two]).start()
    assert next(order) is two


def test_children_that_take_too_long_are_named():
    one, two = children(2)
    complete(one)
    with pytest.raises(TimeoutError, match="child-1"):
        list(AsCompleted([one, two], 0.01))

    async def collect():
        async for _ in AsCompleted([one, two], 0.01):
            pass

    with pytest.raises(TimeoutError, match="child-1"):
        asyncio.run(collect())


def test_a_mapped_list_gives_all_results():
    mapped = Children(children(2))
    for number, child in enumerate(mapped):
        complete(child, number)
    mapped.wait(1)
    assert mapped.result() == [0, 1]

    async def collect():
        return await mapped

    assert asyncio.run(collect()) == [0, 1]


def test_a_mapped_list_can_give_errors_in_place_of_results():
    mapped = Children(children(1))
    fail(mapped[0])
    (error,) = mapped.result(raise_on_failure=False)
    assert isinstance(error, ChildError)


# -- what a scope tells of them -----------------------------------------------------------------


def ended(body, *, faults=None, **options):
    """Run a body to its end; return its run.

    Its children: *slow/test* takes 100 s, *good/test* 20 s, and *bad/test* fails after 10 s.
    """
    # Persisted, so that what it raises can be looked at.
    flow = supervised_flow(name="root", persist_result=True, **options)(body)
    with FakePrefect(faults=faults) as prefect:
        prefect.deploy("slow/test", takes=100)
        prefect.deploy("good/test", takes=20, returns="done")
        prefect.deploy("bad/test", takes=10, fails=True)
        run = prefect.start(flow)
        prefect.until(lambda: not prefect.alive, within=1000)
        return run


def two_slow():
    return [supervisor.spawn("slow/test", key=key) for key in ("one", "two")]


def raised_by(run):
    """Return what a run has raised: the failures in its group, or the exception itself."""
    assert run.state.is_failed()
    exc = run.state.data
    return list(exc.exceptions) if isinstance(exc, ExceptionGroup) else exc


@pytest.mark.parametrize("needed", [1, 2])
def test_an_open_race_adds_nothing_to_what_the_body_raises(needed):
    async def body():
        supervisor.quorum(needed, *two_slow())
        await asyncio.sleep(20)
        raise KeyError("the body's own")

    run = ended(body)
    assert isinstance(raised_by(run), KeyError)
    assert all(child.state.is_cancelled() for child in run.below)


@pytest.mark.parametrize("is_awaited", [False, True])
def test_an_open_race_adds_nothing_to_the_failure_of_another_child(is_awaited):
    async def body():
        supervisor.spawn("bad/test", key="bad")
        race = supervisor.first_success(*two_slow())
        await (race if is_awaited else asyncio.sleep(60))

    run = ended(body)
    (failure,) = raised_by(run)
    assert isinstance(failure, ChildFailed)
    assert str(failure.__cause__) == "it was made to fail"


def test_an_open_race_adds_nothing_in_a_thread():
    @supervised_flow(persist_result=True)
    def root():
        supervisor.spawn("bad/test", key="bad")
        supervisor.first_success(*two_slow()).result()

    with FakePrefect() as prefect:
        prefect.deploy("slow/test", takes=3600)
        prefect.deploy("bad/test", takes=1, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        (failure,) = raised_by(run)
        assert isinstance(failure, ChildFailed)
        assert failure.child == "bad/test"


def test_a_race_whose_scope_is_told_to_cancel_is_no_failure():
    async def body():
        supervisor.first_success(*two_slow())
        await asyncio.sleep(20)
        supervisor.cancel("enough")

    run = ended(body)
    assert run.state.is_completed()
    assert all(child.state.is_cancelled() for child in run.below)


def test_a_race_whose_children_somebody_cancels_is_no_failure():
    async def body():
        runners = two_slow()
        supervisor.first_success(*runners)
        await asyncio.sleep(20)
        for child in runners:
            child.cancel()

    assert ended(body).state.is_completed()


def test_a_race_that_was_lost_and_that_nobody_asks_about_is_the_scopes_failure():
    async def body():
        supervisor.first_success(*(supervisor.spawn("bad/test", key=key) for key in "ab"))
        await asyncio.sleep(60)

    # The group of the race, in that of the scope.
    (lost,) = raised_by(ended(body))
    assert [type(error) for error in lost.exceptions] == [ChildFailed] * 2


def test_a_race_that_takes_too_long_cancels_its_children():
    seen = []

    async def body():
        runners = two_slow()
        with pytest.raises(TimeoutError, match="within 20 s"):
            await supervisor.first_success(*runners, timeout=20)
        await asyncio.sleep(10)
        seen.extend((child.outcome, child.cancel_reason.source) for child in runners)

    run = ended(body)
    assert run.state.is_completed()
    assert seen == [("cancelled", "lost_race")] * 2


@pytest.mark.parametrize(
    "faults",
    [Faults(), Faults(dropped_events=1.0)],
    ids=["one after the other", "in one look"],
)
def test_the_second_failure_of_a_gather_is_the_scopes(faults):
    heard = []

    async def body():
        both = [supervisor.spawn("bad/test", key=key) for key in "ab"]
        try:
            await supervisor.gather(*both)
        except ChildFailed as exc:
            heard.append(exc.flow_run_id)
        await asyncio.sleep(30)

    run = ended(body, on_child_failure="wait", faults=faults)
    (other,) = raised_by(run)
    assert {*heard, other.flow_run_id} == {child.id for child in run.below}


def test_of_two_that_fail_alike_under_one_name_each_is_told_where_it_was_not_heard():
    heard, cleaned = [], []

    async def body():
        both = supervisor.map("bad/test", [{"part": 0}, {"part": 1}])
        try:
            await supervisor.gather(*both)
        except ChildFailed as exc:
            heard.append(exc.flow_run_id)
        await asyncio.sleep(5)
        cleaned.append(True)

    run = ended(body, faults=Faults(dropped_events=1.0))
    (other,) = raised_by(run)
    assert cleaned
    assert {*heard, other.flow_run_id} == {child.id for child in run.below}


def test_the_second_failure_of_a_gather_of_inline_children_is_the_scopes():
    heard = []

    @supervised_flow
    async def bad():
        await asyncio.sleep(10)
        raise ValueError("bad")

    async def body():
        both = [supervisor.spawn(bad, key=key) for key in "ab"]
        try:
            await supervisor.gather(*both)
        except ChildFailed as exc:
            heard.append(exc.flow_run_id)
        await asyncio.sleep(10)

    run = ended(body, on_child_failure="wait")
    (other,) = raised_by(run)
    assert {*heard, other.flow_run_id} == {child.id for child in run.below}


def test_a_gather_that_gives_errors_has_told_of_all_failures():
    async def body():
        both = [supervisor.spawn("bad/test", key=key) for key in "ab"]
        await supervisor.gather(*both, return_exceptions=True)

    assert ended(body, on_child_failure="wait").state.is_completed()


def test_a_child_that_failed_is_given_to_the_body_that_takes_them_as_they_end():
    handled = []

    async def body():
        both = [supervisor.spawn("bad/test"), supervisor.spawn("good/test")]
        async for child in supervisor.as_completed(both):
            try:
                await child
            except ChildError as exc:
                handled.append((exc.child, child.outcome))

    run = ended(body)
    assert handled == [("bad/test", "failed"), ("good/test", "cancelled")]
    assert run.state.is_completed()


def test_a_failed_child_that_was_given_and_not_asked_is_the_scopes_failure():
    given = []

    async def body():
        both = [supervisor.spawn("bad/test"), supervisor.spawn("good/test")]
        given.extend([child.name async for child in supervisor.as_completed(both)])

    (failure,) = raised_by(ended(body, on_child_failure="wait"))
    assert given == ["bad/test", "good/test"]
    assert failure.child == "bad/test"


@pytest.mark.parametrize("policy", ["wait", "cancel_siblings"])
def test_a_failure_that_nobody_was_given_is_not_lost_with_the_loop(policy):
    @supervised_flow(on_child_failure=policy)
    async def root():
        many = [supervisor.spawn("quick/test"), supervisor.spawn("bad/test")]
        async for _ in supervisor.as_completed(many):
            await asyncio.sleep(30)
            break

    with FakePrefect() as prefect:
        prefect.deploy("quick/test", takes=1)
        prefect.deploy("bad/test", takes=10, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=120)
        assert run.state.is_failed()


# -- what is heard, by whom, and when ------------------------------------------------------------


def played(body, **options):
    """Run a body with children that take 100 s, 20 s, or fail after 10 s; return its run."""
    root = supervised_flow(name="root", **options)(body)
    with FakePrefect() as prefect:
        prefect.deploy("slow/test", takes=100)
        prefect.deploy("good/test", takes=20, returns="done")
        prefect.deploy("bad/test", takes=10, fails=True)
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive, within=1000)
        return run


def test_a_failure_whose_waiter_was_cancelled_before_it_heard_is_told_by_the_scope():
    async def body():
        bad = supervisor.spawn("bad/test")
        waiting = asyncio.ensure_future(bad.aresult())
        bad.add_done_callback(lambda _: loop.call_soon_threadsafe(waiting.cancel))
        loop = asyncio.get_running_loop()
        await asyncio.wait([waiting])

    assert played(body, on_child_failure="wait").state.is_failed()


def test_a_body_whose_wait_for_the_failure_was_given_up_does_not_go_on_in_a_dead_scope():
    woken = []

    async def body():
        bad = supervisor.spawn("bad/test")
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(bad.aresult())
        bad.add_done_callback(lambda _: loop.call_soon_threadsafe(waiting.cancel))
        await asyncio.wait([waiting])
        await asyncio.sleep(500)
        woken.append(True)

    run = played(body)
    assert run.state.is_failed()
    assert not woken


def test_a_failure_that_somebody_handled_is_not_told_again_because_another_waited_too():
    async def body():
        bad, slow = supervisor.spawn("bad/test"), supervisor.spawn("slow/test")

        async def handle():
            with pytest.raises(ChildFailed):
                await bad

        handling = asyncio.ensure_future(handle())
        with pytest.raises(TimeoutError):
            await supervisor.gather(bad, slow, return_exceptions=True, timeout=30)
        await handling

    assert played(body, on_child_failure="wait").state.is_completed()


def test_a_race_is_over_in_time_though_nobody_waits_for_it():
    seen = []

    async def body():
        slow, slower = supervisor.spawn("slow/test"), supervisor.spawn("slow/test")
        race = supervisor.first_success(slow, slower, timeout=5)
        await asyncio.sleep(50)
        seen.extend(child.outcome for child in (slow, slower))
        with pytest.raises(TimeoutError, match="within 5 s"):
            await race

    assert played(body).state.is_completed()
    assert seen == ["cancelled", "cancelled"]


def test_a_lost_race_is_told_by_the_scope_that_began_it_though_it_spawned_nothing():
    async def body():
        bad, worse = supervisor.spawn("bad/test"), supervisor.spawn("bad/test")

        @supervised_flow
        async def inner():
            supervisor.first_success(bad, worse)
            await asyncio.sleep(30)

        await inner()

    run = played(body, on_child_failure="wait")
    assert run.state.is_failed()


def test_a_race_owns_a_failure_that_came_before_it_began():
    async def body():
        bad, good = supervisor.spawn("bad/test"), supervisor.spawn("good/test")
        await asyncio.sleep(12)
        return await supervisor.first_success(bad, good)

    assert played(body, on_child_failure="wait").state.is_completed()


def test_what_a_lost_race_tells_names_each_childs_own_exception():
    told = []

    async def body():
        race = supervisor.first_success(supervisor.spawn("bad/test"), supervisor.spawn("bad/test"))
        await asyncio.sleep(20)
        told.append(race)

    played(body)
    error = told[0].error()
    assert [type(each.__cause__) for each in error.exceptions] == [RuntimeError, RuntimeError]


def test_of_races_that_begin_in_many_threads_none_is_forgotten():
    joiners, each = Joiners(), 200

    def begin():
        for _ in range(each):
            joiners.first_success(make())

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(joiners._races) == 8 * each


@pytest.mark.parametrize("timeout", [-1, float("nan"), "x"])
def test_a_wait_of_no_length_is_refused(timeout):
    child = make()
    join = Joiners().gather(child)
    for ask in (child.result, child.wait, join.result, Children([child]).wait):
        with pytest.raises(ValueError, match="timeout must be"):
            ask(timeout)


@pytest.mark.parametrize("ends", ["raises", "cancels", "races"])
def test_a_child_that_was_let_go_before_it_had_a_run_is_launched_whatever_comes(ends):
    async def body():
        child = supervisor.spawn("good/test")
        child.detach()
        if ends == "raises":
            raise KeyError("mine")
        if ends == "cancels":
            supervisor.cancel()
        else:
            await supervisor.first_success(child, supervisor.spawn("good/test"))

    run = played(body)
    assert run.report is None or all(
        each.status == "detached" for each in run.report.receipts if each.name == "good/test"
    )
    deployed = [each for each in run.below if each.state.is_cancelled()]
    assert not deployed
