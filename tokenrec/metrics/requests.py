"""NDCG within requests: how well the rows that were shown together are ordered.

With gains g_i (the labels, at least 0) and ranks r_i by falling score:

    NDCG@k = sum_{i: r_i <= k} g_i / log2(1 + r_i) / the same of the best order

It is the mean over requests with two rows of known label or more, and a gain above 0.
Equal scores share the mean of the discounts of their ranks, so that a constant gains
nothing from the order of the rows (McSherry and Najork, *Computing Information
Retrieval Performance Measures Efficiently in the Presence of Tied Scores*, ECIR 2008).
Source: Järvelin and Kekäläinen, TOIS 2002, with linear gains.
"""

from __future__ import annotations

import numpy as np

# Odd constants of splitmix64 (Steele et al., 2014), which mix the bits of a key.
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def request_codes(
    users: np.ndarray, times: np.ndarray, requests: np.ndarray
) -> np.ndarray:
    """Number the requests, equally in every batch.

    Args:
      users: `[N] int64`, codes of users.
      times: `[N] int64`, milliseconds.
      requests: `[N] int64`, number of the request at that time, 0 or more.

    Returns:
      `[N] int64`, a hash of the three. Of n requests, two share a number with a
      probability of about n^2 / 2^65.
    """
    code = np.zeros(len(users), np.uint64)
    for part in (users, times, requests):
        code ^= part.astype(np.int64).view(np.uint64)
        for multiplier, shift in zip(_MIX, (30, 27), strict=True):
            code = (code ^ (code >> np.uint64(shift))) * multiplier
        code ^= code >> np.uint64(31)
    return code.view(np.int64)


def request_ndcg(
    requests: np.ndarray, gains: np.ndarray, scores: np.ndarray, k: int
) -> tuple[float | None, int]:
    """Compute NDCG@k within requests.

    Args:
      requests: `[N] int64`, number of each row's request.
      gains: `[N]`, labels; those below 0 gain nothing.
      scores: `[N]`, of any scale.
      k: places that count.

    Returns:
      NDCG@k, None without any request to measure; and the number of these requests.

    >>> requests, gains = np.array([4, 4, 4, 9]), np.array([0.0, 1.0, 0.0, 1.0])
    >>> request_ndcg(requests, gains, np.array([0.9, 0.5, 0.1, 0.3]), k=1)
    (0.0, 1)
    """
    gains = np.maximum(np.asarray(gains, np.float64), 0)
    _, request = np.unique(requests, return_inverse=True)
    request = request.reshape(-1)
    count = int(request.max(initial=-1)) + 1
    size = np.bincount(request, minlength=count)
    total = np.bincount(request, weights=gains, minlength=count)
    kept = ((size > 1) & (total > 0))[request]
    request, gains, scores = request[kept], gains[kept], np.asarray(scores)[kept]
    if not len(request):
        return None, 0
    dcg = _discounted(request, scores, gains, k)
    best = _discounted(request, gains, gains, k)
    measured = best > 0
    values = dcg[measured] / best[measured]
    return float(np.sort(values).mean()), len(values)


def _discounted(
    request: np.ndarray, scores: np.ndarray, gains: np.ndarray, k: int
) -> np.ndarray:
    """DCG@k of each request in the order of falling scores: `[requests] float64`."""
    order = np.lexsort((-scores, request))
    request, scores, gains = request[order], scores[order], gains[order]
    opens = np.ones(len(request), bool)
    opens[1:] = request[1:] != request[:-1]
    place = np.arange(len(request))
    rank = place - np.maximum.accumulate(np.where(opens, place, 0)) + 1
    discount = np.where(rank <= k, 1 / np.log2(1 + rank), 0.0)
    # Runs of equal scores share their discounts.
    opens[1:] |= scores[1:] != scores[:-1]
    starts = np.flatnonzero(opens)
    lengths = np.diff(starts, append=len(request))
    discount = np.repeat(np.add.reduceat(discount, starts) / lengths, lengths)
    return np.bincount(request, weights=gains * discount)
