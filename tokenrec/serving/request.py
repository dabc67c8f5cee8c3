"""Parse a request, and check it without knowing the model.

A request is what a caller sends: a user, the events of its past, and the candidates to
score, as columns of plain values. The encoder (encoder.py) checks the columns against
the features of the model.

    {
      "user": {"user_id": 7, "age": "25-34"},
      "time_ms": 1710000000000,
      "history": {"time_ms": [...], "item_id": [...], "quantity": [...]},
      "context": {"store_id": 31},
      "candidates": {"item_id": [...], "display_location": [...]},
      "user_version": "42"
    }
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.errors import InputError, suggest

# A value of a column: a number, a text, null, or a list of numbers or texts.
type Value = bool | int | float | str | Sequence[int | float | str | None] | None
type Column = Sequence[Value] | np.ndarray

# Times and ids are int64.
_INT64 = 1 << 63

# Characters of the name of a column.
_NAME = 1_024

_FLOATS, _TEXTS, _NUMBERS = {float}, {str}, {int, float, bool}


class BadRequest(InputError):
    """A request that cannot be scored.

    The message names the field, its value, the reason and the remedy.
    """


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one request may hold.

    Attributes:
      candidates: candidates.
      history: events of the history.
      columns: columns of a part of the request.
      values: values of a list, such as those of a multi-valued feature.
      text: characters of a text.
    """

    candidates: int = 2_000
    history: int = 10_000
    columns: int = 1_000
    values: int = 4_096
    text: int = 16_384


@dataclasses.dataclass(frozen=True)
class Request:
    """A request whose form was checked. E events, C candidates.

    Attributes:
      user: `user_id`, and features of the user.
      time_ms: time of the request, in milliseconds.
      history: columns of E earlier events, oldest first, `time_ms` and `item_id` among
        them; empty for a user without a past.
      context: features of the context, which all candidates share.
      candidates: columns of C candidates, `item_id` among them; empty in a request for
        items (retrieval_request.py).
      user_version: changes when the user's history does; None if the caller has no such
        number. It is an optional help for a cache and changes no score.
    """

    user: dict[str, Value]
    time_ms: int
    history: dict[str, Column]
    context: dict[str, Value]
    candidates: dict[str, Column]
    user_version: str | None = None

    @property
    def events(self) -> int:
        """E, number of events of the history."""
        return len(self.history["time_ms"]) if self.history else 0

    @property
    def candidate_count(self) -> int:
        """C, number of candidates."""
        return len(self.candidates["item_id"]) if self.candidates else 0


_FIELDS = tuple(field.name for field in dataclasses.fields(Request))
_REQUIRED = ("user", "time_ms", "candidates")


def parse_request(value: Any, limits: Limits) -> Request:
    """Check the form of a request.

    Args:
      value: what the caller sent, as JSON or Arrow has been read: a dict. Columns are
        lists or NumPy arrays of one dimension.
      limits: the most that it may hold.

    Raises:
      BadRequest: a field is unknown or missing, has the wrong type or exceeds a limit;
        columns differ in length; events are not in the order of time, or not earlier
        than the request.
    """
    check_fields(value, _FIELDS, _REQUIRED)
    candidates = _columns(value["candidates"], "candidates", limits, limits.candidates)
    request = parse_history(value, limits)
    if not len(candidates.get("item_id", ())):
        raise BadRequest(
            "candidates: the column 'item_id' is missing or empty; send the id of each "
            "item to score"
        )
    return dataclasses.replace(request, candidates=candidates)


def check_fields(value: Any, known: Sequence[str], required: Sequence[str]) -> None:
    """Check the names of the fields of a request.

    Args:
      value: what the caller sent.
      known: names that it may have.
      required: those that it must have.

    Raises:
      BadRequest: it is no object, or a field is unknown or missing.
    """
    if not isinstance(value, dict):
        raise BadRequest(
            f"request: {short_repr(value)} is not a JSON object; send one with the fields "
            f"{', '.join(required)}"
        )
    for name in value:
        if name not in known:
            raise BadRequest(
                f"request: no field {short_repr(name)}{suggest(str(name), known)}"
            )
    for name in required:
        if name not in value:
            raise BadRequest(f"request: the field '{name}' is missing; send it")


def parse_history(value: dict[str, Any], limits: Limits) -> Request:
    """Check all of a request but its candidates, which are left empty.

    Args:
      value: a request whose fields were checked.
      limits: the most that it may hold.

    Raises:
      BadRequest: as `parse_request`.
    """
    time_ms = _time(value["time_ms"], "time_ms")
    history = _columns(value.get("history", {}), "history", limits, limits.history)
    _check_history(history, time_ms)
    version = value.get("user_version")
    if version is not None and not isinstance(version, str):
        raise BadRequest(
            f"user_version: {short_repr(version)} is no text; send a string"
        )
    if version is not None and len(version) > limits.text:
        raise BadRequest(too_long("user_version", len(version), limits.text))
    return Request(
        user=_values(value["user"], "user", limits),
        time_ms=time_ms,
        history=history,
        context=_values(value.get("context", {}), "context", limits),
        candidates={},
        user_version=version,
    )


def _values(part: Any, name: str, limits: Limits) -> dict[str, Value]:
    """Check a part of one value per column."""
    checked = _part(part, name, limits)
    for column, value in checked.items():
        check_value(value, f"{name}.{column}", limits)
    return checked


def _columns(part: Any, name: str, limits: Limits, most: int) -> dict[str, Column]:
    """Check a part whose columns are lists of equal length, at most `most`."""
    checked = _part(part, name, limits)
    length: int | None = None
    for column, values in checked.items():
        # Most columns, the fast way.
        check = _PLAIN_CHECKS.get(type(values))
        if check and len(values) == length and check(values, limits):
            continue
        where = f"{name}.{column}"
        is_array = isinstance(values, np.ndarray) and values.ndim == 1
        if not is_array and not isinstance(values, list):
            raise BadRequest(
                f"{where}: {short_repr(values)} is not a list; send one value per row"
            )
        if len(values) > most:
            raise BadRequest(too_long(where, len(values), most))
        if length is not None and len(values) != length:
            raise BadRequest(
                f"{where}: has {len(values)} values, and the column "
                f"'{next(iter(checked))}' has {length}; send columns of equal length"
            )
        length = len(values)
        if is_array and values.dtype != object:
            _check_array(values, where)
        else:
            for position, value in enumerate(values):
                check_value(value, where, limits, position)
    return checked


def _is_plain(values: list[Any], limits: Limits) -> bool:
    """Whether `check_value` surely accepts all values of a column.

    A request has many columns, most of them of finite floats.
    """
    kinds = set(map(type, values))
    kinds.discard(type(None))
    # Nulls, and numbers that are 0, are sound.
    given = filter(None, values)
    if kinds <= _FLOATS:
        return all(map(math.isfinite, given))
    if kinds == _TEXTS:
        return max(map(len, given), default=0) <= limits.text
    if kinds <= _NUMBERS:
        numbers = list(given)
        # With NaN among them both may be wrong; then one of the checks fails.
        least, most = min(numbers, default=0), max(numbers, default=0)
        is_small = least >= -_INT64 and most < _INT64
        return is_small and all(map(math.isfinite, numbers))
    return False


def _is_plain_array(values: np.ndarray, limits: Limits) -> bool:
    """Whether `_check_array` surely accepts a column."""
    kind = values.dtype.kind
    if values.ndim != 1 or kind not in "bif":
        return False
    return kind != "f" or not np.isinf(values).any()


_PLAIN_CHECKS: dict[type, Any] = {list: _is_plain, np.ndarray: _is_plain_array}


def _part(part: Any, name: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise BadRequest(
            f"{name}: {short_repr(part)} is not a JSON object; send columns by their names"
        )
    if len(part) > limits.columns:
        raise BadRequest(too_long(name, len(part), limits.columns, "columns"))
    check_names(part, name)
    return dict(part)


def check_names(part: dict[Any, Any], where: str) -> None:
    """Check the names of columns, which messages repeat."""
    for name in part:
        if not isinstance(name, str):
            raise BadRequest(
                f"{where}: the name {short_repr(name)} is no text; send a text"
            )
        if len(name) > _NAME:
            place = f"{where}: the name {short_repr(name)}"
            raise BadRequest(too_long(place, len(name), _NAME, "characters"))


def check_value(
    value: Any, where: str, limits: Limits, position: int | None = None
) -> None:
    """Check one value, of one column or of one row of it."""
    kind = type(value)
    # Most values are numbers within range: the fast way first.
    if value is None or kind is bool or (kind is int and -_INT64 <= value < _INT64):
        return
    if kind is str and len(value) <= limits.text:
        return
    if kind is float and math.isfinite(value):
        return
    place = where if position is None else f"{where}[{position}]"
    if isinstance(value, (list, tuple, np.ndarray)):
        if len(value) > limits.values:
            raise BadRequest(too_long(place, len(value), limits.values))
        for inner in value:
            if isinstance(inner, (list, tuple, dict, np.ndarray)):
                raise BadRequest(
                    f"{place}: {short_repr(inner)} is a list within a list; send a list of "
                    "numbers or texts"
                )
            check_value(inner, place, limits)
        return
    if isinstance(value, np.generic):
        check_value(value.item(), where, limits, position)
        return
    if kind is str:
        raise BadRequest(too_long(place, len(value), limits.text, "characters"))
    if kind is int:
        raise BadRequest(f"{place}: {value} exceeds 64 bits; send a smaller integer")
    if kind is float:
        raise BadRequest(
            f"{place}: {value} is not finite; send null where a value is missing"
        )
    raise BadRequest(
        f"{place}: {short_repr(value)} is a {kind.__name__}; send a number, a text, null or "
        "a list of them"
    )


def _check_array(values: np.ndarray, where: str) -> None:
    """Check a column that is an array of numbers; NaN is missing."""
    if values.dtype.kind not in "biufU":
        raise BadRequest(
            f"{where}: has the dtype {values.dtype}; send numbers or texts"
        )
    if values.dtype.kind == "f" and np.isinf(values).any():
        raise BadRequest(f"{where}: holds inf; send null where a value is missing")
    if values.dtype == np.uint64 and values.max(initial=0) >= _INT64:
        raise BadRequest(
            f"{where}: {values.max()} exceeds 64 bits; send a smaller integer"
        )


def _check_history(history: dict[str, Column], time_ms: int) -> None:
    """Check that events have a time each, in order, before the request."""
    if not history:
        return
    for name in ("time_ms", "item_id"):
        if name not in history:
            raise BadRequest(
                f"history: the column '{name}' is missing; send it, or no history at all"
            )
    before: int | None = None
    times = history["time_ms"]
    plain = times.tolist() if isinstance(times, np.ndarray) else times
    for position, value in enumerate(plain):
        time = _time(value, f"history.time_ms[{position}]")
        if before is not None and time < before:
            raise BadRequest(
                f"history.time_ms[{position}]: {time} is earlier than the event before "
                f"it, {before}; send the oldest event first"
            )
        before = time
    if before is not None and before >= time_ms:
        raise BadRequest(
            f"history.time_ms: the newest event is at {before}, not earlier than the "
            f"request at time_ms={time_ms}; send only events that are strictly earlier"
        )


def _time(value: Any, where: str) -> int:
    number = value.item() if isinstance(value, np.integer) else value
    if type(number) is not int or not -_INT64 <= number < _INT64:
        raise BadRequest(
            f"{where}: {short_repr(value)} is not an int64; send whole milliseconds"
        )
    return number


def too_long(where: str, count: int, most: int, unit: str = "values") -> str:
    """Message of a limit that a request exceeds."""
    return f"{where}: has {count} {unit}, more than the limit of {most}; send fewer"


def short_repr(value: Any) -> str:
    """Show a value of a caller in a message, without all of a long one."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
