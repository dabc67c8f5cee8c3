"""How many directions a cloud of states really fills (methods.md section 5)."""

from __future__ import annotations

import numpy as np

from tokenrec.errors import InputError

LEAST_ROWS = 4096  # of a published figure; fewer rows of a wide model lower the rank by themselves


def singular_values(states: np.ndarray) -> np.ndarray:
    """Singular values of the centred states, largest first: `[n, d]` -> `[min(n, d)] float64`.

    >>> singular_values(np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]])).round(6).tolist()
    [4.242641, 0.0]

    Raises:
      InputError: not a matrix of at least one row, or a number is not finite.
    """
    states = np.asarray(states, np.float64)
    if states.ndim != 2 or not states.size:
        raise InputError(
            f"states have the shape {states.shape}, but must be [n, d] with n and d of 1 or more"
        )
    if not np.isfinite(states).all():
        raise InputError(
            "states hold values that are not finite; measure a model whose loss is finite"
        )
    return np.linalg.svd(states - states.mean(axis=0), compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """`exp(-sum p log p)`, `p = values / sum values`, of singular values (Roy and Vetterli, EUSIPCO 2007).

    Between 1 and the number of values above 0; 0 where all are 0.

    >>> [round(effective_rank(np.array(values)), 6) for values in ([2.0, 2.0, 2.0, 0.0], [5.0], [0.0, 0.0])]
    [3.0, 1.0, 0.0]
    """
    values = np.asarray(values, np.float64)
    if not values.sum():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
