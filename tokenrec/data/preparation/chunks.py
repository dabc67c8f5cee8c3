"""Sort log rows by user and time, drop repeats, and cut them into chunks.

A chunk is what one record of a shard holds: a contiguous run of one user's log rows in
time order. A user with many rows gets several chunks. Each chunk begins with the events
before it, at most `overlap` of them, so that a sample at its head has a history without
a look into another chunk:

    user's rows    e1 e2 e3 e4 e5 e6 e7 e8 e9     (chunk_events=4, overlap=2)
    chunk 0        e1 e2 e3 e4
    chunk 1              e3 e4 e5 e6 e7 e8        e3 and e4 are history only
    chunk 2                          e7 e8 e9     e7 and e8 are history only

Letters: n log rows of some users, U chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError

TRAIN = SPLITS.index("train")


class ChunkIndices(NamedTuple):
    """The log rows of each chunk of one split.

    Attributes:
      rows: `[m] int64`, indices into the input, chunk after chunk. An index occurs more
        than once if later chunks repeat its log row as history.
      start: `[U + 1] int64`, position in `rows` where each chunk begins.
      history_only: `[m] bool`, True for a log row that the chunk holds as history
        alone.
    """

    rows: np.ndarray
    start: np.ndarray
    history_only: np.ndarray


def sort_order(
    user: np.ndarray,
    time: np.ndarray,
    request: np.ndarray,
    item: np.ndarray,
    scored: np.ndarray,
) -> np.ndarray:
    """Sort log rows by user, time, request and item, an event before an impression.

    Rows that are equal in all of these repeat one another (repeats.py).

    Args:
      user: `[n] int32`, codes of the users.
      time: `[n] int64`, milliseconds.
      request: `[n] int64`, request numbers; -1 for a request of one row.
      item: `[n] int32`, codes or catalogue rows of the items.
      scored: `[n]`, nonzero for an impression.

    Returns:
      `[n] int64`, the permutation that sorts the rows.
    """
    return np.lexsort((scored, item, request, time, user))


def check_request_times(
    user: np.ndarray, time: np.ndarray, request: np.ndarray
) -> None:
    """Check that all log rows of one request have one time.

    Args:
      user: `[n] int32`, codes of the users.
      time: `[n] int64`, milliseconds.
      request: `[n] int64`, request numbers; -1 is not checked.

    Raises:
      InputError: two rows of one user and one request >= 0 have different times.
    """
    grouped = np.flatnonzero(request >= 0)
    # Rows of one request become neighbours, in the order of their times.
    order = grouped[np.lexsort((time[grouped], request[grouped], user[grouped]))]
    user, request, time = user[order], request[order], time[order]
    same_request = (user[1:] == user[:-1]) & (request[1:] == request[:-1])
    wrong = same_request & (time[1:] != time[:-1])
    if wrong.any():
        first = int(wrong.argmax())
        raise InputError(
            f"rows(): request {request[first]} of one user has rows at "
            f"time_ms {time[first]} and {time[first + 1]}; rows of a request share "
            "their time; give each time its own request number, or -1"
        )


def is_learned(split: np.ndarray, flags: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Find the log rows whose labels enter the training loss.

    These are the scored rows of train, and the unscored events of train that have a
    known label (a purchase outside of any list, for example).

    Args:
      split: `[n] uint8`, index into `SPLITS`.
      flags: `[n] uint8`, `EVENT | SCORED`.
      labels: `[n, tasks] int8`, 1, 0, or -1 where unknown.

    Returns:
      `[n] bool`.
    """
    scored, event = (flags & SCORED) > 0, (flags & EVENT) > 0
    return (split == TRAIN) & (scored | (event & (labels >= 0).any(axis=1)))


def chunk_indices(
    user: np.ndarray,
    time: np.ndarray,
    split: np.ndarray,
    flags: np.ndarray,
    wanted_split: int,
    chunk_events: int,
    overlap: int,
) -> ChunkIndices:
    """Cut the log rows of one split into chunks.

    A user has chunks of train if any of the user's train rows is an event, scored or
    learned, and chunks of another split if any row of that split is scored. A chunk
    holds at most `chunk_events` new rows of the split, and more only where that many
    share one time; they follow at most `overlap` of the latest events before them.
    Events of earlier splits are history wherever they fall in time.

    Args:
      user: `[n] int32`, codes of the users; the rows are sorted by `sort_order`.
      time: `[n] int64`, milliseconds.
      split: `[n] uint8`, index into `SPLITS`.
      flags: `[n] uint8`, `EVENT | SCORED | LEARNED`.
      wanted_split: index into `SPLITS` of the split to cut.
      chunk_events: the most new rows of a chunk.
      overlap: the most events that a chunk repeats at its head.

    Returns:
      The log rows of each chunk; no chunk if the split has no row that needs one.
    """
    # 1. Keep the log rows that a chunk of this split can hold, as new rows or history.
    rows = _rows_for_split(user, split, flags, wanted_split)
    if not len(rows):
        empty = np.zeros(0, np.int64)
        return ChunkIndices(empty, np.zeros(1, np.int64), np.zeros(0, bool))

    # From here on a position counts in `rows`, not in the input.
    user, time = user[rows], time[rows]
    events = np.flatnonzero((flags[rows] & EVENT) > 0)
    is_new = split[rows] == wanted_split
    position = np.arange(len(rows))

    # 2. Find each chunk as two ranges: the events that it repeats at its head (a range
    #    of `events`), and its body (a range of positions).
    ranges = _chunk_ranges(user, time, events, is_new, chunk_events, overlap)

    # 3. Expand the ranges. Heads and bodies index one array, events before positions.
    lengths = ranges[:, 1::2] - ranges[:, 0::2]
    offsets = ranges[:, 0::2] + [0, len(events)]
    source = np.concatenate([events, position])
    taken = source[_expand_ranges(offsets.ravel(), lengths.ravel())]
    # Rows of a head are history, even those of this split: an earlier chunk has them.
    in_head = np.repeat(np.tile([True, False], len(ranges)), lengths.ravel())
    start = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))])
    return ChunkIndices(rows[taken], start, in_head | ~is_new[taken])


def _rows_for_split(
    user: np.ndarray, split: np.ndarray, flags: np.ndarray, wanted_split: int
) -> np.ndarray:
    """Select the rows of the split and earlier events, of users who have chunks."""
    # The prepended code differs from the first one: row 0 begins a user as well.
    user_start = np.flatnonzero(np.diff(user, prepend=user[:1] - 1))
    if not len(user_start):
        return np.zeros(0, np.int64)
    event, in_split = (flags & EVENT) > 0, split == wanted_split
    # Outside of train an event alone needs no chunk: nothing would be scored in it.
    needed = EVENT | SCORED | LEARNED if wanted_split == TRAIN else SCORED
    needs_chunk = in_split & ((flags & needed) > 0)
    has_chunks = np.repeat(
        np.logical_or.reduceat(needs_chunk, user_start),
        np.diff(user_start, append=len(user)),
    )
    return np.flatnonzero(has_chunks & (in_split | (event & (split < wanted_split))))


def _chunk_ranges(
    user: np.ndarray,
    time: np.ndarray,
    events: np.ndarray,
    is_new: np.ndarray,
    chunk_events: int,
    overlap: int,
) -> np.ndarray:
    """Ranges of all chunks: `[U, 4]`, head from and to, body from and to."""
    position = np.arange(len(user))
    user_start = np.flatnonzero(np.diff(user, prepend=user[:1] - 1))

    # A user's run is trimmed: it begins with the history of the first new row and ends
    # with the last new row.
    first_new = np.minimum.reduceat(np.where(is_new, position, len(user)), user_start)
    begin = np.maximum(user_start, first_new - overlap)
    end = np.maximum.reduceat(np.where(is_new, position, -1), user_start) + 1

    # Most users fit into one chunk; they need no loop.
    new_rows = np.add.reduceat(is_new, user_start, dtype=np.int64)
    fits = new_rows <= chunk_events
    # An empty head (0, 0) repeats nothing.
    ranges = np.zeros((len(user_start), 4), np.int64)
    ranges[:, 2] = begin
    ranges[:, 3] = end
    if fits.all():
        return ranges

    # Rows of one time stay together: a chunk may end only where user or time change.
    changes = np.diff(user, prepend=user[:1] - 1) != 0
    changes |= np.diff(time, prepend=time[:1]) != 0
    boundary = np.append(np.flatnonzero(changes), len(user))
    # The number of new rows in [a, b) is new_before[b] - new_before[a].
    new_before = np.concatenate([[0], np.cumsum(is_new)])
    parts = []
    for i in range(len(user_start)):
        if fits[i]:
            parts.append(ranges[i : i + 1])
            continue
        run = (int(begin[i]), int(end[i]))
        parts.append(
            _cut_long_run(run, events, boundary, new_before, chunk_events, overlap)
        )
    return np.concatenate(parts)


def _cut_long_run(
    run: tuple[int, int],
    events: np.ndarray,
    boundary: np.ndarray,
    new_before: np.ndarray,
    chunk_events: int,
    overlap: int,
) -> np.ndarray:
    """Cut one user's run of positions, first and end, into several chunks.

    Args:
      run: first and end position of the user's rows.
      events: `[E]`, positions of all events, ascending.
      boundary: `[K]`, positions where a chunk may end, ascending.
      new_before: `[n + 1]`, number of new rows before each position.
      chunk_events: the most new rows of a chunk.
      overlap: the most events that a chunk repeats at its head.

    Returns:
      `[U, 4] int64`, ranges as in `_chunk_ranges`.
    """
    begin, end = run
    first_event = int(np.searchsorted(events, begin))
    ranges: list[tuple[int, int, int, int]] = []
    body_start = begin
    while body_start < end:
        # The last position that leaves at most chunk_events new rows in the body.
        limit = new_before[body_start] + chunk_events
        body_stop = int(np.searchsorted(new_before, limit, side="right")) - 1
        body_stop = min(body_stop, end)
        if body_stop < end:
            # Move back to the start of the group of equal time that it falls into.
            group = np.searchsorted(boundary, body_stop, side="right") - 1
            body_stop = int(boundary[group])
            if new_before[max(body_stop, body_start)] == new_before[body_start]:
                # The next group alone is larger than a chunk: take it whole.
                next_new = np.searchsorted(new_before, new_before[body_start] + 1)
                group = np.searchsorted(boundary, int(next_new))
                body_stop = min(int(boundary[group]), end)
        # The first chunk repeats nothing: its history is part of the trimmed run.
        head_stop = int(np.searchsorted(events, body_start)) if ranges else 0
        head_start = max(first_event, head_stop - overlap) if ranges else 0
        ranges.append((head_start, head_stop, body_start, body_stop))
        body_start = body_stop
    return np.array(ranges, np.int64)


def _expand_ranges(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges `first[i], ..., first[i] + lengths[i] - 1`."""
    shift = first - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
