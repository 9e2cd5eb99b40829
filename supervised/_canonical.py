"""Telling whether two values are the same, across processes: a digest of what they consist of.

JSON alone takes different values for the same (`1` and `"1"` as keys, tuples and lists, everything
that hides its value), and the same for different ones (a set, in whatever order it comes); pickles
depend on the order and the identity of what is in them.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import pickle
from array import array
from collections import UserList, deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any
from uuid import UUID

import attrs
import cloudpickle  # type: ignore[import-untyped]
from pydantic import BaseModel, Secret, SecretBytes, SecretStr

_BUILT_IN = (int, float, complex, str, bytes)
_SECRETS = (Secret, SecretStr, SecretBytes)
_SIMPLE = {int, float, complex, str, bytes, bool, type(None)}
_JSON = {str, int, float, bool, type(None)}
_PLAIN = (range, int, float, complex, str, bytes, Decimal, UUID, date, time, timedelta, PurePath)


def digest(*values: Any) -> str | None:
    """Return what is the same for equal values of equal types, in whatever process.

    What is neither a plain value, a container, nor a model or class of fields counts by its pickle.

    Returns:
        A hexadecimal digest; `None` if a value cannot be compared.
    """
    try:
        text = json.dumps(_parts(values))
    except Exception:  # what a user's class does when it is looked at, too deep nesting
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def is_plain(value: Any) -> bool:
    """Whether a value is nothing but JSON, which everybody writes alike."""
    if type(value) in _JSON:
        return True
    if type(value) is dict:
        return {type(key) for key in value} <= {str} and _are_plain(value.values())
    return type(value) is list and _are_plain(value)


def _are_plain(values: Iterable[Any]) -> bool:
    # At once where that is all: there may be millions.
    return {type(each) for each in values} <= _JSON or all(map(is_plain, values))


def closure(fn: FunctionType) -> tuple[Any, ...]:
    """Return what tells a function from another one that the same code has made.

    Only what cannot change: a function that counts its calls is the same before and after.
    """
    return _made_with(fn, set())


def _made_with(fn: FunctionType, seen: set[FunctionType]) -> tuple[Any, ...]:
    """Return what a function was made with; each function that it leads to counts once."""
    seen.add(fn)
    defaults = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    cells = [_unchanging(cell, seen) for cell in fn.__closure__ or ()]
    return (*cells, *(_fixed(value, seen) for value in defaults))


def _unchanging(cell: CellType, seen: set[FunctionType]) -> Any:
    try:
        return _fixed(cell.cell_contents, seen)
    except ValueError:  # not filled yet
        return None


def _fixed(value: Any, seen: set[FunctionType]) -> Any:
    """Return a value that cannot change as it is, and the name of any other's type."""
    if value is None or isinstance(value, (*_PLAIN, *_SECRETS, enum.Enum)):
        return value
    if isinstance(value, (tuple, frozenset)):
        return [_name(value), *(_fixed(each, seen) for each in value)]
    if isinstance(value, FunctionType) and value not in seen:
        return [_name_of(value), *_made_with(value, seen)]
    if isinstance(value, (FunctionType, BuiltinFunctionType, type, ModuleType)):
        return _name_of(value)
    return _name(value)


def _parts(value: Any) -> Any:
    """Return a value as JSON that only equal values of equal types have."""
    if value is None or isinstance(value, bool):
        return value
    return [_name(value), _content(value)]


def _content(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return [value.name, _parts(value.value)]
    if isinstance(value, _PLAIN):
        return _plain(value)
    if isinstance(value, _SECRETS):
        return _parts(value.get_secret_value())
    if (fields := _fields(value)) is not None:
        return {name: _parts(field) for name, field in sorted(fields.items())}
    return _items(value)


def _plain(value: Any) -> str:
    """Return the text of a value, whatever a class that is derived from its own shows."""
    base: Any = next((kind for kind in _BUILT_IN if isinstance(value, kind)), type(value))
    return str(base.__repr__(value))


def _items(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((_pair(item) for item in value.items()), key=json.dumps)
    if isinstance(value, Iterator):
        raise TypeError("to look at it would be to empty it")
    if isinstance(value, AbstractSet):
        return sorted((_parts(each) for each in value), key=json.dumps)
    if isinstance(value, (bytearray, memoryview, array)):
        return [getattr(value, "typecode", ""), hashlib.sha256(value).hexdigest()]
    if isinstance(value, (list, tuple)) and {type(each) for each in value} <= _SIMPLE:
        return repr([*value])  # at once: there may be millions
    if isinstance(value, (list, tuple, deque, UserList)):
        return [_parts(each) for each in value]  # any other sequence may fetch what it has
    return _pickled(value)


def _pair(item: tuple[Any, Any]) -> list[Any]:
    return [_parts(item[0]), _parts(item[1])]


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a model, a dataclass or an attrs class; `None` if it is none."""
    names: list[str]
    if isinstance(value, type):
        return None
    if isinstance(value, BaseModel):
        names = [*type(value).model_fields, *(value.model_extra or ())]
        private = value.__pydantic_private__ or {}
        return {**{name: getattr(value, name, None) for name in names}, **private}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    elif attrs.has(type(value)):
        names = [field.name for field in attrs.fields(type(value))]
    else:
        return None
    return {name: getattr(value, name, None) for name in names}


class _Hasher:
    """A file that keeps the digest of what is written: objects may have gigabytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        raw = pickle.PickleBuffer(data).raw()  # an array's buffer has a shape
        self._hash.update(raw)
        return raw.nbytes

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _pickled(value: Any) -> str:
    hasher = _Hasher()
    cloudpickle.dump(value, hasher)
    return hasher.hexdigest()


def _name(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _name_of(value: Any) -> str:
    """Return the full name of a function, a class or a module."""
    module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", None)
    return f"{module}.{name or value.__name__}"
