"""Raw Arrow columns to the integer and float matrices of a schema, checked value by value, without a Python loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, columns
from tokenrec.data.vocabulary import TableValues
from tokenrec.errors import InputError, suggest


def check_columns(names: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Raises an InputError unless `names` are exactly the `expected` ones, in any order."""
    for name in names:
        if name not in expected:
            raise InputError(
                f"{where}: unknown column '{name}'{suggest(name, expected)}; add a feature to the schema or drop it"
            )
    for name in expected:
        if name not in names:
            raise InputError(
                f"{where}: column '{name}' is missing{suggest(name, names)}"
            )
    if len(names) != len(expected):
        raise InputError(f"{where}: a column occurs twice in {list(names)}; drop one")


def join(batches: Sequence[pa.RecordBatch], where: str) -> pa.RecordBatch:
    """One record batch out of several of the same columns; a column that is all null in some may have the type null."""
    try:
        table = pa.concat_tables(
            [pa.Table.from_batches([b]) for b in batches], promote_options="default"
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{where}: batches disagree about a column's type: {error}; cast it"
        ) from error
    return as_batch(table)


def as_batch(table: pa.Table) -> pa.RecordBatch:
    """The whole table as one record batch."""
    arrays = [
        c.combine_chunks() if c.num_chunks != 1 else c.chunk(0) for c in table.columns
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def encode_features(
    batch: pa.RecordBatch,
    features: Sequence[Feature],
    tables: dict[str, TableValues],
    where: str,
    first: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of `features` as matrices: `[n, I] int32` of provisional ids (vocabulary.py), `[n, D] float32`.

    `first` is the number of the batch's first row, for messages. Ids of a text stay 0: its tokenizer is trained when
    the whole log has been seen (`Entities.encode_texts`).

    Raises:
      InputError: a value does not fit its feature; names column, value and row.
    """
    layout = columns(features)
    n = batch.num_rows
    ids = np.zeros((n, layout.ids_width), np.int32)
    dense = np.full((n, layout.dense_width), np.nan, np.float32)
    for f in features:
        values, place = batch.column(f.name), f"{where}: column '{f.name}'"
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
            out[:, 0] = _numbers(values, place, first, None)
        else:
            flat, row, position = _lists(values, f, place, first)
            if f.kind == "multi_valued":
                out[row, position] = tables[f.table_name].provisional(flat, place)
            elif f.kind == "embedding":
                out[row, position] = _numbers(flat, place, first, row)
            else:
                out[row, position] = _semantic_ids(flat, f, place, first, row, position)
    return ids, dense


def integers(
    batch: pa.RecordBatch,
    name: str,
    first: int,
    least: int | None = None,
    most: int | None = None,
) -> np.ndarray:
    """A column of `rows()` that holds an integer, `least` to `most`, in every row: `[n] int64`."""
    values, where = _column(batch, name, first)
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
        at = int(wrong.argmax())
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise InputError(
            f"{where} is {out[at]} in row {first + at}; it must be {allowed}"
        )
    return out


def flags(batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
    """A bool column of `rows()` without nulls: `[n] bool`."""
    values, where = _column(batch, name, first)
    if not pa.types.is_boolean(values.type):
        raise InputError(
            f"{where} has the type {values.type}, but must be bool; cast it"
        )
    return values.to_numpy(zero_copy_only=False)


def labels(batch: pa.RecordBatch, name: str, first: int) -> np.ndarray:
    """A label column of `rows()`: `[n] int8`, 1, 0, or -1 where it is -1 or null."""
    values, where = batch.column(name), f"rows(): column '{name}'"
    if pa.types.is_null(values.type):
        return np.full(len(values), -1, np.int8)
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise InputError(
            f"{where} has the type {values.type}, but a label is int8: 1, 0, -1 or null; cast it"
        )
    out = (
        values.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
    )
    wrong = (out < -1) | (out > 1)
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(
            f"{where} is {out[at]} in row {first + at}; a label is 1, 0, or -1 or null where unknown"
        )
    return out.astype(np.int8)


def strings(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """A text column of a source's table, null where missing: `[n]` strings.

    Raises:
      InputError: it holds something else; names the column.
    """
    values = table[name]
    kind = (
        values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    )
    is_text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )
    if not (is_text or pa.types.is_null(kind)):
        raise InputError(
            f"{where}: column '{name}' has the type {values.type}, but a text is a string; cast it"
        )
    return values.cast(pa.large_string())


def _column(batch: pa.RecordBatch, name: str, first: int) -> tuple[pa.Array, str]:
    """A column that has a value in every row, and its name for messages."""
    values, where = batch.column(name), f"rows(): column '{name}'"
    if values.null_count:
        at = first + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
        raise InputError(f"{where} is null in row {at}; every row needs a value")
    return values, where


def _numbers(
    values: pa.Array, where: str, first: int, row: np.ndarray | None
) -> np.ndarray:
    """`[n] float32`, NaN where null. `row` maps positions of a flattened list to rows."""
    kind = values.type
    if pa.types.is_null(kind):
        return np.full(len(values), np.nan, np.float32)
    if not (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
    ):
        raise InputError(
            f"{where} has the type {kind}, but must hold numbers; cast it to float32"
        )
    exact = (
        values.cast(pa.float64(), safe=False)
        .fill_null(np.nan)
        .to_numpy(zero_copy_only=False)
    )
    with np.errstate(over="ignore"):
        out = exact.astype(np.float32)
    if np.isinf(out).any():
        at = int(np.isinf(out).argmax())
        number = first + (at if row is None else int(row[at]))
        raise InputError(
            f"{where} is {exact[at]} in row {number}, no finite float32; write null where it is missing"
        )
    return out


def _lists(
    values: pa.Array, f: Feature, where: str, first: int
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Flat values of a list column, with the row and the position in its list of each."""
    kind = values.type
    if not (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
    ):
        raise InputError(
            f"{where} has the type {kind}, but a {f.kind} feature is a list; wrap each value in one"
        )
    lengths = (
        pc.list_value_length(values)
        .fill_null(0)
        .to_numpy(zero_copy_only=False)
        .astype(np.int64)
    )
    wrong = (lengths != f.length) & ~values.is_null().to_numpy(zero_copy_only=False)
    if f.kind != "multi_valued" and wrong.any():
        at = int(wrong.argmax())
        raise InputError(
            f"{where} has {lengths[at]} values in row {first + at}; its length is {f.length}; write null where missing"
        )
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
        at = int(wrong.argmax())
        raise InputError(
            f"{where} has the code {codes[at]} in row {first + int(row[at])}; codes are 0 to {f.codes - 1}"
        )
    return np.where(missing, MISSING, FIRST_KNOWN + position * f.codes + codes).astype(
        np.int32
    )
