"""Metrics of ranked lists: hit rate, Recall@k, NDCG@k and MRR, from ranks.

With r_1, ..., r_m the ranks of the m relevant items of a query, each metric is a mean
over the queries that have a relevant item:

    HitRate@k = 1 if min_i r_i <= k, else 0
    Recall@k  = #{i: r_i <= k} / m
    NDCG@k    = sum_{i: r_i <= k} 1 / log2(1 + r_i)
                / sum_{j = 1..min(m, k)} 1 / log2(1 + j)
    MRR       = 1 / min_i r_i

Sources: NDCG with binary relevance, Järvelin and Kekäläinen, Cumulated gain-based
evaluation of IR techniques, TOIS 2002; MRR, Voorhees, The TREC-8 question answering
track report, 1999.

Everywhere `ranks: [N]` (one relevant item a query) or `[N, R]`. Rank 1 is the top of
the list, `inf` marks an item that the list does not hold, and 0 fills the entries of a
query with fewer than R relevant items. A query without a relevant item is left out;
without any query the metric is None. Ranks are those in the full catalogue: metrics of
a sampled catalogue do not order models as the full ones do (Krichene and Rendle, On
sampled metrics for item recommendation, KDD 2020).
"""

from __future__ import annotations

import numpy as np

from tokenrec.errors import InputError


def ranks_of(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank the relevant items among all scored ones.

    Equal scores share the mean of their ranks. A constant scorer thus ranks every item
    in the middle, and gains nothing from the order of the items.

    Args:
      scores: `[N, V]`, scores of V items for N queries.
      relevant: `[N]` or `[N, R]`, columns of `scores`; -1 fills.

    Returns:
      float64 ranks, of the shape of `relevant`: 1 is the highest score, 0 fills. Takes
      O(N V) memory, whatever R is.

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
            f"scores have shape {scores.shape}, relevant {relevant.shape}; "
            "give [N, V] and [N] or [N, R]"
        )
    if relevant.size and not (
        relevant.min() >= -1 and relevant.max() < scores.shape[1]
    ):
        raise InputError(
            f"relevant spans {relevant.min()} to {relevant.max()}; "
            f"columns are 0 to {scores.shape[1] - 1}"
        )
    if np.isnan(scores).any():
        raise InputError(
            "scores hold NaN, which has no rank; find where the model made it"
        )
    columns = relevant if relevant.ndim == 2 else relevant[:, None]
    ranks = np.zeros(columns.shape)
    # One relevant item at a time, because [N, R, V] need not fit in memory.
    for r in range(columns.shape[1]):
        column = columns[:, r : r + 1]
        own_score = np.take_along_axis(scores, np.maximum(column, 0), axis=1)
        higher = (scores > own_score).sum(1)
        equal = (scores == own_score).sum(1)
        ranks[:, r] = np.where(column[:, 0] < 0, 0.0, higher + (equal + 1) / 2)
    return ranks.reshape(relevant.shape)


def hit_rate_at(ranks: np.ndarray, k: int) -> float | None:
    """Compute the share of queries with a relevant item among the first k.

    `ranks: [N]` or `[N, R]`, see the module.

    >>> hit_rate_at(np.array([1, 3, 12]), k=10)
    0.6666666666666666
    """
    ranks, counts = _answered_queries(ranks, k)
    return float(_within(ranks, k).any(axis=1).mean()) if len(counts) else None


def recall_at(ranks: np.ndarray, k: int) -> float | None:
    """Compute Recall@k: the mean share of relevant items that are among the first k.

    `ranks: [N]` or `[N, R]`, see the module.

    >>> recall_at(np.array([[1, 30], [2, 0]]), k=10)
    0.75
    """
    ranks, counts = _answered_queries(ranks, k)
    if not len(counts):
        return None
    return float((_within(ranks, k).sum(axis=1) / counts).mean())


def ndcg_at(ranks: np.ndarray, k: int) -> float | None:
    """Compute NDCG@k: the mean of DCG over the best DCG that k places allow.

    `ranks: [N]` or `[N, R]`, see the module. A relevant item at rank r <= k gains
    1 / log2(1 + r).

    >>> ndcg_at(np.array([1, 3, 12]), k=10)
    0.5
    """
    ranks, counts = _answered_queries(ranks, k)
    if not len(counts):
        return None
    within = _within(ranks, k)
    # Ranks outside of the list are replaced by 1 before the logarithm, which is not
    # defined at a fill of 0 and not wanted at inf.
    gains = np.where(within, 1 / np.log2(1 + np.where(within, ranks, 1)), 0.0)
    best = np.cumsum(1 / np.log2(1 + np.arange(1, int(counts.max()) + 1)))
    return float((gains.sum(axis=1) / best[np.minimum(counts, k) - 1]).mean())


def mrr(ranks: np.ndarray) -> float | None:
    """Compute the mean reciprocal rank of the first relevant item of each query.

    `ranks: [N]` or `[N, R]`, see the module. A query whose items are not in the list
    counts as 0.

    >>> mrr(np.array([[1, 4], [4, 2]]))
    0.75
    """
    ranks, counts = _answered_queries(ranks, 1)
    if not len(counts):
        return None
    return float((1 / np.where(ranks > 0, ranks, np.inf).min(axis=1)).mean())


def _within(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks > 0) & (ranks <= k)


def _answered_queries(ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Select the queries that have a relevant item.

    Returns:
      `[N', R]`, their ranks, and `[N'] int`, the number of relevant items of each.
    """
    if k < 1:
        raise InputError(f"k={k} must be at least 1")
    ranks = np.asarray(ranks, np.float64)
    if ranks.ndim not in (1, 2):
        raise InputError(f"ranks have shape {ranks.shape}; give [N] or [N, R]")
    ranks = ranks if ranks.ndim == 2 else ranks[:, None]
    # Written as a negation, because NaN fails every comparison.
    wrong = ~((ranks == 0) | (ranks >= 1))
    if wrong.any():
        raise InputError(
            f"ranks hold {ranks[wrong][0]}; a rank is at least 1, and 0 fills queries "
            "with fewer items"
        )
    counts = (ranks > 0).sum(axis=1)
    return ranks[counts > 0], counts[counts > 0]
