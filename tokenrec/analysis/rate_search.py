"""The learning-rate search of a study: the chosen rates, and the values behind them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenrec.analysis.study_metrics import (
    MetricKey,
    Spread,
    headline_metric,
    higher_is_better,
    ordered_names,
    spread,
)
from tokenrec.analysis.study_rows import MACRO, Result

_TUNING_SPLIT = "valid"


class RateSearch(NamedTuple):
    """Values of the search.

    Attributes:
      key: the metric that rates are compared by.
      seeds: seeds of the runs that are compared.
      values: model -> learning rate -> mean and deviation over these seeds.
    """

    key: MetricKey
    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[float, Spread]]

    def at_edge(self, model: str, rate: float) -> bool:
        """Whether a better rate may lie outside of those that were tried."""
        rates = self.values[model]
        return len(rates) > 1 and rate in (min(rates), max(rates))


def chosen_rates(results: Sequence[Result]) -> dict[str, float]:
    """Find the learning rate that each trained model was given.

    The final runs of a model have more seeds than its search, so the chosen rate is the
    one with most seeds; among rates with equally many, the one with the best value on
    valid.
    """
    key, compared = _compared_results(results)
    seeds: dict[str, dict[float, set[int]]] = {}
    for row in results:
        if row.learning_rate is not None:
            by_rate = seeds.setdefault(row.model, {})
            by_rate.setdefault(row.learning_rate, set()).add(row.seed)

    def merit(model: str, rate: float) -> tuple[int, float]:
        """Number of seeds, then the mean, so that the larger merit is the better."""
        values = [
            row.value
            for row in compared
            if (row.model, row.learning_rate) == (model, rate)
        ]
        mean = spread(values).mean
        if mean is None:
            value = -math.inf
        elif higher_is_better(key.metric):
            value = mean
        else:
            value = -mean
        return len(seeds[model][rate]), value

    # Sorted: of equal merits the lowest rate wins.
    return {
        model: max(sorted(rates), key=functools.partial(merit, model))
        for model, rates in seeds.items()
    }


def search_of(results: Sequence[Result]) -> RateSearch:
    """Collect the values of the search, for comparison on equal terms.

    Only seeds that every model has at every rate are included: the chosen rates have
    more seeds than the others.
    """
    key, compared = _compared_results(results)
    by_model: dict[str, dict[float, dict[int, float | None]]] = {}
    for row in compared:
        if row.learning_rate is not None:
            by_rate = by_model.setdefault(row.model, {})
            by_rate.setdefault(row.learning_rate, {})[row.seed] = row.value
    # Seeds that every model has at every rate: those of the search.
    shared = set.intersection(
        *(set(by_seed) for by_rate in by_model.values() for by_seed in by_rate.values())
    )
    values = {
        model: {
            rate: spread([by_seed[seed] for seed in shared])
            for rate, by_seed in by_rate.items()
        }
        for model, by_rate in by_model.items()
    }
    return RateSearch(key, tuple(sorted(shared)), values)


def _compared_results(results: Sequence[Result]) -> tuple[MetricKey, list[Result]]:
    """Select the results of trained models by which learning rates are compared."""
    # Baselines have no learning rate. Results of one split, task and metric remain.
    rows = [row for row in results if row.learning_rate is not None]
    split = ordered_names((row.split for row in rows), (_TUNING_SPLIT,))[0]
    rows = [row for row in rows if row.split == split]
    metric = headline_metric(rows)
    tasks = (row.task for row in rows if row.metric == metric)
    task = ordered_names(tasks, (MACRO,))[0]
    selected = [row for row in rows if (row.task, row.metric) == (task, metric)]
    return MetricKey(split, task, metric), selected
