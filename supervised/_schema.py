"""What the parameters of a deployment have to fit, found out here where that is certain.

The server checks the deployment's schema before each run's parameters, a hundred times for a
hundred runs: 0.6 ms for a flow with one parameter, 6 ms for one with ten, models among them
(server/api/deployments.py, `bulk_create_flow_runs_from_deployment`; jsonschema's `validate`).
Parameters alone take 0.005 and 0.25 ms. So it is told not to look at what fits for certain; of
anything else it is the judge, and gives its reasons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from jsonschema import Draft202012Validator
from referencing import Registry

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

_MOST_CHARACTERS = 4_096  # 5 ms of the loop's time, in the worst case
_TEMPLATE = "__prefect_kind"  # a value that the server fills in (utilities/schema_tools/hydration)
_TYPE_WORDS = ("type", "$ref", "anyOf", "allOf", "oneOf", "enum", "const")


@attrs.frozen
class ParameterSchema:
    """What a deployment's schema says of its parameters.

    Args:
        schema: The schema.
        defaults: The deployment's own parameters, which a run's replace one by one.
    """

    _schema: Mapping[str, Any]
    _defaults: Mapping[str, Any]
    _validator: Any = attrs.field(init=False, repr=False, eq=False)

    @_validator.default
    def _make_validator(self) -> object:
        # Without a registry of its own, a validator asks the network for what `$ref` names.
        return Draft202012Validator(self._schema, registry=Registry())

    @property
    def names(self) -> list[str]:
        """The names of the parameters."""
        return list(self._properties)

    @property
    def _properties(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._schema.get("properties") or {}
        return found

    def unknown(self, given: Mapping[str, Any]) -> list[str]:
        """Return the names that the flow cannot take; none if it may take any (`**kwargs`)."""
        if any(_may_be_anything(said) for said in self._properties.values()):
            return []
        return sorted(set(given) - set(self._properties))

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether the server would accept the parameters, for certain.

        It accepts more: Prefect's own validator fills templates in, allows `None` where pydantic 1
        did, and lets a block be referred to.

        Args:
            given: The parameters of a run, as JSON.
        """
        whole = {**self._defaults, **given}
        try:
            text = json.dumps(whole)
            if len(text) > _MOST_CHARACTERS or _TEMPLATE in text:
                return False
            return bool(self._validator.is_valid(whole))
        except Exception:  # no JSON, no schema, a reference to elsewhere, or one to itself
            return False


def parameter_schema(found: DeploymentResponse) -> ParameterSchema | None:
    """Return the schema of a deployment; `None` if it says nothing, or nobody is to enforce it."""
    if not found.enforce_parameter_schema:
        return None
    schema = found.parameter_openapi_schema or {}
    if not schema.get("properties") and "title" not in schema:
        return None  # what the server gives to a deployment that was made without a schema
    return ParameterSchema(schema, found.parameters or {})


def _may_be_anything(said: object) -> bool:
    """Whether it may be `**kwargs`: of no type up to Prefect 3.8, of any names from 3.9 on."""
    if not isinstance(said, Mapping) or not any(word in said for word in _TYPE_WORDS):
        return True
    return said.get("type") == "object" and said.get("default") == {}
