"""Read the events before KuaiRand's log: each user's last videos, with partial labels.

A row of `history_to_*.parquet` is one user: `watch_seq`, the videos last watched,
oldest first; `long_watch_seq` and `like_seq`, the videos among them that were watched
long or liked; `last_time_ms`, the time of the last one; and `history_len`, the number
of videos of the whole history, which may be longer than these sequences.

The files do not say which event of `watch_seq` a labelled video is. `settle_labels`
finds the events whose label follows with certainty; the others stay unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError

HISTORY_TYPES = {
    "user_id": pa.int64(),
    "history_len": pa.int64(),
    "last_time_ms": pa.int64(),
    "watch_seq": pa.list_(pa.int64()),
    "long_watch_seq": pa.list_(pa.int64()),
    "like_seq": pa.list_(pa.int64()),
}
_SEQUENCE_OF_TASK = {"long_view": "long_watch_seq", "is_like": "like_seq"}
# Sequences are padded to the longest of a block, so that blocks bound the memory.
_USERS_AT_ONCE = 4096


def history_rows(
    batch: pa.RecordBatch, users: np.ndarray, first_ms: np.ndarray, path: Path
) -> pa.RecordBatch:
    """Make one row per watched video.

    The i-th of n events gets the time `last_time_ms - (n - 1 - i)`, which keeps the
    order and nothing more. Where that is not before the user's first row of the log,
    all of them move to just before it.

    Args:
      batch: columns of `HISTORY_TYPES`.
      users: `[U] int64`, users of the log, ascending.
      first_ms: `[U] int64`, time of each one's first row.
      path: file of the batch, for messages.

    Returns:
      Columns `user_id`, `video_id`, `time_ms`, and `long_view` and `is_like`, null
      where the label is not certain.

    Raises:
      InputError: a value is null, or a labelled sequence contradicts the watched one.
    """
    for name in HISTORY_TYPES:
        if batch.column(name).null_count:
            raise InputError(
                f"{path}: column '{name}' holds nulls; write an empty list where "
                "nothing was watched"
            )
    user = batch.column("user_id").to_numpy()
    # 1. Times. A user who is not in the log keeps the time of the file.
    last = batch.column("last_time_ms").to_numpy().copy()
    index = np.searchsorted(users, user)
    in_log = index < len(users)
    in_log[in_log] = users[index[in_log]] == user[in_log]
    last[in_log] = np.minimum(last[in_log], first_ms[index[in_log]] - 1)
    length = _lengths(batch.column("watch_seq"))
    before_last = np.repeat(np.cumsum(length), length) - 1 - np.arange(length.sum())
    columns = {
        "user_id": pa.array(np.repeat(user, length)),
        "video_id": batch.column("watch_seq").flatten(),
        "time_ms": pa.array(np.repeat(last, length) - before_last),
    }
    # 2. Labels.
    for task, name in _SEQUENCE_OF_TASK.items():
        blocks = [
            _labels_of_block(batch, name, user, path, start)
            for start in range(0, len(user), _USERS_AT_ONCE)
        ]
        label = np.concatenate(blocks)
        columns[task] = pa.array(label, mask=label < 0)
    return pa.RecordBatch.from_pydict(columns)


def _labels_of_block(
    batch: pa.RecordBatch, name: str, user: np.ndarray, path: Path, start: int
) -> np.ndarray:
    """Labels of all events of `_USERS_AT_ONCE` users, one after another: `[n] int8`."""
    block = batch.slice(start, _USERS_AT_ONCE)
    watched, watched_length = _pad(block.column("watch_seq"))
    marked, marked_length = _pad(block.column(name))
    label, outside = settle_labels(watched, watched_length, marked, marked_length)
    # Marked videos that are not among the watched ones must be older than these.
    older = block.column("history_len").to_numpy() - watched_length
    wrong = np.flatnonzero(outside > older)
    if len(wrong):
        first = wrong[0]
        raise InputError(
            f"{path}: {outside[first]} values of '{name}' of "
            f"user_id={user[start + first]} are not in its 'watch_seq' in that order, "
            "more than 'history_len' leaves outside of it; correct the file"
        )
    return label[np.arange(watched.shape[1]) < watched_length[:, None]]


def settle_labels(
    watched: np.ndarray,
    watched_length: np.ndarray,
    marked: np.ndarray,
    marked_length: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the labels of watched events, of which a subsequence of videos is marked.

    The marked sequence may reach further back than the watched one: its shortest head
    that has to lie outside is taken to lie outside, and the rest is embedded. (Cutting
    the histories of users whose whole history is known in half, this gave 161,016
    labels of KuaiRand-Pure and not one that is wrong.)

    A video may be watched several times, so that there may be several embeddings: an
    event is 1 if every one marks it, 0 if none does, and -1 otherwise. In an embedding
    the j-th marked video lies between its position in the earliest one (greedy from the
    left) and in the latest one (greedy from the right), and each position of that video
    between them occurs in one; so it is certain where the two coincide.

    Args:
      watched: `[U, T] int64`, ids of the watched videos, oldest first.
      watched_length: `[U] int64`, number of watched videos of each user.
      marked: `[U, M] int64`, ids of the marked videos, oldest first.
      marked_length: `[U] int64`, number of marked videos of each user.

    Returns:
      `[U, T] int8` labels, -1 beyond the length; and `[U] int64`, the number of marked
      videos outside of the watched ones.

    >>> label, outside = settle_labels(
    ...     watched=np.array([[7, 7, 9, 5]]),
    ...     watched_length=np.array([4]),
    ...     marked=np.array([[3, 7, 9]]),
    ...     marked_length=np.array([3]),
    ... )
    >>> label.tolist(), outside.tolist()
    ([[-1, -1, 1, 0]], [1])
    """
    user = np.arange(len(watched))
    length, most_marked = watched.shape[1], marked.shape[1]
    steps = length if most_marked else 0

    # 1. Latest embedding: from the right, each event takes the last marked video that
    #    is left. What is left at the end lies outside.
    latest = np.full(marked.shape, -1)
    tail = marked_length - 1
    for t in reversed(range(steps)):
        hit = (t < watched_length) & (tail >= 0)
        hit &= watched[:, t] == marked[user, np.maximum(tail, 0)]
        latest[user[hit], tail[hit]] = t
        tail = tail - hit
    outside = tail + 1

    # 2. Earliest embedding of the rest: from the left, in the same way.
    earliest = np.full(marked.shape, length)
    head = outside
    for t in range(steps):
        hit = (t < watched_length) & (head < marked_length)
        hit &= watched[:, t] == marked[user, np.minimum(head, most_marked - 1)]
        earliest[user[hit], head[hit]] = t
        head = head + hit

    # 3. Between the two an event of that video may be the marked one; where they
    #    coincide it is.
    position = np.arange(length)
    label = np.where(position < watched_length[:, None], 0, -1).astype(np.int8)
    for j in range(most_marked):
        low, high = earliest[:, j : j + 1], latest[:, j : j + 1]
        possible = watched == marked[:, j : j + 1]
        possible &= (position >= low) & (position <= high)
        label[possible & (low == high)] = 1
        label[possible & (low < high) & (label != 1)] = -1
    return label, outside


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy())


def _pad(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Pad lists with 0 to the longest: `[U, T] int64`, and their lengths `[U]`."""
    length = _lengths(lists)
    padded = np.zeros((len(lists), int(length.max(initial=0))), np.int64)
    padded[np.arange(padded.shape[1]) < length[:, None]] = lists.flatten().to_numpy()
    return padded, length
