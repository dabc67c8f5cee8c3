"""What a model has to beat: popularity, the item's rate of positives, and how often the user met the item before.

Each baseline is one number per row, turned into a probability by a one-dimensional logistic regression on the training
rows, so that log loss is defined beside AUC. A training row's own label is left out of its own count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenrec.data.log import EVENT, LEARNED, SCORED, Log
from tokenrec.data.past import PastCounts

PRIOR_ROWS = 20.0  # weight of the overall rate in the smoothed rate of an item, as a number of rows
NEWTON_STEPS = 50


def popularity_scores(train: Log, log: Log, task: int) -> np.ndarray:
    """Positives of each row's item among the rows of `train` that may be learned from: `[R] float64`."""
    positives, _ = _item_counts(train, task, _items(train, log))
    return positives[log.item]


def rate_scores(train: Log, log: Log, task: int) -> np.ndarray:
    """Share of positives of each row's item in `train`, smoothed towards the overall share: `[R] float64`."""
    positives, known = _item_counts(train, task, _items(train, log))
    return _smooth(positives, known)[log.item]


def repeat_scores(log: Log) -> np.ndarray:
    """How often each row's item is among the strictly earlier events of its chunk: `[R] float64`.

    A chunk that continues a user begins with the last events before it (`prepare`'s overlap, 1024 unless told
    otherwise); repeats further back than these are not counted.
    """
    chunk = np.repeat(np.arange(log.chunks), np.diff(log.start))
    key = chunk * (int(log.item.max(initial=0)) + 1) + log.item
    event = log.flags & EVENT > 0
    return PastCounts(key[event], log.time[event]).before(key, log.time).astype(np.float64)


def fit_probability(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits `P(label = 1) = sigmoid(a + b log(1 + score))` by Newton's method.

    `scores: [N] >= 0`, `labels: [N]` of 0 and 1. The slope carries a penalty that is felt only where the labels leave
    it undetermined; labels of one class, or no labels, give their smoothed share everywhere.

    >>> probability = fit_probability(np.array([0, 0, 0, 0, 9, 9, 9, 9]), np.array([0, 0, 0, 1, 0, 1, 1, 1]))
    >>> probability(np.array([0, 9])).round(3).tolist()
    [0.25, 0.75]
    """
    positives, rows = float(labels.sum()), len(labels)
    share = (positives + 0.5) / (rows + 1)
    weights = np.array([np.log(share / (1 - share)), 0.0])
    x = np.log1p(np.asarray(scores, np.float64))
    center, spread = (float(x.mean()), float(x.std())) if rows else (0.0, 0.0)
    if 0 < positives < rows and spread > 0:
        z = (x - center) / spread
        for _ in range(NEWTON_STEPS):
            p = _sigmoid(weights[0] + weights[1] * z)
            error, curve = p - labels, p * (1 - p)
            gradient = np.array([error.sum(), error @ z + 1e-6 * weights[1]])
            cross = curve @ z
            step = np.linalg.solve([[curve.sum(), cross], [cross, curve @ (z * z) + 1e-6]], gradient)
            weights -= step
            if np.abs(step).max() < 1e-9:
                break

    def probability(new_scores: np.ndarray) -> np.ndarray:
        z = (np.log1p(np.asarray(new_scores, np.float64)) - center) / (spread or 1.0)
        return _sigmoid(weights[0] + weights[1] * z)

    return probability


def baselines(train: Log, log: Log, tasks: Sequence[int]) -> dict[str, np.ndarray]:
    """Probabilities of the scored rows of `log`, in row order: name -> `[rows scored, K] float64`.

    "popularity" counts an item's positives in `train`, "item_rate" is their smoothed share among its rows, and
    "repeat" counts the item among the user's earlier events (for purchases: how often it was bought before).

    Args:
      train: the training split, which the counts and the regressions come from.
      log: the split to score, on the same catalogue.
      tasks: columns of `Log.labels`, one for each column of the result.
    """
    scored = log.flags & SCORED > 0
    repeats, repeats_train = repeat_scores(log)[scored], repeat_scores(train)
    result = {name: np.empty((int(scored.sum()), len(tasks))) for name in ("popularity", "item_rate", "repeat")}
    for column, task in enumerate(tasks):
        learned = _learned(train, task)
        item, label = train.item[learned], train.labels[learned, task].astype(np.float64)
        positives, known = _item_counts(train, task, _items(train, log))
        others = positives[item] - label
        share = float(label.mean()) if len(label) else 0.0
        for name, fitted_on, scores in (
            ("popularity", others, positives[log.item][scored]),
            ("item_rate", _smooth(others, known[item] - 1, share), _smooth(positives, known)[log.item][scored]),
            ("repeat", repeats_train[learned], repeats),
        ):
            result[name][:, column] = fit_probability(fitted_on, label)(scores)
    return result


def goal_counts(train: Log, items: int, task: int | None) -> np.ndarray:
    """How often each item is what a retrieval run learns to say, a positive of `task` if there is one: `[items]`."""
    learned = (train.flags & LEARNED > 0) if task is None else _learned(train, task) & (train.labels[:, task] > 0)
    return np.bincount(train.item[learned], minlength=items).astype(np.float32)


def _learned(log: Log, task: int) -> np.ndarray:
    return (log.flags & LEARNED > 0) & (log.labels[:, task] >= 0)


def _items(train: Log, log: Log) -> int:
    return int(max(train.item.max(initial=-1), log.item.max(initial=-1))) + 1


def _item_counts(train: Log, task: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Positives and known labels of each item: `[items] float64` both."""
    learned = _learned(train, task)
    item = train.item[learned]
    positives = np.bincount(item, weights=train.labels[learned, task], minlength=items)
    return positives, np.bincount(item, minlength=items).astype(np.float64)


def _smooth(positives: np.ndarray, known: np.ndarray, share: float | None = None) -> np.ndarray:
    """Shares pulled towards `share`, by default the overall one."""
    if share is None:
        share = float(positives.sum() / max(known.sum(), 1.0))
    return (positives + PRIOR_ROWS * share) / (known + PRIOR_ROWS)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
