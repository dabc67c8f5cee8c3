"""Check values against type annotations, and name types in error messages.

The values come from JSON files, config files and command-line flags.
"""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal, get_args

_ONE: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
    Any: "any value",
}
_SEVERAL: dict[Any, str] = {
    int: "whole numbers",
    float: "finite numbers",
    bool: "booleans",
    str: "strings",
    Any: "any values",
}


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation.

    A list passes for a tuple, because JSON has no tuples. A float must be finite and
    may be written as an integer. A boolean is no integer.

    >>> has_type([1, 2], tuple[int, ...]), has_type(True, int)
    (True, False)
    >>> has_type(math.inf, float), has_type("a", Literal["b"])
    (False, False)
    """
    origin, args = typing.get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(
            has_type(v, args[0]) for v in value
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            has_type(k, args[0]) and has_type(v, args[1]) for k, v in value.items()
        )
    if origin is types.UnionType:
        return any(has_type(value, a) for a in args)
    # In Python a boolean is an integer; in a config it is a mistake.
    if hint is float:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and _is_finite(value)
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def hint_name(hint: Any) -> str:
    """Name the type of an annotation in words, for error messages.

    >>> hint_name(int), hint_name(float | None)
    ('a whole number', 'a finite number or null')
    >>> hint_name(tuple[int, ...]), hint_name(dict[str, float])
    ('a list of whole numbers', 'a mapping of strings to finite numbers')
    """
    return _name(hint, _ONE, "a list", "a mapping")


def _name(hint: Any, words: dict[Any, str], many: str, mapping: str) -> str:
    origin, args = typing.get_origin(hint), get_args(hint)
    if hint in words:
        return words[hint]
    if origin is types.UnionType:
        return " or ".join(_name(arg, words, many, mapping) for arg in args)
    if origin is tuple:
        return f"{many} of {_names(args[0])}"
    if origin is dict:
        return f"{mapping} of {_names(args[0])} to {_names(args[1])}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    return getattr(hint, "__name__", str(hint))


def _names(hint: Any) -> str:
    return _name(hint, _SEVERAL, "lists", "mappings")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer beyond the largest float.
        return False
