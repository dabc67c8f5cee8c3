"""Interface of a source: a class that yields log rows and a schema.

A source is one file in tokenrec/data/sources/. docs/guides/data.md shows how to write
one. `prepare` reads a source once and writes a prepared data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Schema

SPLITS = ("train", "valid", "test")
# Column of log rows that a `FreezingSource` adds: lists of float32, null but for the
# scored rows of valid and test.
FROZEN_COLUMN = "frozen_statistics"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of the data, which the metadata of the prepared data set records.

    Attributes:
      name: name of the source.
      licence: licence of the data.
      citation: how to cite the data.
      files: raw files, whose checksums are recorded.
      counts: name -> what the source itself left out or changed while reading; joins
        the counts of `prepare`.
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
    | time_ms | int64 | time of the log row, milliseconds |
    | split | int8 | index into `SPLITS` |
    | event | bool | the log row enters the histories of later log rows |
    | scored | bool | the log row is an impression: a sample of its split |
    | request | int64 | number from 0 of the log rows shown together; -1: alone |
    | label_TASK | int8 | 1, 0, or null or -1 where unknown, for each binary task |
    | label_TASK | int8 | index of the class, null or -1: unknown; a task of classes |
    | label_TASK | float | a number, null where unknown; a task of numbers |
    | row_weight | float | weight in the training loss, null: 1; with `Schema.weighted` |
    | one per feature of the groups `row` and `action` | raw value | null is missing |

    Log rows of one user with an equal request share a time and a history. A categorical
    value is an int64 or a string; a multi-valued, embedding or semantic-id value is a
    list.

    Attributes:
      schema: features and tasks.
      provenance: origin of the data.
    """

    schema: Schema
    provenance: Provenance

    def users(self) -> pa.Table:
        """Return `user_id` and one column per user feature.

        Users of the log that are absent here have missing features.
        """
        ...

    def items(self) -> pa.Table:
        """Return `item_id` and one column per catalogue feature.

        Items of the log that are absent here have missing features.
        """
        ...

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the log rows."""
        ...


@runtime_checkable
class StatefulSource(Source, Protocol):
    """A raw log with features that count the past, which can go on where one ended."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the totals at the end of the log, by a name that is a file's name.

        It is called once, after `rows` has ended.
        """
        ...

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on from the totals of an earlier log.

        It is called before `rows`, which then yields no row of that time or before.

        Args:
          state: what `state` returned at the end of that log.
          last_time_ms: time of its last row.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Features that a source also gives as of the start of a split.

    Attributes:
      features: their names, in the order of the lists in `FROZEN_COLUMN`.
      times: split -> earliest and latest time at which it is frozen so, milliseconds;
        no row lies between, and none before them if the earliest is None.
    """

    features: tuple[str, ...]
    times: Mapping[str, tuple[int | None, int]]


@runtime_checkable
class FreezingSource(Source, Protocol):
    """A raw log whose rows have a column `FROZEN_COLUMN`, for `evaluate --freeze-at`."""

    def frozen(self) -> Frozen | None:
        """Describe the column; None if there is none. Called after `rows` has ended."""
        ...


@dataclasses.dataclass(frozen=True)
class LogPart:
    """A part of a source's log rows that can be read on its own, on any machine.

    Attributes:
      name: where the log rows are, for messages.
      read: yields the log rows; it can be pickled.
    """

    name: str
    read: Callable[[], Iterator[pa.RecordBatch]]


class PartitionedSource(Source, Protocol):
    """A raw log that many machines can read at once."""

    def row_parts(self) -> Sequence[LogPart]:
        """Return parts whose batches, part after part, are those of `rows`."""
        ...

    def user_parts(self) -> Sequence[LogPart]:
        """Return parts whose batches, part after part, are `users`."""
        ...

    def check_times(self, earliest: int, latest: int) -> None:
        """Check the range of times, which `rows` would check at its end.

        Args:
          earliest: the least `time_ms` of all log rows.
          latest: the greatest.

        Raises:
          InputError: the one that `rows` would raise.
        """
        ...
