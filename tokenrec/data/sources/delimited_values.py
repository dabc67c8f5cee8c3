"""Convert the columns of the user's files: ids, categories, numbers, texts.

A column of a CSV file comes as text, one of a Parquet file in its own type. Either is
converted by the same rules, value by value, so that no result depends on the file or
on the block in which a value stands. A value that does not convert raises `WrongValue`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.delimited_notes import ColumnNotes
from tokenrec.data.sources.tabular_errors import first_failure

# Doubles hold every whole number below it.
EXACT = 1 << 53
_WHOLE_TEXT = r"^[+-]?\d+\.0*$"
# Ids that were numbers of more digits than a double has.
_ROUNDED_TEXT = r"^[+-]?(\d\.\d+[eE]\+\d+|\d{16,}\.0*)$"
_HEXADECIMAL = "[xX]"
_PADDED_TEXT = r"^\s|\s$"
_MISSING_WORDS = pa.array(
    ["NULL", "null", "Null", "NaN", "nan", "None", "none", "NA", "N/A", "n/a", r"\N"]
)
_ID_REMEDY = "write ids as integers or as text, in every file alike"


class WrongValue(Exception):
    """A value, or a whole column, that does not convert.

    Attributes:
      row: index of the value; None for the column.
      reason: what is wrong and what to do, after the value or the column.
    """

    def __init__(self, row: int | None, reason: str) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason


def plain(values: pa.Array) -> pa.Array:
    """Decode dictionaries and the like; empty text is null, as in CSV."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if is_text(values.type):
        values = cast(values, pa.string(), "is not UTF-8; write it as UTF-8 text")
        empty = pc.equal(values, "")
        if pc.any(empty).as_py():
            values = pc.if_else(empty, pa.scalar(None, pa.string()), values)
    return values


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are text, or the bytes of text."""
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
        )
    )


def cast(values: pa.Array, kind: pa.DataType, reason: str) -> pa.Array:
    """Cast without loss, or raise a WrongValue for the first value that fails."""
    try:
        return values.cast(kind)
    except pa.ArrowException as error:
        try:
            row = first_failure(
                len(values), lambda start, stop: values[start:stop].cast(kind)
            )
        # A pair of types that has no cast fails without rows too.
        except pa.ArrowNotImplementedError:
            raise WrongValue(None, f"is {values.type}: {reason}") from error
        raise WrongValue(row, reason) from error


def may_hold(values: pa.Array, letters: bytes) -> bool:
    """Whether one of some ASCII letters is in text, at the speed of memory.

    True may be due to text beside a slice, so the answer decides only whether a slower
    test is worthwhile.
    """
    data = values.buffers()[2]
    if data is None:
        return False
    content = data.to_pybytes()
    return any(bytes([letter]) in content for letter in letters)


def refuse(mask: pa.Array, reason: str) -> None:
    """Raise a WrongValue for the first row that is true."""
    rows = true_rows(mask)
    if len(rows):
        raise WrongValue(int(rows[0]), reason)


def true_rows(mask: pa.Array) -> np.ndarray:
    """Return the indices of the rows that are true."""
    return np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))


def add_note(notes: ColumnNotes, kind: str, mask: pa.Array, values: pa.Array) -> None:
    """Note the values for which a mask is true."""
    count = pc.sum(mask).as_py()
    if count:
        notes.add(kind, count, values.filter(mask)[0].as_py())


def read_ids(
    values: pa.Array, notes: ColumnNotes, *, kind: pa.DataType, is_key: bool
) -> pa.Array:
    """Convert ids or categorical values to integers or text.

    Whole numbers become integers, never "7.0". A key may not be a fraction, nor a
    number that a double has rounded.

    Args:
      values: `[n]`, of any type.
      notes: notes on the column.
      kind: int64 or string.
      is_key: the values are ids of users or items.
    """
    stored = values.type
    if pa.types.is_string(stored):
        return _text_ids(values, notes, kind, is_key)
    if pa.types.is_floating(stored):
        return _float_ids(values, notes, kind, is_key)
    if pa.types.is_decimal(stored):
        return _text_ids(whole_text(values.cast(pa.string())), notes, kind, is_key)
    if pa.types.is_nested(stored):
        raise WrongValue(
            None, f"is {stored}, but one value is needed; declare it multi_valued"
        )
    if pa.types.is_temporal(stored) and pa.types.is_integer(kind):
        raise WrongValue(None, f"is {stored} and not int64; correct key_types")
    return cast(values, kind, f"is not {kind}; correct the value, or key_types")


def _float_ids(
    values: pa.Array, notes: ColumnNotes, kind: pa.DataType, is_key: bool
) -> pa.Array:
    values = values.cast(pa.float64())
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    exact = pc.and_(
        pc.equal(pc.floor(values), values), pc.less(pc.abs(values), float(EXACT))
    )
    if is_key:
        refuse(
            pc.invert(exact),
            "is a double that is not a whole number below 2^53, so ids have been "
            f"rounded; {_ID_REMEDY}",
        )
    if pa.types.is_integer(kind):
        refuse(pc.invert(exact), "is not int64; correct the value, or key_types")
    whole = pc.if_else(exact, values, pa.scalar(None, pa.float64())).cast(pa.int64())
    if is_key:
        add_note(notes, "whole_floats", exact, values)
    if pa.types.is_integer(kind):
        return whole
    return pc.coalesce(whole.cast(pa.string()), values.cast(pa.string()))


def whole_text(values: pa.Array) -> pa.Array:
    """Remove the decimal point of whole numbers."""
    whole = pc.match_substring_regex(values, _WHOLE_TEXT)
    digits = pc.replace_substring_regex(values, r"\.0*$", "")
    return pc.if_else(whole, digits, values)


def _text_ids(
    values: pa.Array, notes: ColumnNotes, kind: pa.DataType, is_key: bool
) -> pa.Array:
    if pa.types.is_integer(kind):
        return _text_integers(values, notes)
    if may_hold(values, b"."):
        if is_key:
            refuse(
                pc.match_substring_regex(values, _ROUNDED_TEXT),
                "is the text of a double, so ids of many digits have been rounded; "
                f"{_ID_REMEDY}",
            )
        like_floats = pc.match_substring_regex(values, _WHOLE_TEXT)
        add_note(notes, "ids_like_floats", like_floats, values)
    if may_hold(values, b" \t\r\n"):
        padded = pc.match_substring_regex(values, _PADDED_TEXT)
        add_note(notes, "padded", padded, values)
    words = pc.is_in(values, value_set=_MISSING_WORDS)
    add_note(notes, "missing_words", words, values)
    return values


def _text_integers(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    try:
        return whole_numbers(values)
    except pa.ArrowException:
        trimmed = pc.utf8_trim_whitespace(values)
    floats = pc.match_substring_regex(trimmed, _WHOLE_TEXT)
    refuse(
        pc.and_(floats, pc.match_substring_regex(trimmed, _ROUNDED_TEXT)),
        f"is the text of a double, which may be rounded; {_ID_REMEDY}",
    )
    add_note(notes, "whole_floats", floats, trimmed)
    reason = "is not int64; correct the value, or key_types"
    refuse(pc.match_substring_regex(trimmed, _HEXADECIMAL), reason)
    # Arrow reads no plus sign.
    digits = pc.replace_substring_regex(whole_text(trimmed), r"^\+", "")
    return cast(digits, pa.int64(), reason)


def whole_numbers(values: pa.Array) -> pa.Array:
    """Parse decimal integers.

    Raises:
      pa.ArrowException: a text is something else.
    """
    # Arrow reads hexadecimal numbers too.
    if may_hold(values, b"xX") and (
        pc.any(pc.match_substring_regex(values, _HEXADECIMAL)).as_py()
    ):
        raise pa.ArrowInvalid("not a decimal number")
    return values.cast(pa.int64())


def read_numbers(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert numbers to float64."""
    return numbers(values)


def numbers(values: pa.Array) -> pa.Array:
    """Convert numbers of any type, or their text, to float64."""
    stored = values.type
    if pa.types.is_temporal(stored) or pa.types.is_nested(stored):
        raise WrongValue(None, f"is {stored}, but a number is needed; write a number")
    if pa.types.is_boolean(stored):
        return values.cast(pa.int8()).cast(pa.float64())
    if pa.types.is_decimal(stored):
        # Arrow's own cast from decimals may be off by the last bit.
        return values.cast(pa.string()).cast(pa.float64())
    if pa.types.is_string(stored):
        try:
            return values.cast(pa.float64())
        except pa.ArrowException:
            return cast(
                pc.utf8_trim_whitespace(values),
                pa.float64(),
                "is not a number; write it with a decimal point and no other signs, "
                "or leave it empty where it is unknown",
            )
    return values.cast(pa.float64(), safe=False)


def beyond_float32(values: pa.Array) -> pa.Array:
    """Find numbers that are infinite, or would be once they are stored as float32."""
    return pc.greater(pc.abs(values), float(np.finfo(np.float32).max))


def read_texts(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert texts to strings."""
    if pa.types.is_nested(values.type):
        raise WrongValue(None, f"is {values.type}, but text is needed; join its values")
    return cast(values, pa.string(), "is not text; write it as UTF-8")
