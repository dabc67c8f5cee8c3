"""Check the columns of log rows that statistics of the past use."""

from __future__ import annotations

import pyarrow as pa

from tokenrec.data.preparation.raw_columns import (
    bool_column,
    check_columns,
    integer_column,
    label_column,
)
from tokenrec.data.schema import Schema

_ROW_COLUMNS = (
    "user_id",
    "item_id",
    "time_ms",
    "split",
    "event",
    "scored",
    "request",
)


def check_rows(batch: pa.RecordBatch, schema: Schema, first: int) -> pa.RecordBatch:
    """Check what statistics need of log rows, and convert `time_ms` to int64.

    `prepare` checks all columns, but after the statistics have used them.

    Args:
      batch: log rows with the columns of `Source.rows`.
      schema: schema of the source, without the statistics.
      first: number of the batch's first row, for messages.

    Raises:
      InputError: a column or a value is wrong; names it.
    """
    labels = [f"label_{task.name}" for task in schema.tasks]
    features = (*schema.group("row"), *schema.group("action"))
    expected = [*_ROW_COLUMNS, *labels, *(f.name for f in features)]
    check_columns(batch.schema.names, list(dict.fromkeys(expected)), "rows()")
    time = integer_column(batch, "time_ms", first)
    for name in ("event", "scored"):
        bool_column(batch, name, first)
    for name in labels:
        label_column(batch, name, first)
    place = batch.schema.names.index("time_ms")
    return batch.set_column(place, "time_ms", pa.array(time))
