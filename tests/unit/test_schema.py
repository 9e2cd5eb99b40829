"""Parameters that fit here fit on the server; of what may not, the server is the judge."""

from __future__ import annotations

import socket
from datetime import datetime
from types import SimpleNamespace
from typing import Literal, Optional

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema as schema_of
from prefect.utilities.schema_tools import ValidationError, validate
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from supervised._schema import ParameterSchema, parameter_schema


class Part(BaseModel):
    name: str
    sizes: list[float] = []
    unit: Optional[Literal["m", "km"]] = None  # noqa: UP045 - what pydantic 1 wrote differently


def train(
    part: Part,
    parts: list[Part],
    pair: tuple[int, str],
    weights: dict[str, float],
    since: datetime,
    rounds: int = 1,
    note: str | None = None,
) -> None:
    """A flow's function, with parameters of many kinds."""


TRAIN = schema_of(train).model_dump()
GIVEN = {
    "part": {"name": "a"},
    "parts": [{"name": "b", "sizes": [1.5], "unit": "km"}],
    "pair": [1, "x"],
    "weights": {"x": 0.5},
    "since": "2026-01-01T00:00:00Z",
}
ONE = {"title": "Parameters", "type": "object", "properties": {"x": {"type": "integer"}}}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
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
    except ValidationError:
        return False
    return True


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


@given(st.sampled_from(sorted(GIVEN)), VALUES)
@example("pair", [])
@example("part", {"name": "a", "unit": "mile"})
def test_whatever_fits_here_prefect_accepts(name, value):
    given = {**GIVEN, name: value}
    assert not fits(TRAIN, given) or is_accepted(TRAIN, given)


@given(
    st.dictionaries(
        st.sampled_from(["type", "items", "prefixItems", "properties", "required", "enum", "$ref"]),
        VALUES | st.sampled_from(["integer", "null", "array", "#/properties/x"]),
    ),
    VALUES,
)
@example({"type": "array", "items": [{"type": "integer"}, {"type": "string"}]}, [1, "x"])
@example({"type": "array", "items": [{"type": "integer"}]}, [])
@example({"type": "integer"}, None)
@example({"$ref": "#/properties/x"}, 1)
def test_whatever_the_schema_is_what_fits_here_prefect_accepts_unless_it_refuses_the_schema(
    said, value
):
    schema = {**ONE, "properties": {"x": said}}
    if not fits(schema, {"x": value}):
        return
    try:
        assert is_accepted(schema, {"x": value})
    except AssertionError:
        raise
    except Exception:
        pass  # the schema is none, which would have the server answer 500


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


def test_a_schema_that_leads_to_itself_is_the_servers_to_refuse():
    assert not fits({**ONE, "properties": {"x": {"$ref": "#/properties/x"}}}, {"x": 1})


def test_what_has_no_json_form_does_not_fit():
    assert not fits({**ONE, "properties": {"x": {}}}, {"x": object()})


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


def test_to_a_flow_that_took_anything_under_an_older_prefect_nothing_is_unknown():
    older = {**ONE, "properties": {**ONE["properties"], "rest": {"title": "rest", "position": 1}}}
    assert ParameterSchema(older, {}).unknown({"x": 1, "y": 2}) == []
