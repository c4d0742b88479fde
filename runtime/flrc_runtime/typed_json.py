"""Strict JSON -> frozen dataclasses: unknown, missing and wrongly typed fields are errors that name their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import FormatError

T = TypeVar("T")


def build(kind: type[T], raw: Any, where: str) -> T:
    """Build a dataclass from JSON, rejecting unknown, missing and wrongly typed fields."""
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: expected an object")
    hints = _hints(kind)  # type: ignore[arg-type]
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise FormatError(f"{where}: unknown field {unknown[0]!r}")
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in raw.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise FormatError(f"{where}: {error}") from None


@cache  # a manifest has hundreds of objects of a dozen kinds
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        if value is None and NoneType in arguments:
            return None
        return _convert(next(a for a in arguments if a is not NoneType), value, where)
    if is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value in arguments:
            return value
        raise FormatError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, list):
            raise FormatError(f"{where}: expected a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], v, where) for v in value)
        if len(value) != len(arguments):
            raise FormatError(f"{where}: expected {len(arguments)} entries")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected an object")
        return {k: _convert(arguments[1], v, f"{where}[{k}]") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise FormatError(f"{where} is out of range")
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise FormatError(f"{where}: expected {hint.__name__}, found {type(value).__name__}")
