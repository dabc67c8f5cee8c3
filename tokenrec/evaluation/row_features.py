"""Features of single log rows as one matrix, for baselines that learn from tables.

A row has the values that a model may know of it, and what the other baselines count:

- every categorical feature of user, item and context, as the id of its table;
- every dense feature of the same three, NaN where missing; past statistics that the
  data set was prepared with are among them;
- of each key of `baselines.row_keys` (user, item, both, attributes of item and context)
  and each task: `baselines.past_rates`, the log-odds and the logarithm of the number of
  earlier labels in the training split;
- `log(1 + n)` of the user's n earlier events with the item.

Features of the action are not known before the row. Multi-valued features, semantic ids,
texts and embeddings have no single value, and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.schema import Feature, columns
from tokenrec.evaluation.baselines import past_rates, repeat_scores, row_keys


@dataclasses.dataclass(frozen=True)
class RowFeatures:
    """Feature matrices of the rows of a split. F features.

    Made by `read_row_features`.

    Attributes:
      names: of the F features, the categorical ones first.
    """

    names: tuple[str, ...]
    _dataset: Dataset
    _train: InteractionLog
    _log: InteractionLog
    _tasks: tuple[int, ...]
    _train_keys: list[np.ndarray]
    _keys: list[np.ndarray]
    _repeats: np.ndarray

    def matrix(self, rows: np.ndarray) -> np.ndarray:
        """Features of some log rows.

        Args:
          rows: `[n] int64`, log rows of the split.

        Returns:
          `[n, F] float32`.
        """
        schema, log = self._dataset.schema, self._log
        catalogue, item = self._dataset.catalogue, log.item[rows]
        chunk = np.searchsorted(log.start, rows, side="right") - 1
        ids, dense = [], []
        for features, id_matrix, dense_matrix, at in (
            (schema.group("user"), log.user_ids, log.user_dense, chunk),
            (schema.group("catalogue"), catalogue.ids, catalogue.dense, item),
            (schema.group("row"), log.row_ids, log.row_dense, rows),
        ):
            categorical, numbers = _single_columns(features)
            ids.append(id_matrix[at][:, list(categorical.values())])
            dense.append(dense_matrix[at][:, list(numbers.values())])
        return np.concatenate(
            [*ids, *dense, *self._counted(rows)], axis=1, dtype=np.float32
        )

    def _counted(self, rows: np.ndarray) -> list[np.ndarray]:
        """Past rates of every key and task, and repeats."""
        # `past_rates` reads the times of the rows alone.
        at = dataclasses.replace(self._log, time=self._log.time[rows])
        rates = [
            past_rates(self._train, of_train, task, at, of_log[rows])
            for of_train, of_log in zip(self._train_keys, self._keys, strict=True)
            for task in self._tasks
        ]
        return [*rates, np.log1p(self._repeats[rows])[:, None]]


def read_row_features(
    dataset: Dataset, train: InteractionLog, log: InteractionLog, tasks: Sequence[int]
) -> RowFeatures:
    """Make the features of the rows of a split.

    Args:
      dataset: the prepared data set, without the features that the run excludes.
      train: its training split, which is counted.
      log: the split; the labels are not read unless it is `train`.
      tasks: columns of `InteractionLog.labels` whose rates are features.
    """
    schema = dataset.schema
    users = np.unique(np.concatenate([train.user_id, log.user_id]))
    item_columns, _ = _single_columns(schema.group("catalogue"))
    context_columns, _ = _single_columns(schema.group("row"))
    attributes = dataset.catalogue.ids[:, list(item_columns.values())]
    context = list(context_columns.values())
    groups = [_single_columns(schema.group(g)) for g in ("user", "catalogue", "row")]
    categorical = [name for ids, _ in groups for name in ids]
    dense = [name for _, numbers in groups for name in numbers]
    keys = ["user", "item", "user and item", *item_columns, *context_columns]
    rates = [
        f"{kind} of {schema.tasks[task].name}, {key}"
        for key in keys
        for task in tasks
        for kind in ("log-odds", "log count")
    ]
    return RowFeatures(
        names=(*categorical, *dense, *rates, "repeats"),
        _dataset=dataset,
        _train=train,
        _log=log,
        _tasks=tuple(tasks),
        _train_keys=row_keys(train, users, attributes, context),
        _keys=row_keys(log, users, attributes, context),
        _repeats=repeat_scores(log),
    )


def _single_columns(
    features: Sequence[Feature],
) -> tuple[dict[str, int], dict[str, int]]:
    """Columns of categorical features in `ids`, and of dense ones in `dense`."""
    layout = columns(features)
    categorical = {
        feature.name: layout.ids[feature.name][0]
        for feature in features
        if feature.kind == "categorical"
    }
    dense = {
        feature.name: layout.dense[feature.name][0]
        for feature in features
        if feature.kind == "dense"
    }
    return categorical, dense
