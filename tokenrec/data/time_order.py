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
# A long log has longer spans: at most 128 days, of a log of 175 years.
_LONGEST_SPAN_MS = _SPAN_MS * 512


def time_ordered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the same log rows in the order of their column `time_ms`.

    The log rows are spilled to the folder for temporary files (`TMPDIR`), a file per
    span of time, so that one span at a time is in memory, however long the log. A span
    is six hours, or as much longer as it must be for 500 spans to hold the log.

    Args:
      batches: record batches with a column `time_ms` (int64, milliseconds), in any
        order, and with equal types of the columns.

    Yields:
      A table per span. Log rows of equal time keep their order and share a table.

    Raises:
      InputError: the times lie so far apart that they cannot be milliseconds of one
        log, or two batches disagree about a column's type.
    """
    with tempfile.TemporaryDirectory(prefix="tokenrec-") as folder:
        spill = _Spill(Path(folder))
        try:
            for batch in batches:
                spill.add(batch)
        finally:
            spill.close()
        for paths in spill.paths_in_order():
            tables = []
            for path in paths:
                with pa.OSFile(str(path), "rb") as file:
                    tables.append(pa.ipc.open_stream(file).read_all())
                # Delete each file once it is read, so that the disk need not hold the
                # log together with what the caller writes.
                path.unlink()
            table = pa.concat_tables(tables)
            order = np.argsort(table.column("time_ms").to_numpy(), kind="stable")
            yield table.take(pa.array(order))


def time_blocks(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cut and join tables in the order of time to about equal numbers of log rows.

    Args:
      tables: tables as `time_ordered` yields them.
      rows: log rows of a block. One has more where so many share a time.

    Yields:
      Tables whose log rows of equal time are in one of them.
    """
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(part.num_rows for part in waiting) >= rows:
            joined = pa.concat_tables(waiting)
            time = joined.column("time_ms").to_numpy()
            # Where the time of the block's last row ends.
            end = int(np.searchsorted(time, time[rows - 1], side="right"))
            yield joined.slice(0, end).combine_chunks()
            rest = joined.slice(end)
            waiting = [rest] if rest.num_rows else []
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


class _Spill:
    """Files of log rows, by span of time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._span_ms = _SPAN_MS
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        # Files of each span, in the order in which they were begun.
        self._paths: dict[int, list[Path]] = {}
        self._files = 0
        self._schema: pa.Schema | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Append log rows to the files of their spans."""
        batch = self._like_the_first(batch)
        time = batch.column("time_ms").to_numpy()
        while len(self._paths.keys() | set(np.unique(time // self._span_ms))) > (
            _MOST_SPANS
        ):
            self._lengthen_spans(time)
        row_span = time // self._span_ms
        # Stably, so that rows of equal time keep their order.
        order = np.argsort(row_span, kind="stable")
        batch = batch.take(pa.array(order))
        spans, starts = np.unique(row_span[order], return_index=True)
        lengths = np.diff(starts, append=len(time))
        for span, start, length in zip(
            spans.tolist(), starts.tolist(), lengths.tolist(), strict=True
        ):
            part = batch.slice(start, length)
            self._writer(span, batch.schema).write_batch(part)

    def close(self) -> None:
        """Complete the files that are open."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def paths_in_order(self) -> Iterator[list[Path]]:
        """Yield the files of each span, the earliest first."""
        for span in sorted(self._paths):
            yield self._paths[span]

    def _writer(self, span: int, schema: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
        if span not in self._writers:
            path = self._folder / f"{self._files}.arrow"
            self._files += 1
            self._paths.setdefault(span, []).append(path)
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers[span] = pa.ipc.new_stream(str(path), schema, options=options)
        return self._writers[span]

    def _lengthen_spans(self, time: np.ndarray) -> None:
        """Make spans twice as long; the files that are there stay as they are."""
        if self._span_ms == _LONGEST_SPAN_MS:
            days = [span * self._span_ms // _DAY_MS for span in self._paths]
            days += [int(time.min()) // _DAY_MS, int(time.max()) // _DAY_MS]
            raise InputError(
                f"time_ms lies between days {min(days)} and {max(days)} of 1970, too "
                "far apart to be sorted; check that it is in milliseconds, or prepare "
                "the log without rates"
            )
        self.close()
        self._span_ms *= 2
        paths: dict[int, list[Path]] = {}
        for span in sorted(self._paths):
            paths.setdefault(span // 2, []).extend(self._paths[span])
        self._paths = paths

    def _like_the_first(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Order the columns as in the first batch, which all batches resemble."""
        if self._schema is None:
            self._schema = batch.schema
        types = dict(zip(batch.schema.names, batch.schema.types, strict=True))
        first = dict(zip(self._schema.names, self._schema.types, strict=True))
        if types != first:
            names = [n for n in {*types, *first} if types.get(n) != first.get(n)]
            raise InputError(
                f"rows(): batches disagree about the columns {sorted(names)}; yield "
                "the same columns of the same types"
            )
        return batch.select(self._schema.names)
