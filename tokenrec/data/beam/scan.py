"""First pass on Beam: check and count every row and user, and collect distinct values.

Rows never leave the worker that reads them. Beam shuffles distinct values per block of
rows instead: values of the embedding tables and items go to one worker per table, users
to `USER_PARTITIONS` partitions. The steps:

    row parts  -> _scan_rows -> values, summaries, users (of each block), problems
    user parts -> partition_user_part -> users (of the table), problems
    users of both, joined -> _scan_users -> values, summaries, problems
    values -> _union_values per table -> shared folder
    summaries -> shared folder;  problems -> the first one -> shared folder

The driver then reads the shared folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.beam.engine import beam_library, create_parts, tagged_output
from tokenrec.data.beam.problems import raise_first_problem, save_first_problem
from tokenrec.data.beam.shared_files import load_records, save_records, save_scan_result
from tokenrec.data.beam.users import (
    LogBlock,
    UserBlock,
    gather_users,
    partition_log,
    partition_users,
    read_user_blocks,
)
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.preparation.chunks import TRAIN
from tokenrec.data.preparation.intake import LogEncoder, rebatch
from tokenrec.data.preparation.matches import Matches
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS, LogPart, PartitionedSource
from tokenrec.data.value_index import Marks, ValueIndex
from tokenrec.data.vocabulary import TableValues
from tokenrec.errors import InputError

USER_PARTITIONS = 256
_ITEMS, _TABLE = "items", "table"

# Distinct values, int64 or object, and a flag for each: a training row uses it.
Values = tuple[np.ndarray, np.ndarray]


class DistinctValues(NamedTuple):
    """Distinct values of one type, of an embedding table or of the items.

    Attributes:
      table: name of the table; None for the original ids of the items.
      type: "int64" or "string".
      values: `[n]`, int64 or object.
      trained: `[n] bool`, True for a value that training rows use.
    """

    table: str | None
    type: str
    values: np.ndarray
    trained: np.ndarray


class RowSummary(NamedTuple):
    """Summary of some log rows.

    Attributes:
      rows: number of rows.
      earliest: least `time_ms`.
      latest: greatest `time_ms`.
      splits: names of the splits that have a row for which a chunk is made.
    """

    rows: int
    earliest: int
    latest: int
    splits: frozenset[str]


class UserSummary(NamedTuple):
    """Summary of the users of a partition.

    Attributes:
      partition: number of the partition.
      users: number of users.
      trained: number of users of training rows.
      type: "int64" or "string", type of their ids.
      moments: moments of the features of the users of training rows.
      matches: how users of the log meet those of the source's table.
    """

    partition: int
    users: int
    trained: int
    type: str
    moments: Moments
    matches: Matches


class ScanResult(NamedTuple):
    """Result of the first pass.

    Attributes:
      rows: summary of the log; None if it has no row.
      users: summaries of the partitions of users, by partition.
      distinct: distinct values of all tables and of the items.
    """

    rows: RowSummary | None
    users: list[UserSummary]
    distinct: list[DistinctValues]


def scan(
    source: PartitionedSource,
    work: str,
    options: Any,
    user_partitions: int = USER_PARTITIONS,
) -> ScanResult:
    """Run the first pass on Apache Beam.

    Args:
      source: the raw log.
      work: folder that all workers see.
      options: Beam's `PipelineOptions`.
      user_partitions: number of partitions of the users.

    Raises:
      InputError: a part cannot be read, or a row or a user is wrong; names the part. Of
        several problems it is the first one of the first part.
    """
    beam = beam_library()
    with beam.Pipeline(options=options) as pipeline:
        rows, table, users = _scan_steps(pipeline, source, user_partitions)
        _ = (
            (rows.values, users.values)
            | "All values" >> beam.Flatten()
            | "Distinct" >> beam.CombinePerKey(_union_values)
            | "Save values" >> beam.Map(_save_values, work)
        )
        _ = (
            rows.counted
            | "Count" >> beam.CombineGlobally(_add_summaries)
            | "Save count" >> beam.Map(save_scan_result, work, "rows")
        )
        _ = (
            users.counted
            | "All user counts" >> beam.combiners.ToList()
            | "Save user counts" >> beam.Map(save_scan_result, work, "users")
        )
        save_first_problem((table.problems, rows.problems, users.problems), work)
    raise_first_problem(work)
    row_summary = next(load_records(work, "scan/rows"), None)
    user_summaries = next(load_records(work, "scan/users"), ())
    return ScanResult(
        row_summary,
        sorted(user_summaries, key=lambda summary: summary.partition),
        list(load_records(work, "scan/values")),
    )


def _scan_steps(
    pipeline: Any, source: PartitionedSource, user_partitions: int
) -> tuple[Any, Any, Any]:
    """Add the steps that read parts; return the outputs of rows, table and users."""
    beam, schema = beam_library(), source.schema
    rows = create_parts(pipeline, source.row_parts(), "Row") | (
        "Scan rows"
        >> beam.FlatMap(_scan_rows, schema, user_partitions).with_outputs(
            "problems", "values", "counted", "users"
        )
    )
    table = create_parts(pipeline, source.user_parts(), "User") | (
        "Scan user table"
        >> beam.FlatMap(partition_user_part, schema, user_partitions).with_outputs(
            "problems", "users"
        )
    )
    users = (
        {"table": table.users, "log": rows.users}
        | "Join users" >> beam.CoGroupByKey()
        | "Scan users"
        >> beam.FlatMap(_scan_users, schema).with_outputs(
            "problems", "values", "counted"
        )
    )
    return rows, table, users


def partition_user_part(
    numbered: tuple[int, LogPart], schema: Schema, partitions: int
) -> Iterator[Any]:
    """Read a part of the table of users, and cut its blocks into partitions.

    Args:
      numbered: number of the part, and the part.
      schema: features and tasks.
      partitions: number of partitions of the users.

    Yields:
      Pieces of blocks tagged "users"; a problem of the input tagged "problems".
    """
    tagged = tagged_output()
    try:
        for block in read_user_blocks(numbered, schema):
            for piece in partition_users(block, partitions):
                yield tagged("users", piece)
    except InputError as error:
        yield tagged("problems", ((0, numbered[0]), str(error)))


def _scan_rows(
    numbered: tuple[int, LogPart], schema: Schema, partitions: int
) -> Iterator[Any]:
    """Check a part of the log; yield the values, users and summary of each block."""
    tagged = tagged_output()
    number, part = numbered
    first = 0
    try:
        for batch in rebatch(part.read()):
            # An encoder per block: its codes mean nothing beyond the block.
            encoder = LogEncoder(schema)
            try:
                rows = encoder.encode(batch, first)
            except InputError as error:
                raise InputError(f"{part.name}: {error}") from error
            yield from _tagged_values(encoder.tables, tagged)
            items = encoder.items
            # All items are sent: those that no training row uses are in the catalogue
            # too.
            key = (_ITEMS, "", items.index.type)
            yield tagged("values", (key, (items.index.values(), items.in_training())))
            users = encoder.users
            block = LogBlock(
                (number, first), pa.array(users.index.values()), users.in_training()
            )
            for piece in partition_log(block, partitions):
                yield tagged("users", piece)
            yield tagged("counted", _summarise(rows))
            first += batch.num_rows
    except InputError as error:
        yield tagged("problems", ((1, number), str(error)))


def _scan_users(
    grouped: tuple[int, dict[str, Iterable[Any]]], schema: Schema
) -> Iterator[Any]:
    """Check the users of a partition; yield their feature values and their summary."""
    tagged = tagged_output()
    partition, group = grouped
    table: Iterable[UserBlock] = group["table"]
    try:
        users, tables, log_blocks = gather_users(schema, table, group["log"])
    except InputError as error:
        yield tagged("problems", ((2, partition), str(error)))
        return
    for block, codes in log_blocks:
        # The rows of a block of users are flags: True for a user of training rows.
        users.in_log.add(codes)
        users.trained.add(codes[block.rows])
    users.complete()
    yield from _tagged_values(tables, tagged)
    moments = Moments(users.features)
    for features in users.training_features():
        moments.add(*features)
    summary = UserSummary(
        partition,
        users.index.size,
        int(users.in_training().sum()),
        users.index.type,
        moments,
        users.matches(),
    )
    yield tagged("counted", summary)


def _tagged_values(tables: dict[str, TableValues], tagged: Any) -> Iterator[Any]:
    """Yield the marked values of each table that has any."""
    for name, table in tables.items():
        if table.index.type:
            known = table.index.values()[table.trained.array(table.index.size)]
            key = (_TABLE, name, table.index.type)
            yield tagged("values", (key, (known, np.ones(len(known), bool))))


def _summarise(rows: np.ndarray) -> RowSummary:
    """Summarise `rows: [n]` of `encoded_row_dtype`."""
    time, flags = rows["row"]["time"], rows["row"]["flags"]
    # The rule of `chunks.chunk_indices`; LEARNED is not set yet, but such a row of
    # train is an event or scored.
    needs_chunk = np.where(rows["split"] == TRAIN, flags > 0, (flags & SCORED) > 0)
    splits = np.unique(rows["split"][needs_chunk])
    return RowSummary(
        len(rows),
        int(time.min()),
        int(time.max()),
        frozenset(SPLITS[number] for number in splits),
    )


def _add_summaries(summaries: Iterable[RowSummary | None]) -> RowSummary | None:
    # Beam combines in stages; a stage without input yields None.
    present = [summary for summary in summaries if summary is not None]
    if not present:
        return None
    rows, earliest, latest, splits = zip(*present, strict=True)
    return RowSummary(sum(rows), min(earliest), max(latest), frozenset().union(*splits))


def _union_values(parts: Iterable[Values]) -> Values:
    # A value that one part uses in training, and another does not, is marked.
    index, trained = ValueIndex(), Marks()
    for values, is_trained in parts:
        if len(values):
            trained.add(index.codes(pa.array(values), "values")[is_trained])
    return index.values(), trained.array(index.size)


def _save_values(keyed: tuple[tuple[str, str, str], Values], work: str) -> None:
    (what, name, kind), (values, trained) = keyed
    distinct = DistinctValues(name if what == _TABLE else None, kind, values, trained)
    save_records(work, f"scan/values/{what}-{name.encode().hex()}-{kind}", distinct)
