"""Parsed JSON becomes dataclasses, strictly: every field is there, no other is, and each has its annotated type."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from reprlib import repr  # of bounded length
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import shown

LARGEST = 10**15  # beyond which no honest number is; it keeps arithmetic with them finite
_CALLED = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


def decoded(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Return `value` as a `kind`, and add to `problems` what is wrong with it; then the result is not to be used.

    Args:
        kind: A dataclass, str, int, float, bool, None, a Literal, or a list, tuple, dict or union of those.
        where: The path of the value in the file, such as "stages[0].curves".
    """
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, where, problems)
    if origin in (Union, UnionType):
        return decoded(NoneType if value is None and NoneType in parts else parts[0], value, where, problems)
    if origin is Literal and value in parts:
        return value
    if origin is list and isinstance(value, list):
        return [decoded(parts[0], each, f"{where}[{place}]", problems) for place, each in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        pairs = enumerate(zip(parts, value, strict=True))
        return tuple(decoded(part, each, f"{where}[{place}]", problems) for place, (part, each) in pairs)
    if origin is dict and isinstance(value, dict):
        return {key: decoded(parts[1], each, f"{where}.{key}", problems) for key, each in value.items()}
    if kind in (int, float) and type(value) in (int, kind) and abs(value) <= LARGEST:  # not of NaN
        return kind(value)
    if kind in (str, bool, NoneType) and type(value) is kind:
        return value
    problems.append(f"{shown(where)}: expected {_called(kind)}, found {shown(repr(value))}")
    return None


def _dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{shown(where) or 'the file'}: expected an object, found {shown(repr(value))}")
        return None
    types = get_type_hints(kind)
    names = [each.name for each in fields(kind)]
    prefix = f"{where}." if where else ""
    problems += [f"{shown(prefix + name)}: expected a value, found none" for name in names if name not in value]
    problems += [f"{shown(prefix + name)}: expected no such field" for name in value if name not in names]
    found = {n: decoded(types[n], value[n], prefix + n, problems) for n in names if n in value}
    return None if len(found) < len(names) else kind(**found)


def _called(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f'"{part}"' for part in parts)
    if origin is tuple:
        return f"a list of {len(parts)}"
    return {list: "a list", dict: "an object"}.get(origin) or _CALLED[kind]
