"""Encode Arrow columns of a source as the integer and float matrices of a schema.

Every value is checked against its feature, without a Python loop over rows. Integer
kinds become *provisional* ids: codes in the order in which values first occur, because
the vocabulary is known only when the whole log has been seen (`vocabulary.py`).

Letters: n rows of a batch, I columns of integer features, D columns of float features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, columns
from tokenrec.data.vocabulary import TableValues
from tokenrec.errors import InputError, suggest


def check_columns(names: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Check that a table has exactly the expected columns, in any order.

    Args:
      names: columns of the table.
      expected: columns that the schema asks for.
      where: name of the table in messages, such as `rows()`.

    Raises:
      InputError: a column is unknown, missing, or there twice.
    """
    for name in names:
        if name not in expected:
            raise InputError(
                f"{where}: unknown column '{name}'{suggest(name, expected)}; add a "
                "feature to the schema or drop it"
            )
    for name in expected:
        if name not in names:
            raise InputError(
                f"{where}: column '{name}' is missing{suggest(name, names)}; add it, "
                "or drop it from the schema if it is a feature"
            )
    if len(names) != len(expected):
        raise InputError(f"{where}: a column occurs twice in {list(names)}; drop one")


def concatenate(batches: Sequence[pa.RecordBatch], where: str) -> pa.RecordBatch:
    """Concatenate record batches that have the same columns.

    A column that is all null in some batches may have the type null there.

    Raises:
      InputError: two batches have different types for a column.
    """
    try:
        table = pa.concat_tables(
            [pa.Table.from_batches([batch]) for batch in batches],
            promote_options="default",
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{where}: batches disagree about a column's type: {error}; cast it"
        ) from error
    return to_record_batch(table)


def to_record_batch(table: pa.Table) -> pa.RecordBatch:
    """Return the whole table as one record batch."""
    arrays = []
    for column in table.columns:
        # A column of one chunk needs no copy.
        if column.num_chunks == 1:
            arrays.append(column.chunk(0))
        else:
            arrays.append(column.combine_chunks())
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def encode_features(
    batch: pa.RecordBatch,
    features: Sequence[Feature],
    tables: dict[str, TableValues],
    where: str,
    first: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode the columns of some features.

    Args:
      batch: raw values, a column for each feature.
      features: features in the order of their columns.
      tables: values of each embedding table; new values are added.
      where: name of the table or log in messages.
      first: number of the batch's first row, for messages.

    Returns:
      `[n, I] int32` provisional ids and `[n, D] float32`, NaN where missing. Ids of a
      text stay 0: `Entities.encode_texts` fills them in when its tokenizer is trained.

    Raises:
      InputError: a value does not fit its feature; names column, value and row.
    """
    layout = columns(features)
    rows = batch.num_rows
    ids = np.zeros((rows, layout.ids_width), np.int32)
    dense = np.full((rows, layout.dense_width), np.nan, np.float32)
    for f in features:
        values = batch.column(f.name)
        place = f"{where}: column '{f.name}'"
        # All missing (id 0, NaN) is what the matrices hold already.
        if pa.types.is_null(values.type) or f.kind == "text":
            continue
        out = (
            ids[:, slice(*layout.ids[f.name])]
            if f.is_integer
            else dense[:, slice(*layout.dense[f.name])]
        )
        if f.kind == "categorical":
            out[:, 0] = tables[f.table_name].provisional(values, place)
        elif f.kind == "dense":
            out[:, 0] = _float_values(values, place, first, None)
        else:
            flat, row, position = _flatten_lists(values, f, place, first)
            if f.kind == "multi_valued":
                out[row, position] = tables[f.table_name].provisional(flat, place)
            elif f.kind == "embedding":
                out[row, position] = _float_values(flat, place, first, row)
            else:
                out[row, position] = _semantic_ids(flat, f, place, first, row, position)
    return ids, dense


def integer_column(
    batch: pa.RecordBatch,
    name: str,
    first: int,
    least: int | None = None,
    most: int | None = None,
) -> np.ndarray:
    """Read a column of `rows()` that holds an integer in every row.

    Args:
      batch: log rows.
      name: name of the column.
      first: number of the batch's first row, for messages.
      least: smallest value that is allowed; None for no bound.
      most: greatest value that is allowed; None for no bound.

    Returns:
      `[n] int64`.

    Raises:
      InputError: the column holds another type, a null, or a value out of bounds.
    """
    values, where = _column_without_nulls(batch, name, first)
    if not pa.types.is_integer(values.type):
        raise InputError(
            f"{where} has the type {values.type}, but must be int64; cast it"
        )
    out = values.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)
    wrong = np.zeros(len(out), bool)
    if least is not None:
        wrong |= out < least
    if most is not None:
        wrong |= out > most
    if wrong.any():
        row = int(wrong.argmax())
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise InputError(
            f"{where} is {out[row]} in row {first + row}; it must be {allowed}; "
            "correct it in the source"
        )
    return out


def bool_column(batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
    """Read a bool column of `rows()`, which must not hold nulls.

    Args:
      batch: log rows.
      name: name of the column.
      first: number of the batch's first row, for messages.

    Returns:
      `[n] bool`.

    Raises:
      InputError: the column holds another type or a null.
    """
    values, where = _column_without_nulls(batch, name, first)
    if not pa.types.is_boolean(values.type):
        raise InputError(
            f"{where} has the type {values.type}, but must be bool; cast it"
        )
    return values.to_numpy(zero_copy_only=False)


def label_column(batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
    """Read a label column of `rows()`.

    Args:
      batch: log rows.
      name: name of the column.
      first: number of the batch's first row, for messages.

    Returns:
      `[n] int8`, 1, 0, or -1 where the label is -1 or null, which means unknown.

    Raises:
      InputError: the column holds another type or value.
    """
    values, where = batch.column(name), f"rows(): column '{name}'"
    if pa.types.is_null(values.type):
        return np.full(len(values), -1, np.int8)
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise InputError(
            f"{where} has the type {values.type}, but a label is int8: 1, 0, -1 or "
            "null; cast it"
        )
    # Compared as int64: a cast to int8 would turn 257 into 1.
    labels = values.cast(pa.int64(), safe=False).fill_null(-1)
    out = labels.to_numpy(zero_copy_only=False)
    wrong = (out < -1) | (out > 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{where} is {out[row]} in row {first + row}; a label is 1, 0, or -1 or "
            "null where unknown; correct it in the source"
        )
    return out.astype(np.int8)


def string_column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """Read a text column of a source's table.

    Args:
      table: users or items.
      name: name of the column.
      where: name of the table in messages.

    Returns:
      `[n]` large strings, null where missing.

    Raises:
      InputError: the column holds another type.
    """
    values = table[name]
    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )
    if not (is_text or pa.types.is_null(kind)):
        raise InputError(
            f"{where}: column '{name}' has the type {values.type}, but a text is a "
            "string; cast it"
        )
    # 32-bit offsets would overflow beyond 2 GB of text.
    return values.cast(pa.large_string())


def _column_without_nulls(
    batch: pa.RecordBatch, name: str, first: int
) -> tuple[pa.Array, str]:
    """Return a column that has a value in every row, and its name for messages."""
    values, where = batch.column(name), f"rows(): column '{name}'"
    if values.null_count:
        row = first + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
        raise InputError(
            f"{where} is null in row {row}; every row needs a value; fill it in or "
            "leave the row out"
        )
    return values, where


def _float_values(
    values: pa.Array, where: str, first: int, row: np.ndarray | None
) -> np.ndarray:
    """Return `[n] float32`, NaN where null.

    Args:
      values: `[n]`, a column or the flattened lists of one.
      where: name of the column in messages.
      first: number of the batch's first row, for messages.
      row: `[n]`, row of each value of flattened lists; None for a column.
    """
    kind = values.type
    if pa.types.is_null(kind):
        return np.full(len(values), np.nan, np.float32)
    is_number = (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
    )
    if not is_number:
        raise InputError(
            f"{where} has the type {kind}, but must hold numbers; cast it to float32"
        )
    exact = (
        values.cast(pa.float64(), safe=False)
        .fill_null(np.nan)
        .to_numpy(zero_copy_only=False)
    )
    # A number beyond float32 overflows to inf here, and is refused as one below.
    with np.errstate(over="ignore"):
        out = exact.astype(np.float32)
    if np.isinf(out).any():
        wrong = int(np.isinf(out).argmax())
        number = first + (wrong if row is None else int(row[wrong]))
        raise InputError(
            f"{where} is {exact[wrong]} in row {number}, no finite float32; write null "
            "where it is missing"
        )
    return out


def _flatten_lists(
    values: pa.Array, f: Feature, where: str, first: int
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Flatten a list column, at most `f.length` values of each list.

    Returns:
      The values, the row of each, and the position of each in its list.
    """
    kind = values.type
    is_list = (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
    )
    if not is_list:
        raise InputError(
            f"{where} has the type {kind}, but a {f.kind} feature is a list; wrap each "
            "value in one"
        )
    lengths = (
        pc.list_value_length(values)
        .fill_null(0)
        .to_numpy(zero_copy_only=False)
        .astype(np.int64)
    )
    wrong = (lengths != f.length) & ~values.is_null().to_numpy(zero_copy_only=False)
    if f.kind != "multi_valued" and wrong.any():
        row_of_batch = int(wrong.argmax())
        raise InputError(
            f"{where} has {lengths[row_of_batch]} values in row "
            f"{first + row_of_batch}; its length is {f.length}; write null where "
            "missing"
        )
    # `flatten` leaves out what lies under a null list, unlike `values.values`.
    flat = values.flatten()
    row = np.repeat(np.arange(len(values)), lengths)
    position = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kept = position < f.length
    if kept.all():
        return flat, row, position
    return flat.filter(pa.array(kept)), row[kept], position[kept]


def _semantic_ids(
    flat: pa.Array,
    f: Feature,
    where: str,
    first: int,
    row: np.ndarray,
    position: np.ndarray,
) -> np.ndarray:
    """Return ids of codes: each level has a range of `f.codes` ids of its own."""
    if pa.types.is_null(flat.type):
        return np.full(len(flat), MISSING, np.int32)
    if not pa.types.is_integer(flat.type):
        raise InputError(
            f"{where} holds {flat.type} values, but codes are integers; cast them"
        )
    codes = (
        flat.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
    )
    missing = flat.is_null().to_numpy(zero_copy_only=False)
    wrong = ~missing & ((codes < 0) | (codes >= f.codes))
    if wrong.any():
        index = int(wrong.argmax())
        raise InputError(
            f"{where} has the code {codes[index]} in row {first + int(row[index])}; "
            f"codes are 0 to {f.codes - 1}; correct it, or change codes={f.codes} of "
            "the feature"
        )
    ids = FIRST_KNOWN + position * f.codes + codes
    return np.where(missing, MISSING, ids).astype(np.int32)
