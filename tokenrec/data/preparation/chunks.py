"""A user's rows in time order, without repeats, cut into chunks that overlap by the history they need."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError

TRAIN = SPLITS.index("train")


class Cut(NamedTuple):
    """Chunks of one split. `rows: [n]`, positions in the input, chunk after chunk; `start: [U + 1]`, the first of each
    chunk; `repeated: [n] bool`, the row is history only."""

    rows: np.ndarray
    start: np.ndarray
    repeated: np.ndarray


def order_rows(
    user: np.ndarray, time: np.ndarray, request: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """Order by user, time, request, item; rows equal in all of these stay in the order they came in."""
    return np.lexsort((item, request, time, user))


def first_of_repeats(
    user: np.ndarray, time: np.ndarray, item: np.ndarray, scored: np.ndarray
) -> np.ndarray:
    """`[n] bool`, False for a row that repeats the (user, time, item, scored) of an earlier one."""
    keys = (scored, item, time, user)
    order = np.lexsort(keys)
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    first = np.ones(len(order), bool)
    first[order[1:][same]] = False
    return first


def check_requests(user: np.ndarray, time: np.ndarray, request: np.ndarray) -> None:
    """Raises an InputError if two rows of one user and one request >= 0 have different times."""
    grouped = np.flatnonzero(request >= 0)
    order = grouped[np.lexsort((time[grouped], request[grouped], user[grouped]))]
    u, r, t = user[order], request[order], time[order]
    wrong = (u[1:] == u[:-1]) & (r[1:] == r[:-1]) & (t[1:] != t[:-1])
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(
            f"rows(): request {r[at]} of one user has rows at time_ms {t[at]} and {t[at + 1]}; rows of a request share "
            f"their time: give each time its own request number, or -1"
        )


def learned(split: np.ndarray, flags: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[n] bool`: scored rows of train, and its unscored events that have a known label."""
    scored, event = (flags & SCORED) > 0, (flags & EVENT) > 0
    return (split == TRAIN) & (scored | (event & (labels >= 0).any(axis=1)))


def cut_chunks(
    user: np.ndarray,
    time: np.ndarray,
    split: np.ndarray,
    flags: np.ndarray,
    wanted_split: int,
    chunk_events: int,
    overlap: int,
) -> Cut:
    """Cuts the chunks of one split from rows that `order_rows` has sorted. All inputs are `[n]`.

    A user has chunks of train if any train row is an event, scored or learned, and chunks of another split if any row
    of it is scored. A chunk holds at most `chunk_events` rows of the split, more only where that many share one time,
    after at most `overlap` of the latest events before them. Events of earlier splits are history, wherever they fall.
    """
    event, inside = (flags & EVENT) > 0, split == wanted_split
    users = np.flatnonzero(
        np.diff(user, prepend=user[:1] - 1)
    )  # first row of each user
    if not len(users):
        return Cut(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, bool))
    counts = np.diff(users, append=len(user))
    matters = inside & (
        (flags & (EVENT | SCORED | LEARNED if wanted_split == TRAIN else SCORED)) > 0
    )
    has_chunks = np.repeat(np.logical_or.reduceat(matters, users), counts)
    rows = np.flatnonzero(has_chunks & (inside | (event & (split < wanted_split))))
    if not len(rows):
        return Cut(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, bool))

    # From here on positions count in `rows`. A user's run is trimmed to begin with the history of its first new row.
    user, time, event, new = user[rows], time[rows], event[rows], inside[rows]
    events = np.flatnonzero(event)
    segment = np.flatnonzero(np.diff(user, prepend=user[:1] - 1))
    position = np.arange(len(rows))
    first_new = np.minimum.reduceat(np.where(new, position, len(rows)), segment)
    begin = np.maximum(segment, first_new - overlap)
    end = np.maximum.reduceat(np.where(new, position, -1), segment) + 1
    whole = np.add.reduceat(new, segment, dtype=np.int64) <= chunk_events

    # Two ranges a chunk: repeated events at its head (positions in `events`), and its body (positions in `rows`).
    ranges = np.zeros((len(segment), 4), np.int64)
    ranges[:, 2], ranges[:, 3] = begin, end
    if not whole.all():
        boundary = np.flatnonzero(
            (np.diff(user, prepend=user[:1] - 1) != 0)
            | (np.diff(time, prepend=time[:1]) != 0)
        )
        boundary = np.append(boundary, len(rows))
        new_before = np.concatenate([[0], np.cumsum(new)])
        parts = [
            ranges[i : i + 1]
            if whole[i]
            else _cut_long(
                begin[i], end[i], events, boundary, new_before, chunk_events, overlap
            )
            for i in range(len(segment))
        ]
        ranges = np.concatenate(parts)
    lengths = ranges[:, 1::2] - ranges[:, 0::2]
    offsets = ranges[:, 0::2] + [0, len(events)]  # heads and bodies index one array
    source = np.concatenate([events, position])
    taken = source[_expand(offsets.ravel(), lengths.ravel())]
    in_head = np.repeat(np.tile([True, False], len(ranges)), lengths.ravel())
    start = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))])
    return Cut(rows[taken], start, in_head | ~new[taken])


def _cut_long(
    begin: int,
    end: int,
    events: np.ndarray,
    boundary: np.ndarray,
    new_before: np.ndarray,
    chunk_events: int,
    overlap: int,
) -> np.ndarray:
    """Ranges of one user's chunks: `[U, 4]`, head from and to in `events`, body from and to in rows."""
    lowest = int(np.searchsorted(events, begin))
    out: list[tuple[int, int, int, int]] = []
    at = int(begin)
    while at < end:
        # The last place that leaves at most chunk_events new rows, moved back to the start of its group of equal time.
        stop = (
            int(
                np.searchsorted(new_before, new_before[at] + chunk_events, side="right")
            )
            - 1
        )
        stop = min(stop, int(end))
        if stop < end:
            stop = int(boundary[np.searchsorted(boundary, stop, side="right") - 1])
            if (
                new_before[max(stop, at)] == new_before[at]
            ):  # the next group alone is larger than a chunk
                grown = int(np.searchsorted(new_before, new_before[at] + 1))
                stop = min(int(boundary[np.searchsorted(boundary, grown)]), int(end))
        high = int(np.searchsorted(events, at)) if out else 0
        low = max(lowest, high - overlap) if out else 0
        out.append((low, high, at, stop))
        at = stop
    return np.array(out, np.int64)


def _expand(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated ranges `first[i], ..., first[i] + lengths[i] - 1`."""
    shift = first - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
