"""User hooks work in whichever way Prefect calls them: by position, and by keyword."""

from __future__ import annotations

import asyncio
import functools
from uuid import uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.runner._hook_runner import _run_hooks as run_as_the_runner
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelling

from supervised._hooks import HOOK_OPTIONS, Hook, normalise_hook, normalise_hooks

RUN = FlowRun(id=uuid4(), flow_id=uuid4(), name="otter")
STATE = Cancelling()
heard = []


@flow
def etl():
    pass


@pytest.fixture(autouse=True)
def _nothing_heard():
    heard.clear()
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


def called_by_the_engine(hook):
    """What a hook gets from `FlowRunEngine.call_hooks`."""
    result = hook(etl, RUN, STATE)
    if asyncio.iscoroutine(result):
        asyncio.run(result)
    return heard.pop()


def called_by_the_runner(hook):
    """What a hook gets from the runner, which logs exceptions and goes on."""
    asyncio.run(run_as_the_runner([hook], RUN, etl, STATE))
    return heard.pop()


# -- every form of a hook -----------------------------------------------------------------------


def prefects_names(flow, flow_run, state):
    heard.append((flow, flow_run, state))


def any_names(f, fr, s):
    heard.append((f, fr, s))


def mixed_names(flow, fr, state):
    heard.append((flow, fr, state))


def positional_only(flow, flow_run, state, /):
    heard.append((flow, flow_run, state))


def with_defaults(flow, flow_run=None, state=None):
    heard.append((flow, flow_run, state))


def with_an_option(f, fr, s, loud=False):
    heard.append((f, fr, s))


def with_everything(*args, **kwargs):
    heard.append((*args, *kwargs.values()))


async def asynchronous(flow, flow_run, state):
    heard.append((flow, flow_run, state))


async def asynchronous_any_names(f, fr, s):
    heard.append((f, fr, s))


def labelled(label, f, fr, s):
    assert label == "ops"
    heard.append((f, fr, s))


async def labelled_asynchronous(label, f, fr, s):
    assert label == "ops"
    heard.append((f, fr, s))


def labelled_by_keyword(flow, flow_run, state, label):
    assert label == "ops"
    heard.append((flow, flow_run, state))


class Callable:
    def __call__(self, f, fr, s):
        heard.append((f, fr, s))

    def method(self, f, fr, s):
        heard.append((f, fr, s))

    async def async_method(self, f, fr, s):
        heard.append((f, fr, s))

    @classmethod
    def class_method(cls, f, fr, s):
        heard.append((f, fr, s))

    @staticmethod
    def static_method(f, fr, s):
        heard.append((f, fr, s))


class CallableByPrefectsNames:
    def __call__(self, flow, flow_run, state):
        heard.append((flow, flow_run, state))


class AsyncCallable:
    async def __call__(self, f, fr, s):
        heard.append((f, fr, s))


class AsyncCallableByPrefectsNames:
    async def __call__(self, flow, flow_run, state):
        heard.append((flow, flow_run, state))


def passing_everything_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def passing_positions_on(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


FORMS = {
    "Prefect's own names": prefects_names,
    "any names": any_names,
    "mixed names": mixed_names,
    "positional only": positional_only,
    "defaults": with_defaults,
    "a fourth argument with a default": with_an_option,
    "*args and **kwargs": with_everything,
    "lambda": lambda f, fr, s: heard.append((f, fr, s)),
    "lambda with *args": lambda *args: heard.append(args),
    "async function": asynchronous,
    "async function, any names": asynchronous_any_names,
    "partial by position": functools.partial(labelled, "ops"),
    "partial by keyword": functools.partial(labelled_by_keyword, label="ops"),
    "partial of a partial": functools.partial(functools.partial(labelled), "ops"),
    "partial, async": functools.partial(labelled_asynchronous, "ops"),
    "partial of a callable object": functools.partial(Callable()),
    "partial of an async callable object": functools.partial(AsyncCallable()),
    "callable object": Callable(),
    "callable object, Prefect's names": CallableByPrefectsNames(),
    "async callable object": AsyncCallable(),
    "async callable object, Prefect's names": AsyncCallableByPrefectsNames(),
    "bound method": Callable().method,
    "async bound method": Callable().async_method,
    "class method": Callable.class_method,
    "static method": Callable.static_method,
    "decorated": passing_everything_on(any_names),
    "decorated, async": passing_everything_on(asynchronous_any_names),
    "decorated, positions only": passing_positions_on(prefects_names),
}
each_form = pytest.mark.parametrize("hook", FORMS.values(), ids=FORMS.keys())


@each_form
def test_the_engine_calls_it_by_position(hook):
    assert (etl, RUN, STATE) == called_by_the_engine(normalise_hook("on_failure", hook))


@each_form
def test_the_runner_calls_it_by_keyword(hook):
    assert (etl, RUN, STATE) == called_by_the_runner(normalise_hook("on_cancellation", hook))


@each_form
def test_what_is_registered_equals_what_was_given(hook):
    registered = normalise_hook("on_failure", hook)
    assert registered == hook
    assert hook == registered
    assert hash(registered) == hash(hook)
    assert [registered].index(hook) == 0
    assert len({registered, hook}) == 1


@each_form
def test_registering_twice_is_registering_once(hook):
    once = normalise_hook("on_failure", hook)
    twice = normalise_hook("on_failure", once)
    assert once == twice
    assert (etl, RUN, STATE) == called_by_the_engine(twice)
    assert (etl, RUN, STATE) == called_by_the_runner(twice)


@pytest.mark.parametrize("hook", [prefects_names, asynchronous, with_defaults])
def test_a_hook_that_takes_both_calls_stays_itself(hook):
    assert normalise_hook("on_failure", hook) is hook


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (any_names, "any_names"),
        (asynchronous_any_names, "asynchronous_any_names"),
        (functools.partial(labelled, "ops"), "labelled"),
        (Callable(), "Callable"),
        (AsyncCallable(), "AsyncCallable"),
        (Callable().method, "method"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_stand_in_appears_in_logs_under_the_users_name(hook, name):
    stand_in = normalise_hook("on_failure", hook)
    assert isinstance(stand_in, Hook)
    assert name == stand_in.__name__
    assert repr(hook) == repr(stand_in)


def test_two_stand_ins_are_equal_exactly_when_their_hooks_are():
    assert normalise_hook("on_failure", any_names) == normalise_hook("on_crashed", any_names)
    assert normalise_hook("on_failure", any_names) != normalise_hook("on_failure", mixed_names)
    assert normalise_hook("on_failure", any_names) != "any_names"


# -- any signature ------------------------------------------------------------------------------

_NAMES = ["flow", "flow_run", "state", "x", "y"]


@st.composite
def signatures(draw):
    """The parameters of a function that three positional arguments fit."""
    names = draw(st.permutations(_NAMES))[: draw(st.integers(3, len(_NAMES)))]
    required = draw(st.integers(0, 3))
    return ", ".join(name if n < required else f"{name}=None" for n, name in enumerate(names))


@given(signatures())
@example("flow, x=None, flow_run=None, state=None")
@example("state, flow, flow_run")
def test_both_calls_hand_the_same_arguments_to_the_same_parameters(signature):
    hook = eval(f"lambda {signature}: list(locals().items())")
    normalised = normalise_hook("on_failure", hook)
    by_position = normalised(1, 2, 3)
    by_keyword = normalised(flow=1, flow_run=2, state=3)
    assert hook(1, 2, 3) == by_position == by_keyword


# -- what is refused ----------------------------------------------------------------------------


def too_few(flow, flow_run):
    pass


def too_many(flow, flow_run, state, reason):
    pass


def keywords_only(*, flow, flow_run, state):
    pass


class TooFew:
    def __call__(self, flow):
        pass


@pytest.mark.parametrize(
    ("hook", "shown", "name"),
    [
        (too_few, "too_few(flow, flow_run)", "too_few"),
        (too_many, "too_many(flow, flow_run, state, reason)", "too_many"),
        (keywords_only, "keywords_only(*, flow, flow_run, state)", "keywords_only"),
        (functools.partial(any_names, 1), "any_names(fr, s)", "any_names"),
        (TooFew(), "TooFew(flow)", "TooFew"),
        (lambda: None, "<lambda>()", "<lambda>"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hook_that_three_arguments_do_not_fit_is_refused_when_it_is_given(hook, shown, name):
    with pytest.raises(TypeError) as caught:
        normalise_hook("on_crashed", hook)
    assert str(caught.value) == (
        f"The 'on_crashed' hook {shown} cannot be called with three arguments. "
        f"Write it as: def {name}(flow, flow_run, state)"
    )
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def advice(option):
    return (
        f"Please provide a list of hooks to '{option}':\n\n"
        f"@flow({option}=[hook1, hook2])\ndef my_flow():\n\tpass"
    )


@pytest.mark.parametrize("option", HOOK_OPTIONS)
@pytest.mark.parametrize(("hook", "kind"), [(3, "int"), ("notify", "str"), (None, "NoneType")])
def test_something_that_cannot_be_called_is_refused_in_prefects_words(option, hook, kind):
    message = f"Expected callables in '{option}'; got {kind} instead. {advice(option)}"
    for refuse in (
        lambda: normalise_hook(option, hook),
        lambda: normalise_hooks(option, [any_names, hook]),
    ):
        with pytest.raises(TypeError) as caught:
            refuse()
        assert message == str(caught.value)


@pytest.mark.parametrize("option", HOOK_OPTIONS)
def test_something_that_is_no_collection_of_hooks_is_refused_in_prefects_words(option):
    with pytest.raises(TypeError) as caught:
        normalise_hooks(option, 3)
    assert str(caught.value) == f"Expected iterable for '{option}'; got int instead. " + advice(
        option
    )


# -- collections --------------------------------------------------------------------------------


def test_no_hooks_stay_none_so_that_prefect_applies_its_default():
    assert normalise_hooks("on_failure", None) is None


def test_a_single_hook_is_a_list_of_one():
    assert [any_names] == normalise_hooks("on_failure", any_names)


def test_a_single_hook_of_the_wrong_arity_is_told_both_ways_out():
    with pytest.raises(TypeError) as caught:
        normalise_hooks("on_failure", too_few)
    assert "cannot be called with three arguments" in str(caught.value)
    assert "Expected iterable for 'on_failure'; got function instead." in str(caught.value)


@pytest.mark.parametrize("collect", [list, tuple, iter, lambda hooks: (h for h in hooks)])
def test_hooks_keep_their_order_in_any_iterable(collect):
    hooks = [any_names, prefects_names, asynchronous]
    assert hooks == normalise_hooks("on_failure", collect(hooks))


def test_an_empty_list_stays_empty():
    assert normalise_hooks("on_failure", []) == []


def test_a_builtin_is_called_by_position():
    kept = normalise_hook("on_failure", max)
    assert kept(flow=1, flow_run=3, state=2) == 3
