"""Paired bootstrap over users: confidence intervals of differences between models.

The impressions of one user are correlated, so the unit that is resampled is the user
(a cluster bootstrap; Field and Welsh, JRSS B 2007). One resample draws U of the U users
with replacement. With `w_u` the number of times that user u was drawn, `u(i)` the user
of impression i, `s_i` its score and P, N the positive and negative impressions:

    AUC(w)  = sum_{i in P, j in N} w_{u(i)} w_{u(j)} ([s_i > s_j] + [s_i = s_j] / 2)
              / (sum_{i in P} w_{u(i)}  sum_{j in N} w_{u(j)})
    GAUC(w) = sum_u w_u n_u AUC_u / sum_u w_u n_u      over users with both classes
    LL(w)   = sum_u w_u loss_u / sum_u w_u n_u         log loss in nats

`n_u` is the number of impressions of user u, `AUC_u` the AUC within them and `loss_u`
their summed log loss. The bootstrap is paired: all models share the weights `w` of a
resample, because what makes a resample hard is then in both terms of

    delta(w) = mean_seeds m(model, w) - mean_seeds m(reference, w)

The 95 % interval is that between the 2.5 % and the 97.5 % quantile of `delta(w)` over
the resamples (percentile method). The two-sided p-value is

    p = 2 min(P(delta(w) <= 0), P(delta(w) >= 0))

**Undefined resamples.** AUC is 0 / 0 in a resample without positives or without
negatives, GAUC in one without a user that has both classes. If k of many users hold all
positives, this happens in about exp(-k) of the resamples. Such a resample is dropped
and counted: P and the quantiles are over the defined ones alone, for each metric. To
draw until a resample is defined would give the same distribution, but the metrics of a
table would no longer share their resamples, and nobody would see how many were
rejected. The count is evidence of its own: an interval of which 5 % of the resamples
are undefined comes from about three users with positives, too few to stand for others.
Whether a resample is defined depends on labels and weights, not on scores, so that it is
dropped for all models alike and the bootstrap stays paired. Of n defined resamples no
p-value is below 2 / n; with n < LEAST_DRAWS there is neither interval nor p-value.

Seeds are not resampled. A difference is one between means over the trained seeds, and
the deviation over seeds is reported separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tokenrec.metrics.exact_auc import CLIP

# The order of the metrics in the arrays of this module.
METRICS = ("auc", "gauc", "log_loss")

# An interval is made of the 2.5 % and 97.5 % quantiles; fewer resamples than this leave
# two or less in each tail.
LEAST_DRAWS = 100


class Estimate(NamedTuple):
    """Estimated difference of a metric, model minus reference.

    Attributes:
      value: the difference on the users as they are; None if the metric is undefined.
      low: lower end of the 95 % interval; None with fewer than `LEAST_DRAWS` defined
        resamples, as the other two.
      high: upper end of the 95 % interval.
      p_value: two-sided, of the hypothesis that the difference is 0.
      undefined_draws: resamples in which the metric is undefined. They are not in the
        interval and the p-value.
    """

    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    undefined_draws: int


def paired_bootstrap(
    labels: np.ndarray,
    scores: Mapping[str, Mapping[int, np.ndarray]],
    users: np.ndarray,
    reference: str,
    *,
    draws: int = 1_000,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Estimate the difference of every model to the reference, with intervals.

    A model that lacks some seeds of the reference is compared on the seeds that both
    have: a seed shifts all models by more than many of them differ. A model that shares
    no seed, such as a baseline without training, is compared with the mean over all.

    Args:
      labels: `[N]`, 0 or 1; both classes occur.
      scores: model -> seed -> `[N]` probabilities.
      users: `[N]`, the user of each impression.
      reference: the model that the others are compared with.
      draws: number of resamples.
      seed: seed of the resamples.

    Returns:
      Metric ("auc", "gauc" or "log_loss") -> model -> `Estimate`.
    """
    # 1. Sort the scores of each run once: a resample is then a few weighted sums.
    _, user = np.unique(users, return_inverse=True)
    count = int(user.max()) + 1
    runs = {
        model: {
            run_seed: _SortedScores(labels, run_scores, user, count)
            for run_seed, run_scores in of_model.items()
        }
        for model, of_model in scores.items()
    }

    # 2. The observed differences: every user counts once.
    observed = _differences(runs, reference, np.ones(count))

    # 3. Their distribution over resamples. All models share the weights of a resample.
    generator = np.random.default_rng(seed)
    resampled = []
    for _ in range(draws):
        drawn_users = generator.integers(count, size=count)
        weights = np.bincount(drawn_users, minlength=count).astype(np.float64)
        resampled.append(_differences(runs, reference, weights))

    estimates: dict[str, dict[str, Estimate]] = {}
    for column, metric in enumerate(METRICS):
        estimates[metric] = {
            model: _estimate(
                float(difference[column]),
                np.array([resample[model][column] for resample in resampled]),
            )
            for model, difference in observed.items()
        }
    return estimates


def _differences(
    runs: Mapping[str, Mapping[int, _SortedScores]],
    reference: str,
    weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """Compute `delta(w)` of each model: `[3]`, in the order of `METRICS`."""
    metrics = {
        model: {seed: run.metrics(weights) for seed, run in of_model.items()}
        for model, of_model in runs.items()
    }
    of_reference = metrics[reference]
    differences = {}
    for model, of_model in metrics.items():
        if model == reference:
            continue
        shared = sorted(of_model.keys() & of_reference.keys())
        mean, reference_mean = (
            np.mean([by_seed[seed] for seed in shared or sorted(by_seed)], axis=0)
            for by_seed in (of_model, of_reference)
        )
        differences[model] = mean - reference_mean
    return differences


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    """Summarise the resampled differences `[draws]` of one metric; NaN is undefined."""
    defined = resampled[~np.isnan(resampled)]
    undefined_draws = len(resampled) - len(defined)
    observed = None if np.isnan(value) else value
    if observed is None or len(defined) < LEAST_DRAWS:
        return Estimate(observed, None, None, None, undefined_draws)
    low, high = np.quantile(defined, [0.025, 0.975])
    # NaN is neither <= 0 nor >= 0: counted here, it would make both tails too small.
    tail = min(np.mean(defined <= 0), np.mean(defined >= 0))
    # n resamples cannot support a p-value below 2 / n, and the two tails overlap where
    # resampled differences equal 0, so that twice the smaller one may exceed 1.
    p_value = min(max(2 * tail, 2 / len(defined)), 1)
    return Estimate(observed, float(low), float(high), float(p_value), undefined_draws)


class _SortedScores:
    """Scores of one run, sorted once, so that the metrics of a resample are cheap.

    Args:
      labels: `[N]`, 0 or 1.
      scores: `[N]` probabilities.
      user: `[N]`, number of the user, from 0.
      count: number of users.
    """

    def __init__(
        self, labels: np.ndarray, scores: np.ndarray, user: np.ndarray, count: int
    ) -> None:
        positive, negative = (np.flatnonzero(labels == label) for label in (1, 0))
        negative = negative[np.argsort(scores[negative], kind="stable")]
        self._positive_user = user[positive]
        self._negative_user = user[negative]
        # For each positive, the number of negatives with a lower score, and of those
        # with a lower or equal one. They index the cumulative weights of the negatives.
        self._lower, self._lower_or_equal = (
            np.searchsorted(scores[negative], scores[positive], side=side)
            for side in ("left", "right")
        )
        within_user, self._mixed_counts = user_auc(labels, scores, user, count)
        # A user of one class has no AUC (NaN) and weight 0; 0 * NaN would spread.
        self._user_auc = np.where(self._mixed_counts > 0, within_user, 0.0)
        # Clipped as in tokenrec/metrics/exact_auc.py, so that log losses agree.
        p = np.clip(scores.astype(np.float64), CLIP, 1 - CLIP)
        losses = -np.log(np.where(labels == 1, p, 1 - p))
        self._user_loss = np.bincount(user, losses, minlength=count)
        self._counts = np.bincount(user, minlength=count)

    def metrics(self, weights: np.ndarray) -> np.ndarray:
        """Compute AUC, GAUC and log loss `[3]` with `weights: [U]` of the users.

        AUC and GAUC are NaN where `weights` leave them undefined. Every user has log
        rows, so that the log loss is always defined.
        """
        positive_weights = weights[self._positive_user]
        negative_weights = np.append(0.0, np.cumsum(weights[self._negative_user]))
        # Weight of the negatives that a positive outranks; a tie counts one half.
        outranked = (
            negative_weights[self._lower] + negative_weights[self._lower_or_equal]
        ) / 2
        pairs = positive_weights.sum() * negative_weights[-1]
        auc = positive_weights @ outranked / pairs if pairs else np.nan

        mixed = weights * self._mixed_counts
        gauc = mixed @ self._user_auc / mixed.sum() if mixed.any() else np.nan
        log_loss = weights @ self._user_loss / (weights @ self._counts)
        return np.array([auc, gauc, log_loss])


def user_auc(
    labels: np.ndarray, scores: np.ndarray, user: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUC within each user.

    Args:
      labels: `[N]`, 0 or 1.
      scores: `[N]`.
      user: `[N]`, number of the user, from 0.
      count: number of users U.

    Returns:
      `[U]` the AUC, NaN for a user without both classes, and `[U]` the number of
      impressions that it comes from, 0 for such a user.

    >>> user_auc(
    ...     np.array([1, 0, 1, 0, 1]),
    ...     np.array([0.9, 0.2, 0.4, 0.4, 0.3]),
    ...     np.array([0, 0, 1, 1, 2]),
    ...     3,
    ... )
    (array([1. , 0.5, nan]), array([2, 2, 0]))
    """
    # 1. Sort by user, then score. A tie group is a run of one user with equal scores.
    order = np.lexsort((scores, user))
    u, s, positive = user[order], scores[order], labels[order].astype(np.float64)
    new_user = np.diff(u, prepend=-1).astype(bool)
    new_score = np.diff(s, prepend=-np.inf).astype(bool)
    first = np.flatnonzero(new_user | new_score)

    # 2. Count both classes in each tie group, and the negatives in all groups before.
    positives_in_group = np.add.reduceat(positive, first)
    negatives_in_group = np.add.reduceat(1 - positive, first)
    negatives_before = np.cumsum(negatives_in_group) - negatives_in_group

    # 3. Take away the negatives of earlier users: the least cumulative count of a user.
    owner = u[first]
    earlier_users = np.full(count, np.inf)
    np.minimum.at(earlier_users, owner, negatives_before)

    # 4. A positive outranks the negatives of lower groups, and half of its own group.
    outranked = negatives_before - earlier_users[owner] + negatives_in_group / 2
    pairs = np.bincount(owner, positives_in_group * outranked, minlength=count)

    positives = np.bincount(u, positive, minlength=count)
    impressions = np.bincount(u, minlength=count)
    negatives = impressions - positives
    mixed = (positives > 0) & (negatives > 0)
    auc = np.full(count, np.nan)
    auc[mixed] = pairs[mixed] / (positives[mixed] * negatives[mixed])
    return auc, np.where(mixed, impressions, 0)
