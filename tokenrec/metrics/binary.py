"""Exact metrics of binary predictions: AUC, GAUC, log loss and normalised entropy.

With P positives, N negatives, scores `s`, probabilities `p` and labels `y`:

    AUC      = (#{(i, j): s_i > s_j} + 1/2 #{(i, j): s_i = s_j}) / (P N)
               over all pairs of a positive i and a negative j
    GAUC     = sum_g n_g AUC_g / sum_g n_g
               over the groups (users) with both classes; n_g log rows in group g
    log loss = -1/n sum_i (y_i log p_i + (1 - y_i) log(1 - p_i)), in nats
    NE       = log loss / -(q log q + (1 - q) log(1 - q)), with q = P / (P + N)

AUC is the share of pairs in the right order, where a tie counts one half. NE below 1 is
better than to predict the base rate q of the same labels everywhere. Sources: GAUC, Zhu
et al., Optimized Cost per Click in Taobao Display Advertising, KDD 2017, with
impressions as weights; NE, He et al., Practical Lessons from Predicting Clicks on Ads
at Facebook, ADKDD 2014.

AUC and GAUC are exact, not binned: pairs are counted in integers, in O(n log n) time.
No metric depends on the order of the log rows. An undefined metric (no log rows, or one
class only) is None. The functions here hold all log rows in memory; `score_store.py`
gives the same numbers for splits beyond memory. Metrics of ranked lists are in
`ranking.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.metrics.calibration import calibration_of_sorted
from tokenrec.metrics.exact_auc import (
    auc_of_sorted,
    gauc_of_sorted,
    loss_of_sorted,
    sort_keys,
)
from tokenrec.metrics.groups import arrow_ids


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Compute the area under the ROC curve; a tie counts one half.

    Args:
      labels: `[N]`, 0 or 1.
      scores: `[N]`, of any scale.

    Returns:
      The exact AUC, rounded once; None if either class is absent.

    Raises:
      InputError: shapes differ, a label is not 0 or 1, or a score is NaN.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    >>> auc(np.array([1, 1]), np.array([0.1, 0.4])) is None
    True
    """
    labels, scores = check_scores(labels, scores)
    return auc_of_sorted(*_sorted_classes(labels, scores))


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float | None:
    """Compute the mean AUC inside groups, weighted by the log rows of each group.

    Groups of one class have no AUC and are left out.

    Args:
      labels: `[N]`, 0 or 1.
      scores: `[N]`, of any scale.
      groups: `[N]`, integers or strings, such as user ids.

    Returns:
      GAUC; None if no group has both classes.

    Raises:
      InputError: as `auc`, or `groups` are neither integers nor strings.

    >>> labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.4, 0.9, 0.8, 0.3])
    >>> gauc(labels, scores, np.array(["ann", "ann", "bob", "bob", "cyd"]))
    0.5
    """
    labels, scores = check_scores(labels, scores)
    if np.shape(groups) != labels.shape:
        raise InputError(
            f"groups have shape {np.shape(groups)}, labels {labels.shape}; "
            "give one group per label"
        )
    codes = arrow_ids(groups).dictionary_encode().indices.to_numpy()
    # A sort key has room for 32 bits of score: other types are replaced by their ranks,
    # which have the same order and the same ties.
    if scores.dtype != np.float32:
        scores = np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    return gauc_of_sorted(np.sort(sort_keys(codes, scores, labels)))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Compute the mean of `-log p(label)` in nats, in float64.

    Args:
      labels: `[N]`, 0 or 1.
      probabilities: `[N]` in [0, 1], float32 or float64; clipped to [1e-7, 1 - 1e-7].

    Returns:
      The log loss; None if there are no log rows.

    Raises:
      InputError: as `auc`, or a probability is outside [0, 1].

    >>> round(log_loss(np.array([1, 0]), np.array([0.5, 0.25])), 6)
    0.490415
    """
    labels, probabilities = check_scores(labels, probabilities)
    if not len(labels):
        return None
    return loss_of_sorted(*_sorted_classes(labels, probabilities)) / len(labels)


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Compute the log loss over the entropy of these labels' own base rate.

    Below 1 is better than predicting the base rate. Source: He et al., Practical
    Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014.

    Args:
      labels: `[N]`, 0 or 1.
      probabilities: `[N]` in [0, 1], float32 or float64.

    Returns:
      The normalised entropy; None if either class is absent.

    Raises:
      InputError: as `log_loss`.

    >>> normalized_entropy(np.array([1, 0]), np.array([0.5, 0.5]))
    1.0
    """
    loss = log_loss(labels, probabilities)
    return _over_base_entropy(loss, int(np.count_nonzero(labels)), len(labels))


def summarize(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray,
    tasks: Sequence[str],
    *,
    calibration: bool = False,
) -> dict[str, Any]:
    """Compute all metrics per task, and the means of AUC and GAUC over tasks.

    Args:
      labels: `[N, K] int8`, 1, 0, or -1 where unknown: the log row is then left out of
        that task.
      probabilities: `[N, K] float32`.
      users: `[N]`, integers or strings, the groups of GAUC.
      tasks: K names.
      calibration: also compute `calibration_of_sorted`, as "calibration" of each task.

    Returns:
      `{"macro_auc", "macro_gauc", "tasks": {task: {"auc", "gauc", "log_loss",
      "normalized_entropy", "positives", "examples"}}}`, plain Python values for JSON. A
      mean is over the tasks where the metric is defined.

    Raises:
      InputError: as the single metrics.

    >>> labels, users = np.array([[1], [0], [-1]]), np.array([7, 7, 7])
    >>> result = summarize(labels, np.array([[0.9], [0.1], [0.5]]), users, ["click"])
    >>> click = result["tasks"]["click"]
    >>> result["macro_auc"], click["gauc"], click["examples"]
    (1.0, 1.0, 2)
    """
    labels = np.asarray(labels)
    probabilities = np.asarray(probabilities)
    users = np.asarray(users)
    check_shapes(labels, probabilities, users, tasks)
    reports = {}
    for k, task in enumerate(tasks):
        # Each task has its own log rows: those whose label is known.
        known = labels[:, k] != -1
        y, p = check_scores(labels[known, k], probabilities[known, k])
        reports[task] = task_report(
            *_sorted_classes(y, p),
            gauc(y, p, users[known]),
            calibration=calibration,
        )
    return with_macro_means(reports)


def task_report(
    positives: np.ndarray,
    negatives: np.ndarray,
    grouped_auc: float | None,
    *,
    calibration: bool = False,
) -> dict[str, Any]:
    """Compute the metrics of one task from sorted probabilities.

    Args:
      positives: `[P]`, ascending probabilities of the positive log rows.
      negatives: `[N]`, ascending probabilities of the negative log rows.
      grouped_auc: GAUC of the same log rows.
      calibration: also compute the calibration.

    Returns:
      `{"auc", "gauc", "log_loss", "normalized_entropy", "positives", "examples"}`, and
      if asked "calibration", the result of `calibration_of_sorted`.
    """
    examples = len(positives) + len(negatives)
    loss = loss_of_sorted(positives, negatives) / examples if examples else None
    report: dict[str, Any] = {
        "auc": auc_of_sorted(positives, negatives),
        "gauc": grouped_auc,
        "log_loss": loss,
        "normalized_entropy": _over_base_entropy(loss, len(positives), examples),
        "positives": len(positives),
        "examples": examples,
    }
    if calibration:
        report["calibration"] = calibration_of_sorted(positives, negatives)
    return report


def with_macro_means(
    reports: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Add the means over tasks to reports by task, in the form of `summarize`.

    The mean AUC takes of each task the share of pairs in the right order: the AUC of a
    binary task, the XAUC of numbers (which is the AUC where they are 1 and 0), and the
    mean one-vs-rest AUC of classes. The mean GAUC is over binary tasks.
    """
    means = {}
    for name, keys in (("auc", ("auc", "xauc", "ovr_auc")), ("gauc", ("gauc",))):
        values = [
            next((report[key] for key in keys if key in report), None)
            for report in reports.values()
        ]
        defined = [value for value in values if value is not None]
        # fsum rounds once, so that the order of the tasks does not matter.
        means[f"macro_{name}"] = math.fsum(defined) / len(defined) if defined else None
    return {**means, "tasks": reports}


def check_scores(
    labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Check labels and scores of one task.

    Args:
      labels: `[N]`, 0 or 1.
      scores: `[N]`.

    Returns:
      Both as arrays `[N]`, the scores as float32 or float64.

    Raises:
      InputError: shapes differ, a label is not 0 or 1, or a score is NaN.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise InputError(
            f"labels have shape {labels.shape}, scores {scores.shape}; "
            "give two equal vectors"
        )
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise InputError(
            f"labels hold {labels[wrong][0]}, which is neither 0 nor 1; "
            "leave unknown labels out"
        )
    # float32 is kept: a sort key holds its bits, and half the memory is enough.
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64)
    missing = np.isnan(scores)
    if missing.any():
        raise InputError(
            f"scores hold NaN at row {int(missing.argmax())}, which has no rank; "
            "look for it in the model"
        )
    return labels, scores


def check_shapes(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray,
    tasks: Sequence[str],
) -> None:
    """Check that the arrays of K tasks fit together.

    Args:
      labels: `[N, K]`.
      probabilities: `[N, K]`.
      users: `[N]`.
      tasks: K names.

    Raises:
      InputError: a shape is not `[N, K]`.
    """
    expected = (len(users), len(tasks))
    for name, array in (("labels", labels), ("probabilities", probabilities)):
        if array.shape != expected:
            raise InputError(
                f"{name} have shape {array.shape}; {expected[0]} users and "
                f"{expected[1]} tasks need {expected}"
            )


def _sorted_classes(
    labels: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ascending scores of the positives and of the negatives."""
    return np.sort(scores[labels == 1]), np.sort(scores[labels == 0])


def _over_base_entropy(
    loss: float | None, positives: int, examples: int
) -> float | None:
    """Divide a log loss by the entropy of the base rate, in nats."""
    if loss is None or positives in (0, examples):
        return None
    rate = positives / examples
    # log1p is exact for a small rate, where 1 - rate would round.
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
