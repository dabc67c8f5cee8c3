"""Write the tables of a study from the runs that are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenrec.analysis.study_rows import (
    CurvePoint,
    Difference,
    ReliabilityBin,
    Result,
)
from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.evaluation.baselines import split_baselines
from tokenrec.runtime.files import write_json
from tokenrec.runtime.versions import versions
from tokenrec.study.jobs import diverged
from tokenrec.study.plan import TrainingRun, final_runs, search_runs
from tokenrec.study.results import (
    BASELINE_SEED,
    ScoredSplit,
    curve_rows,
    difference_rows,
    median_speed,
    reliability_rows,
    result_rows,
    sort_order,
    write_rows,
)
from tokenrec.study.study_folder import StudyFolder


class _SplitTables(NamedTuple):
    """Rows of the tables that come from one split.

    Attributes:
      results: rows of `Result`.
      reliability: rows of `ReliabilityBin`, of the final runs.
      differences: rows of `Difference`.
      positives: task -> number of positive labels; None without any final run.
    """

    results: list[dict[str, Any]]
    reliability: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    positives: dict[str, int] | None


def write_tables(
    folder: StudyFolder, name: str, dataset: Dataset, spent: float, command: str
) -> None:
    """Write the tables and `study.json` of the runs that are done.

    Args:
      folder: the runs of the study.
      name: name of the study.
      dataset: the data set that was scored.
      spent: CPU-hours used so far.
      command: the command line to record.
    """
    study, out = folder.study, folder.out
    chosen = folder.chosen_rates()
    sizes = folder.model_sizes()
    final = final_runs(study, chosen)
    # Each run once: the first final run of a model is one of the search.
    runs = list(dict.fromkeys([*search_runs(study), *final]))

    results: list[dict[str, Any]] = []
    reliability: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    positives: dict[str, dict[str, int]] = {}
    for split in study.splits:
        tables = _split_tables(folder, name, dataset, split, runs, final, sizes)
        results += tables.results
        reliability += tables.reliability
        differences += tables.differences
        if tables.positives is not None:
            positives[split] = tables.positives
    write_rows(out / "results.parquet", results, Result)
    write_rows(out / "differences.parquet", differences, Difference)
    # An empty table would be refused as that of a study that did not end.
    if reliability:
        write_rows(out / "reliability.parquet", reliability, ReliabilityBin)

    # Unfinished and diverged runs have curves too.
    curves = [row for run in runs for row in curve_rows(name, run, out / run.folder)]
    write_rows(out / "curves.parquet", curves, CurvePoint)
    flops = {model: of_model for model, (_, of_model) in sizes.items()}
    write_json(out / "flops.json", flops)

    about = {
        "study": name,
        "command": command,
        "base": dataclasses.asdict(folder.base),
        "arms": {model: dict(fields) for model, fields in study.models.items()},
        "chosen": chosen,
        "learning_rates": sorted({run.learning_rate for run in search_runs(study)}),
        "seeds": list(study.seeds),
        "reference": study.reference,
        "cpu_hours": study.cpu_hours,
        "spent_cpu_hours": round(spent, 3),
        "diverged": [
            str(run.folder.relative_to("runs"))
            for run in runs
            if diverged(folder.request(run, ()))
        ],
        "versions": versions(),
        "data": {
            "rows": {
                split: dataset.metadata.counts.get(f"scored_{split}")
                for split in dataset.splits
            },
            "positives": positives,
        },
    }
    write_json(out / "study.json", about)


def _split_tables(
    folder: StudyFolder,
    name: str,
    dataset: Dataset,
    split: str,
    runs: list[TrainingRun],
    final: list[TrainingRun],
    sizes: dict[str, tuple[int, float]],
) -> _SplitTables:
    """Make the rows of one split.

    Args:
      folder: the runs of the study.
      name: name of the study.
      dataset: the data set that was scored.
      split: the split.
      runs: all runs, each once.
      final: the final runs among them, which are compared with the reference.
      sizes: model -> parameters and FLOPs.
    """
    results: list[dict[str, Any]] = []
    reliability: list[dict[str, Any]] = []
    final_scores: dict[str, dict[int, ScoredSplit]] = {}
    for run in runs:
        scored = folder.scores(run, split)
        if scored is None:
            continue
        # With runs side by side, the budget may end before the run that describes the
        # model is done and after another run of the model.
        parameters, _ = sizes.get(run.model, (None, None))
        cost = {
            "examples_per_second": median_speed(folder.out / run.folder),
            "parameters": parameters,
        }
        report = scored.metrics(calibration=run in final)
        rows = result_rows(name, run.model, run.seed, run.learning_rate, split, report)
        results += [row | cost for row in rows]
        if run in final:
            reliability += reliability_rows(name, run, split, report)
            final_scores.setdefault(run.model, {})[run.seed] = scored
    if not final_scores:
        return _SplitTables(results, [], [], None)

    # All runs scored the same impressions, which `difference_rows` checks.
    example = next(iter(next(iter(final_scores.values())).values()))
    positives = {
        task: int((example.labels[:, k] == 1).sum())
        for k, task in enumerate(example.tasks)
    }
    for baseline, scored in _baselines(dataset, split, example):
        results += result_rows(
            name, baseline, BASELINE_SEED, None, split, scored.metrics()
        )
        # Compared with the reference like a model of one seed.
        final_scores[baseline] = {BASELINE_SEED: scored}
    reference = folder.study.reference
    differences: list[dict[str, Any]] = []
    if reference in final_scores:
        draws = folder.study.draws
        differences += difference_rows(name, split, final_scores, reference, draws)
    return _SplitTables(results, reliability, differences, positives)


def _baselines(
    dataset: Dataset, split: str, example: ScoredSplit
) -> Iterator[tuple[str, ScoredSplit]]:
    """Score the baselines that need no training, on the impressions of `example`."""
    log = dataset.load(split)
    log_rows = np.flatnonzero(log.flags & SCORED > 0)
    # A chunk of the log is a run of rows of one user.
    users = np.repeat(log.user_id, np.diff(log.start))
    # The log is in order of chunks, `example` in order of user, item and time.
    order = sort_order(
        users[log_rows],
        dataset.catalogue.item_id[log.item[log_rows]],
        log.time[log_rows],
    )
    for name, probabilities in split_baselines(dataset, split, example.tasks).items():
        scores = probabilities[order].astype(np.float32)
        yield name, example._replace(scores=scores)
