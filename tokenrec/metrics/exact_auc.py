"""Exact sums over sorted scores, from which AUC, GAUC and log loss are computed.

Every function takes sorted arrays, so that neither the order of the log rows nor the
number of hosts changes a single bit of a metric. Comparisons are counted in integers
and divided once at the end.

AUC, with P positives, N negatives and scores `s` (the Mann-Whitney U statistic over
`P N`; Hanley and McNeil, The meaning and use of the area under a receiver operating
characteristic (ROC) curve, Radiology 1982):

    AUC = (#{(p, n): s_p > s_n} + 1/2 #{(p, n): s_p = s_n}) / (P N)

GAUC, the mean of the AUC inside each group g (a user) with both classes, weighted by
the log rows `n_g` of the group:

    GAUC = sum_g n_g AUC_g / sum_g n_g

Time is O(n log n), for the sort by the caller. Memory besides the sorted input is two
blocks of `_BLOCK` numbers for AUC and log loss, and a few arrays as long as the block
of keys for GAUC.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from tokenrec.errors import InputError

# A sort key is group code (31 bits), score (32 bits, in the order of the float), label
# (1 bit).
GROUP_SHIFT = 33
MAX_GROUPS = 1 << (64 - GROUP_SHIFT)

# Float32 probabilities lie 6e-8 apart just below 1, and a sigmoid rounds to 1 there.
# Clipping much closer to 0 and 1 would treat p near 1 unlike p near 0. A wrong, certain
# prediction costs -log(1e-7) = 16.1 nats.
CLIP = 1e-7

_BLOCK = 1 << 20  # scores per step, 8 MiB of int64 search results


def auc_of_sorted(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """Compute AUC from the ascending scores of each class.

    Args:
      positives: `[P]`, ascending scores of the positive log rows.
      negatives: `[N]`, ascending scores of the negative log rows.

    Returns:
      The exact quotient, rounded once; None if either class is empty.
    """
    if not len(positives) or not len(negatives):
        return None
    # A negative below a positive is found by both searches, and a tie by the right one
    # alone: the sum of both is twice the numerator of AUC, an integer.
    twice_wins = 0
    for start in range(0, len(positives), _BLOCK):
        block = positives[start : start + _BLOCK]
        twice_wins += int(np.searchsorted(negatives, block, "left").sum())
        twice_wins += int(np.searchsorted(negatives, block, "right").sum())
    # Python integers of any size: the division is the only rounding.
    return twice_wins / (2 * len(positives) * len(negatives))


def loss_of_sorted(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Sum the log loss in nats, in float64.

    Args:
      positives: `[P]`, ascending probabilities of the positive log rows.
      negatives: `[N]`, ascending probabilities of the negative log rows.

    Returns:
      `-sum_p log p_p - sum_n log(1 - p_n)`, probabilities clipped to
      [1e-7, 1 - 1e-7].

    Raises:
      InputError: a probability is outside [0, 1].
    """
    total = 0.0
    for values, label in ((positives, 1), (negatives, 0)):
        if len(values) and not (values[0] >= 0 and values[-1] <= 1):
            raise InputError(
                f"probabilities span {values[0]:g} to {values[-1]:g}, outside [0, 1]; "
                "give sigmoids, not logits"
            )
        for start in range(0, len(values), _BLOCK):
            p = np.clip(
                values[start : start + _BLOCK].astype(np.float64), CLIP, 1 - CLIP
            )
            total -= float((np.log(p) if label else np.log1p(-p)).sum())
    return total


def sort_keys(codes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pack group, score and label into integers that sort in that order.

    Args:
      codes: `[N]`, dense group codes from 0.
      scores: `[N]`, float32 scores or uint32 ranks.
      labels: `[N]`, 0 or 1.

    Returns:
      `[N] uint64`.

    Raises:
      InputError: there are more groups than the key has room for.

    >>> scores = np.array([0.1, 0.5, -0.5], np.float32)
    >>> keys = sort_keys(np.array([1, 0, 0]), scores, np.array([0, 1, 0]))
    >>> np.argsort(keys).tolist()
    [2, 1, 0]
    """
    if len(codes) and int(codes.max()) >= MAX_GROUPS:
        raise InputError(
            f"groups: {int(codes.max()) + 1} distinct ones; GAUC holds {MAX_GROUPS}; "
            "give fewer"
        )
    if scores.dtype == np.float32:
        # The bits of a float32 sort like the number once a negative one is inverted and
        # a positive one has its sign bit set. Adding 0 turns -0 into 0, its equal.
        bits = (scores + np.float32(0)).view(np.uint32)
        scores = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = codes.astype(np.uint64) << np.uint64(32)
    keys |= scores
    keys <<= np.uint64(1)
    keys |= labels.astype(np.uint64)
    return keys


def gauc_of_sorted(keys: np.ndarray, block: int = 4_000_000) -> float | None:
    """Compute GAUC from sorted keys.

    Args:
      keys: `[N] uint64`, ascending, of `sort_keys`.
      block: keys per step; a step is extended to the end of the group that it cuts.

    Returns:
      GAUC; None if no group has both classes.
    """
    parts, rows, start = [], 0, 0
    while start < len(keys):
        stop = group_stop(keys, start + block)
        terms, mixed_rows = gauc_terms(keys[start:stop])
        parts.append(terms)
        rows += mixed_rows
        start = stop
    if not rows:
        return None
    # fsum rounds once, so that neither the order of the groups nor the blocks matter.
    return math.fsum(itertools.chain.from_iterable(p.tolist() for p in parts)) / rows


def gauc_terms(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Compute the terms of GAUC of whole groups.

    Args:
      keys: `[N] uint64`, ascending, of `sort_keys`; no group is cut.

    Returns:
      `[G] float64`, `n_g AUC_g` of each group with both classes, and the sum of their
      `n_g`.
    """
    if not len(keys):
        return np.empty(0), 0
    # 1. Positives and negatives of each tie: a run of one group and one score.
    ties = _run_starts(keys >> np.uint64(1))
    positives = np.add.reduceat((keys & np.uint64(1)).astype(np.int64), ties)
    negatives = np.diff(ties, append=len(keys)) - positives
    # 2. Negatives of the same group that score below each tie.
    groups = _run_starts(keys[ties] >> np.uint64(GROUP_SHIFT))
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[groups], np.diff(groups, append=len(ties)))
    # 3. Twice the numerator of AUC and the size of each class, per group.
    twice_wins = np.add.reduceat(positives * (2 * below + negatives), groups)
    positives = np.add.reduceat(positives, groups)
    negatives = np.add.reduceat(negatives, groups)
    # 4. Groups of one class have no AUC.
    mixed = (positives > 0) & (negatives > 0)
    twice_wins = twice_wins[mixed]
    positives = positives[mixed]
    negatives = negatives[mixed]
    rows = positives + negatives
    return rows * (twice_wins / (2 * positives * negatives)), int(rows.sum())


def group_stop(keys: np.ndarray, stop: int) -> int:
    """Move `stop` to the end of the group that it cuts in sorted `keys: [N]`."""
    if stop >= len(keys):
        return len(keys)
    group = int(keys[stop - 1]) >> GROUP_SHIFT << GROUP_SHIFT
    last_key = group | ((1 << GROUP_SHIFT) - 1)
    return stop + int(np.searchsorted(keys[stop:], np.uint64(last_key), "right"))


def _run_starts(values: np.ndarray) -> np.ndarray:
    """Positions where runs of equal values begin."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
