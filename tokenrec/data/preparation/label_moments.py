"""Describe the labels of tasks of numbers, block by block: mean, deviation and range.

The losses of such tasks are computed on standardised labels, and constant baselines
predict the mean (tokenrec/losses.py, tokenrec/metrics/real.py).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tokenrec.data.preparation.exact_sums import ExactSums
from tokenrec.data.schema import Schema


class LabelMoments:
    """Moments of the labels that training learns from, of each task of numbers."""

    def __init__(self, schema: Schema) -> None:
        tasks = schema.real_tasks
        self._sums = {task.name: ExactSums() for task in tasks}
        self._least = {task.name: math.inf for task in tasks}
        self._most = {task.name: -math.inf for task in tasks}

    def add(self, targets: np.ndarray) -> None:
        """Add labels `[n, V] float32` of the V tasks; NaN is unknown."""
        for column, name in enumerate(self._sums):
            known = targets[:, column]
            known = known[~np.isnan(known)]
            if len(known):
                self._sums[name].add(known)
                self._least[name] = min(self._least[name], float(known.min()))
                self._most[name] = max(self._most[name], float(known.max()))

    def merge(self, other: LabelMoments) -> None:
        """Add the labels of `other`, which has the same tasks."""
        for name, sums in other._sums.items():
            self._sums[name].merge(sums)
            self._least[name] = min(self._least[name], other._least[name])
            self._most[name] = max(self._most[name], other._most[name])

    def fill_in(self, schema: Schema) -> Schema:
        """Return the schema with the moments of its tasks.

        The deviation of a constant label is 1. A task without a known label keeps what
        it has.
        """
        tasks = []
        for task in schema.tasks:
            sums = self._sums.get(task.name)
            if sums is not None and sums.count:
                mean, variance = sums.mean_and_variance()
                deviation = math.sqrt(variance)
                # No more than the float32 rounding of a constant.
                if deviation <= 1e-7 * abs(mean):
                    deviation = 1.0
                task = dataclasses.replace(
                    task,
                    mean=mean,
                    deviation=deviation,
                    least=self._least[task.name],
                    most=self._most[task.name],
                )
            tasks.append(task)
        return dataclasses.replace(schema, tasks=tuple(tasks))
