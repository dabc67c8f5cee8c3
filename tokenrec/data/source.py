"""What a source is: one file that yields rows and a schema. `docs/data.md` shows how to write one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from tokenrec.data.schema import Schema

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where the data comes from: `files` are checksummed into the metadata of the prepared data set.

    `counts` is what the source itself left out or changed on reading; it joins the counts that `prepare` makes.
    """

    name: str
    licence: str
    citation: str
    files: tuple[Path, ...]
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """A raw log.

    `rows` yields record batches in any order, with the columns

    | column | type | meaning |
    |---|---|---|
    | user_id, item_id | int64 or string | original ids |
    | time_ms | int64 | time of the row, milliseconds |
    | split | int8 | index into `SPLITS` |
    | event | bool | the row enters the histories of later rows |
    | scored | bool | the row is an impression: a sample of its split |
    | request | int64 | rows of one user with equal request >= 0 share a time and a history; -1: alone |
    | label_TASK | int8 | 1, 0, or null or -1 where unknown, for each task of the schema |
    | one per feature of the groups `row` and `action` | raw value | null is missing |

    A categorical value is an int64 or a string, a multi-valued, embedding or semantic-id value a list.
    """

    schema: Schema
    provenance: Provenance

    def users(self) -> pa.Table:
        """`user_id` and one column per user feature. Users of the log that are absent have missing features."""
        ...

    def items(self) -> pa.Table:
        """`item_id` and one column per catalogue feature. Items of the log that are absent have missing features."""
        ...

    def rows(self) -> Iterator[pa.RecordBatch]: ...


@dataclasses.dataclass(frozen=True)
class LogPart:
    """A run of a source's rows that can be read apart from the others, on any machine: it pickles.

    `name` says in messages where the rows are.
    """

    name: str
    read: Callable[[], Iterator[pa.RecordBatch]]


class PartitionedSource(Source, Protocol):
    """A raw log that many machines can read at once, and whose users need not fit into one."""

    def row_parts(self) -> Sequence[LogPart]:
        """Parts whose batches, part after part, are those of `rows`."""
        ...

    def user_parts(self) -> Sequence[LogPart]:
        """Parts whose batches, part after part, are `users`."""
        ...

    def check_times(self, earliest: int, latest: int) -> None:
        """Raises the InputError with which `rows` would end, given the least and the greatest time of its rows."""
        ...
