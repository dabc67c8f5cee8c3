"""Join log rows that repeat one another, by a rule that no order of files changes.

Rows of one user, item and time are one row, except that an event and an impression are
two. Logs repeat rows when files overlap, when a client sends an event again, or when a
view and a purchase of the same second are two lines. Where such rows disagree:

- a label is the greatest that any of them says (1 over 0, more seconds over fewer, the
  later class over the earlier), or unknown if none says any; so is the weight;
- features come from one of them, the one with the fewest missing values, and among
  equals the one whose bytes are greatest, which is arbitrary and always the same.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tokenrec.data.interaction_log import REPEATED, SCORED


def join_repeats(partition: np.ndarray, counts: Counter[str]) -> np.ndarray:
    """Keep one of the rows that repeat one another.

    Args:
      partition: `[n]` of `encoded_row_dtype`, with vocabulary ids, sorted by
        `chunks.sort_order`.
      counts: receives `repeats_dropped`, and of these `repeats_other_labels` and
        `repeats_other_features`, which disagree with the row that is kept.

    Returns:
      `[m]` of `encoded_row_dtype`, in the same order.
    """
    group = _group_of_each(partition)
    size = np.bincount(group, minlength=1)
    counts["repeats_dropped"] += len(partition) - int(np.count_nonzero(size))
    if len(partition) == np.count_nonzero(size):
        return partition
    # Only rows of groups of several are looked at more closely.
    repeated = np.flatnonzero(size[group] > 1)
    rows = partition["row"][repeated].copy()
    _, group = np.unique(group[repeated], return_inverse=True)
    labels = _join_labels(rows["labels"], group)
    numbers: dict[str, np.ndarray] = {
        name: _greatest(rows[name], group)
        for name in ("targets", "weight")
        if name in (rows.dtype.names or ())
    }
    known_otherwise = (rows["labels"] >= 0) & (rows["labels"] != labels[group])
    disagrees = known_otherwise.any(axis=1)
    for name, greatest in numbers.items():
        other = ~np.isnan(rows[name]) & (rows[name] != greatest[group])
        disagrees |= other.reshape(len(rows), -1).any(axis=1)
        rows[name] = 0
    rows["labels"] = 0
    counts["repeats_other_labels"] += int(disagrees.sum())

    best = _best_of_each(rows, group)
    differs = _bytes_rank(rows) != _bytes_rank(rows)[best][group]
    counts["repeats_other_features"] += int(differs.sum())
    is_best = np.zeros(len(rows), bool)
    is_best[best] = True

    kept = np.ones(len(partition), bool)
    kept[repeated] = is_best
    for name, values in {"labels": labels, **numbers}.items():
        partition["row"][name][repeated[best]] = values
    return partition[kept]


def _group_of_each(partition: np.ndarray) -> np.ndarray:
    """Number the groups of rows that repeat one another: `[n] int64`."""
    row = partition["row"]
    # A row of an earlier data set is not new (`prepare --like`).
    kind = row["flags"] & np.uint8(SCORED | REPEATED)
    keys = (kind, row["item"], row["time"], partition["user"])
    order = np.lexsort(keys)
    starts = np.zeros(len(order), bool)
    starts[:1] = True
    for key in keys:
        ordered = key[order]
        starts[1:] |= ordered[1:] != ordered[:-1]
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(starts) - 1
    return group


def _join_labels(labels: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The label of each group: `[groups, K] int8`."""
    joined = np.full((int(group.max()) + 1, labels.shape[1]), -1, np.int8)
    # Known over unknown and 1 over 0: the greatest of 1, 0 and -1.
    np.maximum.at(joined, group, labels)
    return joined


def _greatest(numbers: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The greatest number of each group, NaN where it has none: `[groups, ...]`."""
    greatest = np.full((int(group.max()) + 1, *numbers.shape[1:]), np.nan, np.float32)
    np.fmax.at(greatest, group, numbers)
    return greatest


def _best_of_each(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Index of the row of each group whose features are kept: `[groups]`."""
    missing = np.zeros(len(rows), np.int64)
    for name in ("row_ids", "action_ids"):
        missing += (rows[name] == 0).sum(axis=1)
    for name in ("row_dense", "action_dense"):
        missing += np.isnan(rows[name]).sum(axis=1)
    order = np.lexsort((-_bytes_rank(rows), missing, group))
    first = np.diff(group[order], prepend=-1) != 0
    return order[first]


def _bytes_rank(rows: np.ndarray) -> np.ndarray:
    """Rank of each row's bytes among all: `[n] int64`, equal for equal bytes."""
    raw = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.dtype.itemsize)))
    return np.unique(raw, return_inverse=True)[1].reshape(-1)
