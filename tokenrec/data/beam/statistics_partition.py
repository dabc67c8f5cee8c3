"""Steps of the pipeline of statistics that hold a partition of users."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.beam.engine import tagged_output
from tokenrec.data.beam.shared_files import load_record, record_names, save_records
from tokenrec.data.beam.statistics_options import (
    USERS,
    StatisticsOptions,
    load_items,
    numbered,
    state_folder,
)
from tokenrec.data.beam.users import BlockOrder, UserBlock
from tokenrec.data.past.keys import KeyTable
from tokenrec.data.past.partitions import PartitionFeatures
from tokenrec.data.past.plan import Key
from tokenrec.data.past.runs import Runs
from tokenrec.data.preparation.raw_columns import concatenate
from tokenrec.data.source import LogPart
from tokenrec.errors import InputError

_ROWS, _FINISHED = "statistics/rows", "statistics/finished"


class RowPiece(NamedTuple):
    """The log rows of one partition in a block of the log.

    Attributes:
      order: position of the block among all blocks.
      batch: raw values of the rows.
    """

    order: BlockOrder
    batch: pa.RecordBatch


class EntryPiece(NamedTuple):
    """Entries of one shared key from one partition, in one span of time.

    Attributes:
      partition: number of the partition.
      first: number of the first one among the partition's entries of the key; the
        others follow it.
      keys: `[n] uint64`.
      time: `[n] int64`, ascending.
      values: `[n, width]`, float64, or int8 where that holds them.
    """

    partition: int
    first: int
    keys: np.ndarray
    time: np.ndarray
    values: np.ndarray


class TotalPiece(NamedTuple):
    """Totals before the entries of an `EntryPiece`.

    Attributes:
      key: the shared key.
      first: as there.
      before: for each horizon `[n, width] float64`; None if a total is too large.
    """

    key: Key
    first: int
    before: list[np.ndarray] | None


class PartitionRows(NamedTuple):
    """What a partition keeps until it gets the totals of its entries.

    Attributes:
      table: its log rows in the order of time.
      users: hashes of its users.
    """

    table: pa.Table
    users: KeyTable


def collect_entries(
    grouped: tuple[int, dict[str, Iterable[Any]]],
    options: StatisticsOptions,
    edges: np.ndarray,
) -> Iterator[Any]:
    """Save the rows of a partition in the order of time; yield what others need of them.

    Args:
      grouped: number of the partition, its blocks of users and its `RowPiece`s.
      options: options of the pipeline.
      edges: `[spans - 1] int64`, first time of each span but the first.

    Yields:
      Tagged "partitions", the number of the partition, if it has rows; tagged
      "entries", `EntryPiece`s by (key, span); tagged "runs", the runs of each horizon
      by (key, shard); a problem of the input tagged "problems".
    """
    tagged = tagged_output()
    partition, group = grouped
    past = options.features()
    try:
        users = _hash_users(past, group["table"])
        if past.needs_table("user_id"):
            save_records(options.work, numbered(USERS, partition), users)
        pieces = sorted(group["log"], key=lambda piece: piece.order)
        if not pieces:
            return
        table = _in_time_order([piece.batch for piece in pieces])
        _use_tables(past, users, options)
        entries = past.shared_entries(table)
    except InputError as error:
        yield tagged("problems", ((0, partition), str(error)))
        return
    save_records(options.work, numbered(_ROWS, partition), PartitionRows(table, users))
    yield tagged("partitions", (partition, None))
    for number, (keys, time, values) in enumerate(entries):
        if not len(keys):
            continue
        span = np.searchsorted(edges, time, side="right")
        for at, where in _slices(span):
            piece = EntryPiece(
                partition, where.start, keys[where], time[where], _packed(values[where])
            )
            yield tagged("entries", ((number, at), piece))
        runs = past.totals(past.shared[number]).runs(keys, time, values, span)
        for shard, of_shard in _by_shard(runs, options.spans):
            yield tagged("runs", ((number, shard), of_shard))


def add_statistics(
    grouped: tuple[int, dict[str, Iterable[Any]]], options: StatisticsOptions
) -> Iterator[Any]:
    """Add the features to the rows of a partition, and save them and the totals.

    Args:
      grouped: number of the partition, and its `TotalPiece`s.
      options: options of the pipeline.

    Yields:
      A problem of the input, tagged "problems".
    """
    partition, group = grouped
    pieces: list[TotalPiece] = sorted(group["totals"], key=lambda piece: piece.first)
    if any(piece.before is None for piece in pieces):
        # `start_spans` reports the total that is too large.
        return
    past = options.features()
    rows: PartitionRows = load_record(options.work, numbered(_ROWS, partition))
    _use_tables(past, rows.users, options)
    totals = {}
    for key in past.shared:
        before = [piece.before for piece in pieces if piece.key == key]
        # None where no row has the key.
        horizons = [np.concatenate(h) for h in zip(*before, strict=True)]
        totals[key] = horizons or past.no_totals(key)
    try:
        table = past.add_to_partition(rows.table, totals)
    except InputError as error:
        yield tagged_output()("problems", ((2, partition), str(error)))
        return
    save_records(options.work, numbered(_FINISHED, partition), table)
    for part, state in past.state_by_part().items():
        save_records(options.work, numbered(state_folder(part), partition), state)


def finished_parts(options: StatisticsOptions) -> list[LogPart]:
    """The rows with their features, a part for each partition that has any."""
    return [
        LogPart(name, functools.partial(_read_finished, options.work, name))
        for name in record_names(options.work, _FINISHED)
    ]


def _read_finished(work: str, name: str) -> Iterator[pa.RecordBatch]:
    table: pa.Table = load_record(work, name)
    return iter(table.to_batches())


def _hash_users(past: PartitionFeatures, blocks: Iterable[UserBlock]) -> KeyTable:
    """Hash the users of a partition, of whom there may be none."""
    ordered = sorted(blocks, key=lambda block: block.order)
    if not ordered:
        return past.no_table("user_id")
    batch = concatenate([block.batch for block in ordered], "users()")
    return past.hash_table("user_id", pa.Table.from_batches([batch]))


def _use_tables(
    past: PartitionFeatures, users: KeyTable, options: StatisticsOptions
) -> None:
    past.use_table("user_id", users)
    past.use_table("item_id", load_items(options.work))


def _in_time_order(batches: list[pa.RecordBatch]) -> pa.Table:
    """Sort log rows by time; those of equal time keep their order."""
    batch = concatenate(batches, "rows()")
    order = np.argsort(batch["time_ms"].to_numpy(), kind="stable")
    return pa.Table.from_batches([batch.take(pa.array(order))])


def _slices(ascending: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield each value of `ascending: [n]`, n > 0, and where it is."""
    values, starts = np.unique(ascending, return_index=True)
    stops = np.append(starts[1:], len(ascending))
    for value, start, stop in zip(
        values.tolist(), starts.tolist(), stops.tolist(), strict=True
    ):
        yield value, slice(start, stop)


def _packed(values: np.ndarray) -> np.ndarray:
    """Most values are flags, which need no eight bytes in a shuffle."""
    with np.errstate(invalid="ignore"):
        small = values.astype(np.int8)
    return small if np.array_equal(small, values) else values


def _by_shard(runs: list[Runs], shards: int) -> Iterator[tuple[int, list[Runs]]]:
    """Cut the runs of each horizon by their key, all horizons alike."""
    of_run = [runs_.key % np.uint64(shards) for runs_ in runs]
    for shard in np.unique(of_run[0]).tolist():
        yield (
            shard,
            [
                of_horizon.select(where == shard)
                for of_horizon, where in zip(runs, of_run, strict=True)
            ],
        )
