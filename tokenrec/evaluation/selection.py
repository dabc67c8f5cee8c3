"""The value of an evaluation that decides which checkpoint is the best."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenrec.config import Config


def selection_value(report: dict[str, Any], config: Config) -> float | None:
    """Value of `train.best_metric` in a report; higher is better.

    `auto` is NDCG@10 for retrieval and the mean AUC of the tasks for ranking (of tasks
    that are not binary, `metrics.binary.with_macro_means`). The loss is negated; it is
    the mean over tasks of the log loss, and of a task of numbers of half the squared
    error in standard deviations.

    Returns:
      None if the metric is undefined, such as the AUC of a task without positives.
    """
    metric = config.train.best_metric
    if config.data.objective == "retrieval":
        return report["retrieval"]["ndcg@10" if metric == "auto" else metric]
    if metric == "request_ndcg":
        return report[f"macro_request_ndcg@{config.data.request_ndcg}"]
    if metric != "loss":
        return report["macro_auc" if metric == "auto" else metric]
    losses = [
        task["log_loss"] if "log_loss" in task else task["loss"]
        for task in report["tasks"].values()
    ]
    defined = [loss for loss in losses if loss is not None]
    return -float(np.mean(defined)) if defined else None


def criterion(config: Config) -> str:
    """What the values of `selection_value` measure; others cannot be compared with it.

    It names the metric, and the split and number of samples it is computed on.
    """
    train = config.train
    default = "ndcg@10" if config.data.objective == "retrieval" else "macro_auc"
    metric = default if train.best_metric == "auto" else train.best_metric
    if metric == "request_ndcg":
        metric = f"{metric}@{config.data.request_ndcg}"
    samples = f", {train.eval_samples} samples" if train.eval_samples else ""
    return f"{metric} on {train.eval_split}{samples}"


def flatten_report(report: dict[str, Any]) -> dict[str, float | None]:
    """Report as one flat mapping for the logs, `TASK/METRIC` for values of a task.

    The loss of an alignment task is `alignment/TASK`.
    """
    if "retrieval" in report:
        aligned = report.get("alignment", {}).items()
        return report["retrieval"] | {
            f"alignment/{name}": task["loss"] for name, task in aligned
        }
    flat = {name: value for name, value in report.items() if name != "tasks"}
    for task, values in report["tasks"].items():
        flat |= {f"{task}/{name}": value for name, value in values.items()}
    return flat
