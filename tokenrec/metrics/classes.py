"""Metrics of predicted classes: accuracy, log loss and one-vs-rest AUC.

With labels c_i and probabilities p_ic:

    accuracy = mean 1[argmax_c p_ic = c_i]      (of equal probabilities the first class)
    log loss = -mean log p_{i c_i}, in nats
    NE       = log loss / -sum_c q_c log q_c, with q_c the share of class c
    OvR AUC  = mean_c AUC(1[c_i = c], p_ic), over the classes that some rows have and
               others do not

OvR AUC is the macro mean of Hand and Till, *A Simple Generalisation of the Area Under
the ROC Curve for Multiple Class Classification Problems*, Machine Learning 2001, in its
one-vs-rest form. A constant prediction has the accuracy of the commonest class,
`accuracy_of_commonest`, NE 1 at best and OvR AUC 0.5. No metric depends on the order of
the log rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.metrics.exact_auc import CLIP, auc_of_sorted


def class_report(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Compute all metrics of a task of classes.

    Args:
      labels: `[N]`, indices of classes, all known.
      probabilities: `[N, C]`, clipped to at least 1e-7 in the log loss.

    Returns:
      `{"accuracy", "log_loss", "normalized_entropy", "ovr_auc",
      "accuracy_of_commonest", "examples"}`; an undefined metric is None.

    Raises:
      InputError: shapes do not fit, a label is no class, or a probability is not in
        [0, 1].

    >>> p = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    >>> report = class_report(np.array([0, 0, 1]), p)
    >>> report["accuracy"], report["ovr_auc"], report["examples"]
    (1.0, 1.0, 3)
    """
    labels, p = _checked(labels, probabilities)
    names = ("accuracy", "log_loss", "normalized_entropy", "ovr_auc")
    if not len(labels):
        return dict.fromkeys((*names, "accuracy_of_commonest")) | {"examples": 0}
    own = np.take_along_axis(p, labels[:, None], axis=1)[:, 0].astype(np.float64)
    # Sorted, so that the rounding of the sum does not depend on the order.
    loss = -float(np.sort(np.log(np.maximum(own, CLIP))).mean())
    counts = np.bincount(labels, minlength=p.shape[1])
    shares = counts[counts > 0] / len(labels)
    entropy = -float((shares * np.log(shares)).sum())
    return {
        "accuracy": int((p.argmax(axis=1) == labels).sum()) / len(labels),
        "log_loss": loss,
        "normalized_entropy": loss / entropy if len(shares) > 1 else None,
        "ovr_auc": _one_vs_rest_auc(labels, p),
        "accuracy_of_commonest": int(counts.max()) / len(labels),
        "examples": len(labels),
    }


def _one_vs_rest_auc(labels: np.ndarray, p: np.ndarray) -> float | None:
    aucs = []
    for label in range(p.shape[1]):
        is_label = labels == label
        value = auc_of_sorted(np.sort(p[is_label, label]), np.sort(p[~is_label, label]))
        if value is not None:
            aucs.append(value)
    return sum(aucs) / len(aucs) if aucs else None


def _checked(
    labels: np.ndarray, probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    labels, p = np.asarray(labels).astype(np.int64), np.asarray(probabilities)
    if labels.ndim != 1 or p.ndim != 2 or len(p) != len(labels):
        raise InputError(
            f"labels have shape {labels.shape}, probabilities {p.shape}; give [N] and "
            "[N, classes]"
        )
    wrong = (labels < 0) | (labels >= p.shape[1])
    if wrong.any():
        raise InputError(
            f"labels hold {labels[wrong][0]}, which is none of {p.shape[1]} classes; "
            "leave unknown labels out"
        )
    # Also refuses NaN.
    if len(p) and not ((p >= 0) & (p <= 1)).all():
        raise InputError(
            "probabilities hold a value outside [0, 1]; give those of a softmax"
        )
    return labels, p
