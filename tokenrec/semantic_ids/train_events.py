"""Read the events of the training split, each of them once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import EVENT

# Log rows that are read at once.
LOAD_ROWS = 1 << 21


class TrainEvents(NamedTuple):
    """Events of the training split, user after user, in the order of time. E events.

    Attributes:
      user: `[E] int32`, number of the user, from 0.
      item: `[E] int32`, catalogue row of the item.
      time: `[E] int64`, milliseconds.
    """

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray


def train_events(dataset: Dataset) -> TrainEvents:
    """Read the events of the training split, without those that chunks repeat.

    A chunk that continues a user begins with a repetition of earlier events (its head).
    Log rows of one time are never split between chunks, so that a head ends where the
    times get later than the last time of the chunk before.
    """
    ends = np.cumsum(dataset.chunk_lengths("train"))
    parts: list[tuple[np.ndarray, ...]] = []
    user = -1
    last_id = None
    last_time = 0
    start = 0
    while start < len(ends):
        # 1. Load the next chunks, about LOAD_ROWS log rows, at least one chunk.
        rows_before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, rows_before + LOAD_ROWS, side="right"))
        stop = max(start + 1, stop)
        log = dataset.load("train", start, stop)

        # 2. Number the users, and find the last time before each chunk of a user. Both
        #    carry over from the chunks that were loaded before.
        number = np.empty(log.num_chunks, np.int32)
        head_until = np.full(log.num_chunks, np.iinfo(np.int64).min)
        for chunk in range(log.num_chunks):
            first, end = log.start[chunk], log.start[chunk + 1]
            if last_id is None or log.user_id[chunk] != last_id:
                user += 1
                last_id = log.user_id[chunk]
            else:
                head_until[chunk] = last_time
            number[chunk] = user
            if end > first:
                last_time = int(log.time[end - 1])

        # 3. Keep the events that are no repetitions.
        chunk_of = np.repeat(np.arange(log.num_chunks), np.diff(log.start))
        kept = ((log.flags & EVENT) > 0) & (log.time > head_until[chunk_of])
        parts.append((number[chunk_of[kept]], log.item[kept], log.time[kept]))
        start = stop
    return TrainEvents(*(np.concatenate(column) for column in zip(*parts, strict=True)))
