"""Convert labels, flags and requests of the user's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.delimited_notes import ColumnNotes
from tokenrec.data.sources.delimited_schema import LabelRule
from tokenrec.data.sources.delimited_values import (
    WrongValue,
    add_note,
    beyond_float32,
    cast,
    numbers,
    read_ids,
    refuse,
    whole_numbers,
    whole_text,
)

_COMPARE: dict[str, Callable[[pa.Array, pa.Scalar], pa.Array]] = {
    ">=": pc.greater_equal,
    ">": pc.greater,
    "<=": pc.less_equal,
    "<": pc.less,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_FLAGS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0}
_LABELS = {"1": 1, "true": 1, "0": 0, "false": 0, "-1": -1}
_DIGITS = re.compile("^[+-]?[0-9]{1,19}$")


def read_labels(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert labels to int8: 1, 0, and -1 or null where unknown."""
    reason = "is not a label; use 1, 0, or nothing where it is unknown"
    return _read_words(values, _LABELS, reason).cast(pa.int8())


def read_targets(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert labels of the kind real to float64, null where unknown."""
    return _finite(values, "is not a finite float32; correct it, or leave it empty")


def read_weights(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert weights of rows to float64, null where there is none."""
    found = _finite(values, "is not a finite float32; correct it, or leave it empty")
    refuse(
        pc.less(found, 0), "is negative; a weight is 0 or more, or nothing, which is 1"
    )
    return found


def _finite(values: pa.Array, reason: str) -> pa.Array:
    found = numbers(values)
    found = pc.if_else(pc.is_nan(found), pa.scalar(None, pa.float64()), found)
    refuse(beyond_float32(found), reason)
    return found


def read_classes(
    values: pa.Array, notes: ColumnNotes, *, classes: Sequence[str]
) -> pa.Array:
    """Convert the names of classes to their index: int8, null where unknown.

    A whole number is the class of its digits, with a decimal point or without.
    """
    # Text needs none of the notes on ids: "2.0" and " 2" are the class 2.
    if not pa.types.is_string(values.type):
        values = read_ids(values, notes, kind=pa.string(), is_key=False)
    text = pc.utf8_trim_whitespace(values)
    known = pa.array(classes, pa.string())
    index = pc.coalesce(
        pc.index_in(text, value_set=known),
        pc.index_in(whole_text(text), value_set=known),
    )
    refuse(
        pc.and_(pc.is_valid(text), pc.is_null(index)),
        f"is no class; the schema has {', '.join(classes)}; correct it, add it to "
        "classes, or leave it empty where it is unknown",
    )
    return index.cast(pa.int8())


def read_flags(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert flags to booleans."""
    reason = "is not a flag; use true or false (or 1 or 0)"
    return _read_words(values, _FLAGS, reason).cast(pa.bool_())


def _read_words(values: pa.Array, words: Mapping[str, int], reason: str) -> pa.Array:
    stored = values.type
    if pa.types.is_temporal(stored) or pa.types.is_nested(stored):
        raise WrongValue(None, f"is {stored}: {reason}")
    if pa.types.is_string(stored):
        return _map_text(values, lambda text: _word(text, words), reason)
    found = numbers(values)
    found = pc.if_else(pc.is_nan(found), pa.scalar(None, pa.float64()), found)
    known = pa.array(sorted(set(words.values())), pa.float64())
    refuse(pc.and_(pc.is_valid(found), pc.invert(pc.is_in(found, known))), reason)
    return found.cast(pa.int8())


def _word(text: str, words: Mapping[str, int]) -> int | None:
    text = text.strip().lower()
    if text in words:
        return words[text]
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in words.values() else None


def _map_text(
    values: pa.Array, convert: Callable[[str], int | None], reason: str
) -> pa.Array:
    """Convert each distinct text; None is a WrongValue."""
    encoded = values.dictionary_encode()
    converted = [convert(text) for text in encoded.dictionary.to_pylist()]
    wrong = [code for code, number in enumerate(converted) if number is None]
    if wrong:
        is_wrong = pc.is_in(encoded.indices, pa.array(wrong, pa.int32()))
        refuse(pc.and_(pc.is_valid(encoded.indices), is_wrong), reason)
    return pa.array(converted, pa.int64()).take(encoded.indices)


def compare(values: pa.Array, notes: ColumnNotes, *, rule: LabelRule) -> pa.Array:
    """Convert numbers to the labels of a comparison: int8, null where unknown."""
    stored = values.type
    if pa.types.is_integer(stored) and isinstance(rule.number, int):
        found, kind = values, pa.int64()
        values = cast(values, kind, "is not int64; write a smaller number")
    elif pa.types.is_float32(stored):
        # 4.1 as a float32 is less than 4.1 as a double.
        kind = pa.float32()
    else:
        kind = pa.float64()
        try:
            values = numbers(values)
        except WrongValue as error:
            raise WrongValue(
                error.row,
                f"is not a number, which the label '{rule}' compares; "
                "correct it, or leave it empty where it is unknown",
            ) from error
    found = _COMPARE[rule.operator](values, pa.scalar(rule.number, kind))
    if pa.types.is_floating(values.type):
        found = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.bool_()), found)
    return found.cast(pa.int8())


def read_requests(values: pa.Array, notes: ColumnNotes) -> pa.Array:
    """Convert requests to int64; -1 where there is none.

    A whole number is itself. Any other text becomes a number of 63 bits by a hash of
    the text alone, so that files that different machines read agree. Of `n` requests,
    two share a number with a probability of about n^2 / 2^64.
    """
    if pa.types.is_integer(values.type):
        return cast(values, pa.int64(), "is not int64").fill_null(-1)
    if pa.types.is_nested(values.type):
        raise WrongValue(None, f"is {values.type}, but one value is needed")
    if pa.types.is_floating(values.type):
        values = pc.if_else(
            pc.is_nan(values.cast(pa.float64())), pa.scalar(None, values.type), values
        )
    text = values.cast(pa.string())
    try:
        return whole_numbers(text).fill_null(-1)
    except pa.ArrowException:
        text = whole_text(pc.utf8_trim_whitespace(text))
    is_whole = pc.match_substring_regex(text, _DIGITS.pattern)
    add_note(notes, "hashed_requests", pc.invert(is_whole), text)
    return _map_text(text, _request_number, "is no request").fill_null(-1)


def _request_number(text: str) -> int:
    if _DIGITS.fullmatch(text) and -(1 << 63) <= int(text) < 1 << 63:
        return int(text)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
