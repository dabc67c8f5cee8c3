"""How sure a difference between two models is: a paired bootstrap over users.

A user's impressions come together, so users are drawn, with replacement, and a draw is the same for all models: what
makes a draw easy or hard is in both terms of a difference. Seeds are not drawn: a difference is between means over
the seeds that were trained, and their deviation is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tokenrec.metrics.exact_auc import CLIP


class Difference(NamedTuple):
    """Of a model minus the reference: its value, its 95 % interval, and the two-sided p-value of the draws."""

    value: float
    low: float
    high: float
    p_value: float


def compare(
    labels: np.ndarray,
    scores: Mapping[str, Mapping[int, np.ndarray]],
    users: np.ndarray,
    reference: str,
    *,
    draws: int = 1_000,
    seed: int = 0,
) -> dict[str, dict[str, Difference]]:
    """Differences of each other model to `reference`: metric "auc", "gauc" or "log_loss" -> model -> Difference.

    A model that has not all seeds of the reference yet is compared on those that both have: a seed moves all models by
    more than many of them differ. One that shares none, as a baseline that no seed made, is compared with all.

    Args:
      labels: `[N]` of 0 and 1, both of which occur.
      scores: of each model, `[N]` probabilities by seed.
      users: `[N]`.
    """
    _, user = np.unique(users, return_inverse=True)
    count = int(user.max()) + 1
    prepared = {
        name: {of: _Prepared(labels, one, user, count) for of, one in runs.items()}
        for name, runs in scores.items()
    }
    drawn = np.random.default_rng(seed)
    whole = _gaps(prepared, reference, np.ones(count))
    sampled = [
        _gaps(
            prepared,
            reference,
            np.bincount(drawn.integers(count, size=count), minlength=count).astype(
                np.float64
            ),
        )
        for _ in range(draws)
    ]
    found: dict[str, dict[str, Difference]] = {}
    for column, metric in enumerate(("auc", "gauc", "log_loss")):
        found[metric] = {
            name: _difference(
                float(gap[column]), np.array([one[name][column] for one in sampled])
            )
            for name, gap in whole.items()
        }
    return found


def _gaps(
    prepared: Mapping[str, Mapping[int, _Prepared]], reference: str, times: np.ndarray
) -> dict[str, np.ndarray]:
    """Metrics of each model less those of the reference, means over the seeds that both have."""
    metrics = {
        name: {of: run.metrics(times) for of, run in runs.items()}
        for name, runs in prepared.items()
    }
    base, gaps = metrics[reference], {}
    for name, own in metrics.items():
        if name != reference:
            shared = own.keys() & base.keys()
            mine, its = (
                np.mean([runs[of] for of in sorted(shared or runs)], axis=0)
                for runs in (own, base)
            )
            gaps[name] = mine - its
    return gaps


def _difference(value: float, draws: np.ndarray) -> Difference:
    low, high = np.quantile(draws, [0.025, 0.975])
    side = min(np.mean(draws <= 0), np.mean(draws >= 0))
    # Of n draws no p-value below 2 / n can be told.
    return Difference(
        value, float(low), float(high), float(min(max(2 * side, 2 / len(draws)), 1))
    )


class _Prepared:
    """One run's scores, sorted once, so that a draw costs a few passes over the rows."""

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, user: np.ndarray, count: int
    ) -> None:
        positive, negative = (np.flatnonzero(labels == label) for label in (1, 0))
        negative = negative[np.argsort(scores[negative], kind="stable")]
        self._positive_user, self._negative_user = user[positive], user[negative]
        # Of each positive, how many negatives have a lower score, and a score no higher.
        self._below, self._upto = (
            np.searchsorted(scores[negative], scores[positive], side=side)
            for side in ("left", "right")
        )
        value, self._rows = user_auc(labels, scores, user, count)
        self._user_auc = np.where(self._rows > 0, value, 0.0)
        p = np.clip(scores.astype(np.float64), CLIP, 1 - CLIP)  # as metrics.py
        self._loss = np.bincount(
            user, -np.log(np.where(labels == 1, p, 1 - p)), minlength=count
        )
        self._all_rows = np.bincount(user, minlength=count)

    def metrics(self, times: np.ndarray) -> np.ndarray:
        """AUC, GAUC and log loss where user u counts `times[u]` times."""
        positive = times[self._positive_user]
        negative = np.append(0.0, np.cumsum(times[self._negative_user]))
        # A tie counts half.
        won = (negative[self._below] + negative[self._upto]) / 2
        auc = positive @ won / (positive.sum() * negative[-1])
        mixed = times * self._rows
        gauc = mixed @ self._user_auc / mixed.sum() if mixed.any() else np.nan
        return np.array([auc, gauc, times @ self._loss / (times @ self._all_rows)])


def user_auc(
    labels: np.ndarray, scores: np.ndarray, user: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """AUC within each user and how many rows it comes from: `[count]` both; no rows, where a class is missing.

    >>> user_auc(np.array([1, 0, 1, 0, 1]), np.array([.9, .2, .4, .4, .3]), np.array([0, 0, 1, 1, 2]), 3)
    (array([1. , 0.5, nan]), array([2, 2, 0]))
    """
    order = np.lexsort((scores, user))
    u, s, positive = user[order], scores[order], labels[order].astype(np.float64)
    first = np.flatnonzero(
        np.diff(u, prepend=-1).astype(bool) | np.diff(s, prepend=-np.inf).astype(bool)
    )
    wins = np.add.reduceat(positive, first)
    losses = np.add.reduceat(1 - positive, first)
    below = np.cumsum(losses) - losses
    owner = u[first]
    before = np.full(count, np.inf)
    np.minimum.at(before, owner, below)  # the negatives of the users before
    pairs = np.bincount(
        owner, wins * (below - before[owner] + losses / 2), minlength=count
    )
    positives = np.bincount(u, positive, minlength=count)
    rows = np.bincount(u, minlength=count)
    negatives = rows - positives
    mixed = (positives > 0) & (negatives > 0)
    value = np.full(count, np.nan)
    value[mixed] = pairs[mixed] / (positives[mixed] * negatives[mixed])
    return value, np.where(mixed, rows, 0)
