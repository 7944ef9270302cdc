"""Whether what JSON, YAML or a command line holds is what a dataclass declares."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST = 2**53
"""Of whole numbers: no size is larger, and JSON's numbers are exact up to it."""


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Field -> its type, of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def misfits(cls: type, values: Mapping[str, Any]) -> dict[str, str]:
    """Field -> what is expected of it, of those values that are no such thing."""
    return {
        name: described(hint) for name, hint in hints_of(cls).items() if name in values and not is_a(values[name], hint)
    }


def is_a(value: Any, hint: Any) -> bool:
    """Lists stand for tuples, whole numbers for floats; no number is NaN, infinite or larger than any size can be."""
    if hint is Any:
        return True
    if hint is bool or hint is str or hint is types.NoneType:
        return type(value) is hint
    if hint is float and type(value) is float:
        return math.isfinite(value)
    if hint is int or hint is float:
        return type(value) is int and abs(value) <= LARGEST
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(each) and all(map(is_a, value, each))
    return isinstance(value, Mapping if origin is not None else hint)


def shortened(value: Any, most: int = 60) -> str:
    """As a message shows it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


NAMES = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def described(hint: Any) -> str:
    """As it is said to people."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(one) for one in inner if one is not types.NoneType)
    if origin is tuple:
        return f"a list of {described(inner[0]).removeprefix('a ')}s"
    if hint in NAMES:
        return NAMES[hint]
    return "a mapping" if origin is not None or dataclasses.is_dataclass(hint) else str(hint)
