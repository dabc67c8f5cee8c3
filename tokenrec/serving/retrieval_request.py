"""Parse a request for items, and check it without knowing the model.

It has the fields of a request that scores candidates (request.py), less the candidates,
and says which items the answer may hold:

    {
      "user": {"user_id": 7}, "time_ms": 1710000000000,
      "history": {"time_ms": [...], "item_id": [...]}, "context": {"store_id": 31},
      "k": 20,
      "drop_seen": true,
      "exclude": [41, 8],
      "filter": {"brand": ["Private"], "price": {"min": 1.0, "max": 5.0}}
    }
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tokenrec.errors import suggest
from tokenrec.serving.request import (
    BadRequest,
    Limits,
    Request,
    check_fields,
    check_names,
    check_value,
    parse_history,
    short_repr,
    too_long,
)

# An answer's length where the request does not say, or `max_k` if that is less.
DEFAULT_K = 10

_FIELDS = (
    *("user", "time_ms", "history", "context", "user_version"),
    *("k", "drop_seen", "exclude", "filter"),
)
_REQUIRED = ("user", "time_ms")
_BOUNDS = ("min", "max")

type ItemId = int | str


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A range of numbers, both ends included, in the unit of the source.

    Attributes:
      low: the least; None for no bound.
      high: the largest; None for no bound.
    """

    low: float | None
    high: float | None


# Of a feature: the values of which an item has one, or the range of its number.
type Condition = tuple[int | str, ...] | Bounds


@dataclasses.dataclass(frozen=True)
class RetrievalRequest:
    """A request for items whose form was checked.

    Attributes:
      request: user, history and context; it has no candidates.
      k: length of the answer; None for `DEFAULT_K`, or `max_k` if that is less.
      drop_seen: leave out the items of the history; None as `head.drop_seen` of the
        run.
      exclude: ids of items to leave out.
      filter: feature -> what an item must have of it; all of them must hold.
    """

    request: Request
    k: int | None = None
    drop_seen: bool | None = None
    exclude: tuple[ItemId, ...] = ()
    filter: dict[str, Condition] = dataclasses.field(default_factory=dict)


def parse_retrieval(value: Any, limits: Limits) -> RetrievalRequest:
    """Check the form of a request for items.

    Args:
      value: what the caller sent, as JSON or Arrow has been read: a dict.
      limits: the most that it may hold; of `exclude` and of the values of a condition
        `limits.history`.

    Raises:
      BadRequest: a field is unknown or missing, has the wrong type or exceeds a limit.
    """
    check_fields(value, _FIELDS, _REQUIRED)
    k, drop_seen = _plain(value.get("k")), _plain(value.get("drop_seen"))
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise BadRequest(f"k: {short_repr(k)} is no integer of at least 1; send one")
    if drop_seen is not None and not isinstance(drop_seen, bool):
        raise BadRequest(
            f"drop_seen: {short_repr(drop_seen)} is not true or false; send one of them, "
            "or leave it out"
        )
    return RetrievalRequest(
        request=parse_history(value, limits),
        k=k,
        drop_seen=drop_seen,
        exclude=_values(value.get("exclude", ()), "exclude", limits),
        filter=_filter(value.get("filter", {}), limits),
    )


def _filter(part: Any, limits: Limits) -> dict[str, Condition]:
    if not isinstance(part, dict):
        raise BadRequest(
            f"filter: {short_repr(part)} is not a JSON object; send conditions by the "
            "names of features of items"
        )
    if len(part) > limits.columns:
        raise BadRequest(too_long("filter", len(part), limits.columns, "features"))
    check_names(part, "filter")
    conditions: dict[str, Condition] = {}
    for name, condition in part.items():
        where = f"filter.{name}"
        if isinstance(condition, dict):
            conditions[name] = _bounds(condition, where)
            continue
        values = _values(condition, where, limits)
        if not values:
            raise BadRequest(
                f"{where}: has no value, and no item could match; leave the feature out, "
                "or send values"
            )
        conditions[name] = values
    return conditions


def _values(part: Any, where: str, limits: Limits) -> tuple[int | str, ...]:
    """Check a list of integers or texts."""
    if isinstance(part, np.ndarray):
        part = part.tolist()
    if not isinstance(part, (list, tuple)):
        raise BadRequest(f"{where}: {short_repr(part)} is not a list; send a list")
    if len(part) > limits.history:
        raise BadRequest(too_long(where, len(part), limits.history))
    values = tuple(map(_plain, part))
    for i, value in enumerate(values):
        if not isinstance(value, (int, str)):
            raise BadRequest(
                f"{where}[{i}]: {short_repr(value)} is no integer and no text; send one"
            )
        check_value(value, where, limits, i)
    return values


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a value of Python."""
    return value.item() if isinstance(value, np.generic) else value


def _bounds(part: dict[str, Any], where: str) -> Bounds:
    for name in part:
        if name not in _BOUNDS:
            raise BadRequest(
                f"{where}: no bound {short_repr(name)}{suggest(str(name), _BOUNDS)}"
            )
    given = {name: _bound(part.get(name), f"{where}.{name}") for name in _BOUNDS}
    low, high = given["min"], given["max"]
    if low is None and high is None:
        raise BadRequest(f"{where}: has neither 'min' nor 'max'; send one of them")
    if low is not None and high is not None and low > high:
        raise BadRequest(
            f"{where}: min={low:g} is above max={high:g}, and no item could match; "
            "exchange them"
        )
    return Bounds(low, high)


def _bound(value: Any, where: str) -> float | None:
    value = _plain(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRequest(f"{where}: {short_repr(value)} is no number; send one")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRequest(f"{where}: {short_repr(value)} is not finite; leave it out")
    return number
