"""Statistics of the past on Beam: a pipeline between the scan and the build.

It makes the log rows that the second pass reads, with the features added, and the state
that a later log goes on from. Both have the bits of one machine (tokenrec/data/past).

The log is cut twice. Rows lie in *partitions* of users, which have all rows of a user:
times, last events and keys with `user_id` are computed there. All other keys are
shared; their entries are cut into *spans* of time of about `SPAN_ROWS` log rows. A span
is computed like a block of the local path, if it is known with which totals its keys
begin. These follow from the *runs*: what a partition adds to a key in a span, one sum
however many entries there are. So a key with very many log rows, of which that of all
rows is one, is computed by many workers at once. The steps:

    row parts  -> _read_rows -> rows by partition, times
    times      -> _span_edges, one side input
    user parts -> partition_user_part -> users by partition
    rows, users, edges -> collect_entries -> entries by (key, span), runs by key
    runs       -> merge_runs, start_spans -> totals at the start, by (key, span)
    entries, starts -> total_entries -> totals before each entry, by partition
    rows, totals -> add_statistics -> rows with features -> shared folder

`statistics_partition.py` has the functions of partitions, `statistics_totals.py` those
of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.beam.engine import beam_library, create_parts, tagged_output
from tokenrec.data.beam.problems import raise_first_problem, save_first_problem
from tokenrec.data.beam.scan import partition_user_part
from tokenrec.data.beam.shared_files import load_records, save_records
from tokenrec.data.beam.statistics_options import (
    ITEMS,
    USERS,
    StatisticsOptions,
    state_folder,
)
from tokenrec.data.beam.statistics_partition import (
    RowPiece,
    add_statistics,
    collect_entries,
    finished_parts,
)
from tokenrec.data.beam.statistics_totals import merge_runs, start_spans, total_entries
from tokenrec.data.beam.users import partition_of_user, rows_by_partition
from tokenrec.data.past.keys import KeyTable
from tokenrec.data.past.log_rows import check_rows
from tokenrec.data.preparation.intake import rebatch
from tokenrec.data.source import LogPart, PartitionedSource

# Log rows of a span of time. A worker holds the entries of one key of the declaration
# in one span.
SPAN_ROWS = 1 << 20
# Times that stand for those of a block of log rows.
_SAMPLE = 64


class ComputedStatistics(NamedTuple):
    """Result of the pipeline.

    Attributes:
      row_parts: the log rows with the features, a part for each partition of users.
      state: names and arrays of `StatefulSource.state`, each computed when it is asked
        for.
    """

    row_parts: list[LogPart]
    state: Iterator[tuple[str, np.ndarray]]


def compute_statistics(
    plain: PartitionedSource, options: StatisticsOptions, pipeline_options: Any
) -> ComputedStatistics:
    """Run the pipeline on a log that the scan has checked.

    Args:
      plain: the raw log without statistics.
      options: options of the pipeline.
      pipeline_options: Beam's `PipelineOptions`.

    Raises:
      InputError: a value or a sum is too large, or the values of a key cannot be
        hashed.
    """
    past = options.features()
    items = past.hash_table("item_id", plain.items())
    save_records(options.work, ITEMS, items)
    # Without columns of users, no table of them needs to be read.
    user_parts = plain.user_parts() if past.needs_table("user_id") else ()
    with beam_library().Pipeline(options=pipeline_options) as pipeline:
        _add_steps(pipeline, plain.row_parts(), user_parts, options)
    raise_first_problem(options.work)
    return ComputedStatistics(finished_parts(options), _read_state(options, items))


def _add_steps(
    pipeline: Any,
    row_parts: Iterable[LogPart],
    user_parts: Iterable[LogPart],
    options: StatisticsOptions,
) -> None:
    """Add the steps from parts of the log to the shared folder."""
    beam = beam_library()
    # 1. Rows and users by partition, and where spans of time begin.
    rows = create_parts(pipeline, list(row_parts), "Row") | (
        "Read rows" >> beam.FlatMap(_read_rows, options).with_outputs("rows", "times")
    )
    edges = (
        rows.times
        | "All times" >> beam.CombineGlobally(_join_times)
        | "Edges of spans" >> beam.Map(_span_edges, options.spans)
    )
    table = create_parts(pipeline, list(user_parts), "User") | (
        "Partition users"
        >> beam.FlatMap(
            partition_user_part, options.schema, options.partitions
        ).with_outputs("problems", "users")
    )
    # 2. Entries of shared keys, and their runs.
    collected = (
        {"table": table.users, "log": rows.rows}
        | "Join users" >> beam.CoGroupByKey()
        | "Collect entries"
        >> beam.FlatMap(
            collect_entries, options, beam.pvalue.AsSingleton(edges)
        ).with_outputs("problems", "partitions", "entries", "runs")
    )
    # 3. Totals with which spans begin.
    started = (
        collected.runs
        | "Merge runs" >> beam.CombinePerKey(merge_runs)
        | "Start spans"
        >> beam.FlatMap(start_spans, options).with_outputs("problems", "starts")
    )
    # 4. Totals before each entry.
    totals = (
        {"entries": collected.entries, "starts": started.starts}
        | "Join starts" >> beam.CoGroupByKey()
        | "Total entries" >> beam.FlatMap(total_entries, options)
    )
    # 5. Features of the rows of each partition.
    added = (
        {"partition": collected.partitions, "totals": totals}
        | "Join totals" >> beam.CoGroupByKey()
        | "Add statistics"
        >> beam.FlatMap(add_statistics, options).with_outputs("problems")
    )
    save_first_problem(
        (table.problems, collected.problems, started.problems, added.problems),
        options.work,
    )


def _read_rows(
    numbered: tuple[int, LogPart], options: StatisticsOptions
) -> Iterator[Any]:
    """Read a part of the log; yield its rows by partition of users, and some times."""
    tagged = tagged_output()
    number, part = numbered
    first = 0
    for batch in rebatch(part.read()):
        batch = check_rows(batch, options.schema, first)
        time = np.sort(batch["time_ms"].to_numpy())
        # Blocks are of about equal length, so that their quantiles have equal weight.
        places = np.linspace(0, len(time) - 1, _SAMPLE).astype(np.int64)
        yield tagged("times", time[places])
        partition = partition_of_user(batch["user_id"], options.partitions)
        for of_users, rows in rows_by_partition(partition):
            piece = RowPiece((number, first), batch.take(pa.array(rows)))
            yield tagged("rows", (of_users, piece))
        first += batch.num_rows


def _join_times(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _span_edges(times: np.ndarray, spans: int) -> np.ndarray:
    """First time of each span but the first: `[spans - 1] int64`, ascending.

    Rows of one time are always in one span.
    """
    places = np.arange(1, spans) * len(times) // spans
    edges: np.ndarray = np.sort(times)[places]
    return edges


def _read_state(
    options: StatisticsOptions, items: KeyTable
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the state at the end of the log, joined from the shared folder."""
    past = options.features()
    past.use_table("item_id", items)
    users = list(load_records(options.work, USERS))
    if users:
        past.use_table("user_id", KeyTable.join(users))
    return past.whole_state(lambda part: load_records(options.work, state_folder(part)))
