"""The best possible metrics on a synthetic log, from its known probabilities.

The labels of a synthetic log are drawn from probabilities that its source computes.
These probabilities are the best predictions that any model can make: their AUC is a
ceiling, and their log loss a floor, which a model can pass only by luck on the drawn
labels.

A prepared data set does not store the probabilities. It stores the parameters of its
source (`counts` of `tokenrec.json`, `SyntheticSource.generator_counts`), from which the
log is generated again, row by row the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED, InteractionLog
from tokenrec.data.source import SPLITS
from tokenrec.data.sources.synthetic import SyntheticSource

CEILING = "ceiling (known probabilities)"


def known_probabilities(
    dataset: Dataset, split: str, log: InteractionLog, tasks: Sequence[str]
) -> np.ndarray | None:
    """Compute the true probabilities of the scored rows of a split.

    Args:
      dataset: a prepared data set.
      split: name of the split.
      log: the rows of the split, R of them scored.
      tasks: K names.

    Returns:
      `[R, K] float64`, in row order; None if the probabilities are not known: the data
      set is not synthetic, was prepared before its parameters were stored, or does not
      hold the rows and labels that the source generates now.
    """
    source = SyntheticSource.from_counts(dataset.metadata.counts)
    if dataset.metadata.source != "synthetic" or source is None:
        return None
    task_names = [task.name for task in source.schema.tasks]
    if not set(tasks) <= set(task_names):
        return None
    columns = [task_names.index(task) for task in tasks]
    # 1. Scored rows on both sides. A user, a time and an item are one scored row.
    scored = np.flatnonzero(log.flags & SCORED)
    stored = (
        np.repeat(log.user_id, np.diff(log.start))[scored],
        log.time[scored],
        dataset.catalogue.item_id[log.item[scored]],
    )
    generated, index = _generated_rows(source, split)
    # 2. In the order of user, time and item, row n of one is row n of the other.
    stored_order = np.lexsort(stored)
    generated_order = np.lexsort(generated)
    for ours, theirs in zip(stored, generated, strict=True):
        if not np.array_equal(ours[stored_order], theirs[generated_order]):
            return None
    index = index[generated_order]
    # 3. The labels too must be those of the source, or the probabilities are of
    # another.
    labels = log.labels[scored][stored_order]
    data_tasks = [task.name for task in dataset.schema.tasks]
    own_columns = [data_tasks.index(task) for task in tasks]
    if not np.array_equal(labels[:, own_columns], source.labels(index)[:, columns]):
        return None
    probabilities = np.empty((len(scored), len(tasks)))
    probabilities[stored_order] = source.probabilities(index)[:, columns]
    return probabilities


def _generated_rows(
    source: SyntheticSource, split: str
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Generate the scored rows of a split.

    Returns:
      User ids, times and item ids, `[R]` each, and `[R] int64`, the number of each row
      in the source's log.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    first = 0
    for batch in source.rows():
        columns = {
            name: batch[name].to_numpy(zero_copy_only=False)
            for name in ("user_id", "time_ms", "item_id", "split", "scored")
        }
        chosen = columns["scored"] & (columns["split"] == SPLITS.index(split))
        number = first + np.flatnonzero(chosen)
        item_id = columns["item_id"][chosen].astype(str)
        parts.append(
            (columns["user_id"][chosen], columns["time_ms"][chosen], item_id, number)
        )
        first += len(batch)
    user_id, time, item_id, number = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    return (user_id, time, item_id), number
