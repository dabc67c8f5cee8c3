"""Index arrays over a log: its events, its chunks, and its groups of equal time.

**Event coordinates.** Event e of a log is its e-th log row with the flag `EVENT`. In
these coordinates a history is a run of consecutive numbers, whatever log rows lie
between its events.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.data.interaction_log import EVENT, InteractionLog


def count_events(log: InteractionLog) -> tuple[np.ndarray, np.ndarray]:
    """List the events of a log, and count those before each log row.

    Returns:
      event_rows: `[E] int64`, log row of each event; `[1]` zero if there is no event.
      before: `[R + 1] int64`, number of events before each log row, which is the event
        coordinate of a log row that is an event. The last entry is E.
    """
    is_event = (log.flags & EVENT) != 0
    before = np.zeros(log.num_rows + 1, np.int64)
    np.cumsum(is_event, out=before[1:])
    rows = np.flatnonzero(is_event)
    # A gather reads some log row even for an empty history, and masks it afterwards.
    return (rows if rows.size else np.zeros(1, np.int64)), before


def index_chunks(log: InteractionLog) -> np.ndarray:
    """Chunk of each log row: `[R] int32`."""
    return np.repeat(np.arange(log.num_chunks, dtype=np.int32), np.diff(log.start))


def index_time_groups(log: InteractionLog) -> np.ndarray:
    """First log row of the same chunk and time, for each log row: `[R] int64`."""
    opens = np.ones(log.num_rows, bool)
    opens[1:] = log.time[1:] != log.time[:-1]
    # The last log row of a chunk and the first of the next may have one time. Empty
    # chunks are left out: the start of one at the end of the log is R, out of range.
    opens[log.start[:-1][np.diff(log.start) > 0]] = True
    return np.maximum.accumulate(np.where(opens, np.arange(log.num_rows), 0))


def index_history_ends(log: InteractionLog, freeze_at: int | None) -> np.ndarray:
    """First log row that is not in the history of each log row: `[R] int64`.

    Args:
      log: whole chunks.
      freeze_at: milliseconds; log rows from this time on enter no history. None: those
        of the same time on.
    """
    if freeze_at is None:
        return index_time_groups(log)
    # Log rows from then on count as one group of equal time.
    return index_time_groups(
        dataclasses.replace(log, time=np.minimum(log.time, freeze_at))
    )
