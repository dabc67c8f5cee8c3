"""Convert times of the user's files to milliseconds since 1970 UTC."""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.delimited_checks import UNITS, offset_of
from tokenrec.data.sources.delimited_notes import ColumnNotes
from tokenrec.data.sources.delimited_schema import TimeFormat
from tokenrec.data.sources.delimited_values import (
    EXACT,
    WrongValue,
    add_note,
    cast,
    refuse,
    whole_numbers,
)
from tokenrec.errors import InputError

UNIT_NAMES = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}

_NUMBER_TEXT = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# Only after a time of day: the day of a date is no zone.
_ZONE_TEXT = r":.*(Z|[+-]\d\d(:?\d\d)?)$|T\d\d(Z|[+-]\d\d(:?\d\d)?)$"
_EXAMPLES = "2022-05-03, 2022-05-03T12:00 or 2022-05-03T12:00:00+02:00"
# Times of logs lie between these years; a unit that puts all of them there is likely.
_SENSIBLE_MS = (788_918_400_000, 4_102_444_800_000)  # 1995, 2100


def read_times(values: pa.Array, notes: ColumnNotes, *, form: TimeFormat) -> pa.Array:
    """Convert times to int64 milliseconds; null stays null.

    Numbers have the unit of `form`; text may hold numbers or ISO dates and times, which
    have the zone of `form` unless they name one. Fractions of a millisecond are cut.

    Args:
      values: `[n]`, of any type.
      notes: notes on the column.
      form: unit and zone.
    """
    stored = values.type
    if pa.types.is_timestamp(stored):
        return _moments(values, notes, form)
    if pa.types.is_date(stored):
        return _moments(values.cast(pa.timestamp("ms")), notes, form)
    if pa.types.is_string(stored):
        return _texts(values, notes, form)
    if pa.types.is_integer(stored) or pa.types.is_null(stored):
        return _integers(cast(values, pa.int64(), _wrong(form)), form)
    if pa.types.is_floating(stored) or pa.types.is_decimal(stored):
        return _decimals(values, form)
    raise WrongValue(
        None, f"is {stored}, and no time; write integers, ISO text or timestamps"
    )


def _wrong(form: TimeFormat) -> str:
    return (
        f"is not a time; write {UNIT_NAMES[form.unit]} since 1970 UTC, or an ISO date or time such as "
        f"{_EXAMPLES}; every row needs one"
    )


def _integers(values: pa.Array, form: TimeFormat) -> pa.Array:
    per_second = UNITS[form.unit]
    if per_second <= 1000:
        factor = 1000 // per_second
        limit = np.iinfo(np.int64).max // factor
        refuse(pc.or_(pc.greater(values, limit), pc.less(values, -limit)), _wrong(form))
        return pc.multiply(values, factor)
    return _floor_divide(values, per_second // 1000)


def _floor_divide(values: pa.Array, divisor: int) -> pa.Array:
    """Divide integers, rounding down; Arrow would round towards zero."""
    missing = values.is_null().to_numpy(zero_copy_only=False)
    whole = values.fill_null(0).to_numpy() // divisor
    return pa.array(whole, pa.int64(), mask=missing)


def _decimals(values: pa.Array, form: TimeFormat) -> pa.Array:
    if pa.types.is_decimal(values.type):
        # Arrow's own cast from decimals may be off by the last bit.
        values = values.cast(pa.string())
    values = values.cast(pa.float64())
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    if form.unit in ("s", "ms"):
        scaled = pc.multiply(values, 1000 / UNITS[form.unit])
    else:
        scaled = pc.divide(values, UNITS[form.unit] / 1000)
    refuse(
        pc.greater_equal(pc.abs(scaled), float(EXACT)),
        f"is too large for a time in {form.unit}; correct it, or the unit: "
        '"time": {"unit": ...} in the schema',
    )
    # 1.001 seconds are 1000.9999999999999 as a double.
    return pc.floor(pc.add(scaled, 0.001)).cast(pa.int64())


def _moments(values: pa.Array, notes: ColumnNotes, form: TimeFormat) -> pa.Array:
    """Convert timestamps of any unit, with or without a zone."""
    unit = values.type.unit
    offset = offset_of(form.zone)
    if values.type.tz is None and offset is not None:
        here = _integers(values.cast(pa.int64()), TimeFormat(unit))
        return pc.subtract(here, offset)
    if values.type.tz is None and form.zone != "UTC":
        local = values
        values = _in_zone(values, form.zone)
        # Both readings agree but where clocks were changed.
        later = _in_zone(local, form.zone, "latest")
        add_note(notes, "ambiguous_times", pc.not_equal(values, later), local)
    return _integers(values.cast(pa.int64()), TimeFormat(unit))


def _in_zone(values: pa.Array, zone: str, which: str = "earliest") -> pa.Array:
    return pc.assume_timezone(values, zone, ambiguous=which, nonexistent=which)


def _texts(values: pa.Array, notes: ColumnNotes, form: TimeFormat) -> pa.Array:
    try:
        return _integers(whole_numbers(values), form)
    except pa.ArrowException:
        values = pc.utf8_trim_whitespace(values)
    # Each value is read as what it is: numbers, times with a zone, and times without.
    values = pc.replace_substring_regex(values, r"\s*(UTC|GMT)$", "Z")
    values = pc.replace_substring_regex(values, r"\s+([+-]\d\d:?\d\d)$", r"\1")
    is_number = pc.match_substring_regex(values, _NUMBER_TEXT)
    is_whole = pc.match_substring_regex(values, r"^-?\d+$")
    has_zone = pc.match_substring_regex(values, _ZONE_TEXT)

    def those(mask: pa.Array) -> pa.Array:
        return pc.if_else(mask, values, pa.scalar(None, pa.string()))

    wrong = _wrong(form)
    whole = _integers(cast(those(is_whole), pa.int64(), wrong), form)
    decimal = those(pc.and_(is_number, pc.invert(is_whole)))
    fractions = _decimals(cast(decimal, pa.float64(), wrong), form)
    iso = pc.invert(is_number)
    zoned = cast(those(pc.and_(iso, has_zone)), pa.timestamp("ns", "UTC"), wrong)
    local = those(pc.and_(iso, pc.invert(has_zone)))
    unzoned = cast(local, pa.timestamp("ns"), wrong)
    return pc.coalesce(
        whole, fractions, _moments(zoned, notes, form), _moments(unzoned, notes, form)
    )


def split_time(field: str, value: Any, zone: str) -> int:
    """Convert an ISO date or time, or an integer, to milliseconds since 1970 UTC.

    >>> split_time("valid_from", "2022-05-03", "UTC")
    1651536000000
    >>> split_time("valid_from", "2022-05-03", "+08:00")
    1651507200000
    >>> split_time("valid_from", "1651536000000", "UTC")
    1651536000000
    """
    try:
        return int(value)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise InputError(
            f"{field}={value} is neither an ISO date or time nor integer milliseconds; "
            "write it as 2022-05-03, 2022-05-03T12:00 or 1651536000000"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=_zone(zone))
    return round(moment.timestamp() * 1000)


def _zone(name: str) -> datetime.tzinfo:
    offset = offset_of(name)
    if offset is None:
        return zoneinfo.ZoneInfo(name)
    return datetime.timezone(datetime.timedelta(milliseconds=offset))


def are_days(earliest: int, latest: int, form: TimeFormat) -> bool:
    """Whether times that were read as numbers are days such as 20220503.

    >>> are_days(20_220_503, 20_220_630, TimeFormat())
    True
    >>> are_days(20_220_503, 20_220_690, TimeFormat())
    False
    """
    for time in (earliest, latest):
        number = time * UNITS[form.unit] // 1000
        if not 19_950_101 <= number <= 21_001_231:
            return False
        try:
            datetime.datetime.strptime(str(number), "%Y%m%d")
        except ValueError:
            return False
    return True


def likely_unit(earliest: int, latest: int, form: TimeFormat) -> str | None:
    """Return the unit in which times are sensible, where in theirs they are not.

    Args:
      earliest: milliseconds since 1970 UTC, as they were read.
      latest: the same.
      form: how they were read.

    >>> likely_unit(1_640_995_200, 1_641_254_400, TimeFormat())
    's'
    >>> likely_unit(1_640_995_200_000, 1_641_254_400_000, TimeFormat())
    """
    first, last = _SENSIBLE_MS
    if latest >= first // 2 and earliest <= 2 * last:
        return None
    for unit, per_second in UNITS.items():
        # As integers, since doubles would round.
        scaled = [time * UNITS[form.unit] // per_second for time in (earliest, latest)]
        if unit != form.unit and first <= scaled[0] and scaled[1] <= last:
            return unit
    return None
