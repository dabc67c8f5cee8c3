"""Ranking baselines that need no model: what a trained model should beat.

Each gives a probability for every scored log row of a split, from counts of the
training split:

- "popularity": positives c of the item in `train`; `P = sigmoid(a + b log(1 + c))`.
- "item_rate": share of positives among the item's rows in `train`, smoothed towards the
  overall share q as `(c + m q) / (n + m)` with m = 20 rows; the same regression.
- "repeat": number of the user's earlier events with the item (for purchases: how often
  it was bought before); the same regression.
- "rates": a logistic regression on past rates. For the user, the item, the pair of
  both, and each attribute of item and context, it sees the smoothed rate of positives,
  as log-odds, among the rows of `train` that are strictly earlier and share the value,
  and the logarithm of their number.

a and b are fitted on the training rows (`logistic_regression.py`), so that log loss is
defined beside AUC. A training row must not see its own label there: "popularity" and
"item_rate" leave it out of its own count, and "rates" counts earlier rows only, for
training rows too. (A rate over all other rows would not do: in a small group it is high
exactly where the own label is 0, and the regression would learn that.)

R log rows, K tasks. All counts are exact; memory is a few arrays of R integers per key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.past_counts import PastCounts
from tokenrec.data.schema import Feature, columns
from tokenrec.evaluation.logistic_regression import fit_logistic, fit_probability

# Weight of the overall rate in a smoothed rate, as a number of log rows.
PRIOR_ROWS = 20.0


def popularity_scores(
    train: InteractionLog, log: InteractionLog, task: int
) -> np.ndarray:
    """Count the positives of each row's item in the training split.

    Args:
      train: training split; only rows that may be learned from count.
      log: split to score.
      task: column of `InteractionLog.labels`.

    Returns:
      `[R] float64`, for each row of `log`.
    """
    positives, _ = _item_counts(train, task, _item_count(train, log))
    return positives[log.item]


def rate_scores(train: InteractionLog, log: InteractionLog, task: int) -> np.ndarray:
    """Compute the smoothed share of positives of each row's item in the training split.

    Args:
      train: training split; only rows that may be learned from count.
      log: split to score.
      task: column of `InteractionLog.labels`.

    Returns:
      `[R] float64`, for each row of `log`.
    """
    positives, known = _item_counts(train, task, _item_count(train, log))
    return _smooth(positives, known)[log.item]


def repeat_scores(log: InteractionLog) -> np.ndarray:
    """Count each row's item among the strictly earlier events of its chunk.

    A chunk that continues a user begins with the last events before it (the overlap of
    `prepare`, 1024 by default); repeats further back than these are not counted.

    Returns:
      `[R] float64`, for each row of `log`.
    """
    chunk = np.repeat(np.arange(log.num_chunks), np.diff(log.start))
    # One integer per pair of chunk and item.
    key = chunk * (int(log.item.max(initial=0)) + 1) + log.item
    event = log.flags & EVENT > 0
    earlier = PastCounts(key[event], log.time[event])
    return earlier.before(key, log.time).astype(np.float64)


def past_rates(
    train: InteractionLog,
    keys: np.ndarray,
    task: int,
    log: InteractionLog,
    log_keys: np.ndarray,
) -> np.ndarray:
    """Compute the rate of positives among earlier training rows with the same key.

    Rows of `train` count that may be learned from, have the row's key, and are strictly
    earlier.

    Args:
      train: training split.
      keys: `[rows of train] int64`.
      task: column of `InteractionLog.labels`.
      log: split to score.
      log_keys: `[R] int64`, keys of the rows of `log`.

    Returns:
      `[R, 2] float64`: the log-odds of the rate, smoothed towards the overall rate, and
      `log(1 + n)` of the n known labels that it is of.
    """
    learned = _learned(train, task)
    key, time = keys[learned], train.time[learned]
    positive = train.labels[learned, task] > 0
    known = PastCounts(key, time).before(log_keys, log.time)
    positives = PastCounts(key[positive], time[positive]).before(log_keys, log.time)
    share = (positive.sum() + 0.5) / (len(positive) + 1)
    rate = (positives + PRIOR_ROWS * share) / (known + PRIOR_ROWS)
    return np.stack([np.log(rate / (1 - rate)), np.log1p(known)], axis=1)


def row_keys(
    log: InteractionLog,
    users: np.ndarray,
    attributes: np.ndarray | None,
    context: Sequence[int],
) -> list[np.ndarray]:
    """List the keys by which log rows are grouped for "rates".

    Args:
      log: a split of R rows.
      users: `[U]`, all ids of users, ascending.
      attributes: `[items, n] int32`, as in `baselines`.
      context: columns of `InteractionLog.row_ids`.

    Returns:
      `[R] int64` each: user, item, both, every attribute of the item, every context.
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
    """Compute the probabilities of all baselines for the scored rows of a split.

    Labels of `log` are not read.

    Args:
      train: training split, from which the counts and the regressions come.
      log: split to score, on the same catalogue.
      tasks: columns of `InteractionLog.labels`, one for each column of the result.
      attributes: `[items, n] int32`, attributes that items share, for "rates".
      context: columns of `InteractionLog.row_ids`, for "rates".

    Returns:
      Name of the baseline -> `[rows scored, K] float64`, in row order.
    """
    scored = log.flags & SCORED > 0
    users = np.unique(np.concatenate([train.user_id, log.user_id]))
    train_keys = row_keys(train, users, attributes, context)
    log_keys = row_keys(log, users, attributes, context)
    log_repeats, train_repeats = repeat_scores(log)[scored], repeat_scores(train)
    names = ("popularity", "item_rate", "repeat", "rates")
    shape = (int(scored.sum()), len(tasks))
    result = {name: np.empty(shape) for name in names}
    for column, task in enumerate(tasks):
        learned = _learned(train, task)
        item = train.item[learned]
        label = train.labels[learned, task].astype(np.float64)
        positives, known = _item_counts(train, task, _item_count(train, log))
        # 1. Baselines of one count. A training row is left out of its own count.
        other_positives = positives[item] - label
        share = float(label.mean()) if len(label) else 0.0
        one_count = (
            (
                "popularity",
                other_positives,
                popularity_scores(train, log, task)[scored],
            ),
            (
                "item_rate",
                _smooth(other_positives, known[item] - 1, share),
                rate_scores(train, log, task)[scored],
            ),
            ("repeat", train_repeats[learned], log_repeats),
        )
        for name, train_scores, log_scores in one_count:
            probability = fit_probability(train_scores, label)
            result[name][:, column] = probability(log_scores)
        # 2. The regression on past rates, two features for each key.
        train_rates = _all_past_rates(train, train_keys, task, train, train_keys)
        log_rates = _all_past_rates(train, train_keys, task, log, log_keys)
        probability = fit_logistic(train_rates[learned], label)
        result["rates"][:, column] = probability(log_rates[scored])
    return result


def split_baselines(
    dataset: Dataset,
    split: str,
    tasks: Sequence[str],
    *,
    freeze_at: int | None = None,
) -> dict[str, np.ndarray]:
    """Compute `baselines` for the scored rows of a split of a data set.

    The attributes of items and contexts are the categorical features of the schema.

    Args:
      dataset: the prepared data set.
      split: split to score.
      tasks: K names.
      freeze_at: milliseconds; "repeat" and "rates" count what is earlier than this
        time. Totals and regressions of the training split are what a baseline has
        learned, and stay.

    Returns:
      Name of the baseline -> `[rows scored, K] float64`, in row order.
    """
    log = dataset.load(split)
    if freeze_at is not None:
        # What is strictly earlier than a row counts: later rows move to the time at
        # which nothing more counts.
        log = dataclasses.replace(log, time=np.minimum(log.time, freeze_at))
    task_names = [task.name for task in dataset.schema.tasks]
    item_columns = _categorical_columns(dataset.schema.group("catalogue"))
    return baselines(
        dataset.load("train"),
        log,
        [task_names.index(task) for task in tasks],
        attributes=dataset.catalogue.ids[:, item_columns],
        context=_categorical_columns(dataset.schema.group("row")),
    )


def goal_counts(train: InteractionLog, items: int, task: int | None) -> np.ndarray:
    """Count how often each item is a goal of a retrieval run in the training split.

    Args:
      train: training split.
      items: number of items V.
      task: column of `InteractionLog.labels`, whose positives are the goals; None: every row that
        may be learned from is a goal.

    Returns:
      `[V] float32`.
    """
    learned = train.flags & LEARNED > 0
    if task is not None:
        learned = _learned(train, task) & (train.labels[:, task] > 0)
    return np.bincount(train.item[learned], minlength=items).astype(np.float32)


def _all_past_rates(
    train: InteractionLog,
    train_keys: Sequence[np.ndarray],
    task: int,
    log: InteractionLog,
    log_keys: Sequence[np.ndarray],
) -> np.ndarray:
    """`past_rates` of every key side by side: `[R, 2 keys]`."""
    pairs = zip(train_keys, log_keys, strict=True)
    rates = [
        past_rates(train, of_train, task, log, of_log) for of_train, of_log in pairs
    ]
    return np.concatenate(rates, axis=1)


def _categorical_columns(features: Sequence[Feature]) -> list[int]:
    """Columns of an `ids` matrix that hold one categorical value each."""
    layout = columns(features)
    return [
        layout.ids[feature.name][0]
        for feature in features
        if feature.kind == "categorical"
    ]


def _learned(log: InteractionLog, task: int) -> np.ndarray:
    """`[R] bool`: the row may be learned from, and its label is known."""
    return (log.flags & LEARNED > 0) & (log.labels[:, task] >= 0)


def _item_count(train: InteractionLog, log: InteractionLog) -> int:
    """One more than the highest item of both splits."""
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
