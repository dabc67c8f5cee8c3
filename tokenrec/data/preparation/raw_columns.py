"""Check the columns of a source's tables and log, before they are encoded.

`Source.rows` yields keys, times and flags in columns of fixed names and types; each
function here reads one kind of them. Labels are read by `label_columns.py`, and the
columns of features by `encode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError, suggest


def check_columns(names: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Check that a table has exactly the expected columns, in any order.

    Args:
      names: columns of the table.
      expected: columns that the schema needs.
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
    # All names are known and none is missing, so that only a repeat is left.
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
