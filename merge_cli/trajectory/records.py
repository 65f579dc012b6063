"""Dataclasses of numbers to JSON and back, checked field by field: files come from other versions,
hands and machines.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from merge_cli.errors import InputError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """`value` as objects of JSON: dataclasses and named tuples become objects, NaN and Inf null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: encode(part) for name, part in zip(value._fields, value, strict=True)}
    if isinstance(value, Mapping):
        return {str(key): encode(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [encode(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: type[T], value: object, where: str) -> T:
    """The dataclass, named tuple or plain value of type `kind` that `encode` made `value` of.

    Fields that are missing take their default; unknown ones are left out, so a newer file can be
    read. Raises InputError, naming `where` and the field.
    """
    return typing.cast("T", _decode(kind, value, where))


def _decode(kind: Any, value: object, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _decode(next(option for option in options if option is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        return _object(kind, value, where)
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_decode(typing.get_args(kind)[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {key: _decode(typing.get_args(kind)[1], part, f"{where}.{key}") for key, part in value.items()}
    elif kind is Any:
        return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where} is {str(value)[:60]!r}", details=[f"expected  {getattr(kind, '__name__', kind)}"])


def _object(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where} is {str(value)[:60]!r}", details=["expected  an object"])
    hints = typing.get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        empty = (dataclasses.MISSING, dataclasses.MISSING)
        optional = {field.name for field in dataclasses.fields(kind) if (field.default, field.default_factory) != empty}
    else:
        optional = set(kind._field_defaults)
    missing = [name for name in hints if name not in value and name not in optional]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}")
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items() if name in value})
