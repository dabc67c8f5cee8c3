"""Find features that predict a label by themselves, which is how leaks look.

A watch time, a rating or the number of the order, declared as a feature of the row that
they follow from, tells the label of that row. A model trained on it is excellent on
every split and useless for rows to come. No rule knows what a column means, but hardly
any signal of the past predicts a label alone with an AUC above `LEAK_AUC`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED, InteractionLog
from tokenrec.data.schema import Feature, Schema, columns

LEAK_AUC = 0.98
SAMPLED_ROWS = 50_000
# With fewer of either class an AUC this high may be chance.
_FEWEST = 30


class Leak(NamedTuple):
    """A feature that tells a label.

    Attributes:
      feature: name of the feature.
      task: name of the task.
      auc: AUC of the feature alone, of training rows, turned so that it is at least 0.5.
    """

    feature: str
    task: str
    auc: float


def find_leaks(dataset: Dataset, rows: int = SAMPLED_ROWS) -> list[Leak]:
    """Find features that predict a label of training rows by themselves.

    Features of actions are left out, because a model sees them for earlier events only.

    Args:
      dataset: a prepared data set.
      rows: log rows to look at; whole chunks from the start of the split.

    Returns:
      The leaks, the strongest first; empty if there are too few rows of a class.
    """
    if "train" not in dataset.splits:
        return []
    ends = np.cumsum(dataset.chunk_lengths("train"))
    chunks = int(np.searchsorted(ends, rows)) + 1
    log = dataset.load("train", 0, min(chunks, len(ends)))
    scored = np.flatnonzero(log.flags & SCORED)
    leaks = []
    for k, task in enumerate(dataset.schema.tasks):
        known = scored[log.labels[scored, k] >= 0]
        labels = _upper_labels(log, dataset.schema, k, known)
        if min(labels.sum(), (~labels).sum()) < _FEWEST:
            continue
        for feature, ids, dense in _features(dataset, log, known):
            auc = max(_scores_auc(s, labels) for s in _scores(ids, dense, labels))
            if auc > LEAK_AUC:
                leaks.append(Leak(feature.name, task.name, auc))
    return sorted(leaks, key=lambda leak: -leak.auc)


def _upper_labels(
    log: InteractionLog, schema: Schema, k: int, rows: np.ndarray
) -> np.ndarray:
    """Whether labels of task k are 1, or in the upper half: `[n] bool`.

    What tells a number or a class tells on which side of the middle it is.
    """
    task = schema.tasks[k]
    if task.kind == "real" and len(rows):
        assert log.targets is not None
        values = log.targets[rows, schema.real_tasks.index(task)]
        return values > np.median(values)
    if task.kind == "classes":
        return 2 * log.labels[rows, k].astype(np.int64) >= task.width
    return log.labels[rows, k] == 1


def _features(
    dataset: Dataset, log: InteractionLog, rows: np.ndarray
) -> list[tuple[Feature, np.ndarray | None, np.ndarray | None]]:
    """List features of one value, and their ids or numbers, `[n]`, in these rows."""
    chunk = np.searchsorted(log.start, rows, side="right") - 1
    item = log.item[rows]
    catalogue = dataset.catalogue
    matrices = {
        "user": (log.user_ids, log.user_dense, chunk),
        "catalogue": (catalogue.ids, catalogue.dense, item),
        "row": (log.row_ids, log.row_dense, rows),
    }
    found: list[tuple[Feature, np.ndarray | None, np.ndarray | None]] = []
    for group, (ids, dense, index) in matrices.items():
        features = dataset.schema.group(group)  # type: ignore[arg-type]
        place = columns(features)
        for feature in features:
            if feature.kind == "categorical":
                values = ids[index, place.ids[feature.name][0]]
                found.append((feature, values, None))
            elif feature.kind == "dense":
                values = dense[index, place.dense[feature.name][0]]
                found.append((feature, None, values))
    return found


def _scores(
    ids: np.ndarray | None, dense: np.ndarray | None, labels: np.ndarray
) -> list[np.ndarray]:
    """Make scores `[n]` of a feature's values, none of which saw the label of its row."""
    if dense is not None:
        missing = np.isnan(dense)
        # A value that is there for one class alone tells as much as its size.
        return [missing.astype(float), np.where(missing, -np.inf, dense)]
    assert ids is not None
    # The share of positives of each id, counted in the other half of the rows.
    half = np.arange(len(ids)) % 2
    scores = np.empty(len(ids))
    for own in (0, 1):
        other = half != own
        known = np.bincount(ids[other], minlength=int(ids.max()) + 1)
        positive = np.bincount(ids[other], labels[other], minlength=len(known))
        share = (positive + labels.mean()) / (known + 1)
        scores[half == own] = share[ids[half == own]]
    return [scores]


def _scores_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUC of scores, ties counted half, turned so that it is at least 0.5."""
    _, rank, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    positives = int(labels.sum())
    total = middle[rank.reshape(-1)][labels].sum() - positives * (positives + 1) / 2
    auc = total / (positives * (len(labels) - positives))
    return float(max(auc, 1 - auc))
