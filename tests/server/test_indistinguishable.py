"""A supervised flow that spawns nothing is a plain flow, whatever way one looks at it."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import cloudpickle
import prefect.runtime
import pytest
from prefect import Flow, flow, task
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.states import Cancelling, Completed, Failed
from support.observe import Observed, Observer
from support.world import FLOWS

from supervised import SupervisedFlow, supervised_flow
from supervised._control import ControlPlane

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervised.testing import LocalServer

Decorate = Any
"""`flow` or `supervised_flow`."""


# -- flows of all sorts -------------------------------------------------------------------------
#
# Each function makes one with the decorator that it is given, and returns what runs it.


def sync(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def sync(number: int) -> int:
        seen.look()
        get_run_logger().info("got %d", number)
        return number + 1

    return partial(sync, 1)


def asynchronous(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def asynchronous(number: int) -> int:
        seen.look()
        await asyncio.sleep(0)
        get_run_logger().info("got %d", number)
        return number + 1

    return lambda: asyncio.run(asynchronous(1))


def generator(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def generator(count: int) -> Iterator[int]:
        seen.look()
        yield from range(count)

    return lambda: list(generator(3))


def abandoned_generator(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def abandoned_generator() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            seen.look()
            get_run_logger().info("closed")

    def run() -> int:
        items = abandoned_generator()
        first = next(items)
        items.close()
        return first

    return run


def failing_generator(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def failing_generator() -> Iterator[int]:
        yield 1
        seen.look()
        raise ValueError("no second item")

    return lambda: list(failing_generator())


def async_generator(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def async_generator(count: int) -> AsyncIterator[int]:
        for number in range(count):
            seen.look()
            yield number

    async def collect() -> list[int]:
        return [item async for item in async_generator(3)]

    return lambda: asyncio.run(collect())


def failing(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def failing() -> None:
        seen.look()
        raise KeyError("nothing there")

    return failing


def failing_async(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def failing_async() -> None:
        seen.look()
        raise KeyError("nothing there")

    return lambda: asyncio.run(failing_async())


def with_a_wrong_parameter(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def with_a_wrong_parameter(number: int) -> int:
        seen.look()
        return number

    return partial(with_a_wrong_parameter, "many")


def retried(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(retries=2)
    def retried() -> int:
        seen.look()
        if prefect.runtime.flow_run.run_count < 3:
            raise ValueError("not yet")
        return prefect.runtime.flow_run.run_count

    return retried


def retried_async(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(retries=1, retry_delay_seconds=0.1)
    async def retried_async() -> None:
        seen.look()
        raise ValueError(f"attempt {prefect.runtime.flow_run.run_count}")

    return lambda: asyncio.run(retried_async())


@task
def add(left: int, right: int) -> int:
    return left + right


@task
async def multiply(left: int, right: int) -> int:
    return left * right


def with_tasks(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def with_tasks() -> int:
        seen.look()
        return add(add.submit(1, 2).result(), 3)

    return with_tasks


def with_async_tasks(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def with_async_tasks() -> int:
        seen.look()
        return add(await multiply(2, 3), 1)

    return lambda: asyncio.run(with_async_tasks())


@flow
def inner(number: int) -> int:
    return -number


@flow
async def inner_async(number: int) -> int:
    return -number


def with_a_subflow(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def with_a_subflow() -> int:
        seen.look()
        return inner(1)

    return with_a_subflow


def with_async_subflows(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def with_async_subflows() -> list[int]:
        seen.look()
        return [await inner_async(1), await inner_async(2)]

    return lambda: asyncio.run(with_async_subflows())


def with_a_subflow_of_its_kind(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def below(number: int) -> int:
        seen.look()
        return -number

    @decorate
    async def with_a_subflow_of_its_kind() -> int:
        seen.look()
        return below(1)

    return lambda: asyncio.run(with_a_subflow_of_its_kind())


HOOKS = ("on_completion", "on_failure", "on_cancellation", "on_crashed", "on_running")


def hooks(seen: Observer) -> dict[str, list[Callable[..., None]]]:
    return {kind: [seen.hook(kind)] for kind in HOOKS}


def with_hooks_completing(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(**hooks(seen))
    def with_hooks_completing() -> None:
        seen.look()

    return with_hooks_completing


def with_hooks_failing(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(**hooks(seen))
    def with_hooks_failing() -> None:
        seen.look()
        raise ValueError("bad")

    return with_hooks_failing


def with_hooks_crashing(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(**hooks(seen))
    def with_hooks_crashing() -> None:
        seen.look()
        raise KeyboardInterrupt

    return with_hooks_crashing


def with_hooks_crashing_async(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(**hooks(seen))
    async def with_hooks_crashing_async() -> None:
        seen.look()
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    return lambda: asyncio.run(with_hooks_crashing_async())


def with_hooks_cancelling(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(**hooks(seen))
    def with_hooks_cancelling() -> int:
        seen.look()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(prefect.runtime.flow_run.id, Cancelling())
        return 1

    return with_hooks_cancelling


def with_hooks_by_method(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def with_hooks_by_method() -> None:
        seen.look()
        raise ValueError("bad")

    for kind in HOOKS:
        getattr(with_hooks_by_method, kind)(seen.hook(kind))
    return with_hooks_by_method


def timed_out(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(timeout_seconds=1, **hooks(seen))
    def timed_out() -> None:
        seen.look()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)

    return timed_out


def timed_out_async(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(timeout_seconds=0.3, **hooks(seen))
    async def timed_out_async() -> None:
        seen.look()
        await asyncio.sleep(60)

    return lambda: asyncio.run(timed_out_async())


def state_asked_for(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def state_asked_for() -> int:
        seen.look()
        return 3

    return partial(state_asked_for, return_state=True)


def failed_state_asked_for(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def failed_state_asked_for() -> None:
        seen.look()
        raise ValueError("bad")

    return lambda: asyncio.run(failed_state_asked_for(return_state=True))


def returning_a_completed_state(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    def returning_a_completed_state() -> Any:
        seen.look()
        return Completed(message="all is well", name="Happy")

    return partial(returning_a_completed_state, return_state=True)


def returning_a_failed_state(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate
    async def returning_a_failed_state() -> Any:
        seen.look()
        return Failed(message="nothing is well")

    return lambda: asyncio.run(returning_a_failed_state())


def with_prints_and_a_name(decorate: Decorate, seen: Observer) -> Callable[[], object]:
    @decorate(log_prints=True, name="Prints", flow_run_name="prints-{text}", persist_result=True)
    def with_prints_and_a_name(text: str) -> str:
        seen.look()
        print(f"printed {text}")
        return prefect.runtime.flow_run.name

    return partial(with_prints_and_a_name, "hello")


SORTS = [
    sync,
    asynchronous,
    generator,
    abandoned_generator,
    failing_generator,
    async_generator,
    failing,
    failing_async,
    with_a_wrong_parameter,
    retried,
    retried_async,
    with_tasks,
    with_async_tasks,
    with_a_subflow,
    with_async_subflows,
    with_a_subflow_of_its_kind,
    with_hooks_completing,
    with_hooks_failing,
    with_hooks_crashing,
    with_hooks_crashing_async,
    with_hooks_cancelling,
    with_hooks_by_method,
    timed_out,
    timed_out_async,
    state_asked_for,
    failed_state_asked_for,
    returning_a_completed_state,
    returning_a_failed_state,
    with_prints_and_a_name,
]


# -- the comparison -----------------------------------------------------------------------------


@attrs.frozen
class Pair:
    """The same flow, plain and supervised."""

    plain: Observed
    supervised: Observed


@pytest.fixture(scope="module")
def observer(server: LocalServer) -> Iterator[Observer]:
    """An observer, after Prefect has done what it does once in a process."""
    with get_client(sync_client=True) as client:
        observer = Observer(client)
        for sort in (with_prints_and_a_name, with_tasks, with_async_subflows, timed_out):
            observer.observe(sort(flow, observer))
        yield observer


@pytest.fixture(scope="module", params=SORTS, ids=lambda sort: sort.__name__)
def pair(request: pytest.FixtureRequest, observer: Observer) -> Pair:
    plain = observer.observe(request.param(flow, observer))
    return Pair(plain, observer.observe(request.param(supervised_flow, observer)))


def test_it_returns_or_raises_the_same(pair: Pair) -> None:
    assert pair.supervised.outcome == pair.plain.outcome


def test_its_runs_end_in_the_same_states(pair: Pair) -> None:
    assert pair.plain.states
    assert pair.supervised.states == pair.plain.states


def test_it_logs_the_same(pair: Pair) -> None:
    assert pair.plain.logs
    assert pair.supervised.logs == pair.plain.logs


def test_it_makes_the_same_requests(pair: Pair) -> None:
    assert pair.plain.requests
    assert pair.supervised.requests == pair.plain.requests


def test_its_hooks_are_called_the_same(pair: Pair) -> None:
    assert pair.supervised.hooks == pair.plain.hooks


def test_it_has_no_thread_that_a_plain_flow_has_not(pair: Pair) -> None:
    during = zip(pair.supervised.threads, pair.plain.threads, strict=True)
    assert [ours - plain for ours, plain in during] == [set()] * len(pair.plain.threads)
    assert pair.supervised.left_behind == set()
    assert ControlPlane._running == []


def test_the_table_calls_hooks_of_all_five_kinds(observer: Observer) -> None:
    """Else the comparison of hooks would compare nothing."""
    called = set()
    for sort in (with_hooks_completing, with_hooks_failing, with_hooks_crashing):
        called.update(observer.observe(sort(supervised_flow, observer)).hooks)
    called.update(observer.observe(with_hooks_cancelling(supervised_flow, observer)).hooks)
    assert {call.split(":")[0] for call in called} == set(HOOKS)


# -- what tools do with a flow ------------------------------------------------------------------


def nightly(day: str, count: int = 3) -> list[str]:
    """Do the nightly work.

    Args:
        day: Which day.
        count: How many parts.
    """
    return [day] * count


OPTIONS: dict[str, Any] = {"name": "Nightly", "retries": 2, "description": "Work at night."}
plain_nightly = flow(**OPTIONS)(nightly)
supervised_nightly = supervised_flow(
    **OPTIONS, grace_seconds=7, on_child_failure="wait", on_parent={"completed": "cancel"}
)(nightly)


def test_it_is_a_flow_with_the_same_face() -> None:
    ours, plain = supervised_nightly, plain_nightly
    assert isinstance(ours, Flow)
    assert inspect.signature(ours) == inspect.signature(plain)
    assert inspect.signature(ours.fn) == inspect.signature(plain.fn)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(ours, name) == getattr(plain, name)
        assert getattr(ours.fn, name) == getattr(plain.fn, name)


def test_it_tells_prefect_the_same_of_itself() -> None:
    """Its version and entrypoint come from the user's file, not from the library's."""
    same = set(vars(plain_nightly)) - {"fn", "task_runner"}
    assert {name: vars(supervised_nightly)[name] for name in same} == {
        name: vars(plain_nightly)[name] for name in same
    }
    assert supervised_nightly.version is not None
    assert supervised_nightly._entrypoint.endswith("test_indistinguishable:nightly")


def test_a_script_tells_prefect_the_same_of_its_flow(server: LocalServer) -> None:
    """What runs as `__main__` is known by its file, which must not become the library's."""
    plain, ours, changed = printed([sys.executable, "loaded.py"], server)
    assert ours == changed == plain
    assert ours["entrypoint"].endswith("loaded.py:double")
    assert ours["version"]


def printed(command: list[str], server: LocalServer) -> Any:
    """What a process prints that has nothing in common with this one but the server."""
    ended = subprocess.run(
        command, cwd=FLOWS, env=dict(server.env), capture_output=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr.decode()[-4000:]
    return json.loads(ended.stdout)


@pytest.mark.parametrize(
    ("sort", "kinds"),
    [
        (sync, (False, False)),
        (asynchronous, (True, False)),
        (generator, (False, True)),
        (async_generator, (True, True)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_of_the_kind_of_its_function(sort: Callable[..., Any], kinds: object) -> None:
    made: list[SupervisedFlow[..., Any]] = []

    def decorate(fn: Callable[..., Any]) -> SupervisedFlow[..., Any]:
        made.append(supervised_flow(fn))
        return made[0]

    sort(decorate, None)
    assert (made[0].isasync, made[0].isgenerator) == kinds
    assert inspect.iscoroutinefunction(made[0].fn) == (kinds == (True, False))
    assert inspect.isgeneratorfunction(made[0].fn) == (kinds == (False, True))
    assert inspect.isasyncgenfunction(made[0].fn) == (kinds == (True, True))


def test_it_can_be_pickled(server: LocalServer) -> None:
    loaded = pickle.loads(cloudpickle.dumps(supervised_nightly))
    assert type(loaded) is SupervisedFlow
    assert loaded.scope_options == supervised_nightly.scope_options
    assert loaded.version == supervised_nightly.version
    assert loaded("monday", count=1) == ["monday"]


LOAD_PICKLE = """
import pickle, sys
loaded = pickle.load(sys.stdin.buffer)
print(type(loaded).__name__, loaded.scope_options.grace_seconds, loaded.retries, loaded(5))
"""


def test_it_can_be_pickled_into_a_process_that_lacks_its_module(server: LocalServer) -> None:
    """As `flow.serve()` does."""
    factor = 3

    @supervised_flow(grace_seconds=7, retries=1)
    def times(number: int) -> int:
        return factor * number

    ended = subprocess.run(
        [sys.executable, "-c", LOAD_PICKLE],
        input=cloudpickle.dumps(times),
        env=dict(server.env),
        cwd=FLOWS,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert ended.stdout.decode().split() == ["SupervisedFlow", "7", "1", "15"], ended.stderr


def test_a_copy_is_as_good_as_the_original(server: LocalServer) -> None:
    copied = copy.copy(supervised_nightly)
    assert type(copied) is SupervisedFlow
    assert copied.scope_options == supervised_nightly.scope_options
    assert copied("monday", count=1) == ["monday"]


def test_other_options_leave_everything_else_alone(server: LocalServer) -> None:
    changed = supervised_nightly.with_options(retries=0, grace_seconds=9)
    assert type(changed) is SupervisedFlow
    assert (changed.retries, supervised_nightly.retries) == (0, 2)
    before, after = supervised_nightly.scope_options, changed.scope_options
    assert after == attrs.evolve(before, grace_seconds=9)
    assert changed.unsupervised_fn is supervised_nightly.unsupervised_fn is nightly
    for name in ("version", "_entrypoint", "parameters", "description", "name"):
        assert getattr(changed, name) == getattr(supervised_nightly, name)
    assert inspect.signature(changed) == inspect.signature(supervised_nightly)
    assert changed("monday", count=1) == ["monday"]


def test_options_change_as_those_of_a_plain_flow_do() -> None:
    options = {"name": "Daily", "retries": 5, "timeout_seconds": 3, "log_prints": True}
    ours, plain = supervised_nightly.with_options(**options), plain_nightly.with_options(**options)
    same = set(vars(plain)) - {"fn", "task_runner", "__wrapped__"}
    assert {name: vars(ours)[name] for name in same} == {name: vars(plain)[name] for name in same}
    assert inspect.unwrap(ours) is inspect.unwrap(plain) is nightly


def test_a_changed_flow_is_supervised_once(server: LocalServer) -> None:
    """Else each `with_options` would open one more scope in the same run."""
    changed = supervised_nightly.with_options(retries=0).with_options(name="Daily")
    assert changed.fn.__wrapped__ is nightly


class Scaler:
    """A user's class with flows for methods."""

    unit = 10

    def __init__(self, factor: int) -> None:
        self.factor = factor

    @supervised_flow
    def scale(self, number: int) -> int:
        return self.factor * number

    @supervised_flow
    async def scale_async(self, number: int) -> int:
        return self.factor * number

    @supervised_flow
    @classmethod
    def in_units(cls, number: int) -> int:
        return cls.unit * number

    @supervised_flow
    @staticmethod
    def halve(number: int) -> int:
        return number // 2


class Dozens(Scaler):
    unit = 12


def test_methods_can_be_supervised_flows(server: LocalServer) -> None:
    double = Scaler(2)
    assert double.scale(3) == 6
    assert asyncio.run(double.scale_async(4)) == 8


def test_a_method_stays_with_its_own_instance(server: LocalServer) -> None:
    """Under plain Prefect the instance that was touched last wins."""
    twice, thrice = Scaler(2).scale, Scaler(3).scale
    assert (twice(1), thrice(1), twice(1)) == (2, 3, 2)


def test_class_methods_and_static_methods_can_be_supervised_flows(server: LocalServer) -> None:
    assert Scaler.in_units(2) == 20
    assert Dozens.in_units(2) == Dozens(1).in_units(2) == 24
    assert Scaler.halve(6) == Scaler(5).halve(6) == 3


LOAD = """
import json, sys
from prefect.flows import load_flow_from_entrypoint
loaded = load_flow_from_entrypoint(sys.argv[1])
grace_seconds = loaded.scope_options.grace_seconds
print(json.dumps([type(loaded).__name__, loaded.retries, grace_seconds, loaded(4)]))
"""


@pytest.mark.parametrize("entrypoint", ["loaded.py:double", "loaded.double"])
def test_a_process_that_knows_nothing_of_it_can_load_it(
    server: LocalServer, entrypoint: str
) -> None:
    loaded = printed([sys.executable, "-c", LOAD, entrypoint], server)
    assert loaded == ["SupervisedFlow", 2, 7, 8]


def test_it_becomes_the_same_deployment(server: LocalServer) -> None:
    """All that a runner registers, schedules and parameters included."""
    options: dict[str, Any] = {
        "parameters": {"day": "monday"},
        "interval": 3600,
        "tags": ["night"],
        "version": "1",
    }
    ours = supervised_nightly.to_deployment("test", **options)
    plain = plain_nightly.to_deployment("test", **options)
    varying = {"schedules"}  # anchored to the moment
    assert ours.model_dump(exclude=varying) == plain.model_dump(exclude=varying)
    assert ours._parameter_openapi_schema == plain._parameter_openapi_schema
    assert ours.full_name == "Nightly/test"
    assert len(ours.schedules) == 1


@pytest.mark.parametrize("of", [SupervisedFlow, supervised_flow], ids=["class", "decorator"])
def test_it_can_be_loaded_from_a_source(server: LocalServer, of: Any) -> None:
    loaded = of.from_source(str(FLOWS), "loaded.py:double")
    assert type(loaded) is SupervisedFlow
    assert loaded.scope_options.grace_seconds == 7
    assert loaded(4) == 8
    assert loaded.to_deployment("test").entrypoint == "loaded.py:double"
