"""The children of one scope: who is admitted, who is live, and when all are over."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervised import DuplicateKeyError, ScopeClosedError
from supervised._registry import Registry, describe_ban
from supervised._types import CancelReason


@pytest.fixture(scope="session")
def open_scope(make_child):
    """A function that makes a registry, and one that admits children to it."""

    def open_():
        registry = Registry("etl")

        def admit(work, key=None):
            return registry.admit(
                key=key,
                work=work,
                make=lambda final: make_child(
                    name=f"child {final}", key=final, target=work, on_done=registry.finished
                ),
            )

        return registry, admit

    return open_


@pytest.fixture
def scope(open_scope):
    return open_scope()


# -- admission ----------------------------------------------------------------------------------


def test_equal_work_without_a_key_is_as_many_children_as_it_was_spawned(scope):
    registry, admit = scope
    admitted = [admit("load:1"), admit("load:2"), admit("load:1"), admit("load:1")]
    assert all(is_new for _, is_new in admitted)
    assert [child.key for child, _ in admitted] == ["load:1", "load:2", "load:1#2", "load:1#3"]
    assert registry.all() == [child for child, _ in admitted]


def test_the_same_key_for_the_same_work_is_the_same_child(scope):
    registry, admit = scope
    first, is_new = admit("load:1", key="nightly")
    again, is_new_again = admit("load:1", key="nightly")
    assert (is_new, is_new_again) == (True, False)
    assert first is again
    assert [first] == registry.all()


def test_the_same_key_still_means_the_same_child_after_its_end(scope):
    _, admit = scope
    first, _ = admit("load:1", key="nightly")
    first.settle("failed")
    assert (first, False) == admit("load:1", key="nightly")


def test_the_same_key_for_other_work_is_refused(scope):
    registry, admit = scope
    first, _ = admit("load:1", key="nightly")
    with pytest.raises(DuplicateKeyError, match="'nightly' is taken in 'etl' by load:1") as caught:
        admit("load:2", key="nightly")
    assert first.name == caught.value.child
    assert [first] == registry.all()


def test_a_made_up_key_evades_the_ones_that_users_chose(scope):
    _, admit = scope
    admit("other", key="load:1")
    admit("other", key="load:1#2")
    child, is_new = admit("load:1")
    assert is_new
    assert child.key == "load:1#3"


def test_a_child_that_cannot_be_made_leaves_no_trace(scope):
    registry, admit = scope

    def fail(key):
        raise ValueError(key)

    with pytest.raises(ValueError, match="nightly"):
        registry.admit(key="nightly", work="load:1", make=fail)
    assert registry.all() == []
    assert registry.when_settled().done()
    assert admit("load:2", key="nightly")[1]


# -- the end of admission -----------------------------------------------------------------------


def test_nothing_is_admitted_after_a_ban_not_even_what_is_known(scope):
    registry, admit = scope
    child, _ = admit("load:1", key="nightly")
    registry.ban("the flow has ended")
    for key in (None, "nightly"):
        with pytest.raises(ScopeClosedError, match="in 'etl' any more: the flow has ended"):
            admit("load:1", key=key)
    assert [child] == registry.all()


def test_the_first_ban_gives_the_reason(scope):
    registry, admit = scope
    reason = CancelReason(source="sibling_failed", message="sibling 'a' failed: boom", child="a")
    registry.ban(describe_ban(reason))
    registry.ban("the flow has ended")
    with pytest.raises(ScopeClosedError, match="torn down because sibling 'a' failed: boom"):
        admit("load:1")


# -- who is live --------------------------------------------------------------------------------


def test_a_child_that_is_over_is_not_live_but_stays_on_record(scope):
    registry, admit = scope
    children = [admit(f"load:{n}")[0] for n in range(3)]
    children[1].settle("completed")
    assert children == registry.all()
    assert [children[0], children[2]] == registry.live()


def test_lists_of_children_are_copies(scope):
    registry, admit = scope
    admit("load:1")
    registry.all().clear()
    registry.live().clear()
    assert len(registry.all()) == len(registry.live()) == 1


# -- waiting ------------------------------------------------------------------------------------


def test_a_scope_without_children_is_settled(scope):
    registry, _ = scope
    assert registry.when_settled().result(timeout=0) is None


def test_a_scope_is_settled_when_its_last_child_is_over(scope):
    registry, admit = scope
    first, second = admit("load:1")[0], admit("load:2")[0]
    settled = registry.when_settled()
    second.settle("failed")
    assert not settled.done()
    first.settle("completed")
    assert settled.done()
    assert registry.when_settled().done()


def test_children_that_come_while_one_waits_are_waited_for(scope):
    registry, admit = scope
    first = admit("load:1")[0]
    settled = registry.when_settled()
    second = admit("load:2")[0]
    first.settle("completed")
    assert not settled.done()
    second.settle("completed")
    assert settled.done()


def test_a_ban_ends_the_waiting_for_children_that_live_on(scope):
    registry, admit = scope
    admit("load:1")
    settled = registry.when_settled()
    registry.ban("the scope is being torn down")
    assert settled.done()
    assert registry.when_settled().done()


def test_a_waiter_that_gave_up_is_no_obstacle_for_the_others(scope):
    registry, admit = scope
    child = admit("load:1")[0]
    given_up, patient = registry.when_settled(), registry.when_settled()
    assert given_up.cancel()
    child.settle("completed")
    assert patient.result(timeout=0) is None


def test_whoever_is_woken_may_use_the_registry_from_another_thread(scope):
    registry, admit = scope
    child = admit("load:1")[0]
    seen = []

    def look(_):
        thread = threading.Thread(target=lambda: seen.append(registry.live()))
        thread.start()
        thread.join(timeout=10)

    registry.when_settled().add_done_callback(look)
    child.settle("completed")
    assert seen == [[]]


# -- many threads -------------------------------------------------------------------------------

plans = st.lists(
    st.lists(st.sampled_from(["load:1", "load:2", "score:1"]), max_size=6), min_size=2, max_size=6
)


def in_threads(functions):
    """Run functions at once, each in its own thread, and return their results in order."""
    start = threading.Barrier(len(functions))

    def run(function):
        start.wait(timeout=10)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(run, function) for function in functions]
        return [future.result(timeout=10) for future in futures]


@settings(max_examples=25)
@given(plans)
def test_every_spawn_of_every_thread_is_a_child_of_its_own(open_scope, plan):
    registry, admit = open_scope()
    admitted = in_threads([lambda works=works: [admit(work) for work in works] for works in plan])
    children = [child for batch in admitted for child, _ in batch]
    assert all(is_new for batch in admitted for _, is_new in batch)
    assert len({child.key for child in children}) == len(children) == len(registry.all())
    for batch in admitted:
        keys = [child.key for child, _ in batch]
        assert keys == [child.key for child in registry.all() if child.key in keys]


@settings(max_examples=25)
@given(plans)
def test_the_scope_is_settled_exactly_when_all_threads_have_ended_their_children(open_scope, plan):
    registry, admit = open_scope()
    held = admit("held")[0]
    settled = registry.when_settled()

    def spawn_and_end(works):
        for work in works:
            admit(work)[0].settle("completed")

    in_threads([lambda works=works: spawn_and_end(works) for works in plan])
    assert not settled.done()
    assert [held] == registry.live()
    held.settle("completed")
    assert settled.done()
    assert registry.live() == []


@settings(max_examples=25)
@given(st.integers(2, 8))
def test_threads_that_spawn_one_key_share_one_child(open_scope, count):
    _, admit = open_scope()
    admitted = in_threads([lambda: admit("load:1", key="nightly")] * count)
    assert len({child for child, _ in admitted}) == 1
    assert [is_new for _, is_new in admitted].count(True) == 1


@settings(max_examples=25)
@given(plans)
def test_a_ban_lets_in_everybody_before_it_and_nobody_after(open_scope, plan):
    registry, admit = open_scope()

    def spawn(works):
        admitted = []
        with contextlib.suppress(ScopeClosedError):
            admitted.extend(admit(work)[0] for work in works)
        return admitted

    def ban():
        registry.ban("the flow has ended")
        return registry.all()

    *admitted, at_ban = in_threads([*(lambda works=works: spawn(works) for works in plan), ban])
    assert {child for batch in admitted for child in batch} == set(at_ban)
    assert at_ban == registry.all()
    assert isinstance(registry.when_settled(), concurrent.futures.Future)
    assert registry.when_settled().done()
