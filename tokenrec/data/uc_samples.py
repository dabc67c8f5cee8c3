"""Cut streams: runs of a user's events, most of which are read (UC, user centric).

samples.py has pictures, of siblings too.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.log_index import count_events, index_chunks, index_history_ends


@dataclasses.dataclass(frozen=True)
class Streams:
    """UC samples. N samples, E events, R log rows.

    Attributes:
      event_rows: `[E] int64`, log row of each event (`[1]` zero without events).
      chunk: `[N] int32`, chunk of the log.
      stop: `[N] int64`, event coordinate after the newest event of the run.
      length: `[N] int32`, positions of the stream: the events of the run, and one for
        the sibling itself, which is not part of the run.
      first_read: `[N] int64`, first log row that the stream reads; events before it are
        history only.
      sibling: `[N] bool`; True: after its run the stream ends with the log row
        `first_read`, the only one that it reads.
      readable: `[R] bool`, log rows that a stream without `sibling` may read.
    """

    event_rows: np.ndarray
    chunk: np.ndarray
    stop: np.ndarray
    length: np.ndarray
    first_read: np.ndarray
    sibling: np.ndarray
    readable: np.ndarray

    @property
    def opens(self) -> np.ndarray:
        """`[N] bool`, all True: every stream stands alone (see `Requests.opens`)."""
        return np.ones(len(self.length), bool)


def cut_streams(
    log: InteractionLog,
    read: np.ndarray,
    events: int,
    overlap: int,
    *,
    siblings: bool,
    freeze_at: int | None = None,
) -> Streams:
    """Cover the read log rows with streams.

    Args:
      log: whole chunks.
      read: `[R] bool`, events to read.
      events: T, the most positions of a stream.
      overlap: events at the head of a continued stream that are history only.
      siblings: give every read event that shares its time with an earlier event of the
        log a stream of its own; otherwise it is not read.
      freeze_at: milliseconds; read events from this time on are siblings whose runs end
        before it.
    """
    event_rows, before = count_events(log)
    history_end = index_history_ends(log, freeze_at)
    chunk_begin = before[log.start[:-1]]
    chunk_end = before[log.start[1:]]

    # 1. Find the read events that are the first of their time: those with as many
    #    events before them as before their whole time group.
    earlier = before[history_end]
    is_first = earlier == before[:-1]
    if freeze_at is not None:
        # The first event from then on as well: all have the same history.
        is_first &= log.time < freeze_at
    readable = read & is_first

    # 2. Cover them with runs.
    runs = _cover(
        before[np.flatnonzero(readable)], chunk_begin, chunk_end, events, overlap
    )

    # 3. Add a stream for each sibling. Its run ends before its time group, or where
    #    histories are frozen.
    rows = np.flatnonzero(read & ~is_first) if siblings else np.empty(0, np.int64)
    sibling_chunk = index_chunks(log)[rows]
    history = np.minimum(events - 1, earlier[rows] - chunk_begin[sibling_chunk])
    chunk = np.concatenate([runs.chunk, sibling_chunk])
    stop = np.concatenate([runs.stop, earlier[rows]])
    length = np.concatenate([runs.length, history + 1])
    first_read = np.concatenate([event_rows[runs.first_read], rows])
    is_sibling = np.repeat([False, True], [len(runs.chunk), len(rows)])

    # 4. Put all streams into the order of the log.
    order = np.argsort(first_read, kind="stable")
    return Streams(
        event_rows=event_rows,
        chunk=chunk[order].astype(np.int32),
        stop=stop[order],
        length=length[order].astype(np.int32),
        first_read=first_read[order],
        sibling=is_sibling[order],
        readable=readable,
    )


class _Runs(NamedTuple):
    """Runs of events, in event coordinates. All `[N] int64`.

    Attributes:
      chunk: chunk of the log.
      stop: coordinate after the last event.
      length: number of events.
      first_read: first event that is read.
    """

    chunk: np.ndarray
    stop: np.ndarray
    length: np.ndarray
    first_read: np.ndarray


def _cover(
    positions: np.ndarray, begin: np.ndarray, end: np.ndarray, events: int, overlap: int
) -> _Runs:
    """Cover positions with runs, greedily from the left, in all chunks at once.

    Iteration n makes the n-th run of every chunk that has one, so that the Python loop
    is as long as the longest chunk has runs, not as there are chunks.

    Args:
      positions: `[P] int64`, sorted event coordinates to cover.
      begin: `[U] int64`, event coordinate at which each chunk begins.
      end: `[U] int64`, event coordinate after the last event of each chunk.
      events: the most events of a run.
      overlap: events before the first read one that a run begins with, if there are as
        many.
    """
    pointer = np.searchsorted(positions, begin)
    limit = np.searchsorted(positions, end)
    active = np.flatnonzero(pointer < limit)
    parts = [_Runs(*(np.empty(0, np.int64),) * 4)]
    while active.size:
        first = positions[pointer[active]]
        last = positions[limit[active] - 1]
        # A run that could be longer does not begin earlier where few log rows follow:
        # how much history a log row gets must not tell how much is to come.
        start = np.maximum(begin[active], first - overlap)
        stop = np.minimum(start + events, last + 1)
        parts.append(_Runs(active, stop, stop - start, first))
        pointer[active] = np.searchsorted(positions, stop)
        active = active[pointer[active] < limit[active]]
    return _Runs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
