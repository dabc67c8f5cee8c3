"""Which rows of a log form a sample: requests (NIO) and streams (UC), as flat index arrays (methods.md section 3).

Histories are counted in *event coordinates*: event e of a log is its e-th row with the flag `EVENT`, so that a
history is a run of consecutive numbers whatever lies between its rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.errors import InputError


@dataclasses.dataclass(frozen=True)
class Requests:
    """NIO samples: a history and the candidates that share it. N samples, E events, M scored rows.

    Attributes:
      event_rows: `[E] int64`, row of each event (one row 0 if the log has no event).
      chunk: `[N] int32`, chunk of the log.
      stop: `[N] int64`, event coordinate after the newest event of the history.
      length: `[N] int32`, events in the history.
      first: `[N + 1] int64`, sample n has the candidates `rows[first[n] : first[n + 1]]`.
      rows: `[M] int64`, scored rows, sample after sample.
      opens: `[N] bool`, the sample is the first of its request.
    """

    event_rows: np.ndarray
    chunk: np.ndarray
    stop: np.ndarray
    length: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    opens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Streams:
    """UC samples: runs of events, some of which are read. N samples, E events, R rows.

    Attributes:
      event_rows, chunk: as in `Requests`.
      stop: `[N] int64`, event coordinate after the newest event of the run.
      length: `[N] int32`, rows of the stream: the run, and the sibling's own row.
      first_read: `[N] int64`, row from which on the stream reads; rows before it are history.
      sibling: `[N] bool`, the stream ends, after its run, with the row `first_read`, the only one that it reads.
      readable: `[R] bool`, rows that a stream without `sibling` may read.
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
        """`[N] bool`: every stream stands alone."""
        return np.ones(len(self.length), bool)


type Samples = Requests | Streams


def cut_samples(log: InteractionLog, config: DataConfig, *, train: bool) -> Samples:
    """Cuts a log into the samples of `config.paradigm`, in the order of their first read row's time group.

    Args:
      log: whole chunks; `log.labels: [R, K]` holds the configured tasks only.
      config: objective, paradigm, events, overlap, candidates.
      train: leave out rows without a known label, and (UC) later rows of a group of equal time.

    Retrieval reads positives: rows whose only label is 1, or every scored row where `log.labels` has no column. In
    evaluation it is NIO whatever the paradigm: one question per request.

    Raises:
      InputError: UC, and a scored row is not an event.
    """
    if config.objective == "retrieval":
        return _cut_goals(log, config, train=train)
    known = (log.labels >= 0).any(axis=1)
    if config.paradigm == "nio":
        scored = (log.flags & SCORED) != 0
        return _cut_requests(
            log, scored & known if train else scored, config.events, config.candidates
        )
    stray = np.flatnonzero((log.flags & (SCORED | EVENT)) == SCORED)
    if stray.size:
        raise InputError(
            f"data.paradigm='uc', but {stray.size} scored rows are not events (the first is row {stray[0]}): a history "
            "of purchases alone carries no negatives to learn from; use data.paradigm='nio'"
        )
    wanted = LEARNED | EVENT if train else SCORED
    read = (log.flags & wanted) == wanted
    if train:
        read &= known
    return _cut_streams(log, read, config.events, config.overlap, siblings=not train)


def _cut_goals(log: InteractionLog, config: DataConfig, *, train: bool) -> Samples:
    goal = (log.flags & SCORED) != 0
    if log.labels.shape[1]:
        goal &= log.labels[:, 0] == 1
    if config.paradigm == "nio" or not train:
        return _cut_requests(log, goal, config.events, config.candidates)
    _, before = _events(log)
    goal &= (log.flags & EVENT) != 0
    goal &= (
        before[:-1] > before[log.start[:-1]][_chunks(log)]
    )  # an event must come before it to be read
    # One event more than the model reads: the last one of a stream is a goal only.
    return _cut_streams(log, goal, config.events + 1, config.overlap, siblings=False)


def _cut_requests(
    log: InteractionLog, scored: np.ndarray, events: int, candidates: int
) -> Requests:
    event_rows, before = _events(log)
    group = _time_groups(log)
    rows = np.flatnonzero(scored)
    rows = rows[np.lexsort((log.request[rows], group[rows]))]
    groups, requests = group[rows], log.request[rows]
    opens = np.ones(len(rows), bool)
    opens[1:] = (
        (groups[1:] != groups[:-1])
        | (requests[1:] != requests[:-1])
        | (requests[1:] < 0)
    )
    rank = np.arange(len(rows))
    rank -= np.maximum.accumulate(np.where(opens, rank, 0))
    first = np.flatnonzero(rank % candidates == 0)
    chunk = _chunks(log)[rows[first]]
    stop = before[groups[first]]
    length = np.minimum(events, stop - before[log.start[chunk]]).astype(np.int32)
    return Requests(
        event_rows,
        chunk,
        stop,
        length,
        np.append(first, len(rows)),
        rows,
        rank[first] == 0,
    )


def _cut_streams(
    log: InteractionLog, read: np.ndarray, events: int, overlap: int, *, siblings: bool
) -> Streams:
    event_rows, before = _events(log)
    group = _time_groups(log)
    # The first event of a group of equal time is the one with as many events before it as before the whole group.
    earlier = before[group]
    is_first = earlier == before[:-1]
    readable = read & is_first
    begin, end = before[log.start[:-1]], before[log.start[1:]]
    positions = before[np.flatnonzero(readable)]
    runs = _cut_greedily(positions, begin, end, events, overlap)
    chunk, stop, length, first_read = runs[0], runs[1], runs[2], event_rows[runs[3]]

    rows = np.flatnonzero(read & ~is_first) if siblings else np.empty(0, np.int64)
    own_chunk = _chunks(log)[rows]
    own_length = np.minimum(events - 1, earlier[rows] - begin[own_chunk]) + 1
    sibling = np.repeat([False, True], [len(chunk), len(rows)])
    chunk, stop = (
        np.concatenate([chunk, own_chunk]),
        np.concatenate([stop, earlier[rows]]),
    )
    length, first_read = (
        np.concatenate([length, own_length]),
        np.concatenate([first_read, rows]),
    )
    order = np.argsort(first_read, kind="stable")
    return Streams(
        event_rows,
        chunk[order].astype(np.int32),
        stop[order],
        length[order].astype(np.int32),
        first_read[order],
        sibling[order],
        readable,
    )


def _cut_greedily(
    positions: np.ndarray, begin: np.ndarray, end: np.ndarray, events: int, overlap: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Covers the sorted event coordinates `positions` with runs, the n-th run of every chunk at once.

    Returns:
      chunk, stop, length and first read position of each run.
    """
    pointer, limit = np.searchsorted(positions, begin), np.searchsorted(positions, end)
    active = np.flatnonzero(pointer < limit)
    found: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64),) * 4]
    while active.size:
        read, last = positions[pointer[active]], positions[limit[active] - 1]
        # Not further back where fewer rows follow: how much history a row gets must not tell how much is to come.
        start = np.maximum(begin[active], read - overlap)
        stop = np.minimum(start + events, last + 1)
        found.append((active, stop, stop - start, read))
        pointer[active] = np.searchsorted(positions, stop)
        active = active[pointer[active] < limit[active]]
    chunk, stop, length, read = (
        np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    return chunk, stop, length, read


def _events(log: InteractionLog) -> tuple[np.ndarray, np.ndarray]:
    """Row of each event, and `[R + 1]` the number of events before each row."""
    is_event = (log.flags & EVENT) != 0
    before = np.zeros(log.num_rows + 1, np.int64)
    np.cumsum(is_event, out=before[1:])
    rows = np.flatnonzero(is_event)
    # A gather reads something even for an empty history, and masks it.
    return (rows if rows.size else np.zeros(1, np.int64)), before


def _chunks(log: InteractionLog) -> np.ndarray:
    """`[R] int32`, chunk of each row."""
    return np.repeat(np.arange(log.num_chunks, dtype=np.int32), np.diff(log.start))


def _time_groups(log: InteractionLog) -> np.ndarray:
    """`[R] int64`, first row of the same chunk and time."""
    opens = np.ones(log.num_rows, bool)
    opens[1:] = log.time[1:] != log.time[:-1]
    opens[log.start[:-1][np.diff(log.start) > 0]] = True
    return np.maximum.accumulate(np.where(opens, np.arange(log.num_rows), 0))
