"""What a model has to beat: popularity, the item's rate of positives, how often the user met the item before, and a
logistic regression on smoothed rates.

Each of the first three is one number per row, turned into a probability by a one-dimensional logistic regression on the
training rows, so that log loss is defined beside AUC. A training row's own label is left out of its own count.

The last one sees, for the user, the item, the two together, and each attribute of item and context, how many rows of
`train` before a row's time had the same, and their rate of positives. It is earlier rows that count for training rows
too: a rate over all others of a small group is high where the own label is low, and a regression would learn that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.past_counts import PastCounts
from tokenrec.data.schema import Feature, columns

PRIOR_ROWS = 20.0  # weight of the overall rate in the smoothed rate of an item, as a number of rows
NEWTON_STEPS = 50
LONGEST_STEP = 10.0  # of a weight, in one of them


def popularity_scores(
    train: InteractionLog, log: InteractionLog, task: int
) -> np.ndarray:
    """Positives of each row's item among the rows of `train` that may be learned from: `[R] float64`."""
    positives, _ = _item_counts(train, task, _items(train, log))
    return positives[log.item]


def rate_scores(train: InteractionLog, log: InteractionLog, task: int) -> np.ndarray:
    """Share of positives of each row's item in `train`, smoothed towards the overall share: `[R] float64`."""
    positives, known = _item_counts(train, task, _items(train, log))
    return _smooth(positives, known)[log.item]


def repeat_scores(log: InteractionLog) -> np.ndarray:
    """How often each row's item is among the strictly earlier events of its chunk: `[R] float64`.

    A chunk that continues a user begins with the last events before it (`prepare`'s overlap, 1024 unless told
    otherwise); repeats further back than these are not counted.
    """
    chunk = np.repeat(np.arange(log.num_chunks), np.diff(log.start))
    key = chunk * (int(log.item.max(initial=0)) + 1) + log.item
    event = log.flags & EVENT > 0
    return (
        PastCounts(key[event], log.time[event]).before(key, log.time).astype(np.float64)
    )


def fit_probability(
    scores: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fits `P(label = 1) = sigmoid(a + b log(1 + score))` by Newton's method.

    `scores: [N] >= 0`, `labels: [N]` of 0 and 1. The slope carries a penalty that is felt only where the labels leave
    it undetermined; labels of one class, or no labels, give their smoothed share everywhere.

    >>> probability = fit_probability(np.array([0, 0, 0, 0, 9, 9, 9, 9]), np.array([0, 0, 0, 1, 0, 1, 1, 1]))
    >>> probability(np.array([0, 9])).round(3).tolist()
    [0.25, 0.75]
    """
    probability = fit_logistic(
        np.log1p(np.asarray(scores, np.float64))[:, None], labels
    )
    return lambda new_scores: probability(
        np.log1p(np.asarray(new_scores, np.float64))[:, None]
    )


def fit_logistic(
    x: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fits `P(label = 1) = sigmoid(a + b x)` by Newton's method, with the penalty that `fit_probability` describes.

    `x: [N, F] float64`, `labels: [N]` of 0 and 1; the result maps `[M, F]` to `[M]`.
    """
    positives, (rows, features) = float(labels.sum()), x.shape
    share = (positives + 0.5) / (rows + 1)
    weights = np.array([np.log(share / (1 - share)), *np.zeros(features)])
    center, spread = (
        (x.mean(axis=0), x.std(axis=0))
        if rows
        else (np.zeros(features), np.zeros(features))
    )
    scale = np.where(spread > 0, spread, 1.0)

    def inputs(x: np.ndarray) -> np.ndarray:
        # A feature that is the same in all rows tells nothing, whatever it is later.
        return np.concatenate(
            [np.ones((len(x), 1)), np.where(spread > 0, (x - center) / scale, 0)],
            axis=1,
        )

    if 0 < positives < rows and spread.any():
        # The intercept's penalty too: where labels can be told apart wholly, nothing else holds the weights.
        z, penalty = inputs(x), np.full(features + 1, 1e-6)
        for _ in range(NEWTON_STEPS):
            p = _sigmoid(z @ weights)
            gradient = z.T @ (p - labels) + penalty * weights
            step = np.linalg.solve(
                (z.T * (p * (1 - p))) @ z + np.diag(penalty), gradient
            )
            # Where every p is nearly 0 or 1 the curvature is almost nothing, and a whole step leads anywhere.
            weights -= step * min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-30))
            if np.abs(step).max() < 1e-9:
                break
    return lambda new: _sigmoid(inputs(np.asarray(new, np.float64)) @ weights)


def past_rates(
    train: InteractionLog,
    keys: np.ndarray,
    task: int,
    log: InteractionLog,
    wanted: np.ndarray,
) -> np.ndarray:
    """Rate of positives, in log-odds and smoothed towards the overall one, and `log(1 + n)` of the n known labels.

    They count rows of `train` that may be learned from, have a row's key, and are strictly earlier: `[R, 2] float64`.

    Args:
      keys: `[rows of train]` integers; wanted: `[R]`, those of the rows of `log`.
    """
    learned = _learned(train, task)
    key, time, positive = (
        keys[learned],
        train.time[learned],
        train.labels[learned, task] > 0,
    )
    known = PastCounts(key, time).before(wanted, log.time)
    positives = PastCounts(key[positive], time[positive]).before(wanted, log.time)
    share = (positive.sum() + 0.5) / (len(positive) + 1)
    rate = (positives + PRIOR_ROWS * share) / (known + PRIOR_ROWS)
    return np.stack([np.log(rate / (1 - rate)), np.log1p(known)], axis=1)


def row_keys(
    log: InteractionLog,
    users: np.ndarray,
    attributes: np.ndarray | None,
    context: Sequence[int],
) -> list[np.ndarray]:
    """What rows are alike in: user, item, both, attributes of the item, context; `[R] int64` each.

    `users`: all ids of users, ascending; the other arguments as in `baselines`.
    """
    user = np.repeat(np.searchsorted(users, log.user_id), np.diff(log.start))
    item = log.item.astype(np.int64)
    keys = [user, item, user << 32 | item]
    if attributes is not None:
        keys += list(attributes[item].T.astype(np.int64))
    return keys + [log.row_ids[:, column].astype(np.int64) for column in context]


def baselines(
    train: InteractionLog,
    log: InteractionLog,
    tasks: Sequence[int],
    *,
    attributes: np.ndarray | None = None,
    context: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """Probabilities of the scored rows of `log`, in row order: name -> `[rows scored, K] float64`.

    "popularity" counts an item's positives in `train`, "item_rate" is their smoothed share among its rows, and
    "repeat" counts the item among the user's earlier events (for purchases: how often it was bought before).
    "rates" is the logistic regression on smoothed rates.

    Args:
      train: the training split, which the counts and the regressions come from.
      log: the split to score, on the same catalogue.
      tasks: columns of `InteractionLog.labels`, one for each column of the result.
      attributes: `[items, n] int32`, what items have in common, for "rates"; context: columns of
        `InteractionLog.row_ids`.
    """
    scored = log.flags & SCORED > 0
    users = np.unique(np.concatenate([train.user_id, log.user_id]))
    keys, wanted = (row_keys(one, users, attributes, context) for one in (train, log))
    repeats, repeats_train = repeat_scores(log)[scored], repeat_scores(train)
    result = {
        name: np.empty((int(scored.sum()), len(tasks)))
        for name in ("popularity", "item_rate", "repeat", "rates")
    }
    for column, task in enumerate(tasks):
        learned = _learned(train, task)
        item, label = (
            train.item[learned],
            train.labels[learned, task].astype(np.float64),
        )
        positives, known = _item_counts(train, task, _items(train, log))
        others = positives[item] - label
        share = float(label.mean()) if len(label) else 0.0
        for name, fitted_on, scores in (
            ("popularity", others, positives[log.item][scored]),
            (
                "item_rate",
                _smooth(others, known[item] - 1, share),
                _smooth(positives, known)[log.item][scored],
            ),
            ("repeat", repeats_train[learned], repeats),
        ):
            result[name][:, column] = fit_probability(fitted_on, label)(scores)
        of_train, of_log = (
            np.concatenate(
                [
                    past_rates(train, key, task, one, at)
                    for key, at in zip(keys, some, strict=True)
                ],
                axis=1,
            )
            for one, some in ((train, keys), (log, wanted))
        )
        result["rates"][:, column] = fit_logistic(of_train[learned], label)(
            of_log[scored]
        )
    return result


def baselines_of(
    dataset: Dataset, split: str, tasks: Sequence[str]
) -> dict[str, np.ndarray]:
    """`baselines` of the scored rows of a split, for tasks by name; alike are items and contexts of one category."""
    names = [task.name for task in dataset.schema.tasks]
    of_item, context = (
        _categorical(dataset.schema.group(group)) for group in ("catalogue", "row")
    )
    return baselines(
        dataset.load("train"),
        dataset.load(split),
        [names.index(task) for task in tasks],
        attributes=dataset.catalogue.ids[:, of_item],
        context=context,
    )


def goal_counts(train: InteractionLog, items: int, task: int | None) -> np.ndarray:
    """How often each item is what a retrieval run learns to say, a positive of `task` if there is one: `[items]`."""
    learned = (
        (train.flags & LEARNED > 0)
        if task is None
        else _learned(train, task) & (train.labels[:, task] > 0)
    )
    return np.bincount(train.item[learned], minlength=items).astype(np.float32)


def _categorical(features: Sequence[Feature]) -> list[int]:
    """Columns of an `ids` matrix with one value per row."""
    place = columns(features)
    return [
        place.ids[feature.name][0]
        for feature in features
        if feature.kind == "categorical"
    ]


def _learned(log: InteractionLog, task: int) -> np.ndarray:
    return (log.flags & LEARNED > 0) & (log.labels[:, task] >= 0)


def _items(train: InteractionLog, log: InteractionLog) -> int:
    return int(max(train.item.max(initial=-1), log.item.max(initial=-1))) + 1


def _item_counts(
    train: InteractionLog, task: int, items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positives and known labels of each item: `[items] float64` both."""
    learned = _learned(train, task)
    item = train.item[learned]
    positives = np.bincount(item, weights=train.labels[learned, task], minlength=items)
    return positives, np.bincount(item, minlength=items).astype(np.float64)


def _smooth(
    positives: np.ndarray, known: np.ndarray, share: float | None = None
) -> np.ndarray:
    """Shares pulled towards `share`, by default the overall one."""
    if share is None:
        share = float(positives.sum() / max(known.sum(), 1.0))
    return (positives + PRIOR_ROWS * share) / (known + PRIOR_ROWS)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
