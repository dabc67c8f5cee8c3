"""The baseline "lightgbm": gradient-boosted trees on the features of single log rows.

LightGBM (Ke et al., NeurIPS 2017) learns each task on its own, from the scored rows of
the training split, with the features of `row_features.py`. The last tenth of these rows
in time decides after how many trees to stop, and then as many are fitted to all rows;
no row of the split that is scored is seen. Ids are numbers to the trees: with
LightGBM's own splits on categories the sum of the log losses of two tasks of
KuaiRand-Pure on the last tenth of train was higher, 1.1243 against 1.1233. Seed and
parameters are fixed and the training is deterministic. The library is the extra
`baselines`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.evaluation.row_features import read_row_features

LIGHTGBM = "lightgbm"
INSTALL = 'pip install ".[baselines]"'

# Training rows at most, the latest ones, and rows that are scored at a time: with 100
# features a matrix of them takes 400 MB.
MOST_ROWS = 1_000_000
# Share of the training rows, the last ones in time, on which the number of trees is
# chosen.
STOP_SHARE = 0.1
MOST_TREES = 2_000
PATIENCE = 50  # trees without a better log loss

_PARAMETERS: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "seed": 0,
    "deterministic": True,
    "force_row_wise": True,
    # Its threads wait actively for each other: with two of them on two busy cores a tree
    # took 14 times as long as with one.
    "num_threads": 1,
    "verbosity": -1,
}


def has_lightgbm() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec(LIGHTGBM) is not None


def lightgbm_scores(
    dataset: Dataset,
    split: str,
    tasks: tuple[str, ...],
    *,
    freeze_at: int | None = None,
) -> np.ndarray:
    """Train on the training split, and score a split: `BoostedTrees.scores`."""
    return BoostedTrees(dataset, tasks).scores(split, freeze_at=freeze_at)


class BoostedTrees:
    """The trees of K tasks, trained on the training split of a data set.

    Args:
      dataset: the prepared data set, without the features that the run excludes.
      tasks: K names.
    """

    def __init__(self, dataset: Dataset, tasks: Sequence[str]) -> None:
        names = [task.name for task in dataset.schema.tasks]
        self._dataset = dataset
        self._places = tuple(names.index(task) for task in tasks)
        # The latest scored rows of the training split, in the order of time.
        train = dataset.load("train")
        rows = np.flatnonzero(train.flags & SCORED)
        rows = rows[np.argsort(train.time[rows], kind="stable")][-MOST_ROWS:]
        features = read_row_features(dataset, train, train, self._places)
        x, time = features.matrix(rows), train.time[rows]
        self._models = [
            _Model(x, train.labels[rows, task], time) for task in self._places
        ]

    def scores(self, split: str, *, freeze_at: int | None = None) -> np.ndarray:
        """Score the scored rows of a split, whose labels are not read.

        Args:
          split: split to score.
          freeze_at: milliseconds; past rates and repeats of the rows that are scored
            count what is earlier than this time, and their statistics of the past are
            those of the start of the split.

        Returns:
          `[rows scored, K] float64`, in row order. A task without labels of both
          classes has its smoothed share everywhere.
        """
        dataset = self._dataset
        log = dataset.load(split, frozen=freeze_at is not None)
        if freeze_at is not None:
            log = dataclasses.replace(log, time=np.minimum(log.time, freeze_at))
        features = read_row_features(dataset, dataset.load("train"), log, self._places)
        scored = np.flatnonzero(log.flags & SCORED)
        result = np.empty((len(scored), len(self._models)))
        # Some rows at a time.
        for start in range(0, len(scored), MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            x = features.matrix(scored[part])
            for column, model in enumerate(self._models):
                result[part, column] = model.probability(x)
        return result


class _Model:
    """The trees of one task.

    Args:
      x: `[n, F] float32`, in the order of time.
      labels: `[n] int8`, -1 where unknown.
      time: `[n] int64`, ascending.
    """

    def __init__(self, x: np.ndarray, labels: np.ndarray, time: np.ndarray) -> None:
        known = labels >= 0
        if not known.all():
            x, labels, time = x[known], labels[known], time[known]
        self._share = (float(labels.sum()) + 0.5) / (len(labels) + 1)
        self._trees = None
        if 0 < labels.sum() < len(labels):
            self._trees = _fit(x, labels, time)

    def probability(self, x: np.ndarray) -> np.ndarray:
        """Probabilities `[m] float64` of rows with features `x: [m, F]`."""
        if self._trees is None:
            return np.full(len(x), self._share)
        return self._trees.predict(x)


def _fit(x: np.ndarray, labels: np.ndarray, time: np.ndarray) -> Any:
    """Choose the number of trees on the last rows, and fit so many to all rows."""
    import lightgbm

    def data(part: slice, reference: Any = None) -> Any:
        return lightgbm.Dataset(x[part], labels[part], reference=reference)

    # Rows of one time are on one side.
    cut = int(np.searchsorted(time, time[int(len(time) * (1 - STOP_SHARE))]))
    trees = 100
    if 0 < labels[:cut].sum() < cut:
        early = data(slice(0, cut))
        stopped = lightgbm.train(
            _PARAMETERS,
            early,
            MOST_TREES,
            valid_sets=[data(slice(cut, None), early)],
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )
        trees = stopped.best_iteration
    return lightgbm.train(_PARAMETERS, data(slice(None)), trees)
