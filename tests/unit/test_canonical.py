"""Which values are the same to whoever compares work, in this process and in others."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from uuid import UUID

import attrs
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from prefect import flow
from prefect.client.schemas.actions import DeploymentFlowRunCreate
from pydantic import BaseModel, Field, SecretBytes, SecretStr

from supervised import supervised_flow, supervisor
from supervised._canonical import closure, digest, is_plain
from supervised._identity import default_key, is_comparable
from supervised._launch import code_of, freeze_parameters
from supervised.testing import FakePrefect


class Colour(str, enum.Enum):
    """Compares equal to its value."""

    RED = "red"


class Light(enum.Enum):
    """Has the value of a colour, and is none."""

    RED = "red"


class Level(enum.IntEnum):
    """Compares equal to its number."""

    LOW = 1


@dataclasses.dataclass
class Point:
    x: object = 0


@dataclasses.dataclass
class Dot:
    x: object = 0


@attrs.define
class Spot:
    x: object = 0


class Model(BaseModel):
    x: object = 0
    hidden: int = Field(0, exclude=True)


class Open(BaseModel, extra="allow"):
    """Takes any field."""


class Subclass(Model):
    """Another model of the same fields."""


class Failing:
    """Raises when it is looked at."""

    def __reduce__(self):
        raise ValueError("do not pickle")


def itself():
    found = []
    found.append(found)
    return found


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


def made(constant):
    @flow
    def part():
        return constant

    return part


constants = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))  # lone surrogates too
    | st.binary()
    | st.uuids()
    | st.datetimes(timezones=st.none() | st.just(timezone.utc))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.sampled_from([Colour.RED, Light.RED, Level.LOW])
)
plain = constants | st.text(max_size=3).map(SecretStr) | st.binary(max_size=3).map(SecretBytes)
hashable = st.recursive(
    plain, lambda inner: st.tuples(inner) | st.frozensets(inner, max_size=3), max_leaves=4
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.sets(hashable, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | inner.map(Point)
        | inner.map(Spot)
        | inner.map(lambda x: Model(x=x))
    ),
    max_leaves=12,
)


@functools.singledispatch
def backwards(value):
    """An equal value of which no part but the plainest is the same object, filled backwards."""
    return value


@backwards.register
def _(value: dict):
    return {backwards(key): backwards(value[key]) for key in reversed(value)}


@backwards.register(list)
@backwards.register(tuple)
def _(value):
    return type(value)(backwards(each) for each in value)


@backwards.register(set)
@backwards.register(frozenset)
def _(value):
    return type(value)(backwards(each) for each in reversed(list(value)))


@backwards.register(Point)
@backwards.register(Spot)
def _(value):
    return type(value)(backwards(value.x))


@backwards.register
def _(value: Model):
    return Model(hidden=value.hidden, x=backwards(value.x))


@backwards.register(SecretStr)
@backwards.register(SecretBytes)
def _(value):
    return type(value)(value.get_secret_value())


@functools.singledispatch
def exactly(value):
    """A form that two values share only if they are the same: 1, 1.0 and True are three."""
    return type(value), repr(value)


@exactly.register
def _(value: dict):
    return "dict", frozenset((exactly(key), exactly(item)) for key, item in value.items())


@exactly.register(set)
@exactly.register(frozenset)
def _(value):
    return type(value), frozenset(exactly(each) for each in value)


@exactly.register(list)
@exactly.register(tuple)
def _(value):
    return type(value), tuple(exactly(each) for each in value)


@exactly.register(Point)
@exactly.register(Spot)
def _(value):
    return type(value), exactly(value.x)


@exactly.register
def _(value: Model):
    return type(value), exactly(value.x), value.hidden


@exactly.register(SecretStr)
@exactly.register(SecretBytes)
def _(value):
    return type(value), value.get_secret_value()


# -- what is the same ---------------------------------------------------------------------------


@given(values)
def test_equal_values_have_equal_digests_whatever_the_order_they_were_filled_in(value):
    assert digest(value) is not None
    assert digest(value) == digest(backwards(value))


@given(st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=4))
def test_equal_work_has_one_key_whatever_the_order_of_its_parameters(parameters):
    key = default_key("score/gpu", parameters, code="score.gpu")
    assert is_comparable(key)
    assert key == default_key("score/gpu", backwards(parameters), code="score.gpu")


@given(st.floats(), st.lists(st.floats(), max_size=3))
@example(math.nan, [math.nan])
def test_a_number_that_does_not_equal_itself_is_the_same_work(one, others):
    assert digest(one, others) == digest(one, list(others))


def test_looking_at_a_value_does_not_change_it():
    value = {"set": {1, 2}, "list": [{"a": SecretStr("b")}], "model": Model(x=[1])}
    before = exactly(value)
    digest(value)
    assert exactly(value) == before


_ELSEWHERE = """
import uuid
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath

from prefect import flow
from pydantic import SecretStr

from supervised._canonical import digest
from supervised._identity import default_key
from supervised._launch import code_of, freeze_parameters

names = [f"part-{number}" for number in range(50)]
def make(constant):
    def part():
        return constant
    part.__module__ = "parts"
    return flow(part)
parameters = {
    "set": set(names),
    "frozen": {frozenset(names[:9]), frozenset(names[9:])},
    "dict": {name: {name} for name in names},
    "mixed": {1, "1", 1.5, None, (1, "a"), b"a", date(2026, 1, 1)},
    "secret": SecretStr("s"),
    "plain": [uuid.UUID(int=1), Decimal("1.50"), timedelta(1), PurePosixPath("/a"), 1j],
    "when": datetime(2026, 1, 1, tzinfo=timezone.utc),
}
print(default_key("score/gpu", parameters, code=code_of(make("a"))))
print(digest(parameters), digest(code_of(make("b"))))
"""


def test_equal_values_have_equal_digests_in_other_processes_too():
    def told(seed):
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_ELSEWHERE)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    assert told("1") == told("2")


# -- what is not --------------------------------------------------------------------------------


@given(values, values)
def test_different_values_have_different_digests(one, other):
    assume(exactly(one) != exactly(other))
    assert digest(one) != digest(other)


MOMENT = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    "different",
    [
        [1, "1", True, 1.0, 1 + 0j, Decimal(1), b"1", Level.LOW],
        [0, False, None, "", b"", [], (), {}, set(), frozenset()],
        [[1, 2], (1, 2), {1, 2}, frozenset({1, 2}), [2, 1], range(1, 3), b"\1\2"],
        [{1: "x"}, {"1": "x"}, {1.0: "x"}, {True: "x"}, {(1,): "x"}],
        [{"a": {"b": 1}}, {"a": {"b": 2}}, {"a": [("b", 1)]}, [["a", {"b": 1}]]],
        [SecretStr("a"), SecretStr("b"), "a", SecretBytes(b"a"), SecretBytes(b"b")],
        [Colour.RED, Light.RED, "red", "RED"],
        [Point(1), Point(2), Point("1"), Dot(1), Spot(1), Spot(2), {"x": 1}, [1]],
        [Model(), Model(hidden=1), Model(x=1), Subclass(), {"x": 0, "hidden": 0}],
        [Open(a=1), Open(a=2), Open(b=1), Open()],
        [Point, Dot, Point(), "Point"],
        [UUID(int=1), str(UUID(int=1)), UUID(int=2)],
        [MOMENT, MOMENT.replace(tzinfo=None), MOMENT.isoformat(), MOMENT.date(), MOMENT.time()],
        [date(2026, 1, 1), date(2026, 1, 2), time(1), time(2), timedelta(1), timedelta(2)],
        [PurePosixPath("/a"), "/a", PurePosixPath("/b")],
        [Decimal("0.1"), 0.1, "0.1"],
        [math.nan, math.inf, -math.inf, "nan"],
        ["\ud800", "\udfff", "?", "\\ud800"],
        [10**20, 10**20 + 1, float(10**20)],
        [nested(3), nested(4), []],
    ],
    ids=lambda different: repr(different[0])[:20],
)
def test_what_is_alike_is_not_the_same(different):
    found = [digest(value) for value in different]
    assert None not in found
    assert len(set(found)) == len(different)
    assert len({default_key("f", {"x": value}) for value in different}) == len(different)


@given(st.lists(plain, max_size=3), st.lists(plain, max_size=3))
def test_it_matters_which_value_is_which(one, other):
    assume([exactly(value) for value in one] != [exactly(value) for value in other])
    assert digest(*one) != digest(*other)


# -- what cannot be compared --------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), itself(), nested(10**5), 10**5000, Point(threading.Lock()), Failing()],
    ids=["lock", "recursion", "depth", "huge", "field", "failing"],
)
def test_what_cannot_be_compared_equals_nothing(value):
    assert digest(value) is None
    assert digest("beside", value) is None
    assert digest({"inside": [value]}) is None
    assert not is_comparable(default_key("score", {"x": value}))


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": "\udfff"}, math.nan, {math.nan}, -0.0])
def test_what_has_no_json_form_can_be_compared(value):
    assert digest(value) is not None
    assert is_comparable(default_key("score\ud800", {"x\ud800": value}))


def test_work_that_cannot_be_compared_is_spawned_as_often_as_one_says():
    @flow
    def part(guard):
        return id(guard)

    @supervised_flow
    async def root():
        guards = [threading.Lock(), threading.Lock()]
        children = [supervisor.spawn(part, {"guard": guard}) for guard in guards]
        assert await supervisor.gather(*children) == [id(guard) for guard in guards]

    with FakePrefect() as prefect:
        run = prefect.start(root)
        prefect.until(lambda: not prefect.alive)
        assert run.state.is_completed()


# -- code ---------------------------------------------------------------------------------------


@given(constants, constants)
def test_flows_that_one_factory_has_made_are_told_apart_by_what_went_in(one, other):
    same = exactly(one) == exactly(other)
    assert (code_of(made(one)) == code_of(made(other))) is same
    codes = [code_of(made(each)) for each in (one, other)]
    assert (len({default_key("part", {}, code=code) for code in codes}) == 1) is same


def test_flows_made_of_functions_and_classes_are_told_apart_by_their_names():
    different = [backwards, exactly, made, itself, Point, Spot, math, os]
    assert len({code_of(made(each)) for each in different}) == len(different)


def test_a_flow_that_counts_its_calls_stays_the_same():
    calls = []

    @flow
    def counting():
        calls.append(1)
        return len(calls)

    before = code_of(counting)
    counting.fn()
    assert counting.fn() == 2
    assert code_of(counting) == before


def test_a_variable_that_is_filled_later_hinders_nothing():
    @flow
    def early():
        return late

    before = closure(early.fn)
    late = 1
    assert before == (None,)
    assert closure(early.fn) == (late,)


def test_two_flows_of_one_name_are_told_apart_by_where_they_are():
    def elsewhere():
        @flow
        def part():
            return None

        return part

    @flow
    def part():
        return None

    assert code_of(part) != code_of(elsewhere())
    assert code_of(part) == code_of(part)


def test_the_code_of_a_deployment_is_not_known_here():
    assert code_of("score/gpu") == code_of(UUID(int=1)) == ""


class Array:
    """Is pickled as arrays are: its buffer, as it lies in memory."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __reduce_ex__(self, protocol):
        return Array, (pickle.PickleBuffer(self.buffer),)


@pytest.mark.parametrize("size", [1, 1_000_000])
@pytest.mark.parametrize("rows", [1, 10])
def test_arrays_of_the_same_content_are_the_same_work(size, rows):
    def array(byte):
        return Array(memoryview(bytes([byte]) * (rows * size)).cast("B", (rows, size)))

    assert digest(array(1)) is not None
    assert digest(array(1)) == digest(array(1))
    assert digest(array(1)) != digest(array(2))


def test_a_sequence_that_fetches_what_it_has_is_not_read():
    class Pages(Sequence):
        def __len__(self):
            return 1_000_000

        def __getitem__(self, at):
            raise AssertionError("it was fetched")

    digest(Pages())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_is_json_is_sent_to_a_deployment_as_prefects_client_sends_it(value):
    assert is_plain(value)
    request = DeploymentFlowRunCreate(parameters={"value": value})
    sent = request.model_dump(mode="json", include={"parameters"})["parameters"]
    frozen = freeze_parameters("score/gpu", {"value": value})
    assert repr(frozen) == repr(sent)
    assert frozen["value"] is not value or not isinstance(value, (list, dict)), "it is a copy"


@pytest.mark.parametrize(
    "value", [(1,), {1: 2}, {"a": [{1}]}, Colour.RED, [date(2024, 1, 1)], b"a"]
)
def test_what_only_becomes_json_is_not_taken_for_it(value):
    assert not is_plain(value)


def test_parameters_that_raise_when_they_are_looked_at_are_left_to_the_request():
    class Fussy(list):
        def __init__(self, first, second):
            super().__init__([first, second])

    given_ones = {"value": Fussy(date(2024, 1, 1), SecretStr("a"))}
    assert freeze_parameters("score/gpu", given_ones)["value"]
