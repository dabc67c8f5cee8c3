"""Logistic regression by Newton's method, for the baselines.

Fits `P(label = 1) = sigmoid(a + b . z)` to standardised features z by maximum
likelihood with a small ridge penalty on all weights,

    min_w  -sum_i log p(y_i) + 1/2 sum_j 1e-6 w_j^2 ,

so that few labels, or labels that the features separate, still give finite weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

NEWTON_STEPS = 50
LONGEST_STEP = 10.0  # largest change of a weight in one Newton step
_PENALTY = 1e-6


def fit_probability(
    scores: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit `P(label = 1) = sigmoid(a + b log(1 + score))`.

    The penalty is felt only where the labels leave the slope undetermined. Labels of
    one class, or no labels, give their smoothed share everywhere.

    Args:
      scores: `[N]`, numbers >= 0.
      labels: `[N]`, 0 or 1.

    Returns:
      A function from scores `[M]` to probabilities `[M] float64`.

    >>> scores = np.array([0, 0, 0, 0, 9, 9, 9, 9])
    >>> labels = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    >>> probability = fit_probability(scores, labels)
    >>> probability(np.array([0, 9])).round(3).tolist()
    [0.25, 0.75]
    """

    def log_scores(scores: np.ndarray) -> np.ndarray:
        """Map `[N]` to `[N, 1] float64`."""
        return np.log1p(np.asarray(scores, np.float64))[:, None]

    probability = fit_logistic(log_scores(scores), labels)
    return lambda new_scores: probability(log_scores(new_scores))


def fit_logistic(
    x: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit `P(label = 1) = sigmoid(a + b . x)`, with the penalty of the module.

    Args:
      x: `[N, F] float64`, features.
      labels: `[N]`, 0 or 1.

    Returns:
      A function from features `[M, F]` to probabilities `[M] float64`.
    """
    positives, (rows, features) = float(labels.sum()), x.shape
    # Start from the smoothed base rate: the result where there is nothing to fit.
    share = (positives + 0.5) / (rows + 1)
    weights = np.array([np.log(share / (1 - share)), *np.zeros(features)])
    center, spread = np.zeros(features), np.zeros(features)
    if rows:
        center, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)

    def design(x: np.ndarray) -> np.ndarray:
        """Standardise features `[N, F]` and add an intercept: `[N, F + 1]`."""
        # A feature that is constant in the fitted rows carries no information, whatever
        # it is later.
        standardised = np.where(spread > 0, (x - center) / scale, 0)
        return np.concatenate([np.ones((len(x), 1)), standardised], axis=1)

    if 0 < positives < rows and spread.any():
        # The intercept is penalised too: where the labels are separable, nothing else
        # bounds the weights.
        z, penalty = design(x), np.full(features + 1, _PENALTY)
        for _ in range(NEWTON_STEPS):
            p = _sigmoid(z @ weights)
            gradient = z.T @ (p - labels) + penalty * weights
            hessian = (z.T * (p * (1 - p))) @ z + np.diag(penalty)
            step = np.linalg.solve(hessian, gradient)
            # Where every p is nearly 0 or 1 the curvature is almost nothing, and a
            # whole step would overshoot.
            weights -= step * min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-30))
            if np.abs(step).max() < 1e-9:
                break
    return lambda new: _sigmoid(design(np.asarray(new, np.float64)) @ weights)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # By tanh, which does not overflow.
    return 0.5 * (1 + np.tanh(0.5 * x))
