"""Calibration of probabilities: do labels come as often as predicted?

With n log rows, probabilities `p`, labels `y` and logits `x = log p - log(1 - p)`:

    ECE     = sum_b n_b / n |mean_b p - mean_b y|      over B bins of about equal size
    slope   = b and intercept = a that maximise the likelihood of
              P(y = 1) = sigmoid(a + b x)
    top     = mean p - mean y over the tenth of the log rows with the highest p

A calibrated model has ECE 0, up to the noise of the labels, slope 1 and intercept 0. A
slope below 1 says that predictions are too extreme. Slope and intercept are fitted
together (Cox, Two further applications of a model for binary regression, Biometrika
1958); ECE with bins of equal mass: Nguyen and O'Connor, Posterior calibration and
exploratory analysis for natural language processing models, EMNLP 2015.

Bin b holds the log rows for which b n / B <= (number of rows with a lower p)
< (b + 1) n / B. Equal probabilities share a bin, so that no result depends on the order
of the log rows; many equal ones make bins unequal, or empty. All functions take the
sorted probabilities of each class, as `exact_auc.py` does, and read them in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenrec.metrics.exact_auc import CLIP

BINS = 20
_TOP_SHARE = 10  # the highest 1 / _TOP_SHARE of the log rows
_BLOCK = 1 << 20
_NEWTON_STEPS = 100
_MOST_HALVINGS = 40


class _Bin(NamedTuple):
    """Log rows with neighbouring probabilities.

    Attributes:
      predicted: sum of their probabilities.
      positives: number of positive labels.
      examples: number of log rows.
    """

    predicted: float
    positives: int
    examples: int

    def means(self) -> dict[str, float | int]:
        """`{"predicted", "observed", "examples"}`; the first two are means."""
        return {
            "predicted": self.predicted / self.examples,
            "observed": self.positives / self.examples,
            "examples": self.examples,
        }

    @property
    def over_prediction(self) -> float:
        """Mean probability minus share of positives."""
        return (self.predicted - self.positives) / self.examples


def calibration_of_sorted(
    positives: np.ndarray, negatives: np.ndarray
) -> dict[str, Any] | None:
    """Compute the calibration of one task.

    Args:
      positives: `[P]`, ascending probabilities of the positive log rows.
      negatives: `[N]`, ascending probabilities of the negative log rows.

    Returns:
      A JSON value, or None without log rows:

      - "bins": B, and "expected_error": ECE;
      - "slope" and "intercept": None if the labels do not determine them, because one
        class is absent or a threshold separates the classes;
      - "predicted" and "observed": mean probability and share of positives;
      - "top_decile": {"predicted", "observed", "examples", "over_prediction"} of the
        log rows with the highest probabilities, a tenth of all, and those tied with
        the lowest of them;
      - "reliability": [{"predicted", "observed", "examples"}] of the bins that hold log
        rows, in ascending order.
    """
    total = len(positives) + len(negatives)
    if not total:
        return None
    # 1. Ends of the bins: bins below b hold the rows up to the value of rank
    #    ceil(b n / B), its ties included.
    ends = [
        _count_up_to(positives, negatives, -(-number * total // BINS))
        for number in range(1, BINS)
    ]
    bins = _cut(positives, negatives, [*ends, (len(positives), len(negatives))])
    bins = [part for part in bins if part.examples]
    errors = [part.examples * abs(part.over_prediction) for part in bins]
    whole = _cut(positives, negatives, [(len(positives), len(negatives))])[0]
    top = _top(positives, negatives, -(-total // _TOP_SHARE))
    slope, intercept = _fit_line(positives, negatives)
    means = whole.means()
    return {
        "bins": BINS,
        "expected_error": sum(errors) / total,
        "slope": slope,
        "intercept": intercept,
        "predicted": means["predicted"],
        "observed": means["observed"],
        "top_decile": top.means() | {"over_prediction": top.over_prediction},
        "reliability": [part.means() for part in bins],
    }


def _value_of_rank(first: np.ndarray, second: np.ndarray, rank: int) -> float:
    """The `rank`-th smallest entry, from 1, of two ascending arrays together."""
    # Of the `rank` smallest entries, `low` to `high` are of the first array. The
    # search ends at the number for which the next entry of the first array is not
    # below the last one that is taken from the second.
    low, high = max(0, rank - len(second)), min(rank, len(first))
    while low < high:
        middle = (low + high) // 2
        if first[middle] < second[rank - middle - 1]:
            low = middle + 1
        else:
            high = middle
    taken = []
    if low > 0:
        taken.append(first[low - 1])
    if rank - low > 0:
        taken.append(second[rank - low - 1])
    return max(taken)


def _count_up_to(
    positives: np.ndarray, negatives: np.ndarray, rank: int
) -> tuple[int, int]:
    """Entries of each array up to the value of a rank, ties included."""
    value = _value_of_rank(positives, negatives, rank)
    return (
        int(np.searchsorted(positives, value, "right")),
        int(np.searchsorted(negatives, value, "right")),
    )


def _cut(
    positives: np.ndarray, negatives: np.ndarray, ends: list[tuple[int, int]]
) -> list[_Bin]:
    """Cut both arrays at the ends of bins, numbers of positives and negatives."""
    bins, start = [], (0, 0)
    for end in ends:
        parts = (positives[start[0] : end[0]], negatives[start[1] : end[1]])
        predicted = sum(float(part.sum(dtype=np.float64)) for part in parts)
        bins.append(_Bin(predicted, len(parts[0]), len(parts[0]) + len(parts[1])))
        start = end
    return bins


def _top(positives: np.ndarray, negatives: np.ndarray, count: int) -> _Bin:
    """The `count` log rows with the highest probabilities, and their ties."""
    rank = len(positives) + len(negatives) - count + 1
    value = _value_of_rank(positives, negatives, rank)
    positives, negatives = (
        values[int(np.searchsorted(values, value, "left")) :]
        for values in (positives, negatives)
    )
    return _cut(positives, negatives, [(len(positives), len(negatives))])[0]


def _blocks(
    positives: np.ndarray, negatives: np.ndarray
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield logits `[n] float64`, block by block, with their label."""
    for values, label in ((positives, 1), (negatives, 0)):
        for start in range(0, len(values), _BLOCK):
            p = values[start : start + _BLOCK].astype(np.float64)
            p = np.clip(p, CLIP, 1 - CLIP)
            yield np.log(p) - np.log1p(-p), label


def _fit_line(
    positives: np.ndarray, negatives: np.ndarray
) -> tuple[float | None, float | None]:
    """Fit slope and intercept by Newton's method, with the logit as the feature."""
    total = len(positives) + len(negatives)
    # 1. There is a maximum only if the classes overlap: otherwise a steeper line is
    #    always more likely.
    if not len(positives) or not len(negatives):
        return None, None
    edges = np.clip(
        np.array([positives[0], positives[-1], negatives[0], negatives[-1]]),
        CLIP,
        1 - CLIP,
    )
    if edges[1] <= edges[2] or edges[3] <= edges[0]:
        return None, None
    # 2. Standardised logits, for well-conditioned steps.
    mean = sum(float(x.sum()) for x, _ in _blocks(positives, negatives)) / total
    squares = sum(
        float(np.square(x - mean).sum()) for x, _ in _blocks(positives, negatives)
    )
    deviation = (squares / total) ** 0.5

    def derivatives(weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Negative log likelihood, its gradient `[2]` and its Hessian `[2, 2]`."""
        loss, gradient, hessian = 0.0, np.zeros(2), np.zeros((2, 2))
        for x, label in _blocks(positives, negatives):
            z = (x - mean) / deviation
            logit = weights[0] + weights[1] * z
            # -log p(label) = log(1 + exp(-s logit)) with s = 1 or -1.
            loss += float(np.logaddexp(0, -logit if label else logit).sum())
            p = 0.5 * (1 + np.tanh(0.5 * logit))
            residual, curvature = p - label, p * (1 - p)
            gradient += residual.sum(), (residual * z).sum()
            mixed = (curvature * z).sum()
            hessian += [
                [curvature.sum(), mixed],
                [mixed, (curvature * z * z).sum()],
            ]
        return loss, gradient, hessian

    # 3. Newton's method from the base rate, where no probability is saturated. A step
    #    that does not lower the loss is halved.
    weights = np.array([np.log(len(positives)) - np.log(len(negatives)), 0.0])
    loss, gradient, hessian = derivatives(weights)
    for _ in range(_NEWTON_STEPS):
        step = np.linalg.solve(hessian, gradient)
        for _ in range(_MOST_HALVINGS):
            trial = derivatives(weights - step)
            if trial[0] <= loss * (1 + 1e-12):
                break
            step = step / 2
        weights = weights - step
        loss, gradient, hessian = trial
        if np.abs(step).max() < 1e-9:
            break
    slope = float(weights[1] / deviation)
    return slope, float(weights[0] - slope * mean)
