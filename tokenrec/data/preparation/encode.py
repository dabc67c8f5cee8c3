"""Encode the feature columns of a source as the matrices of a schema.

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
from tokenrec.errors import InputError


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
    # Integer and float features have columns of their own.
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
            f"{where} is {exact[wrong]} in row {number}, not a finite float32; write "
            "null where it is missing"
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
    # The running number of a value, less that of the first value of its list.
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
