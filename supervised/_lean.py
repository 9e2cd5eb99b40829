"""Models of pydantic in half of the memory: there may be 100,000 of them."""

from __future__ import annotations

import functools
from typing import TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def lean(model: M) -> M:
    """Return an equal model that shares what models of its kind have in common.

    Each remembers in a set of its own which fields were given: with the models inside, that is
    half of the 10 KB that a flow run takes as a server sends it. A state's *data* stays what it is.
    """
    values = {
        name: lean(value) if isinstance(value, BaseModel) and name != "data" else value
        for name, value in vars(model).items()
    }
    return type(model).model_construct(_shared(frozenset(model.model_fields_set)), **values)


@functools.cache
def _shared(names: frozenset[str]) -> set[str]:
    return set(names)
