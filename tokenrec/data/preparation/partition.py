"""Turn the encoded log rows of some users into chunks: sort, deduplicate, count, cut.

This is the second pass for one partition: the log rows of some users, all rows of each.
The local path (`prepare.py`) and Apache Beam (`tokenrec/data/beam/builder.py`) call the
same functions, which is why both make the same chunks.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data import records
from tokenrec.data.interaction_log import EVENT, LEARNED, REPEATED, SCORED
from tokenrec.data.preparation.chunks import (
    TRAIN,
    check_request_times,
    chunk_indices,
    is_learned,
    sort_order,
)
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.label_moments import LabelMoments
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.repeats import join_repeats
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS


@dataclasses.dataclass(frozen=True)
class PreparationCounts:
    """Counts of log rows, and moments of their dense features; filled in by partition.

    Attributes:
      by_name: numbers of log rows by name, as in `counts` of `tokenrec.json`.
      row_moments: moments of the features of the group `row`, over training rows.
      action_moments: moments of the features of the group `action`, over training rows.
      label_moments: moments of the labels of numbers, over rows that training learns
        from.
    """

    by_name: Counter[str]
    row_moments: Moments
    action_moments: Moments
    label_moments: LabelMoments

    @staticmethod
    def empty(schema: Schema) -> PreparationCounts:
        return PreparationCounts(
            Counter(),
            Moments(schema.group("row")),
            Moments(schema.group("action")),
            LabelMoments(schema),
        )

    def merge(self, other: PreparationCounts) -> None:
        """Add the counts of another partition."""
        self.by_name.update(other.by_name)
        self.row_moments.merge(other.row_moments)
        self.action_moments.merge(other.action_moments)
        self.label_moments.merge(other.label_moments)


class ChunkRun(NamedTuple):
    """Chunks of one split, back to back.

    Attributes:
      split: name of the split.
      rows: `[m]` of `records.row_dtype`, log rows, chunk after chunk.
      start: `[U + 1] int64`, first log row of each chunk.
      user: `[U] int32`, code of each chunk's user.
      frozen: `[m] int64`, place of each log row's frozen statistics, 0 for none.
    """

    split: str
    rows: np.ndarray
    start: np.ndarray
    user: np.ndarray
    frozen: np.ndarray


def encoded_row_dtype(schema: Schema) -> np.dtype:
    """Type of an encoded log row: the code of its user, its split, and its columns.

    User and split are not part of a chunk's rows: a chunk has one user and one split.
    `frozen` is the place of its frozen statistics (frozen.py), 0 for none.
    """
    return np.dtype(
        [
            ("user", "<i4"),
            ("split", "u1"),
            ("frozen", "<i8"),
            ("row", records.row_dtype(schema)),
        ]
    )


def sort_and_deduplicate(
    partition: np.ndarray, schema: Schema, counts: PreparationCounts
) -> np.ndarray:
    """Sort a partition, drop repeats, set the flag LEARNED, and count.

    Args:
      partition: `[n]` of `encoded_row_dtype`, with vocabulary ids, all rows of its
        users.
      schema: features and tasks.
      counts: receives the counts and moments of this partition.

    Returns:
      `[m]` of `encoded_row_dtype`, sorted by user, time, request and item.

    Raises:
      InputError: rows of one request have different times.
    """
    # 1. Sort, and join rows that repeat one another.
    row = partition["row"]
    partition = partition[
        sort_order(
            partition["user"],
            row["time"],
            row["request"],
            row["item"],
            row["flags"] & SCORED,
        )
    ]
    partition = join_repeats(partition, counts.by_name)

    # 2. Check and mark what can be known only when all rows of a user are together.
    row = partition["row"]
    check_request_times(partition["user"], row["time"], row["request"])
    # Rows of an earlier data set are history, whatever they were there.
    earlier = (row["flags"] & REPEATED) > 0
    row["flags"][earlier] = EVENT | REPEATED
    learned = is_learned(partition["split"], row["flags"], row["labels"])
    row["flags"] |= learned * np.uint8(LEARNED)

    # 3. Count. Moments come from training rows alone: no look into valid or test.
    _count_rows(partition, schema, counts.by_name)
    in_train = partition["split"] == TRAIN
    counts.row_moments.add(row["row_ids"][in_train], row["row_dense"][in_train])
    counts.action_moments.add(
        row["action_ids"][in_train], row["action_dense"][in_train]
    )
    if schema.real_tasks:
        counts.label_moments.add(row["targets"][learned])
    return partition


def _count_rows(partition: np.ndarray, schema: Schema, counts: Counter[str]) -> None:
    """Count rows, impressions, events, known and positive labels of each split."""
    # Rows of an earlier data set (`prepare --like`) were counted there.
    partition = partition[(partition["row"]["flags"] & REPEATED) == 0]
    row = partition["row"]
    for number, name in enumerate(SPLITS):
        in_split = partition["split"] == number
        scored = in_split & ((row["flags"] & SCORED) > 0)
        event = in_split & ((row["flags"] & EVENT) > 0)
        counts[f"rows_{name}"] += int(in_split.sum())
        counts[f"scored_{name}"] += int(scored.sum())
        counts[f"events_{name}"] += int(event.sum())
        for i, task in enumerate(schema.tasks):
            # Labels of unscored rows enter no metric.
            labels = row["labels"][scored, i]
            if task.kind == "binary":
                counts[f"positives_{name}_{task.name}"] += int((labels == 1).sum())
            counts[f"labelled_{name}_{task.name}"] += int((labels >= 0).sum())
    counts["learned_train"] += int(((row["flags"] & LEARNED) > 0).sum())


def cut_into_chunks(
    partition: np.ndarray, chunk_events: int, overlap: int
) -> Iterator[ChunkRun]:
    """Yield the chunks of each split that has any.

    Args:
      partition: `[n]` of `encoded_row_dtype`, from `sort_and_deduplicate`.
      chunk_events: the most new rows of a chunk.
      overlap: the most events that a chunk repeats at its head.
    """
    user, split, row = partition["user"], partition["split"], partition["row"]
    for number, name in enumerate(SPLITS):
        chunks = chunk_indices(
            user, row["time"], split, row["flags"], number, chunk_events, overlap
        )
        if len(chunks.rows):
            # A copy, so that the flags set below change no other split.
            rows = row[chunks.rows]
            # A row that is history here must be neither scored nor learned again.
            rows["flags"][chunks.history_only] = EVENT | REPEATED
            chunk_user = user[chunks.rows[chunks.start[:-1]]]
            frozen = partition["frozen"][chunks.rows]
            yield ChunkRun(name, rows, chunks.start, chunk_user, frozen)


class Users:
    """Original ids and features of all users, once their ids are vocabulary ids."""

    def __init__(self, users: Entities, schema: Schema) -> None:
        self._ids = users.index.array()
        self._entities = users
        self._dtype = records.user_dtype(schema)

    def ids(self, codes: np.ndarray) -> list[int | str]:
        """Return the original ids of users `codes: [n]`."""
        ids: list[int | str] = self._ids.take(pa.array(codes)).to_pylist()
        return ids

    def features(self, codes: np.ndarray) -> np.ndarray:
        """Pack the features of users `codes: [n]`: `[n]` of `records.user_dtype`."""
        packed = np.zeros(len(codes), self._dtype)
        packed["user_ids"] = self._entities.ids[codes]
        packed["user_dense"] = self._entities.dense[codes]
        return packed


def chunk_records(run: ChunkRun, users: Users) -> Iterator[records.Chunk]:
    """Yield the chunks of a run as records."""
    # One copy of all bytes, of which each chunk is a slice.
    data, row_bytes = run.rows.tobytes(), run.rows.dtype.itemsize
    packed = users.features(run.user)
    features, user_bytes = packed.tobytes(), packed.dtype.itemsize
    chunks = zip(
        run.start[:-1].tolist(),
        run.start[1:].tolist(),
        users.ids(run.user),
        strict=True,
    )
    for number, (begin, end, user_id) in enumerate(chunks):
        yield records.Chunk(
            user_id,
            features[number * user_bytes : (number + 1) * user_bytes],
            data[begin * row_bytes : end * row_bytes],
        )
