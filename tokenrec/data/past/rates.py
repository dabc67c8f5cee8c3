"""Turn totals of the past into rates and means that are smoothed towards a parent.

For a row with the key k, whose parent is q, and the key of all log rows, (), at last:

    g       = (P + 1) / (N + 2)                        of all log rows
    p(k)    = (positive(k) + s p(q)) / (known(k) + s)  p(()) = g
    rate(k) = logit(p(k)) - logit(g)

and for the mean of a feature, with the sum and the number n of its values:

    m(k)    = (sum(k) + s m(q)) / (n(k) + s)           m(()) = sum(()) / n(())
    mean(k) = m(k) - m(())

Both are 0 for an average key, and missing where no label (value) of the key is known.
All totals of an equation are of one horizon.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def smoothed_rate(
    known: Sequence[np.ndarray], positive: Sequence[np.ndarray], strength: float
) -> np.ndarray:
    """Compute the rate of a key, in log-odds above that of all log rows.

    Args:
      known: totals `[R]` of the key, of its parent, ..., and of all log rows.
      positive: the same of positive labels.
      strength: log rows of evidence that a parent's rate is worth.

    Returns:
      `[R] float64`, NaN where `known[0]` is 0.
    """
    # One imaginary positive and one negative keep g inside (0, 1) at the start.
    overall = (positive[-1] + 1.0) / (known[-1] + 2.0)
    share = overall
    for k, p in zip(known[-2::-1], positive[-2::-1], strict=True):
        share = (p + strength * share) / (k + strength)
    rate = _logit(share) - _logit(overall)
    return np.where(known[0] > 0, rate, np.nan)


def smoothed_mean(
    count: Sequence[np.ndarray], total: Sequence[np.ndarray], strength: float
) -> np.ndarray:
    """Compute the mean of a key, above that of all log rows.

    Args:
      count: totals `[R]` of known values of the key, of its parent, ..., of all.
      total: the same of the values.
      strength: values of evidence that a parent's mean is worth.

    Returns:
      `[R] float64`, NaN where `count[0]` is 0.
    """
    # 0 / 0 where nothing is known yet, which is missing below.
    overall = np.divide(
        total[-1], count[-1], out=np.zeros_like(total[-1]), where=count[-1] > 0
    )
    mean = overall
    for c, t in zip(count[-2::-1], total[-2::-1], strict=True):
        mean = (t + strength * mean) / (c + strength)
    return np.where(count[0] > 0, mean - overall, np.nan)


def _logit(share: np.ndarray) -> np.ndarray:
    return np.log(share / (1 - share))
