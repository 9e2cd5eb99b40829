"""What is current: the supervisor behind its proxy, and whether the running code is to stop."""

from __future__ import annotations

import contextlib
import contextvars
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from supervised import NoSupervisorError, cancelled, supervisor
from supervised._context import current_child, current_supervisor
from supervised._types import CancelReason

ASKED = CancelReason(source="explicit", message="its handle was cancelled")


@contextlib.contextmanager
def current(variable, value):
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def a_supervisor(*, is_ending=False, children=("part",)):
    """What `cancelled` and the proxy ask of a supervisor."""
    return SimpleNamespace(
        is_ending=is_ending, children=children, owns=lambda child: child in children
    )


# -- the proxy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spawn", "cancel", "children", "nonsense"])
def test_outside_a_supervised_run_the_proxy_says_where_it_may_be_used(name):
    with pytest.raises(NoSupervisorError, match=rf"^supervisor\.{name} was used outside"):
        getattr(supervisor, name)


def test_inside_the_proxy_is_the_current_supervisor():
    with current(current_supervisor, a_supervisor()):
        assert supervisor.children == ("part",)
        with pytest.raises(AttributeError, match="nonsense"):
            supervisor.nonsense  # noqa: B018


def test_the_innermost_supervisor_is_current():
    with current(current_supervisor, a_supervisor()):
        with current(current_supervisor, a_supervisor()) as inner:
            inner.children = ("inner",)
            assert supervisor.children == ("inner",)
        assert supervisor.children == ("part",)


def test_a_thread_knows_the_supervisor_only_through_a_copy_of_the_context():
    with current(current_supervisor, a_supervisor()), ThreadPoolExecutor(1) as pool:
        context = contextvars.copy_context()
        given = pool.submit(context.run, lambda: supervisor.children)
        bare = pool.submit(lambda: supervisor.children)
        assert given.result(timeout=10) == ("part",)
        with pytest.raises(NoSupervisorError):
            bare.result(timeout=10)


def test_tools_that_look_for_special_names_find_none():
    assert not hasattr(supervisor, "__wrapped__")
    assert not hasattr(supervisor, "__deepcopy__")
    assert repr(supervisor) == "<supervisor of None>"


# -- whether to stop ----------------------------------------------------------------------------


def test_nothing_is_cancelled_outside_supervised_runs():
    assert not cancelled()


@pytest.mark.parametrize("is_ending", [False, True])
def test_code_is_to_stop_when_the_scope_around_it_ends(is_ending):
    with current(current_supervisor, a_supervisor(is_ending=is_ending)):
        assert is_ending is cancelled()


def test_an_inline_child_is_to_stop_once_its_cancellation_was_asked_for(make_child):
    with current(current_child, make_child(kind="inline")) as child:
        assert not cancelled()
        child.mark_cancel(ASKED)
        assert cancelled()


@pytest.mark.parametrize("is_own", [True, False])
def test_a_child_is_to_stop_with_a_scope_of_its_own_but_its_parents_has_to_ask(make_child, is_own):
    child = make_child(kind="inline")
    children = () if is_own else (child,)
    with (
        current(current_child, child),
        current(current_supervisor, a_supervisor(is_ending=True, children=children)),
    ):
        assert is_own is cancelled()
