"""Users on the way through a shuffle: blocks of rows or of the source's table, cut by a hash of the user's id."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.preparation.encode import check_columns, encode_features, join
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.intake import BLOCK_ROWS, blocks
from tokenrec.data.schema import Schema
from tokenrec.data.source import LogPart
from tokenrec.data.vocabulary import TableValues, canonical, value_tables
from tokenrec.errors import InputError

Place = tuple[
    int, int
]  # number of the part, and of the block's first row in it: the order of the local path


class UserBlock(NamedTuple):
    """Some rows of the source's table of users: their raw values, and their numbers in the part."""

    place: Place
    part: str
    numbers: np.ndarray
    batch: pa.RecordBatch


class LogBlock(NamedTuple):
    """Some rows of the log: the original id of each user, and what else `rows` brings, row for row."""

    place: Place
    user_id: pa.Array
    rows: np.ndarray


def read_users(numbered: tuple[int, LogPart], schema: Schema) -> Iterator[UserBlock]:
    """The blocks of a part of the source's table of users, checked.

    Raises:
      InputError: a column is missing or unknown, or a value does not fit; names the part.
    """
    number, part = numbered
    features, first = schema.group("user"), 0
    for batch in blocks(part.read()):
        try:
            check_columns(
                batch.schema.names,
                list(dict.fromkeys(["user_id", *(f.name for f in features)])),
                "users()",
            )
            Entities("user_id", (), {}).codes(batch.column("user_id"), "users()", first)
            encode_features(batch, features, value_tables(features), "users()", first)
        except InputError as error:
            raise InputError(f"{part.name}: {error}") from error
        yield UserBlock(
            (number, first), part.name, np.arange(first, first + batch.num_rows), batch
        )
        first += batch.num_rows


def spread_users(block: UserBlock, partitions: int) -> Iterator[tuple[int, UserBlock]]:
    """The block's rows by partition of the user."""
    for partition, chosen in _split(
        partition_of(block.batch.column("user_id"), partitions)
    ):
        yield (
            partition,
            block._replace(
                numbers=block.numbers[chosen], batch=block.batch.take(pa.array(chosen))
            ),
        )


def spread_log(block: LogBlock, partitions: int) -> Iterator[tuple[int, LogBlock]]:
    """The block's rows by partition of the user."""
    for partition, chosen in _split(partition_of(block.user_id, partitions)):
        yield (
            partition,
            block._replace(
                user_id=block.user_id.take(pa.array(chosen)), rows=block.rows[chosen]
            ),
        )


def partition_of(user_id: pa.Array, partitions: int) -> np.ndarray:
    """`[n] int64` in [0, partitions): a hash of the id, the same on every machine."""
    user_id = canonical(user_id, "column 'user_id'")
    if pa.types.is_int64(user_id.type):
        hashed = _mix(user_id.to_numpy().view(np.uint64))
    else:
        encoded = user_id.dictionary_encode()
        distinct = [
            zlib.crc32(value.encode()) for value in encoded.dictionary.to_pylist()
        ]
        hashed = _mix(np.array(distinct, np.uint64))[encoded.indices.to_numpy()]
    return (hashed % np.uint64(partitions)).astype(np.int64)


def gather_users(
    schema: Schema, table: Iterable[UserBlock], log: Iterable[LogBlock]
) -> tuple[Entities, dict[str, TableValues], list[tuple[LogBlock, np.ndarray]]]:
    """All users of a partition: the source's table first, then those of the log, as the local path numbers them.

    Returns them with their tables of values, and the log's blocks in order, each with the codes of its users. Marks and
    missing features are left to `Entities.complete`.

    Raises:
      InputError: an id occurs twice in the table, or is an integer here and a string there.
    """
    features = schema.group("user")
    tables = value_tables(features)
    users = Entities("user_id", features, tables)
    ordered = sorted(table, key=lambda block: block.place)
    if ordered:
        _refuse_repeats(ordered)
        users.read(
            pa.Table.from_batches([join([b.batch for b in ordered], "users()")]),
            "users()",
            BLOCK_ROWS,
        )
    blocks_of_log = sorted(log, key=lambda block: block.place)
    numbered = [
        (block, users.codes(block.user_id, "rows()", block.place[1]))
        for block in blocks_of_log
    ]
    return users, tables, numbered


def _refuse_repeats(ordered: Sequence[UserBlock]) -> None:
    seen: set[object] = set()
    for block in ordered:
        for value, number in zip(
            block.batch.column("user_id").to_pylist(),
            block.numbers.tolist(),
            strict=True,
        ):
            if value in seen:
                raise InputError(
                    f"{block.part}: users(): user_id={value!r} occurs twice (row {number}); keep one"
                )
            seen.add(value)


def _split(partition: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each partition that occurs, and the positions where it does, in order."""
    order = np.argsort(partition, kind="stable")
    ordered = partition[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(ordered)), strict=True):
        yield int(ordered[start]), order[start:stop]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby, 2011), so that ids in steps do not fall into few partitions."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
