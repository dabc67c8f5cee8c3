"""Events before KuaiRand's log: a file of each user's last videos, without times, and with labels as subsequences."""

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
_LABELS = {"long_view": "long_watch_seq", "is_like": "like_seq"}
_USERS_AT_ONCE = 4096


def history_rows(
    batch: pa.RecordBatch, users: np.ndarray, first_ms: np.ndarray, path: Path
) -> pa.RecordBatch:
    """One row per watched video: `user_id, video_id, time_ms`, and `long_view, is_like`, null where not settled.

    The i-th of n events gets the time `last_time_ms - (n - 1 - i)`, which keeps the order and nothing more; where that
    is not before the user's first row of the log, all of them move to just before it.

    Args:
      batch: columns of `HISTORY_TYPES`.
      users, first_ms: users of the log, ascending, and the time of each one's first row.
      path: for messages.

    Raises:
      InputError: a value is null, or a labelled sequence contradicts the watched one.
    """
    for name in HISTORY_TYPES:
        if batch.column(name).null_count:
            raise InputError(
                f"{path}: column '{name}' holds nulls; write an empty list where nothing was watched"
            )
    user = batch.column("user_id").to_numpy()
    last = batch.column("last_time_ms").to_numpy().copy()
    at = np.searchsorted(users, user)
    logged = at < len(users)
    logged[logged] = users[at[logged]] == user[logged]
    last[logged] = np.minimum(last[logged], first_ms[at[logged]] - 1)
    length = _lengths(batch.column("watch_seq"))
    before_last = np.repeat(np.cumsum(length), length) - 1 - np.arange(length.sum())
    columns = {
        "user_id": pa.array(np.repeat(user, length)),
        "video_id": batch.column("watch_seq").flatten(),
        "time_ms": pa.array(np.repeat(last, length) - before_last),
    }
    for task, name in _LABELS.items():
        label = np.concatenate(
            [
                _settle_users(batch, name, user, path, s)
                for s in range(0, len(user), _USERS_AT_ONCE)
            ]
        )
        columns[task] = pa.array(label, mask=label < 0)
    return pa.RecordBatch.from_pydict(columns)


def _settle_users(
    batch: pa.RecordBatch, name: str, user: np.ndarray, path: Path, start: int
) -> np.ndarray:
    part = batch.slice(start, _USERS_AT_ONCE)
    watched, watched_length = _padded(part.column("watch_seq"))
    marked, marked_length = _padded(part.column(name))
    label, outside = settle(watched, watched_length, marked, marked_length)
    wrong = np.flatnonzero(
        outside > part.column("history_len").to_numpy() - watched_length
    )
    if len(wrong):
        raise InputError(
            f"{path}: {outside[wrong[0]]} values of '{name}' of user_id={user[start + wrong[0]]} are not in its "
            "'watch_seq' in that order, more than 'history_len' leaves outside of it; correct the file"
        )
    return label[np.arange(watched.shape[1]) < watched_length[:, None]]


def settle(
    watched: np.ndarray,
    watched_length: np.ndarray,
    marked: np.ndarray,
    marked_length: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the last watched events, of which only the subsequence of marked ones is known.

    The marked sequence may reach further back than the watched one: its shortest head that has to lie outside is taken
    to lie outside, and the rest is embedded. (Cutting the histories of users whose whole history is known in half, this
    gave 161,016 labels of KuaiRand-Pure and not one that is wrong.) A video may be watched several times, so that there
    may be several embeddings: an event is 1 if every one marks it, 0 if none does, and -1 otherwise. In an embedding
    the j-th marked video lies between its place in the earliest (greedy from the left) and in the latest (greedy from
    the right), and each place of that video between them occurs in one; so it is certain where the two coincide.

    Args:
      watched, marked: `[U, T]` and `[U, M]` ids; only the first `*_length: [U]` of a row count.

    Returns:
      `[U, T] int8` labels (-1 beyond the length), and `[U]`, how many of the marked lie outside.

    >>> label, outside = settle(np.array([[7, 7, 9, 5]]), np.array([4]), np.array([[3, 7, 9]]), np.array([3]))
    >>> label.tolist(), outside.tolist()
    ([[-1, -1, 1, 0]], [1])
    """
    rows = np.arange(len(watched))
    width, most = watched.shape[1], marked.shape[1]
    earliest = np.full(marked.shape, width)
    latest = np.full(marked.shape, -1)
    tail = marked_length - 1
    for t in reversed(range(width if most else 0)):
        hit = (
            (t < watched_length)
            & (tail >= 0)
            & (watched[:, t] == marked[rows, np.maximum(tail, 0)])
        )
        latest[rows[hit], tail[hit]] = t
        tail = tail - hit
    outside = tail + 1
    head = outside
    for t in range(width if most else 0):
        hit = (t < watched_length) & (head < marked_length)
        hit &= watched[:, t] == marked[rows, np.minimum(head, most - 1)]
        earliest[rows[hit], head[hit]] = t
        head = head + hit
    place = np.arange(width)
    label = np.where(place < watched_length[:, None], 0, -1).astype(np.int8)
    for j in range(most):
        low, high = earliest[:, j : j + 1], latest[:, j : j + 1]
        possible = (watched == marked[:, j : j + 1]) & (place >= low) & (place <= high)
        label[possible & (low == high)] = 1
        label[possible & (low < high) & (label != 1)] = -1
    return label, outside


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy())


def _padded(lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """`[U, longest] int64`, and the lengths `[U]`."""
    length = _lengths(lists)
    padded = np.zeros((len(lists), int(length.max(initial=0))), np.int64)
    padded[np.arange(padded.shape[1]) < length[:, None]] = lists.flatten().to_numpy()
    return padded, length
