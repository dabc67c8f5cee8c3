"""A study in numbers: the rate of each model, means and deviations over seeds, what may be claimed and what may not."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from tokenrec.analysis.study_files import MACRO, Difference, Result, StudyFiles

LEAST_POSITIVES = 500  # of a task in a split, for a claim about it

_LOWER_IS_BETTER = ("log_loss", "normalized_entropy")
_HEADLINES = (
    "auc",
    "ndcg@10",
)  # the metric that figures show and learning rates are compared by, if it is there
_SPLITS = ("test", "valid")  # the first that is there is what the study is about
_TUNED_ON = "valid"

type Verdict = Literal["better", "worse", "equal", "unknown"]


class Spread(NamedTuple):
    """Mean and sample deviation over runs; None where a run's value is undefined, or for the deviation of one run."""

    mean: float | None
    deviation: float | None
    runs: int


class MetricKey(NamedTuple):
    """Where a value stands, but for its model."""

    split: str
    task: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the pages and figures show of a study.

    Attributes:
      models: trained ones, in the order of the study's file.
      baselines: models without a learning rate.
      rates: the chosen learning rate of each trained model.
      seeds: those of each trained model at that rate.
      tasks: of each split, the macro mean first. Splits are in the order of interest.
      metrics: of all tasks, in the order of the results.
      headline: the metric that figures show.
      spreads: at the chosen rates, by place, then model.
      differences: by place, then model.
      no_claim: the reason why nothing is claimed, by split and task.
    """

    models: tuple[str, ...]
    baselines: tuple[str, ...]
    reference: str
    rates: Mapping[str, float]
    seeds: Mapping[str, tuple[int, ...]]
    tasks: Mapping[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    headline: str
    spreads: Mapping[MetricKey, Mapping[str, Spread]]
    differences: Mapping[MetricKey, Mapping[str, Difference]]
    no_claim: Mapping[tuple[str, str], str]

    @property
    def main_split(self) -> str:
        return next(iter(self.tasks))

    @property
    def claimed_tasks(self) -> tuple[str, ...]:
        """Of the main split; without the macro mean."""
        split = self.main_split
        return tuple(
            task
            for task in self.tasks[split]
            if task != MACRO and (split, task) not in self.no_claim
        )


class Search(NamedTuple):
    """The learning-rate search: the headline metric of runs of the same seeds, by model, then rate."""

    place: MetricKey
    seeds: tuple[int, ...]
    values: Mapping[str, Mapping[float, Spread]]

    def at_edge(self, model: str, rate: float) -> bool:
        """Whether a better rate may lie outside of those tried."""
        return len(self.values[model]) > 1 and rate in (
            min(self.values[model]),
            max(self.values[model]),
        )


def summarize_study(files: StudyFiles) -> Summary:
    """Everything at the learning rate that `chosen_rates` names."""
    results = files.results
    rates = chosen_rates(results)
    known = dict.fromkeys((*files.about.arms, *(row.model for row in results)))
    final = [row for row in results if row.learning_rate == rates.get(row.model)]
    splits = _ordered((row.split for row in results), _SPLITS)
    tasks = {
        split: _ordered((row.task for row in final if row.split == split), (MACRO,))
        for split in splits
    }
    return Summary(
        models=tuple(model for model in known if model in rates),
        baselines=tuple(
            model
            for model in known
            if model not in rates and any(row.model == model for row in results)
        ),
        reference=files.about.reference,
        rates=rates,
        seeds={
            model: tuple(sorted({row.seed for row in final if row.model == model}))
            for model in rates
        },
        tasks=tasks,
        metrics=_ordered((row.metric for row in results), ()),
        headline=_headline(results),
        spreads=_spreads(final),
        differences=_differences(files.differences or ()),
        no_claim={
            (split, task): reason
            for split, of_split in tasks.items()
            for task in of_split
            if (reason := _reason_against(files, split, task, of_split))
        },
    )


def chosen_rates(results: Sequence[Result]) -> dict[str, float]:
    """The learning rate of each trained model: the one with most seeds, among equals the best on valid."""
    place, judged = _judged(results)
    seeds: dict[str, dict[float, set[int]]] = {}
    for row in results:
        if row.learning_rate is not None:
            seeds.setdefault(row.model, {}).setdefault(row.learning_rate, set()).add(
                row.seed
            )

    def merit(model: str, rate: float) -> tuple[int, float]:
        mean = spread(
            [
                row.value
                for row in judged
                if (row.model, row.learning_rate) == (model, rate)
            ]
        ).mean
        worth = (
            -math.inf
            if mean is None
            else mean
            if higher_is_better(place.metric)
            else -mean
        )
        return len(seeds[model][rate]), worth

    return {
        model: max(sorted(tried), key=functools.partial(merit, model))
        for model, tried in seeds.items()
    }


def search_of(results: Sequence[Result]) -> Search:
    """Only seeds that all models have at all their rates are in it, so that rates are compared on equal terms."""
    place, judged = _judged(results)
    found: dict[str, dict[float, dict[int, float | None]]] = {}
    for row in judged:
        if row.learning_rate is not None:
            found.setdefault(row.model, {}).setdefault(row.learning_rate, {})[
                row.seed
            ] = row.value
    shared = set.intersection(
        *(set(of_rate) for of_model in found.values() for of_rate in of_model.values())
    )
    values = {
        model: {
            rate: spread([of_rate[seed] for seed in shared])
            for rate, of_rate in of_model.items()
        }
        for model, of_model in found.items()
    }
    return Search(place, tuple(sorted(shared)), values)


def spread(values: Sequence[float | None]) -> Spread:
    """
    >>> spread([0.25, 0.75]), spread([0.5]), spread([0.5, None])
    (Spread(mean=0.5, deviation=0.3535533905932738, runs=2), Spread(mean=0.5, deviation=None, runs=1), \
Spread(mean=None, deviation=None, runs=2))
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Spread(None, None, len(values))
    return Spread(
        statistics.mean(known),
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
    )


def higher_is_better(metric: str) -> bool:
    return metric not in _LOWER_IS_BETTER


def verdict(difference: Difference | None) -> Verdict:
    """Of a model against the reference: "equal" where the interval contains 0, "unknown" without an interval."""
    if (
        difference is None
        or difference.difference is None
        or difference.low is None
        or difference.high is None
    ):
        return "unknown"
    if difference.low <= 0 <= difference.high:
        return "equal"
    return (
        "better"
        if (difference.difference > 0) == higher_is_better(difference.metric)
        else "worse"
    )


def best_model(summary: Summary, place: MetricKey) -> str | None:
    """The model with the best mean, if its lead is distinguishable from 0, else None.

    The lead is over the reference, and that of the reference is over the model next to it.
    """
    if (place.split, place.task) in summary.no_claim:
        return None
    means = {
        model: s.mean
        for model, s in summary.spreads.get(place, {}).items()
        if s.mean is not None
    }
    ranked = sorted(
        means, key=means.__getitem__, reverse=higher_is_better(place.metric)
    )
    if len(ranked) < 2:
        return None
    gaps = summary.differences.get(place, {})
    if ranked[0] == summary.reference:
        return ranked[0] if verdict(gaps.get(ranked[1])) == "worse" else None
    return ranked[0] if verdict(gaps.get(ranked[0])) == "better" else None


def _reason_against(
    files: StudyFiles, split: str, task: str, tasks: Sequence[str]
) -> str | None:
    if task != MACRO:
        count = _positives(files, split, task)
        if count is None:
            return f"the number of positives of {task} in {split} is not recorded"
        return (
            f"{count:,} positives in {split}, fewer than {LEAST_POSITIVES}"
            if count < LEAST_POSITIVES
            else None
        )
    rare = [t for t in tasks if t != MACRO and _reason_against(files, split, t, tasks)]
    return (
        f"the mean holds {', '.join(rare)}, of which nothing is claimed"
        if rare
        else None
    )


def _positives(files: StudyFiles, split: str, task: str) -> int | None:
    count = files.about.positives(split, task)
    if count is None:
        counts = [
            row.positives
            for row in files.differences or ()
            if (row.split, row.task) == (split, task)
        ]
        count = min(counts, default=None)
    return count


def _spreads(final: Iterable[Result]) -> dict[MetricKey, dict[str, Spread]]:
    values: dict[MetricKey, dict[str, list[float | None]]] = {}
    for row in final:
        place = MetricKey(row.split, row.task, row.metric)
        values.setdefault(place, {}).setdefault(row.model, []).append(row.value)
    return {
        place: {model: spread(of_model) for model, of_model in found.items()}
        for place, found in values.items()
    }


def _differences(rows: Iterable[Difference]) -> dict[MetricKey, dict[str, Difference]]:
    found: dict[MetricKey, dict[str, Difference]] = {}
    for row in rows:
        found.setdefault(MetricKey(row.split, row.task, row.metric), {})[row.model] = (
            row
        )
    return found


def _headline(results: Sequence[Result]) -> str:
    return _ordered((row.metric for row in results), _HEADLINES)[0]


def _judged(results: Sequence[Result]) -> tuple[MetricKey, list[Result]]:
    """What learning rates are judged by, and the rows of trained models that tell it."""
    rows = [row for row in results if row.learning_rate is not None]
    split = _ordered((row.split for row in rows), (_TUNED_ON,))[0]
    rows = [row for row in rows if row.split == split]
    metric = _headline(rows)
    task = _ordered((row.task for row in rows if row.metric == metric), (MACRO,))[0]
    return MetricKey(split, task, metric), [
        row for row in rows if (row.task, row.metric) == (task, metric)
    ]


def _ordered(names: Iterable[str], first: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in order of appearance, but `first` the first.

    >>> _ordered(["train", "valid", "train", "test"], ("test", "dev"))
    ('test', 'train', 'valid')
    """
    found = dict.fromkeys(names)
    return tuple(dict.fromkeys((*(name for name in first if name in found), *found)))
