"""Metrics of predicted numbers: RMSE, MAE and XAUC, beside a constant prediction.

With labels y, predictions p, and the mean m and deviation s of the labels of training:

    RMSE = sqrt(mean (p - y)^2)        MAE = mean |p - y|
    XAUC = (#{(i, j): y_i > y_j, p_i > p_j} + 1/2 #{(i, j): y_i > y_j, p_i = p_j})
           / #{(i, j): y_i > y_j}
    loss = RMSE^2 / (2 s^2)

XAUC is the share of pairs of different labels in the right order, where a tie counts
one half (Zhan et al., Deconfounding Duration Bias in Watch-time Prediction for Video
Recommendation, KDD 2022). Of labels 1 and 0 it is the AUC. A constant has XAUC 0.5, and
its RMSE and MAE are those of the prediction m, `rmse_of_mean` and `mae_of_mean`.

XAUC is exact: pairs are counted in integers by a merge sort, in O(n log^2 n) time. No
metric depends on the order of the log rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tokenrec.errors import InputError


def real_report(
    labels: np.ndarray, predictions: np.ndarray, mean: float, deviation: float
) -> dict[str, Any]:
    """Compute all metrics of a task of numbers.

    Args:
      labels: `[N]`, all known.
      predictions: `[N]`, in the unit of the labels.
      mean: mean of the labels of training.
      deviation: their standard deviation.

    Returns:
      `{"rmse", "mae", "xauc", "rmse_of_mean", "mae_of_mean", "loss", "predicted",
      "observed", "examples"}`; "predicted" and "observed" are means. A metric without a
      row, and XAUC of equal labels, is None.

    Raises:
      InputError: shapes differ, or a value is not finite.

    >>> report = real_report(np.array([1.0, 3.0]), np.array([2.0, 3.0]), 2.0, 1.0)
    >>> report["mae"], report["mae_of_mean"], report["xauc"]
    (0.5, 1.0, 1.0)
    """
    y, p = _checked(labels, predictions)
    if not len(y):
        names = ("rmse", "mae", "xauc", "rmse_of_mean", "mae_of_mean", "loss")
        return dict.fromkeys((*names, "predicted", "observed")) | {"examples": 0}
    rmse = _root_mean_square(p - y)
    return {
        "rmse": rmse,
        "mae": _mean(np.abs(p - y)),
        "xauc": xauc(y, p),
        "rmse_of_mean": _root_mean_square(mean - y),
        "mae_of_mean": _mean(np.abs(mean - y)),
        "loss": 0.5 * (rmse / deviation) ** 2,
        "predicted": _mean(p),
        "observed": _mean(y),
        "examples": len(y),
    }


def xauc(labels: np.ndarray, predictions: np.ndarray) -> float | None:
    """Compute the share of pairs of different labels in the right order.

    Args:
      labels: `[N]`, numbers.
      predictions: `[N]`, of any scale; a tie counts one half.

    Returns:
      The exact quotient, rounded once; None if all labels are equal.

    Raises:
      InputError: shapes differ, or a value is not finite.

    >>> xauc(np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.1, 0.4, 0.1, 0.3]))
    0.7
    """
    y, p = _checked(labels, predictions)
    # Ranks instead of numbers, so that a merge compares integers.
    y_rank = np.unique(y, return_inverse=True)[1].reshape(-1)
    p_rank = np.unique(p, return_inverse=True)[1].reshape(-1)
    all_pairs = len(y) * (len(y) - 1) // 2
    pairs = all_pairs - _tied_pairs(y_rank)
    if not pairs:
        return None
    # In the order of the labels, and of equal labels by falling prediction: then a
    # rising pair of predictions is one of different labels.
    rising = _rising_pairs(p_rank[np.lexsort((-p_rank, y_rank))])
    both = y_rank.astype(np.int64) * (int(p_rank.max()) + 1) + p_rank
    ties = _tied_pairs(p_rank) - _tied_pairs(both)
    return (2 * rising + ties) / (2 * pairs)


def _tied_pairs(values: np.ndarray) -> int:
    """Number of pairs of equal integers."""
    counts = np.unique(values, return_counts=True)[1]
    # Python integers: the squares of many rows leave int64.
    return sum(n * (n - 1) // 2 for n in counts[counts > 1].tolist())


def _rising_pairs(ranks: np.ndarray) -> int:
    """Count the pairs `i < j` with `ranks[i] < ranks[j]`.

    A merge sort from below: of two sorted neighbours, each number of the right one
    rises over those of the left one that are smaller.

    Args:
      ranks: `[N]` integers from 0 to N - 1.
    """
    count = len(ranks)
    size = 1 << max(count - 1, 0).bit_length()
    # What fills up to a power of two is smaller than all and last: it rises over none.
    padded = np.full(size, -1, np.int64)
    padded[:count] = ranks
    total, width = 0, 1
    while width < size:
        blocks = padded.reshape(-1, 2, width)
        # One search for all blocks: each is moved to numbers of its own.
        offset = np.arange(len(blocks))[:, None] * (size + 1)
        left, right = blocks[:, 0] + offset, blocks[:, 1] + offset
        found = np.searchsorted(left.reshape(-1), right.reshape(-1), "left")
        smaller = found.reshape(right.shape) - np.arange(len(blocks))[:, None] * width
        total += int(smaller.sum())
        padded = np.sort(padded.reshape(-1, 2 * width), axis=1).reshape(-1)
        width *= 2
    return total


def _checked(
    labels: np.ndarray, predictions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels, np.float64)
    predictions = np.asarray(predictions, np.float64)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise InputError(
            f"labels have shape {labels.shape}, predictions {predictions.shape}; give "
            "two equal vectors"
        )
    for name, values in (("labels", labels), ("predictions", predictions)):
        wrong = ~np.isfinite(values)
        if wrong.any():
            raise InputError(
                f"{name} hold {values[wrong][0]} at row {int(wrong.argmax())}, which is "
                "not finite; leave unknown labels out, or look for it in the model"
            )
    return labels, predictions


def _mean(values: np.ndarray) -> float:
    # Sorted, so that the rounding of the sum does not depend on the order.
    return float(np.sort(values).mean())


def _root_mean_square(errors: np.ndarray) -> float:
    return math.sqrt(_mean(np.square(errors)))
