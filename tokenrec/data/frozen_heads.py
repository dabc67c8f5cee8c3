"""Check that chunks reach back to the time at which histories are frozen.

A chunk that continues a user begins with the newest events before it, as many as
`prepare --overlap` says. Live histories need no more. A frozen history leaves the
newest events out, and what is older than the head lies in an earlier chunk.
"""

from __future__ import annotations

import numpy as np

from tokenrec.data.interaction_log import EVENT, SCORED, InteractionLog
from tokenrec.data.log_index import count_events
from tokenrec.errors import InputError


def check_frozen_heads(
    log: InteractionLog, freeze_at: int, events: int, head: int | None
) -> None:
    """Check that no frozen history is cut short by the beginning of its chunk.

    Args:
      log: whole chunks.
      freeze_at: milliseconds; histories end before this time.
      events: T, the most events of a history.
      head: events that a chunk repeats; None if chunks have no heads.

    Raises:
      InputError: a chunk may hold less history than it needs.
    """
    if head is None or not log.num_rows:
        return
    _, before = count_events(log)
    begins = before[log.start[:-1]]
    # 1. Events of each chunk that a frozen history sees.
    is_event = (log.flags & EVENT) != 0
    seen = _count_by_chunk(log, is_event & (log.time < freeze_at))
    # 2. Events before the first scored row. Only if they are as many as a head may
    #    there be more events of the user, in an earlier chunk.
    scored = np.flatnonzero((log.flags & SCORED) != 0)
    first = np.searchsorted(scored, log.start[:-1])
    has_scored = first < np.searchsorted(scored, log.start[1:])
    places = scored[np.minimum(first, len(scored) - 1)] if len(scored) else first
    leading = np.where(has_scored, before[places] - begins, 0)
    # 3. Does a scored row have a frozen history at all?
    last_time = log.time[np.maximum(log.start[1:] - 1, 0)]
    short = has_scored & (leading >= head) & (seen < events) & (last_time >= freeze_at)
    if short.any():
        chunk = int(short.argmax())
        raise InputError(
            f"histories frozen at {freeze_at} ms need up to {events} events before it, "
            f"and chunks repeat {head}: user {log.user_id[chunk]} has {seen[chunk]} in "
            "a chunk that may continue another; freeze at a later time, or prepare the "
            "data set again with a larger --overlap"
        )


def _count_by_chunk(log: InteractionLog, marked: np.ndarray) -> np.ndarray:
    """Number of marked log rows of each chunk: `[U] int64`."""
    before = np.concatenate([[0], np.cumsum(marked)])
    return before[log.start[1:]] - before[log.start[:-1]]
