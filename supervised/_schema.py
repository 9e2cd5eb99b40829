"""What the parameters of a deployment have to fit, found out here where that is certain.

Before each run of a bulk creation the server checks the deployment's schema, and then the run's
parameters against it (server/api/deployments.py, `bulk_create_flow_runs_from_deployment`;
jsonschema's `validate`): for a flow with ten parameters, models among them, the parameters take a
twentieth of that. So the schema is checked once here, and the server is told not to look at what
fits it for certain. Of anything else it is the judge, and gives its reasons.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from jsonschema import Draft202012Validator
from referencing import Registry

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

_MOST_PARTS = 1_000  # of a schema, with what it refers to: one may lead to itself
_MOST_WORK = 50_000  # parts times characters of parameters: the loop has other work
_TEMPLATE = "__prefect_kind"  # a value that the server fills in (utilities/schema_tools/hydration)
_TYPE_WORDS = ("type", "$ref", "anyOf", "allOf", "oneOf", "enum", "const")
_DEFINITIONS = "#/definitions/"
_SAY_NOTHING = {"title", "description", "default", "examples", "deprecated", "position"}
_FOR_OTHERS = {"format", "readOnly", "writeOnly"}  # the server has none of them checked either
_OF_VALUES = {"type", "enum", "const", "required", "multipleOf"}
_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_SIZES = {f"{end}{of}" for end in ("min", "max") for of in ("Length", "Items", "Properties")}
_OF_PARTS = {"properties", "items", "prefixItems", "additionalProperties", "anyOf", "allOf", "$ref"}
_PLAIN = {"definitions"}.union(_SAY_NOTHING, _FOR_OTHERS, _OF_VALUES, _LIMITS, _SIZES, _OF_PARTS)
"""What a schema may say for us to tell.

Prefect prepares a schema before it checks (utilities/schema_tools/validation.py,
`preprocess_schema`): it lets some parts be null, and a block be referred to. Under these words a
part that is let more makes the whole accept more; under `oneOf` or `not`, less. And none of them
can take long, as `pattern` and `uniqueItems` can.
"""


@attrs.frozen
class ParameterSchema:
    """What a deployment's schema says of its parameters.

    Args:
        schema: The schema.
        defaults: The deployment's own parameters, which a run's replace one by one.
    """

    _schema: Mapping[str, Any]
    _defaults: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The names of the parameters."""
        return list(self._properties)

    @property
    def _properties(self) -> Mapping[str, Any]:
        found = self._schema.get("properties")
        return found if isinstance(found, Mapping) else {}

    def unknown(self, given: Mapping[str, Any]) -> list[str]:
        """Return the names that the flow cannot take; none if it may take any (`**kwargs`)."""
        if _may_take_any(self._properties):
            return []
        return sorted(set(given) - set(self._properties))

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether a server of this version would accept the parameters, for certain.

        Args:
            given: The parameters of a run, as JSON.
        """
        try:
            text = json.dumps({**self._defaults, **given}, allow_nan=False)
            parts, validator = self._judged
            if validator is None or parts * len(text) > _MOST_WORK or _TEMPLATE in text:
                return False
            return bool(validator.is_valid(json.loads(text)))
        except Exception:  # no JSON, or too deep
            return False

    @functools.cached_property
    def _judged(self) -> tuple[int, Any]:
        return _judge(json.dumps(self._schema))


def parameter_schema(found: DeploymentResponse) -> ParameterSchema | None:
    """Return the schema of a deployment; `None` if it says nothing, or nobody is to enforce it."""
    if not found.enforce_parameter_schema:
        return None
    schema = found.parameter_openapi_schema or {}
    if not schema.get("properties") and "title" not in schema:
        return None  # what the server gives to a deployment that was made without a schema
    return ParameterSchema(schema, found.parameters or {})


@functools.lru_cache(maxsize=64)  # each is looked up again every few seconds
def _judge(schema: str) -> tuple[int, Any]:
    """Return of how many parts a schema is, and what validates by it; `None` if we cannot tell."""
    said = json.loads(schema)
    try:
        parts = list(itertools.islice(_unfolded(said), _MOST_PARTS + 1))
        is_plain = all(part is True or _PLAIN.issuperset(part) for part in parts)
        if not is_plain or len(parts) > _MOST_PARTS:
            return 0, None
        Draft202012Validator.check_schema(said)
        values = sum(len(part.get("enum", ())) for part in parts if part is not True)
    except Exception:  # it is no schema
        return 0, None
    # Without a registry of its own it would ask the network for what is not here.
    return len(parts) + values, Draft202012Validator(said, registry=Registry())


def _unfolded(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Yield all that a schema is made of, each reference followed: forever if one leads back."""
    definitions = schema.get("definitions") or {}
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        yield part
        if isinstance(part, Mapping):
            pending += part.get("properties", {}).values()
            for word in ("prefixItems", "anyOf", "allOf"):
                pending += part.get(word, ())
            pending += [part[word] for word in ("items", "additionalProperties") if word in part]
            if "$ref" in part:
                pending.append(definitions[part["$ref"].removeprefix(_DEFINITIONS)])


def _may_take_any(properties: Mapping[str, Any]) -> bool:
    """Whether the last may be `**kwargs`: of no type up to Prefect 3.8, of any names from 3.9 on.

    The latter is what a last parameter with the default `{}` looks like, too.
    """
    if not all(isinstance(said, Mapping) and _has_type(said) for said in properties.values()):
        return True
    if not properties:
        return False
    last = max(properties.values(), key=_position)
    return bool(last.get("type") == "object" and last.get("default") == {})


def _position(said: Mapping[str, Any]) -> int:
    found = said.get("position")
    return found if isinstance(found, int) else -1  # authors may have it be anything


def _has_type(said: Mapping[str, Any]) -> bool:
    return any(word in said for word in _TYPE_WORDS)
