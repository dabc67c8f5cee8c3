"""Find the column of times and its unit."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.data.schema_inference.keys import Key
from tokenrec.errors import InputError

_TIME_WORDS = r"time|stamp|^ts|date|created|when|_at$|^at$"

# Least and greatest time in seconds: 1980 and 2100.
_FIRST, _LAST = 315_532_800, 4_102_444_800
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_UNIT_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}


def find_time(columns: Sequence[ColumnProfile]) -> Key:
    """Find the column of times: the finest one, and one whose name says so first.

    Raises:
      InputError: no column holds times.
    """
    times = [
        (bool(re.search(_TIME_WORDS, c.name.lower())), c.distinct, c)
        for c in columns
        if c.known == c.rows and time_unit(c) is not None
    ]
    if not times:
        names = ", ".join(column.column for column in columns)
        raise InputError(
            "no column of the log holds times on every row: neither dates nor seconds, "
            "milliseconds, micro- or nanoseconds since 1970; histories and splits need "
            f"them; the log has {names}; say which one it is with --time COLUMN"
        )
    named, _, column = max(times, key=lambda entry: entry[:2])
    return describe_time(column, named)


def describe_time(column: ColumnProfile, named: bool = True) -> Key:
    """Make the key of a column of times.

    Raises:
      InputError: the column holds no times.
    """
    unit = time_unit(column)
    if unit is None or column.known < column.rows:
        raise InputError(
            f"column '{column.column}' does not hold a time on every row "
            f"({column.examples()}); name another with --time COLUMN, or write dates "
            "(2022-05-03T12:00) or numbers since 1970"
        )
    first, last = (iso(value) for value in time_range(column, unit))
    how = (
        f"its name says so, and read as {_UNIT_NAMES[unit]} since 1970" if unit else ""
    )
    if unit and not named:
        how = f"read as {_UNIT_NAMES[unit]} since 1970"
    reason = f"{how or 'it holds dates, and'} it runs from {first} to {last} (UTC)"
    return Key(column, reason, unit)


def time_unit(column: ColumnProfile) -> str | None:
    """Unit of a column of times; empty for dates, None if it holds no times."""
    if column.type == "time":
        return ""
    if column.type not in ("int", "float") or not column.known:
        return None
    numbers = column.numbers
    for unit, per_second in UNITS.items():
        low, high = np.nanmin(numbers) / per_second, np.nanmax(numbers) / per_second
        if low >= _FIRST and high <= _LAST:
            return unit
    return None


def milliseconds(column: ColumnProfile, unit: str) -> np.ndarray:
    """Times of a column: `[n] int64` milliseconds since 1970."""
    if not unit:
        return column.numbers.astype(np.int64)
    if column.type == "int":
        values = column.values.to_numpy()
        per_second = UNITS[unit]
        return (
            values * 1000 // per_second
            if per_second <= 1000
            else values // (per_second // 1000)
        )
    return np.floor(column.numbers * (1000 / UNITS[unit])).astype(np.int64)


def time_range(column: ColumnProfile, unit: str) -> tuple[int, int]:
    """First and last time in milliseconds."""
    times = milliseconds(column, unit)
    return int(times.min()), int(times.max())


def iso(time_ms: int) -> str:
    """Format milliseconds as an ISO time in UTC; a date where it is midnight."""
    text = str(np.datetime64(time_ms, "ms").astype("datetime64[s]"))
    return text.removesuffix("T00:00:00").replace("T", " ")
