"""Find the type of a column, and what its values tell."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema_inference.sample import TableSample

ValueType = Literal["int", "float", "bool", "time", "string", "list", "empty", "other"]

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
# Without leading zeros: 007 is a name.
_NUMBER = r"^[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_BOOLEAN = r"^([Tt]rue|[Ff]alse|TRUE|FALSE)$"
_ISO_TIME = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?$"
)
# Types in the headers of RecBole's atomic files.
HEADER_TYPES = ("token", "token_seq", "float", "float_seq")


@dataclasses.dataclass(frozen=True)
class ColumnProfile:
    """A column of a sample.

    Attributes:
      column: its name in the file.
      name: the same without the type of a RecBole header.
      header_type: that type; empty without one.
      type: type of the values. Text that consists of integers is "int", and so are
        whole numbers with a decimal point.
      values: `[n]`, converted to that type: int64, float64, bool, timestamp, string or
        list; null where missing.
      is_text: whether the file is text, so that every value has a spelling.
    """

    column: str
    name: str
    header_type: str
    type: ValueType
    values: pa.ChunkedArray
    is_text: bool

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """`[n] int64`, number of each value in the order of appearance; -1 is null."""
        if self.type in ("list", "other"):
            values = pa.chunked_array([pa.array(map(str, self.values.to_pylist()))])
        else:
            values = self.values
        encoded = values.combine_chunks().dictionary_encode()
        return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(int)

    @functools.cached_property
    def distinct(self) -> int:
        """Number of distinct values, missing ones not counted."""
        return int(self.codes.max(initial=-1)) + 1

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """`[distinct] int64`, rows of each value."""
        return np.bincount(self.codes[self.codes >= 0], minlength=self.distinct)

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def known(self) -> int:
        """Number of rows with a value."""
        return self.rows - self.values.null_count

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """`[n] float64`, NaN where missing; for int, float, bool and time alone."""
        values = self.values
        if self.type == "time":
            values = values.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        values = values.cast(pa.float64(), safe=False)
        return values.to_numpy(zero_copy_only=False)

    def first_of_each(self, owner: ColumnProfile) -> ColumnProfile:
        """The column with the first row of each value of another column."""
        _, first = np.unique(owner.codes, return_index=True)
        return dataclasses.replace(self, values=self.values.take(pa.array(first)))

    @property
    def is_number(self) -> bool:
        return self.type in ("int", "float", "bool")

    @property
    def is_binary(self) -> bool:
        """Whether the values are 0 and 1, or true and false."""
        if self.type == "bool":
            return True
        return self.is_number and bool(
            np.isin(self.numbers[~np.isnan(self.numbers)], (0, 1)).all()
        )

    def examples(self, count: int = 3) -> str:
        """Some distinct values, for a sentence."""
        _, first = np.unique(self.codes[self.codes >= 0], return_index=True)
        known = self.values.drop_null()
        return ", ".join(str(known[int(i)].as_py()) for i in first[:count])


def profile_columns(sample: TableSample) -> list[ColumnProfile]:
    """Profile every column of a sample."""
    return [
        _profile(name, sample.table.column(i), sample.is_text)
        for i, name in enumerate(sample.names)
    ]


def _profile(column: str, values: pa.ChunkedArray, is_text: bool) -> ColumnProfile:
    name, _, header_type = column.rpartition(":")
    if not name or header_type not in HEADER_TYPES:
        name, header_type = column, ""
    kind, values = _convert(values, as_text=header_type in ("token", "token_seq"))
    return ColumnProfile(column, name, header_type, kind, values, is_text)


def _convert(
    values: pa.ChunkedArray, as_text: bool
) -> tuple[ValueType, pa.ChunkedArray]:
    """Convert values to the narrowest type that all of them have."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.cast(kind.value_type)
        kind = values.type
    if values.null_count == len(values):
        return "empty", values
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _convert_text(values.cast(pa.string()), as_text)
    if pa.types.is_boolean(kind):
        return "bool", values
    if pa.types.is_integer(kind):
        return "int", values.cast(pa.int64(), safe=False)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = values.cast(pa.float64(), safe=False)
        return _convert_floats(pc.if_else(pc.is_nan(numbers), None, numbers))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "time", values.cast(pa.timestamp("ms"), safe=False)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list", values
    return "other", values


def _convert_text(
    values: pa.ChunkedArray, as_text: bool
) -> tuple[ValueType, pa.ChunkedArray]:
    if _all_match(values, _INTEGER):
        return "int", values.cast(pa.int64())
    if as_text:
        return "string", values
    if _all_match(values, _NUMBER):
        return _convert_floats(values.cast(pa.float64()))
    if _all_match(values, _BOOLEAN):
        return "bool", pc.equal(pc.utf8_lower(values), "true")
    if _all_match(values, _ISO_TIME):
        return "time", _parse_times(values)
    return "string", values


def _convert_floats(values: pa.ChunkedArray) -> tuple[ValueType, pa.ChunkedArray]:
    """Whole numbers with a decimal point are integers: pandas writes them so."""
    whole = pc.and_(
        pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), 2.0**53)
    )
    if pc.all(whole).as_py():
        return "int", values.cast(pa.int64())
    return "float", values


def _all_match(values: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(values, pattern)).as_py())


def _parse_times(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse ISO dates and times, which may or may not have a zone; UTC without one."""
    has_zone = re.compile(r"(Z|[+-][0-9]{2}:?[0-9]{2})$")
    texts = values.to_pylist()
    # NumPy warns about zones and would drop them: they are taken off and added here.
    times = np.empty(len(texts), "datetime64[ms]")
    for i, text in enumerate(texts):
        zone = None if text is None or len(text) == 10 else has_zone.search(text)
        bare = text if zone is None else text[: zone.start()]
        times[i] = np.datetime64(
            "NaT" if bare is None else bare.replace(" ", "T"), "ms"
        )
        if zone is not None and zone.group() != "Z":
            sign = -1 if zone.group()[0] == "-" else 1
            digits = zone.group()[1:].replace(":", "")
            minutes = 60 * int(digits[:2]) + int(digits[2:])
            times[i] -= np.timedelta64(sign * minutes, "m")
    return pa.chunked_array([pa.array(times, pa.timestamp("ms"))])
