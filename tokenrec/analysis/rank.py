"""Effective rank: the number of directions that a cloud of states fills.

For the centred states `X: [n, d]` with singular values `sigma_k`:

    p_k  = sigma_k / sum_j sigma_j
    rank = exp(-sum_k p_k log p_k)

This is the exponential of the entropy of `p` (Roy and Vetterli, "The effective rank: a
measure of effective dimensionality", EUSIPCO 2007; docs/methods.md section 5). It is r
if r singular values are equal and the others 0. A collapse of the states onto few
directions shows as a low rank.
"""

from __future__ import annotations

import numpy as np

from tokenrec.errors import InputError

# Number of states of a published figure. The rank of fewer states is biased downwards:
# n states fill n - 1 directions at most, and sampling noise spreads the values.
LEAST_ROWS = 4096


def singular_values(states: np.ndarray) -> np.ndarray:
    """Compute the singular values of the centred states.

    >>> states = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]])
    >>> singular_values(states).round(6).tolist()
    [4.242641, 0.0]

    Args:
      states: `[n, d]`, n and d of 1 or more.

    Returns:
      `[min(n, d)] float64`, largest first.

    Raises:
      InputError: `states` is not a matrix, is empty, or holds a non-finite number.
    """
    states = np.asarray(states, np.float64)
    if states.ndim != 2 or not states.size:
        raise InputError(
            f"states have the shape {states.shape}; give [n, d] with n and d of 1 or "
            "more"
        )
    if not np.isfinite(states).all():
        raise InputError(
            "states hold non-finite values; measure a model whose loss is finite"
        )
    return np.linalg.svd(states - states.mean(axis=0), compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """Compute the effective rank from singular values `[k]`.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    >>> round(effective_rank(np.array([5.0])), 6), effective_rank(np.array([0.0, 0.0]))
    (1.0, 0.0)

    Returns:
      A number between 1 and the count of values above 0; 0 if all values are 0.
    """
    values = np.asarray(values, np.float64)
    if not values.sum():
        return 0.0
    # The limit of p log p at 0 is 0, which the logarithm cannot give.
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
