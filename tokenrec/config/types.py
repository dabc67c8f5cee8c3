"""Whether a value has the type of an annotation: for what comes from JSON, from a config file or from a flag."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal, get_args


def has_type(value: Any, hint: Any) -> bool:
    """Tuples may be lists, as JSON has no tuple; a float is finite, and may be written as an integer.

    >>> has_type([1, 2], tuple[int, ...]), has_type(True, int), has_type(math.inf, float), has_type("a", Literal["b"])
    (True, False, False, False)
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
    """The annotation in words, for messages."""
    if hint is float:
        return "a finite number"
    return (
        getattr(hint, "__name__", str(hint))
        if typing.get_origin(hint) is None
        else str(hint)
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
