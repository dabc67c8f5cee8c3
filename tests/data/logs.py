"""Small logs in memory, with everything that makes cutting samples difficult.

They have ties in time, requests, unknown labels, log rows that are no events, and users
of every length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from tokenrec.data.interaction_log import (
    EVENT,
    LEARNED,
    SCORED,
    Catalogue,
    InteractionLog,
)
from tokenrec.data.metadata import Metadata
from tokenrec.data.samples import Requests, Samples
from tokenrec.data.schema import Feature, Schema, Task

ITEMS = 11
PER_ROW = (
    "time",
    "item",
    "flags",
    "request",
    "labels",
    "row_ids",
    "row_dense",
    "action_ids",
    "action_dense",
)
SCHEMA = Schema(
    (
        Feature("age", "categorical", "user"),
        Feature("income", "dense", "user"),
        Feature("video", "categorical", "item"),
        Feature("tab", "categorical", "context"),
        Feature("tags", "multi_valued", "item", length=2),
        Feature("rate", "dense", "item", per_row=True),
        Feature("size", "dense", "item"),
        Feature("clicked", "categorical", "action"),
        Feature("played", "dense", "action"),
    ),
    (Task("click"), Task("long"), Task("like")),
    {"age": 9, "video": 20, "tab": 9, "tags": 9, "clicked": 4},
)


def random_log(
    seed: int, *, chunks: int = 12, rows: int = 30, all_events: bool = False
) -> InteractionLog:
    """Draw chunks of 0 to `rows` log rows; about every third one shares its time."""
    random = np.random.default_rng(seed)
    sizes = random.integers(0, rows + 1, chunks)
    start = np.concatenate([[0], np.cumsum(sizes)])
    count = int(start[-1])
    steps = random.integers(0, 3, count)
    time = np.concatenate(
        [1000 + np.cumsum(steps[a:b]) for a, b in itertools.pairwise(start)]
    )
    event = (random.random(count) < 0.7) | all_events
    scored = random.random(count) < 0.6
    learned = scored | (event & (random.random(count) < 0.3))
    flags = EVENT * event + SCORED * scored + LEARNED * learned
    return InteractionLog(
        start=start,
        user_id=500 + np.arange(chunks),
        user_ids=random.integers(1, 9, (chunks, 1), dtype=np.int32),
        user_dense=random.random((chunks, 1), dtype=np.float32),
        time=time.astype(np.int64),
        item=random.integers(0, ITEMS, count, dtype=np.int32),
        flags=flags.astype(np.uint8),
        request=np.where(
            random.random(count) < 0.3, -1, time // 2 * 4 + random.integers(0, 2, count)
        ),
        labels=random.integers(-1, 2, (count, 3), dtype=np.int8),
        row_ids=random.integers(1, 9, (count, 1), dtype=np.int32),
        row_dense=random.random((count, 1), dtype=np.float32),
        action_ids=random.integers(1, 4, (count, 1), dtype=np.int32),
        action_dense=random.random((count, 1), dtype=np.float32),
    )


def hand_log(
    time: list[int],
    flags: list[int],
    *,
    labels: list[int] | None = None,
    request: list[int] | None = None,
) -> InteractionLog:
    """Make one chunk by hand.

    Args:
      time: ascending times of its log rows.
      flags: EVENT | SCORED | LEARNED of each.
      labels: first label of each; all 1 by default, other labels are unknown.
      request: request of each; all -1 by default.
    """
    count = len(time)
    log = random_log(0, chunks=1)
    zeros = {
        name: np.zeros((count, *getattr(log, name).shape[1:]), getattr(log, name).dtype)
        for name in PER_ROW
    }
    log = dataclasses.replace(log, start=np.array([0, count]), **zeros)
    log.time[:], log.flags[:], log.request[:] = (
        time,
        flags,
        -1 if request is None else request,
    )
    log.labels[:] = -1
    log.labels[:, 0] = 1 if labels is None else labels
    return log


@dataclasses.dataclass
class MemoryData:
    """A data set in memory, a `LogReader`.

    Attributes:
      logs: split -> log.
      options: as in `Metadata.options`.
      schema: schema of the logs.
      on_load: called with each log that is loaded.
      rare_ids: by which ids batches replace those of a table.
    """

    logs: dict[str, InteractionLog]
    options: dict[str, int] = dataclasses.field(default_factory=dict)
    schema: Schema = SCHEMA
    on_load: Callable[[InteractionLog], None] = lambda log: None
    rare_ids: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.schema, "memory", "", "", {}, {}, self.options, {})

    @property
    def catalogue(self) -> Catalogue:
        random = np.random.default_rng(99)
        ids = random.integers(1, 9, (ITEMS, 3), dtype=np.int32)
        return Catalogue(
            100 + np.arange(ITEMS), ids, random.random((ITEMS, 1), dtype=np.float32)
        )

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.logs)

    def chunk_lengths(self, split: str) -> np.ndarray:
        return np.diff(self.logs[split].start)

    def row_marks(self, split: str) -> None:
        return None

    def check_shards(self, split: str) -> None:
        """There are no files."""

    def load(
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        *,
        frozen: bool = False,
    ) -> InteractionLog:
        log = self.logs[split]
        first, last = log.start[[start, log.num_chunks if stop is None else stop]]
        rows = {
            name: getattr(log, name)[first:last].copy(order="K") for name in PER_ROW
        }
        users = {
            name: getattr(log, name)[start:stop]
            for name in ("user_id", "user_ids", "user_dense")
        }
        part = InteractionLog(
            start=log.start[start : None if stop is None else stop + 1] - first,
            **users,
            **rows,
        )
        self.on_load(part)
        return part


def shown(samples: Samples) -> list[tuple[list[int], list[int]]]:
    """List the log rows of the history or stream, and those read, of each sample."""
    result = []
    for n in range(len(samples.length)):
        if isinstance(samples, Requests):
            seen = samples.event_rows[
                samples.stop[n] - samples.length[n] : samples.stop[n]
            ]
            read = samples.rows[samples.first[n] : samples.first[n + 1]]
        elif samples.sibling[n]:
            read = samples.first_read[n : n + 1]
            seen = samples.event_rows[
                samples.stop[n] - samples.length[n] + 1 : samples.stop[n]
            ]
            seen = np.append(seen, read)
        else:
            seen = samples.event_rows[
                samples.stop[n] - samples.length[n] : samples.stop[n]
            ]
            read = seen[(seen >= samples.first_read[n]) & samples.readable[seen]]
        result.append((seen.tolist(), read.tolist()))
    return result
