"""Check the labels and the weights of a source's log, and store them in its rows.

| kind of the task | column `label_TASK` | stored in `labels` | in `targets` |
|---|---|---|---|
| `binary` | integers or booleans | 1 or 0 | |
| `classes` | integers, the index of the class | the same | |
| `real` | finite numbers | 0 | the number |

An unknown label is null, or -1 unless the task is `real`; it is stored as -1, and as
NaN in `targets`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Schema, Task
from tokenrec.errors import InputError

_LARGEST = float(np.finfo(np.float32).max)


def read_labels(
    batch: pa.RecordBatch, schema: Schema, row: np.ndarray, first: int
) -> None:
    """Store the labels and the weights of a block of log rows.

    Args:
      batch: log rows with the columns of `Source.rows`.
      schema: the tasks.
      row: `[n]` of `records.row_dtype`, to be filled in.
      first: number of the block's first row, for messages.

    Raises:
      InputError: a column holds another type or value; names it and the row.
    """
    real = 0
    for k, task in enumerate(schema.tasks):
        values = label_column(batch, task, first)
        if task.kind != "real":
            row["labels"][:, k] = values
            continue
        row["labels"][:, k] = np.where(np.isnan(values), -1, 0)
        row["targets"][:, real] = values
        real += 1
    if schema.weighted:
        row["weight"] = weight_column(batch, first)


def label_column(batch: pa.RecordBatch, task: Task, first: int) -> np.ndarray:
    """Read the label column of a task.

    Args:
      batch: log rows with the columns of `Source.rows`.
      task: the task.
      first: number of the block's first row, for messages.

    Returns:
      Kind `real`: `[n] float32`, NaN where unknown. Other kinds: `[n] int8`, -1 where
      unknown.

    Raises:
      InputError: the column holds another type or value.
    """
    name = f"label_{task.name}"
    if task.kind == "real":
        return _numbers(batch, name, "a label of the kind real", first)
    return _whole_labels(batch, name, task, first)


def weight_column(batch: pa.RecordBatch, first: int) -> np.ndarray:
    """Read the weights of the rows: `[n] float32`, 1 where null.

    Raises:
      InputError: the column holds another type, or a negative number.
    """
    numbers = _numbers(batch, "row_weight", "a weight", first)
    negative = numbers < 0
    if negative.any():
        row = int(negative.argmax())
        raise InputError(
            f"rows(): column 'row_weight' is {numbers[row]:g} in row {first + row}; a "
            "weight is 0 or more, or null for 1; correct it in the source"
        )
    return np.where(np.isnan(numbers), np.float32(1), numbers)


def _whole_labels(
    batch: pa.RecordBatch, name: str, task: Task, first: int
) -> np.ndarray:
    """Read labels that are small integers.

    Returns:
      `[n] int8`, -1 where the label is -1 or null, which means unknown.
    """
    values, where = batch.column(name), f"rows(): column '{name}'"
    if pa.types.is_null(values.type):
        return np.full(len(values), -1, np.int8)
    if task.kind == "binary":
        most, meaning = 1, "1, 0"
    else:
        most = len(task.classes) - 1
        meaning = f"the index of a class, 0 to {most}"
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        raise InputError(
            f"{where} has the type {values.type}, but a label is int8: {meaning}, -1 "
            "or null; cast it"
        )
    # Compared as int64: a cast to int8 would turn 257 into 1.
    labels = values.cast(pa.int64(), safe=False).fill_null(-1)
    out = labels.to_numpy(zero_copy_only=False)
    wrong = (out < -1) | (out > most)
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{where} is {out[row]} in row {first + row}; a label is {meaning}, or -1 "
            "or null where unknown; correct it in the source"
        )
    return out.astype(np.int8)


def _numbers(batch: pa.RecordBatch, name: str, what: str, first: int) -> np.ndarray:
    """Read a column of numbers: `[n] float32`, NaN where null or NaN."""
    values, where = batch.column(name), f"rows(): column '{name}'"
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not (is_number or pa.types.is_null(kind)):
        raise InputError(
            f"{where} has the type {kind}, but {what} is a number; cast it to float64"
        )
    wide = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    # What is beyond float32 would become infinite.
    wrong = np.abs(wide) > _LARGEST
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(
            f"{where} is {wide[row]:g} in row {first + row}; {what} is a finite float32,"
            " or null where unknown; correct it in the source"
        )
    return wide.astype(np.float32)
