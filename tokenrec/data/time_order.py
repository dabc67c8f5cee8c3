"""Sort a log by time on disk, in memory that does not grow with the log."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError

_DAY_MS = 86_400_000
# Log rows of six hours are sorted at once: a heavy day of a large log fits in memory.
_SPAN_MS = 6 * 3_600_000
# Each span is a file that stays open, and operating systems allow about a thousand.
_MOST_SPANS = 500


def time_ordered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the same log rows in the order of their column `time_ms`.

    The log rows are spilled to the folder for temporary files (`TMPDIR`), a file per
    six hours, so that one span at a time is in memory, however long the log.

    Args:
      batches: record batches with a column `time_ms` (int64, milliseconds), in any
        order.

    Yields:
      A table per span. Log rows of equal time keep their order and share a table.

    Raises:
      InputError: the times lie so far apart that they cannot be milliseconds of one
        log.
    """
    with tempfile.TemporaryDirectory(prefix="tokenrec-") as folder:
        spans = _spill(batches, Path(folder))
        for span in sorted(spans):
            with pa.OSFile(str(spans[span]), "rb") as file:
                table = pa.ipc.open_stream(file).read_all()
            # Delete each file once it is read, so that the disk need not hold the log
            # together with what the caller writes.
            spans[span].unlink()
            order = np.argsort(table.column("time_ms").to_numpy(), kind="stable")
            yield table.take(pa.array(order))


def _spill(batches: Iterable[pa.RecordBatch], folder: Path) -> dict[int, Path]:
    """Write a file of log rows per span, and return them by the number of the span."""
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    paths: dict[int, Path] = {}
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    try:
        for batch in batches:
            row_span = batch.column("time_ms").to_numpy() // _SPAN_MS
            for span in np.unique(row_span).tolist():
                if span not in writers:
                    if len(writers) == _MOST_SPANS:
                        raise _too_many_spans(writers)
                    paths[span] = folder / f"{span}.arrow"
                    writers[span] = pa.ipc.new_stream(
                        str(paths[span]), batch.schema, options=options
                    )
                writers[span].write_batch(batch.filter(pa.array(row_span == span)))
    finally:
        for writer in writers.values():
            writer.close()
    return paths


def _too_many_spans(spans: Iterable[int]) -> InputError:
    low, high = (span * _SPAN_MS // _DAY_MS for span in (min(spans), max(spans)))
    return InputError(
        f"time_ms lies in more than {_MOST_SPANS} spans of 6 hours, between days {low} "
        f"and {high} of 1970; check that it is in milliseconds, or prepare the log "
        "without rates"
    )
