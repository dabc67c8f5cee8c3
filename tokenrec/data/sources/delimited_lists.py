"""Convert features of several values: tags, embeddings, semantic ids.

A Parquet file may hold them as lists. Text, of either format, is split at the feature's
separator: spaces around a part are left out, and so are empty parts of a multi-valued
feature. The parts of a vector are numbers, so an empty one is refused.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.delimited_notes import SEPARATORS, ColumnNotes
from tokenrec.data.sources.delimited_values import (
    WrongValue,
    cast,
    plain,
    read_ids,
    refuse,
)

# A list that a program printed: ['a', 'b'], [1, 2], [].
_PRINTED = r"""^\s*[\[(](\s*|.*['",].*|\s*[+-]?[\d.]+\s*)[\])]\s*$"""


def read_lists(
    values: pa.Array,
    notes: ColumnNotes,
    *,
    kind: pa.ListType,
    separator: str,
    is_vector: bool,
) -> pa.Array:
    """Convert lists, or text that separates their values.

    Args:
      values: `[n]`, of any type; one that is neither is a list of one value.
      notes: notes on the column.
      kind: type of the lists: int64, string or float32.
      separator: what separates values in text.
      is_vector: the values are numbers of a fixed count, of which none may be missing.
    """
    stored = values.type
    if pa.types.is_string(stored):
        lists = _split(values, notes, separator, is_vector)
    elif pa.types.is_fixed_size_list(stored):
        lists = values.cast(pa.list_(stored.value_type))
    elif pa.types.is_large_list(stored) or pa.types.is_list(stored):
        lists = values
    elif is_vector or pa.types.is_nested(stored):
        raise WrongValue(
            None,
            f"is {stored}, but a list is needed; write a list column, or text with "
            f"'{separator}' between the values",
        )
    else:
        lists = _lists_of_one(values)
    return _convert_parts(lists, notes, kind, separator if is_vector else None)


def _lists_of_one(values: pa.Array) -> pa.Array:
    missing = values.is_null()
    return _list_array(
        values.drop_null(), pc.invert(missing).cast(pa.int64()).to_numpy(), missing
    )


def _convert_parts(
    lists: pa.Array, notes: ColumnNotes, kind: pa.ListType, separator: str | None
) -> pa.Array:
    """Convert the values of the lists, and name the row of one that does not convert.

    Args:
      lists: lists of values, or of their text.
      notes: notes on the column.
      kind: type of the result.
      separator: what separates numbers in text; None where the values are categorical.
    """
    parts = lists.flatten()
    try:
        if separator is not None:
            converted = _vector_parts(parts, kind.value_type, separator)
        else:
            converted = read_ids(
                plain(parts), notes, kind=kind.value_type, is_key=False
            )
    except WrongValue as error:
        if error.row is None:
            raise
        row = int(_rows(lists)[error.row])
        part = parts[error.row].as_py()
        raise WrongValue(row, f"holds {part!r}, which {error.reason}") from error
    return _list_array(converted, _lengths(lists), lists.is_null())


def _vector_parts(parts: pa.Array, kind: pa.DataType, separator: str) -> pa.Array:
    reason = (
        f"is not {kind}; separate the values with '{separator}', or name what does "
        'under "separators" in the schema'
    )
    parts = plain(parts)
    if pa.types.is_floating(parts.type) and pa.types.is_floating(kind):
        # A double that is no float32 becomes infinite, which is refused later.
        return parts.cast(kind, safe=False)
    return cast(parts, kind, reason)


def _split(
    values: pa.Array, notes: ColumnNotes, separator: str, is_vector: bool
) -> pa.Array:
    refuse(
        pc.match_substring_regex(values, _PRINTED),
        f"is a printed list; write its values with '{separator}' between them, or as "
        "a Parquet list",
    )
    lists = pc.split_pattern(values, separator)
    parts = lists.flatten()
    trimmed = pc.utf8_trim_whitespace(parts)
    empty = pc.equal(trimmed, "")
    if is_vector:
        # An empty part is a missing number, which is refused later.
        trimmed = pc.if_else(empty, pa.scalar(None, pa.string()), trimmed)
        return _list_array(trimmed, _lengths(lists), lists.is_null())
    _tally_separators(values, notes, separator)
    changed = pc.not_equal(trimmed, parts)
    # A run of spaces is one separator.
    if separator.strip():
        changed = pc.or_(changed, empty)
    rows = _rows(lists)
    changed_rows = np.unique(rows[changed.to_numpy(zero_copy_only=False)])
    if len(changed_rows):
        example = values[int(changed_rows[0])].as_py()
        notes.add("cleaned_lists", len(changed_rows), example)
    kept = pc.invert(empty)
    kept_rows = rows[kept.to_numpy(zero_copy_only=False)]
    lengths = np.bincount(kept_rows, minlength=len(lists))
    return _list_array(trimmed.filter(kept), lengths, lists.is_null())


def _tally_separators(values: pa.Array, notes: ColumnNotes, separator: str) -> None:
    """Note how many values hold the separator, and each other one that may be meant."""
    held = {}
    for other in {separator, *SEPARATORS}:
        mask = pc.match_substring(values, other)
        count = pc.sum(mask).as_py() or 0
        example = values.filter(mask)[0].as_py() if count else ""
        held[other] = (count, example)
    notes.tally(separator, len(values) - values.null_count, held)


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).fill_null(0).to_numpy()


def _rows(lists: pa.Array) -> np.ndarray:
    """Return the row of each value of `lists.flatten()`."""
    return np.repeat(np.arange(len(lists)), _lengths(lists))


def _list_array(parts: pa.Array, lengths: np.ndarray, missing: pa.Array) -> pa.Array:
    """Make lists of consecutive parts."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, parts, mask=missing)
