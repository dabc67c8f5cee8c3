"""Bring users and their log rows together in a shuffle, by a hash of the user's id.

There may be billions of users, so that no machine may hold all of them: blocks of the
source's table and of the log are cut into partitions of users, and Beam joins the
pieces. Within a partition, users get the codes that the local path would give them:
those of the table first, then those of the log, each in the order of its blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.preparation.encode import encode_features
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.intake import rebatch
from tokenrec.data.preparation.raw_columns import check_columns, concatenate
from tokenrec.data.schema import Schema
from tokenrec.data.source import LogPart
from tokenrec.data.value_index import canonical
from tokenrec.data.vocabulary import TableValues, value_tables
from tokenrec.errors import InputError

# Number of the part, and of the block's first row in the part. A shuffle keeps no
# order; sorted by this, blocks are in the order in which the local path reads them.
BlockOrder = tuple[int, int]


class UserBlock(NamedTuple):
    """Some rows of the source's table of users.

    Attributes:
      order: position of the block among all blocks.
      part: name of the part, for messages.
      numbers: `[n] int64`, number of each row in its part, for messages.
      batch: raw values of the rows.
    """

    order: BlockOrder
    part: str
    numbers: np.ndarray
    batch: pa.RecordBatch


class LogBlock(NamedTuple):
    """Some log rows, or the distinct users of some.

    Attributes:
      order: position of the block among all blocks.
      user_id: `[n]`, original id of each row's user.
      rows: `[n]`, whatever belongs to the rows: encoded rows, or flags of users.
    """

    order: BlockOrder
    user_id: pa.Array
    rows: np.ndarray


def read_user_blocks(
    numbered: tuple[int, LogPart], schema: Schema
) -> Iterator[UserBlock]:
    """Yield the blocks of a part of the source's table of users, checked.

    Args:
      numbered: number of the part, and the part.
      schema: features and tasks.

    Raises:
      InputError: a column is missing or unknown, or a value does not fit; names the
        part.
    """
    number, part = numbered
    features = schema.group("user")
    expected = list(dict.fromkeys(["user_id", *(f.name for f in features)]))
    first = 0
    for batch in rebatch(part.read()):
        try:
            check_columns(batch.schema.names, expected, "users()")
            # These are called for their errors. Encoding again in `gather_users` costs
            # less than a message that names neither part nor row.
            Entities("user_id", (), {}).codes(batch.column("user_id"), "users()", first)
            encode_features(batch, features, value_tables(features), "users()", first)
        except InputError as error:
            raise InputError(f"{part.name}: {error}") from error
        numbers = np.arange(first, first + batch.num_rows)
        yield UserBlock((number, first), part.name, numbers, batch)
        first += batch.num_rows


def partition_users(
    block: UserBlock, partitions: int
) -> Iterator[tuple[int, UserBlock]]:
    """Yield the block's rows of each partition, with its number."""
    partition = partition_of_user(block.batch.column("user_id"), partitions)
    for number, rows in rows_by_partition(partition):
        piece = block._replace(
            numbers=block.numbers[rows], batch=block.batch.take(pa.array(rows))
        )
        yield number, piece


def partition_log(block: LogBlock, partitions: int) -> Iterator[tuple[int, LogBlock]]:
    """Yield the block's rows of each partition, with its number."""
    partition = partition_of_user(block.user_id, partitions)
    for number, rows in rows_by_partition(partition):
        piece = block._replace(
            user_id=block.user_id.take(pa.array(rows)), rows=block.rows[rows]
        )
        yield number, piece


def partition_of_user(user_id: pa.Array, partitions: int) -> np.ndarray:
    """Hash user ids to partitions, the same on every machine.

    Python's own hash of strings differs from process to process.

    Args:
      user_id: `[n]`, integers or strings.
      partitions: number of partitions.

    Returns:
      `[n] int64` in [0, partitions).
    """
    user_id = canonical(user_id, "column 'user_id'")
    if pa.types.is_int64(user_id.type):
        hashed = _murmur_finaliser(user_id.to_numpy().view(np.uint64))
    else:
        # Each distinct string is hashed once.
        encoded = user_id.dictionary_encode()
        distinct = [
            zlib.crc32(value.encode()) for value in encoded.dictionary.to_pylist()
        ]
        hashed = _murmur_finaliser(np.array(distinct, np.uint64))
        hashed = hashed[encoded.indices.to_numpy()]
    return (hashed % np.uint64(partitions)).astype(np.int64)


def gather_users(
    schema: Schema, table: Iterable[UserBlock], log: Iterable[LogBlock]
) -> tuple[Entities, dict[str, TableValues], list[tuple[LogBlock, np.ndarray]]]:
    """Collect all users of a partition.

    Marks of training users and missing features are left to the caller and to
    `Entities.complete`.

    Args:
      schema: features and tasks.
      table: the partition's blocks of the source's table, in any order.
      log: the partition's blocks of the log, in any order.

    Returns:
      The users; the values of their embedding tables; and the blocks of the log in
      order, each with the codes of its users, `[n] int32`.

    Raises:
      InputError: an id occurs twice in the table, or is an integer here and a string
        there.
    """
    features = schema.group("user")
    tables = value_tables(features)
    users = Entities("user_id", features, tables)
    user_blocks = sorted(table, key=lambda block: block.order)
    if user_blocks:
        _refuse_repeats(user_blocks)
        batch = concatenate([block.batch for block in user_blocks], "users()")
        users.read_table(pa.Table.from_batches([batch]), "users()")
    log_blocks = []
    for block in sorted(log, key=lambda block: block.order):
        codes = users.codes(block.user_id, "rows()", block.order[1])
        log_blocks.append((block, codes))
    return users, tables, log_blocks


def _refuse_repeats(user_blocks: Sequence[UserBlock]) -> None:
    """Refuse an id that occurs twice, by the name of its part and its row there.

    `Entities.read_table` would refuse it too, but without part and row.
    """
    seen: set[object] = set()
    for block in user_blocks:
        ids = block.batch.column("user_id").to_pylist()
        for user_id, number in zip(ids, block.numbers.tolist(), strict=True):
            if user_id in seen:
                raise InputError(
                    f"{block.part}: users(): user_id={user_id!r} occurs twice (row "
                    f"{number}); keep one of them"
                )
            seen.add(user_id)


def rows_by_partition(partition: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each partition that occurs, and the positions where it does, in order."""
    # Stable, so that the rows of a user keep the order of the log.
    order = np.argsort(partition, kind="stable")
    ordered = partition[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(ordered)), strict=True):
        yield int(ordered[start]), order[start:stop]


def _murmur_finaliser(x: np.ndarray) -> np.ndarray:
    """Mix `x: [n] uint64` by the finaliser of MurmurHash3 (Appleby, 2011).

    Without it, ids in steps (10, 20, 30, ...) would fall into few partitions.
    """
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
