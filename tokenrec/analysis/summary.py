"""Summarise a study: chosen rates, means over seeds, and which claims they support."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tokenrec.analysis.rate_search import chosen_rates
from tokenrec.analysis.study_files import StudyFiles
from tokenrec.analysis.study_metrics import (
    MetricKey,
    Spread,
    headline_metric,
    higher_is_better,
    ordered_names,
    spread,
)
from tokenrec.analysis.study_rows import MACRO, Difference, Result

# Positive labels that a task of a split needs for a claim about it.
LEAST_POSITIVES = 500
# Splits in order of interest: the first that exists is the main split of a study.
_SPLITS = ("test", "valid")

type Verdict = Literal["better", "worse", "equal", "unknown"]


@dataclasses.dataclass(frozen=True)
class StudySummary:
    """The numbers that the report shows.

    Attributes:
      models: trained models, in the order of the study file.
      baselines: models without training.
      ensembles: averages of the scores of several runs.
      reference: the model that the others are compared with.
      rates: trained model -> chosen learning rate.
      seeds: trained model -> seeds at that rate.
      tasks: split -> tasks, the macro mean first. Splits are in order of interest.
      metrics: metrics of all tasks, in the order of the results.
      headline: the metric of the figures.
      spreads: key -> model -> mean and deviation at the chosen rates.
      differences: key -> model -> difference to the reference.
      no_claim: (split, task) -> the reason why nothing is claimed.
    """

    models: tuple[str, ...]
    baselines: tuple[str, ...]
    ensembles: tuple[str, ...]
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
        """The split that the study is about."""
        return next(iter(self.tasks))

    @property
    def claimed_tasks(self) -> tuple[str, ...]:
        """Tasks of the main split with a claim, without the macro mean."""
        split = self.main_split
        return tuple(
            task
            for task in self.tasks[split]
            if task != MACRO and (split, task) not in self.no_claim
        )


def summarize_study(files: StudyFiles) -> StudySummary:
    """Summarise a study at the chosen learning rate of each model."""
    results = files.results
    rates = chosen_rates(results)
    with_results = {row.model for row in results}
    # The order of the study file first; models that it lacks are baselines.
    models = dict.fromkeys((*files.info.arms, *(row.model for row in results)))
    # A baseline has neither a rate of its own nor one in `rates`: both are None.
    final = [row for row in results if row.learning_rate == rates.get(row.model)]
    tasks = {
        split: ordered_names(
            (row.task for row in final if row.split == split), (MACRO,)
        )
        for split in ordered_names((row.split for row in results), _SPLITS)
    }
    no_claim = {}
    for split, of_split in tasks.items():
        for task in of_split:
            reason = _reason_against_claim(files, split, task, of_split)
            if reason is not None:
                no_claim[split, task] = reason
    return StudySummary(
        models=tuple(model for model in models if model in rates),
        baselines=tuple(
            model
            for model in models
            if model not in rates
            and model in with_results
            and model not in files.info.ensembles
        ),
        ensembles=tuple(name for name in files.info.ensembles if name in with_results),
        reference=files.info.reference,
        rates=rates,
        seeds={
            model: tuple(sorted({row.seed for row in final if row.model == model}))
            for model in rates
        },
        tasks=tasks,
        metrics=ordered_names((row.metric for row in results), ()),
        headline=headline_metric(results),
        spreads=_spreads(final),
        differences=_differences(files.differences or ()),
        no_claim=no_claim,
    )


def verdict(difference: Difference | None) -> Verdict:
    """Judge a model against the reference by the interval of the difference.

    Returns:
      "better" or "worse"; "equal" if the interval contains 0; "unknown" without an
      interval.
    """
    if difference is None:
        return "unknown"
    value, low, high = difference.difference, difference.low, difference.high
    if value is None or low is None or high is None:
        return "unknown"
    if low <= 0 <= high:
        return "equal"
    is_better = (value > 0) == higher_is_better(difference.metric)
    return "better" if is_better else "worse"


def best_model(summary: StudySummary, key: MetricKey) -> str | None:
    """Find the model with the best mean, if its lead is distinguishable from 0.

    The lead of a model is that over the reference; the lead of the reference is that
    over the second-best model.

    Returns:
      The model; None if nothing is claimed or the lead is not distinguishable.
    """
    if (key.split, key.task) in summary.no_claim:
        return None
    means = {
        model: of_model.mean
        for model, of_model in summary.spreads.get(key, {}).items()
        if of_model.mean is not None
    }
    ranked = sorted(means, key=means.__getitem__, reverse=higher_is_better(key.metric))
    if len(ranked) < 2:
        return None
    # Differences exist to the reference alone, not between any two models.
    best, second = ranked[:2]
    differences = summary.differences.get(key, {})
    if best == summary.reference:
        return best if verdict(differences.get(second)) == "worse" else None
    return best if verdict(differences.get(best)) == "better" else None


def _reason_against_claim(
    files: StudyFiles, split: str, task: str, tasks: Sequence[str]
) -> str | None:
    """Explain why nothing is claimed about a task; None if something may be."""
    if task == MACRO:
        rare = [
            other
            for other in tasks
            if other != MACRO and _reason_against_claim(files, split, other, tasks)
        ]
        if not rare:
            return None
        return f"the mean contains {', '.join(rare)}, about which nothing is claimed"
    count = _positives(files, split, task)
    if count is None:
        return f"the number of positives of {task} in {split} is not recorded"
    if count < LEAST_POSITIVES:
        return f"{count:,} positives in {split}, fewer than {LEAST_POSITIVES}"
    return None


def _positives(files: StudyFiles, split: str, task: str) -> int | None:
    """Positive labels of a task in a split, from `study.json` or the differences."""
    count = files.info.positives(split, task)
    if count is None:
        counts = [
            row.positives
            for row in files.differences or ()
            if (row.split, row.task) == (split, task)
        ]
        # Every row of a task repeats the count; the least one is the cautious choice.
        count = min(counts, default=None)
    return count


def _spreads(final: Iterable[Result]) -> dict[MetricKey, dict[str, Spread]]:
    values: dict[MetricKey, dict[str, list[float | None]]] = {}
    for row in final:
        by_model = values.setdefault(MetricKey(row.split, row.task, row.metric), {})
        by_model.setdefault(row.model, []).append(row.value)
    return {
        key: {model: spread(of_model) for model, of_model in by_model.items()}
        for key, by_model in values.items()
    }


def _differences(rows: Iterable[Difference]) -> dict[MetricKey, dict[str, Difference]]:
    differences: dict[MetricKey, dict[str, Difference]] = {}
    for row in rows:
        by_model = differences.setdefault(
            MetricKey(row.split, row.task, row.metric), {}
        )
        by_model[row.model] = row
    return differences
