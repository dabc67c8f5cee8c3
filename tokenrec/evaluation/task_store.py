"""`TaskStore`: collect predictions of tasks of any kind, batch by batch.

Binary tasks are those of `ScoreStore`, whose memory is bounded. The others are kept in
memory: 8 bytes a row of a number, 1 + 4 C of C classes, and 16 for NDCG in requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.metrics.binary import with_macro_means
from tokenrec.metrics.classes import class_report
from tokenrec.metrics.real import real_report
from tokenrec.metrics.requests import request_codes, request_ndcg
from tokenrec.metrics.score_store import ScoreStore
from tokenrec.task_plan import TaskPlan


class TaskStore:
    """Labels and predictions of K tasks, collected batch by batch.

    Args:
      plans: K tasks.
      ndcg: also compute NDCG@k within requests, of the tasks whose labels are gains
        (those of classes have none); 0: not.
    """

    def __init__(self, plans: Sequence[TaskPlan], *, ndcg: int = 0) -> None:
        self._plans = tuple(plans)
        self._ndcg = ndcg
        self._binary = [k for k, plan in enumerate(plans) if plan.task.kind == "binary"]
        self._scores = ScoreStore([plans[k].task.name for k in self._binary])
        # Of each other task, blocks of labels and of predictions.
        self._labels: dict[str, list[np.ndarray]] = {}
        self._predictions: dict[str, list[np.ndarray]] = {}
        # Of each task with gains, blocks of requests, gains and scores.
        self._requests: dict[str, list[tuple[np.ndarray, ...]]] = {}

    def append(
        self,
        labels: np.ndarray,
        predictions: np.ndarray,
        users: np.ndarray,
        *,
        targets: np.ndarray | None = None,
        time: np.ndarray | None = None,
        request: np.ndarray | None = None,
    ) -> None:
        """Add log rows.

        Args:
          labels: `[N, K] int8`, -1 where unknown.
          predictions: `[N, O] float32`, those of `predict_tasks`.
          users: `[N] int64`, codes of the users.
          targets: `[N, V] float32`, NaN where unknown.
          time: `[N] int64`, milliseconds; for NDCG.
          request: `[N] int64`, -1 for a row on its own; for NDCG.
        """
        if self._binary:
            outputs = [self._plans[k].start for k in self._binary]
            self._scores.append(labels[:, self._binary], predictions[:, outputs], users)
        for k, plan in enumerate(self._plans):
            task, known = plan.task, labels[:, k] >= 0
            gains = labels[:, k]
            if task.kind == "real":
                assert targets is not None
                gains = targets[:, plan.target]
            if task.kind != "binary":
                logits = slice(plan.start, plan.stop)
                self._labels.setdefault(task.name, []).append(gains[known])
                self._predictions.setdefault(task.name, []).append(
                    predictions[known, logits]
                )
            if self._ndcg and task.kind != "classes":
                assert time is not None
                assert request is not None
                known &= request >= 0
                codes = request_codes(users[known], time[known], request[known])
                self._requests.setdefault(task.name, []).append(
                    (codes, gains[known], predictions[known, plan.start])
                )

    def summarize(self, *, calibration: bool = False) -> dict[str, Any]:
        """Compute the metrics of all log rows.

        Returns:
          The form of `metrics.binary.summarize`. The report of a task of numbers is
          that of `real_report`, of one of classes that of `class_report`. With NDCG
          each task with gains has `request_ndcg@k` and `requests`, and the whole
          `macro_request_ndcg@k`, the mean over tasks.
        """
        summary: dict[str, Any] = {"tasks": {}}
        if self._binary:
            summary = self._scores.summarize(calibration=calibration)
        if len(self._binary) == len(self._plans) and not self._ndcg:
            return summary
        reports = {p.task.name: self._report(p, summary) for p in self._plans}
        summary = with_macro_means(reports)
        if self._ndcg:
            name = f"request_ndcg@{self._ndcg}"
            values = [r[name] for r in reports.values() if r.get(name) is not None]
            mean = float(np.mean(values)) if values else None
            summary = {f"macro_{name}": mean} | summary
        return summary

    def _report(self, plan: TaskPlan, binary: dict[str, Any]) -> dict[str, Any]:
        """Metrics of one task; `binary` has those of the binary tasks."""
        name, task = plan.task.name, plan.task
        if task.kind == "binary":
            report: dict[str, Any] = binary["tasks"][name]
        else:
            values = _joined(self._labels.get(name, []), (0,))
            predicted = _joined(self._predictions.get(name, []), (0, task.width))
            if task.kind == "real":
                report = real_report(values, predicted[:, 0], task.mean, task.deviation)
            else:
                report = class_report(values, predicted)
        if self._ndcg and task.kind != "classes":
            blocks = self._requests.get(name, [])
            parts = (_joined([block[i] for block in blocks], (0,)) for i in range(3))
            requests, gains, scores = parts
            value, count = request_ndcg(requests, gains, scores, self._ndcg)
            report = report | {f"request_ndcg@{self._ndcg}": value, "requests": count}
        return report


def _joined(blocks: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Concatenate blocks; an array of `shape` if there are none."""
    return np.concatenate(blocks) if blocks else np.empty(shape, np.float32)
