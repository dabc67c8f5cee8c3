"""Exact sums over sorted scores: what `metrics.py` computes AUC, GAUC and log loss from.

All of them see sorted arrays, so that neither the order of the rows nor the number of hosts changes a single bit.
"""

from __future__ import annotations

import numpy as np

from tokenrec.errors import InputError

# A sort key is group code (31 bits), score (32 bits, in the order of the float), label (1 bit).
GROUP_SHIFT = 33
MAX_GROUPS = 1 << (64 - GROUP_SHIFT)

# Float32 probabilities lie 6e-8 apart just below 1, and a sigmoid rounds to 1 there: no clipping much closer than this
# could treat p near 1 like p near 0. A wrong, certain prediction costs -log(1e-7) = 16.1 nats.
CLIP = 1e-7

_BLOCK = 1 << 20


def auc_of_sorted(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """AUC from the ascending scores of each class: `[P]` and `[N]`. None if either is empty."""
    if not len(positives) or not len(negatives):
        return None
    twice_wins = 0
    for start in range(0, len(positives), _BLOCK):
        part = positives[start : start + _BLOCK]
        twice_wins += int(np.searchsorted(negatives, part, "left").sum())
        twice_wins += int(np.searchsorted(negatives, part, "right").sum())
    return twice_wins / (
        2 * len(positives) * len(negatives)
    )  # integers of any size, rounded once


def loss_of_sorted(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum of the log loss in nats, in float64, from the ascending probabilities of each class."""
    total = 0.0
    for values, label in ((positives, 1), (negatives, 0)):
        if len(values) and not (values[0] >= 0 and values[-1] <= 1):
            raise InputError(
                f"probabilities span {values[0]:g} to {values[-1]:g}, outside [0, 1]; give sigmoids, not logits"
            )
        for start in range(0, len(values), _BLOCK):
            p = np.clip(
                values[start : start + _BLOCK].astype(np.float64), CLIP, 1 - CLIP
            )
            total -= float((np.log(p) if label else np.log1p(-p)).sum())
    return total


def sort_keys(codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`[N] uint64` that sort by group, then score, then label.

    `codes: [N]` dense group codes from 0, `scores: [N]` float32 or uint32 ranks, `labels: [N]` 0 or 1.

    >>> keys = sort_keys(np.array([1, 0, 0]), np.array([0.1, 0.5, -0.5], np.float32), np.array([0, 1, 0]))
    >>> np.argsort(keys).tolist()
    [2, 1, 0]
    """
    if len(codes) and int(codes.max()) >= MAX_GROUPS:
        raise InputError(
            f"groups: {int(codes.max()) + 1} distinct ones; GAUC holds {MAX_GROUPS}, give fewer"
        )
    if scores.dtype == np.float32:
        bits = (scores + np.float32(0)).view(
            np.uint32
        )  # + 0 turns -0 into 0, its equal
        scores = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = codes.astype(np.uint64) << np.uint64(32)
    keys |= scores
    keys <<= np.uint64(1)
    keys |= labels.astype(np.uint64)
    return keys


def gauc_terms(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """From sorted keys of whole groups: rows times AUC of each group with both classes, and the rows of all these."""
    if not len(keys):
        return np.empty(0), 0
    ties = _starts(keys >> np.uint64(1))
    positives = np.add.reduceat((keys & np.uint64(1)).astype(np.int64), ties)
    negatives = np.diff(ties, append=len(keys)) - positives
    groups = _starts(keys[ties] >> np.uint64(GROUP_SHIFT))
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[groups], np.diff(groups, append=len(ties)))
    twice_wins = np.add.reduceat(positives * (2 * below + negatives), groups)
    positives, negatives = (
        np.add.reduceat(positives, groups),
        np.add.reduceat(negatives, groups),
    )
    mixed = (positives > 0) & (negatives > 0)
    twice_wins, positives, negatives = (
        twice_wins[mixed],
        positives[mixed],
        negatives[mixed],
    )
    rows = positives + negatives
    return rows * (twice_wins / (2 * positives * negatives)), int(rows.sum())


def group_stop(keys: np.ndarray, stop: int) -> int:
    """Moves `stop` on to the end of the group that it cuts, in sorted keys."""
    if stop >= len(keys):
        return len(keys)
    last = (int(keys[stop - 1]) >> GROUP_SHIFT << GROUP_SHIFT) | (
        (1 << GROUP_SHIFT) - 1
    )
    return stop + int(np.searchsorted(keys[stop:], np.uint64(last), "right"))


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
