"""Rows of some users, all rows of each, become chunks: ordered, freed from repeats, counted, cut, encoded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tokenrec.data import records
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED
from tokenrec.data.preparation.chunks import (
    TRAIN,
    check_requests,
    cut_chunks,
    first_of_repeats,
    learned,
    order_rows,
)
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS


@dataclasses.dataclass(frozen=True)
class Tally:
    """What `finish` counts: of rows, by name, and of the dense features of training rows."""

    counts: Counter[str]
    row: Moments
    action: Moments

    @staticmethod
    def empty(schema: Schema) -> Tally:
        return Tally(
            Counter(), Moments(schema.group("row")), Moments(schema.group("action"))
        )

    def merge(self, other: Tally) -> None:
        """Adds what `other` counted."""
        self.counts.update(other.counts)
        self.row.merge(other.row)
        self.action.merge(other.action)


class ChunkRun(NamedTuple):
    """Chunks of one split, back to back. `rows: [n]` of `row_dtype`, `start: [U + 1]`, `user: [U]` codes."""

    split: str
    rows: np.ndarray
    start: np.ndarray
    user: np.ndarray


def part_dtype(schema: Schema) -> np.dtype:
    """A row on its way to a chunk: the code of its user, its split, and its columns."""
    return np.dtype(
        [("user", "<i4"), ("split", "u1"), ("row", records.row_dtype(schema))]
    )


def finish(part: np.ndarray, schema: Schema, tally: Tally) -> np.ndarray:
    """Rows `[n]` of `part_dtype` with final ids, ordered, without repeats, LEARNED set; adds them to `tally`.

    Raises:
      InputError: rows of one request have different times.
    """
    row = part["row"]
    part = part[order_rows(part["user"], row["time"], row["request"], row["item"])]
    row = part["row"]
    first = first_of_repeats(
        part["user"], row["time"], row["item"], row["flags"] & SCORED
    )
    tally.counts["repeats_dropped"] += int((~first).sum())
    part = part[first]
    split, row = part["split"], part["row"]
    check_requests(part["user"], row["time"], row["request"])
    row["flags"] |= learned(split, row["flags"], row["labels"]) * np.uint8(LEARNED)
    for number, name in enumerate(SPLITS):
        inside = split == number
        scored = inside & ((row["flags"] & SCORED) > 0)
        tally.counts[f"rows_{name}"] += int(inside.sum())
        tally.counts[f"scored_{name}"] += int(scored.sum())
        tally.counts[f"events_{name}"] += int(
            (inside & ((row["flags"] & EVENT) > 0)).sum()
        )
        for i, task in enumerate(schema.tasks):
            tally.counts[f"positives_{name}_{task.name}"] += int(
                (row["labels"][scored, i] == 1).sum()
            )
    tally.counts["learned_train"] += int(((row["flags"] & LEARNED) > 0).sum())
    train = split == TRAIN
    tally.row.add(row["row_dense"][train])
    tally.action.add(row["action_dense"][train])
    return part


def cut(part: np.ndarray, chunk_events: int, overlap: int) -> Iterator[ChunkRun]:
    """Chunks of what `finish` returned, for each split that has any."""
    user, split, row = part["user"], part["split"], part["row"]
    for number, name in enumerate(SPLITS):
        found = cut_chunks(
            user, row["time"], split, row["flags"], number, chunk_events, overlap
        )
        if len(found.rows):
            rows = row[found.rows]
            rows["flags"][found.repeated] = EVENT
            yield ChunkRun(name, rows, found.start, user[found.rows[found.start[:-1]]])


def user_rows(users: Entities, schema: Schema) -> np.ndarray:
    """`[users.index.size]` of `user_dtype`: features by code, once their ids are final."""
    out = np.zeros(users.index.size, records.user_dtype(schema))
    out["user_ids"], out["user_dense"] = users.ids, users.dense
    return out


def chunks_of(
    run: ChunkRun, user_ids: np.ndarray, user_rows: np.ndarray
) -> Iterator[records.Chunk]:
    """Chunks of a run. `user_ids: [users]` original ids and `user_rows: [users]` of `user_dtype`, both by code."""
    data, size = memoryview(run.rows.tobytes()), run.rows.dtype.itemsize
    for begin, end, code in zip(
        run.start[:-1].tolist(), run.start[1:].tolist(), run.user.tolist(), strict=True
    ):
        user_id = user_ids[code]
        yield records.Chunk(
            user_id if isinstance(user_id, str) else int(user_id),
            user_rows[code].tobytes(),
            bytes(data[begin * size : end * size]),
        )
