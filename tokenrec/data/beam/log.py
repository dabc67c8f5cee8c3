"""What the second pass on Beam reads: the log, with statistics of the past if declared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenrec.data.beam.scan import RowSummary
from tokenrec.data.beam.statistics_options import StatisticsOptions
from tokenrec.data.past.source import declaring
from tokenrec.data.schema import Schema
from tokenrec.data.source import LogPart, PartitionedSource, Source
from tokenrec.errors import InputError


class EncodableLog(NamedTuple):
    """What the second pass reads.

    Attributes:
      schema: schema of the data set.
      row_parts: parts of the log, with the statistics.
      user_parts: parts of the source's table of users.
      partitions: number of partitions of the users.
      state: names and arrays of the state of the source at the end of the log.
    """

    schema: Schema
    row_parts: Sequence[LogPart]
    user_parts: Sequence[LogPart]
    partitions: int
    state: Iterable[tuple[str, np.ndarray]]


def require_parts(source: Source) -> PartitionedSource:
    """Return the source without statistics of the past, if Beam can read it.

    Raises:
      InputError: it has no parts, or a text of users.
    """
    declared = declaring(source)
    plain = source if declared is None else declared.without_statistics()
    has_parts = all(
        hasattr(plain, name) for name in ("row_parts", "user_parts", "check_times")
    )
    if not has_parts:
        raise InputError(
            f"source '{source.provenance.name}' does not come in parts, so --beam "
            "cannot read it; leave --beam out, or write its rows to Parquet files and "
            "use the source delimited"
        )
    texts = [f.name for f in source.schema.group("user") if f.kind == "text"]
    if texts:
        raise InputError(
            f"feature '{texts[0]}' is a text of users, whom --beam never gathers in "
            "one place to encode their texts; leave it out, or leave --beam out"
        )
    return plain  # type: ignore[return-value]


def open_log(
    source: Source,
    plain: PartitionedSource,
    rows: RowSummary,
    work: str,
    pipeline_options: Any,
    partition_bytes: int | None,
    span_rows: int | None,
) -> EncodableLog:
    """Describe the log for the second pass, and compute the statistics it declares.

    Args:
      source: the source.
      plain: the source without statistics, from `require_parts`.
      rows: summary of the log, from the scan.
      work: folder that all workers see.
      pipeline_options: Beam's `PipelineOptions`.
      partition_bytes: bytes of log rows of a partition of users; None for the default.
      span_rows: log rows of a span of time; None for the default.

    Raises:
      InputError: as `statistics.compute_statistics`.
    """
    # Imported here: tensorflow-datasets takes about a second.
    from tokenrec.data.beam import builder

    partitions = builder.count_partitions(
        source.schema, rows.rows, partition_bytes or builder.PARTITION_BYTES
    )
    user_parts = plain.user_parts()
    declared = declaring(source)
    if declared is None or declared.statistics is None:
        # No source in parts counts the past otherwise.
        return EncodableLog(
            source.schema, plain.row_parts(), user_parts, partitions, ()
        )
    from tokenrec.data.beam.statistics import SPAN_ROWS, compute_statistics

    spans = -(-rows.rows // (span_rows or SPAN_ROWS))
    options = StatisticsOptions(
        declared.statistics, plain.schema, partitions, spans, work
    )
    row_parts, arrays = compute_statistics(plain, options, pipeline_options)
    state = ((declared.state_head + name, array) for name, array in arrays)
    return EncodableLog(source.schema, row_parts, user_parts, partitions, state)
