"""Metrics of ranked lists, from the ranks of the relevant items: hit rate, recall, NDCG at k, and MRR.

Everywhere `ranks: [N]` (one relevant item a query) or `[N, R]`: 1 is the top of the list, `inf` an item that the list
does not hold, and 0 fills rows with fewer than R relevant items. A query without a relevant item is left out; without
any query the metric is None.
"""

from __future__ import annotations

import numpy as np

from tokenrec.errors import InputError


def ranks_of(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Ranks of the relevant items among all scored ones; equal scores share the mean of their ranks.

    `scores: [N, V]`, `relevant: [N]` or `[N, R]` columns of `scores`, -1 fills. Returns float64 of the shape of
    `relevant`. A constant scorer thus ranks everything in the middle, and gains nothing from the order of the items.

    Raises:
      InputError: shapes do not fit, a column does not exist, or a score is NaN.

    >>> ranks_of(np.array([[0.3, 0.9, 0.3, 0.1]]), np.array([[1, 0, -1]]))
    array([[1. , 2.5, 0. ]])
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant)
    if (
        scores.ndim != 2
        or relevant.shape[:1] != scores.shape[:1]
        or relevant.ndim not in (1, 2)
    ):
        raise InputError(
            f"scores have shape {scores.shape}, relevant {relevant.shape}; give [N, V] and [N] or [N, R]"
        )
    if relevant.size and not (
        relevant.min() >= -1 and relevant.max() < scores.shape[1]
    ):
        raise InputError(
            f"relevant spans {relevant.min()} to {relevant.max()}; columns are 0 to {scores.shape[1] - 1}"
        )
    if np.isnan(scores).any():
        raise InputError(
            "scores hold NaN, which has no rank; find where the model made it"
        )
    columns = relevant if relevant.ndim == 2 else relevant[:, None]
    ranks = np.zeros(columns.shape)
    for r in range(
        columns.shape[1]
    ):  # one column at a time: [N, R, V] need not fit in memory
        column = columns[:, r : r + 1]
        own = np.take_along_axis(scores, np.maximum(column, 0), axis=1)
        higher, equal = (scores > own).sum(1), (scores == own).sum(1)
        ranks[:, r] = np.where(column[:, 0] < 0, 0.0, higher + (equal + 1) / 2)
    return ranks.reshape(relevant.shape)


def hit_rate_at(ranks: np.ndarray, k: int) -> float | None:
    """Share of queries with a relevant item among the first k.

    >>> hit_rate_at(np.array([1, 3, 12]), k=10)
    0.6666666666666666
    """
    ranks, counts = _queries(ranks, k)
    return float(_within(ranks, k).any(axis=1).mean()) if len(counts) else None


def recall_at(ranks: np.ndarray, k: int) -> float | None:
    """Mean share of a query's relevant items that are among the first k.

    >>> recall_at(np.array([[1, 30], [2, 0]]), k=10)
    0.75
    """
    ranks, counts = _queries(ranks, k)
    return (
        float((_within(ranks, k).sum(axis=1) / counts).mean()) if len(counts) else None
    )


def ndcg_at(ranks: np.ndarray, k: int) -> float | None:
    """Mean of DCG over the best possible DCG, gain 1 / log2(1 + rank) for relevant items among the first k.

    Source: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 2002, binary relevance.

    >>> ndcg_at(np.array([1, 3, 12]), k=10)
    0.5
    """
    ranks, counts = _queries(ranks, k)
    if not len(counts):
        return None
    within = _within(ranks, k)
    gains = np.where(within, 1 / np.log2(1 + np.where(within, ranks, 1)), 0.0).sum(
        axis=1
    )
    best = np.cumsum(1 / np.log2(1 + np.arange(1, int(counts.max()) + 1)))
    return float((gains / best[np.minimum(counts, k) - 1]).mean())


def mrr(ranks: np.ndarray) -> float | None:
    """Mean over queries of 1 / rank of the first relevant item; 0 for a query whose items are not in the list.

    >>> mrr(np.array([[1, 4], [4, 2]]))
    0.75
    """
    ranks, counts = _queries(ranks, 1)
    return (
        float((1 / np.where(ranks > 0, ranks, np.inf).min(axis=1)).mean())
        if len(counts)
        else None
    )


def _within(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks > 0) & (ranks <= k)


def _queries(ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`ranks [N', R]` of the queries that have a relevant item, and `[N'] int` how many."""
    if k < 1:
        raise InputError(f"k={k} must be at least 1")
    ranks = np.asarray(ranks, np.float64)
    if ranks.ndim not in (1, 2):
        raise InputError(f"ranks have shape {ranks.shape}; give [N] or [N, R]")
    ranks = ranks if ranks.ndim == 2 else ranks[:, None]
    wrong = ~((ranks == 0) | (ranks >= 1))  # also true of NaN
    if wrong.any():
        raise InputError(
            f"ranks hold {ranks[wrong][0]}; a rank is at least 1, and 0 fills rows with fewer items"
        )
    counts = (ranks > 0).sum(axis=1)
    return ranks[counts > 0], counts[counts > 0]
