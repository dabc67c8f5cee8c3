"""Metric values of a study: their keys, and mean and deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenrec.analysis.study_rows import Result

_LOWER_IS_BETTER = ("log_loss", "normalized_entropy")
# The metric of the figures and of the choice of learning rates: the first that exists.
_HEADLINES = ("auc", "ndcg@10")


class MetricKey(NamedTuple):
    """Key of a metric value, apart from its model."""

    split: str
    task: str
    metric: str


class Spread(NamedTuple):
    """Mean and sample deviation of a metric over runs.

    Attributes:
      mean: None if the value of a run is undefined.
      deviation: None for a single run as well.
      runs: number of runs.
    """

    mean: float | None
    deviation: float | None
    runs: int


def spread(values: Sequence[float | None]) -> Spread:
    """Compute mean and sample deviation of the values of runs.

    >>> spread([0.25, 0.75])
    Spread(mean=0.5, deviation=0.3535533905932738, runs=2)
    >>> spread([0.5])
    Spread(mean=0.5, deviation=None, runs=1)
    >>> spread([0.5, None])
    Spread(mean=None, deviation=None, runs=2)
    """
    known = [value for value in values if value is not None]
    # A mean over the runs that happen to be defined would not be comparable.
    if not known or len(known) < len(values):
        return Spread(None, None, len(values))
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.mean(known), deviation, len(known))


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of the metric is better."""
    return metric not in _LOWER_IS_BETTER


def headline_metric(results: Sequence[Result]) -> str:
    """Name of the metric that figures show and learning rates are chosen by."""
    return ordered_names((row.metric for row in results), _HEADLINES)[0]


def ordered_names(names: Iterable[str], first: Sequence[str]) -> tuple[str, ...]:
    """List each name once, in order of appearance, but those of `first` before others.

    >>> ordered_names(["train", "valid", "train", "test"], ("test", "dev"))
    ('test', 'train', 'valid')
    """
    distinct = dict.fromkeys(names)
    preferred = (name for name in first if name in distinct)
    return tuple(dict.fromkeys((*preferred, *distinct)))
