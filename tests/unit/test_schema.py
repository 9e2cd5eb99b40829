"""Parameters that fit here fit on the server; of what may not, the server is the judge."""

from __future__ import annotations

import socket
from datetime import datetime
from types import SimpleNamespace
from typing import Annotated, Literal, Optional, Union

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prefect.blocks.core import Block
from prefect.utilities.callables import parameter_schema as schema_of
from prefect.utilities.schema_tools import validate
from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python

from supervised import _schema
from supervised._schema import ParameterSchema, parameter_schema


class Part(BaseModel):
    name: str
    sizes: list[float] = []
    unit: Optional[Literal["m", "km"]] = None  # noqa: UP045 - what pydantic 1 wrote differently


class Group(BaseModel):
    parts: list[Part] = Field(default_factory=list)


class Stock(BaseModel):
    kind: Literal["stock"] = "stock"
    lots: list[int] = Field(default_factory=list)


class Bond(BaseModel):
    kind: Literal["stock"] = "stock"
    lots: Optional[list[int]] = None  # noqa: UP045


class Warehouse(Block):
    host: str = "localhost"


class And(BaseModel):
    of: list[Union[And, Or, int]]  # noqa: UP007


class Or(BaseModel):
    of: list[Union[And, Or, int]]  # noqa: UP007


def train(
    part: Part,
    parts: list[Part],
    pair: tuple[int, str],
    weights: dict[str, float],
    since: datetime,
    either: int | Part | list[Group],
    rounds: int = 1,
    note: str | None = None,
    group: Group = Group(),  # noqa: B008
) -> None:
    """A flow's function, with parameters of many kinds."""


TRAIN = schema_of(train).model_dump()
GIVEN = {
    "part": {"name": "a"},
    "parts": [{"name": "b", "sizes": [1.5], "unit": "km"}],
    "pair": [1, "x"],
    "weights": {"x": 0.5},
    "since": "2026-01-01T00:00:00Z",
    "either": 1,
}
ONE = {"title": "Parameters", "type": "object", "properties": {"x": {"type": "integer"}}}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS
    | st.sampled_from(
        [
            {"name": "a"},
            {"name": "a", "sizes": None},
            {"parts": None},
            {"parts": []},
            "km",
            [1, "x"],
        ]
    ),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["name", "sizes", "unit", "parts", "$ref"]), inner)
    ),
    max_leaves=5,
)
WORDS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["integer", "null", "array", "object", "nothing", ["string"]]),
        "enum": st.lists(st.integers(), max_size=2) | st.integers(),
        "items": st.sampled_from([{"type": "integer"}, [{"type": "integer"}], {"$ref": "#/x"}]),
        "anyOf": st.lists(st.sampled_from([{"type": "integer"}, {"type": "null"}])),
        "oneOf": st.lists(st.sampled_from([{"type": "integer"}, {"minimum": 3}])),
        "not": st.sampled_from([{"type": "integer"}, {}]),
        "examples": st.sampled_from([[3], "3"]),
        "default": st.none(),
        "properties": st.sampled_from([{"a": {"type": "integer"}}, [], {"a": 7}]),
        "required": st.sampled_from([["a"], "a"]),
        "$ref": st.sampled_from(["#/definitions/y", "#/properties/x", "http://schemas.test/x"]),
    },
)


def deployment(schema, defaults=None, *, enforced=True):
    """What the server tells of a deployment."""
    return SimpleNamespace(
        parameter_openapi_schema=schema, parameters=defaults, enforce_parameter_schema=enforced
    )


def fits(schema, given, defaults=None):
    return ParameterSchema(schema, defaults or {}).fits(given)


def is_accepted(schema, given):
    """Whether Prefect's own validation, which the server uses, accepts parameters."""
    try:
        validate(given, schema, raise_on_error=True)
    except Exception:  # a schema that it does not accept has the server answer 500
        return False
    return True


def taking(kind):
    """Return the schema of a flow that takes one parameter of a kind."""

    def takes(x): ...

    takes.__annotations__["x"] = kind
    return schema_of(takes).model_dump()


def test_parameters_of_many_kinds_fit():
    assert fits(TRAIN, GIVEN)
    assert fits(TRAIN, to_jsonable_python({**GIVEN, "part": Part(name="c"), "note": None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("part", {}), ("parts", [{"name": 1}]), ("rounds", "many"), ("weights", [1]), ("since", 3)],
)
def test_parameters_of_another_type_do_not(name, value):
    assert not fits(TRAIN, {**GIVEN, name: value})


def test_a_parameter_that_is_required_may_be_the_deployments_own():
    required = {**ONE, "required": ["x"]}
    assert not fits(required, {})
    assert fits(required, {}, defaults={"x": 1})
    assert not fits(required, {"x": "many"}, defaults={"x": 1})


@given(st.sampled_from(sorted(TRAIN["properties"])), VALUES)
@example("either", [{"parts": [{"name": "a"}]}])
@example("group", {"parts": []})
def test_whatever_fits_here_prefect_accepts(name, value):
    given = {**GIVEN, name: value}
    assert not fits(TRAIN, given) or is_accepted(TRAIN, given)


@given(WORDS, WORDS, st.none() | st.integers(0, 4) | st.lists(st.integers(), max_size=2))
@example({"$ref": "#/definitions/y"}, {"type": "integer"}, 1)
@example({"type": "array", "items": [{"type": "integer"}]}, {}, [])
def test_whatever_the_schema_is_what_fits_here_prefect_accepts(said, defined, value):
    schema = {**ONE, "properties": {"x": said}, "definitions": {"y": defined}}
    assert not fits(schema, {"x": value}) or is_accepted(schema, {"x": value})


def test_what_prefect_reads_more_strictly_than_it_is_written_is_the_servers_to_judge():
    """It lets some parts be null, so that of two kinds of which one may fit both may."""
    schema = taking(Stock | Bond)
    strict = {**schema, "properties": {"x": {"oneOf": schema["properties"]["x"]["anyOf"]}}}
    assert fits(schema, {"x": {"lots": [1]}})
    assert not fits(strict, {"x": {"lots": None}})
    assert not is_accepted(strict, {"x": {"lots": None}})


def test_a_block_is_the_servers_to_judge():
    reference = {"$ref": {"block_document_id": "7"}}
    assert not is_accepted(taking(Warehouse), {"x": {**reference}})
    assert not fits(taking(Warehouse), {"x": {**reference}})


def test_a_schema_that_the_server_refuses_is_not_taken_for_one():
    schema = taking(Annotated[int, Field(json_schema_extra={"examples": "3"})])
    assert not is_accepted(schema, {"x": 1})
    assert not fits(schema, {"x": 1})


@pytest.mark.parametrize(
    ("kind", "value"),
    [(And, {"of": [1]}), (Annotated[str, Field(pattern=r"^(\w+\s?)*$")], "a"), (set[int], [1])],
    ids=["a model that contains itself", "a pattern", "a set"],
)
def test_what_may_take_long_is_the_servers_to_judge(kind, value):
    assert not fits(taking(kind), {"x": value})
    assert is_accepted(taking(kind), {"x": value})


@pytest.mark.parametrize(
    "value",
    [
        {"__prefect_kind": "json", "value": "1"},
        [{"a": {"__prefect_kind": "workspace_variable", "variable_name": "n"}}],
    ],
    ids=["the value itself", "deep in it"],
)
def test_a_template_is_for_the_server_to_fill_in_and_to_judge(value):
    anything = {**ONE, "properties": {"x": {}}}
    assert fits(anything, {"x": 1})
    assert not fits(anything, {"x": value})
    assert not fits(anything, {}, defaults={"x": value})


def test_what_is_large_is_the_servers_to_judge_so_that_the_scope_is_not_held_up():
    many = {**ONE, "properties": {"x": {"type": "array", "items": {"type": "integer"}}}}
    assert fits(many, {"x": [1] * 1_000})
    assert not fits(many, {"x": [1] * 10_000})


@pytest.mark.parametrize("said", [{"type": "no such type"}, {"type": "array", "items": [{}]}, 7])
def test_a_schema_that_is_none_is_the_servers_to_refuse(said):
    assert not fits({**ONE, "properties": {"x": said}}, {"x": [1]})


@pytest.mark.parametrize("odd", [{"$id": 5}, {"properties": ["x"]}, {"definitions": 7}])
def test_an_odd_schema_fails_no_launch(odd):
    schema = ParameterSchema({**ONE, **odd}, {})
    assert not schema.fits({"x": 1})
    assert schema.unknown({"x": 1}) in ([], ["x"])


def test_a_schema_that_leads_to_itself_is_the_servers_to_refuse():
    assert not fits({**ONE, "properties": {"x": {"$ref": "#/properties/x"}}}, {"x": 1})


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf")])
def test_what_has_no_json_form_does_not_fit(value):
    assert not fits({**ONE, "properties": {"x": {}}}, {"x": value})


def test_a_schema_of_many_parts_is_the_servers_to_judge_if_there_is_much_to_compare():
    many = {**ONE, "properties": {"x": {"type": "array", "items": {"enum": [*range(500)]}}}}
    assert fits(many, {"x": [1] * 10})
    assert not fits(many, {"x": [1] * 600})


def test_a_schema_is_judged_once_however_often_it_is_looked_up():
    before = _schema._judge.cache_info().misses
    title = {**ONE, "title": "A schema that no other test has"}
    assert all(ParameterSchema(dict(title), {}).fits({"x": 1}) for _ in range(3))
    assert _schema._judge.cache_info().misses == before + 1


def test_a_schema_elsewhere_is_not_fetched(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args))
    assert not fits({**ONE, "properties": {"x": {"$ref": "http://schemas.test/x"}}}, {"x": 1})
    assert asked == []


def test_a_deployment_whose_schema_nobody_enforces_has_none():
    assert parameter_schema(deployment(ONE)) == ParameterSchema(ONE, {})
    assert parameter_schema(deployment(ONE, enforced=False)) is None


@pytest.mark.parametrize("schema", [None, {}, {"type": "object", "properties": {}}])
def test_a_deployment_that_was_made_without_a_schema_has_none(schema):
    assert parameter_schema(deployment(schema)) is None


def test_a_parameter_that_the_flow_does_not_have_is_unknown():
    schema = ParameterSchema(TRAIN, {})
    assert schema.unknown({**GIVEN, "speed": 1, "age": 2}) == ["age", "speed"]
    assert schema.unknown(GIVEN) == []


def plain(x: int, **rest) -> None: ...


def annotated(x: int, **rest: float) -> None: ...


@pytest.mark.parametrize("function", [plain, annotated])
def test_to_a_flow_that_takes_anything_nothing_is_unknown(function):
    schema = ParameterSchema(schema_of(function).model_dump(), {})
    assert schema.unknown({"x": 1, "y": 2}) == []
    assert schema.fits({"x": 1, "y": 2})


def test_a_position_may_be_anything():
    def takes(
        x: Annotated[int, Field(json_schema_extra={"position": "first"})], y: int
    ) -> None: ...

    assert ParameterSchema(schema_of(takes).model_dump(), {}).unknown({"x": 1, "z": 2}) == ["z"]


def test_a_parameter_that_is_a_dict_does_not_make_a_flow_take_anything():
    def takes(x: int, options: dict = {}, y: int = 1) -> None: ...  # noqa: B006

    assert ParameterSchema(schema_of(takes).model_dump(), {}).unknown({"x": 1, "z": 2}) == ["z"]


def test_to_a_flow_that_took_anything_under_an_older_prefect_nothing_is_unknown():
    older = {**ONE, "properties": {**ONE["properties"], "rest": {"title": "rest", "position": 1}}}
    assert ParameterSchema(older, {}).unknown({"x": 1, "y": 2}) == []
