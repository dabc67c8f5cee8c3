"""Write the tables of a study from the runs that are done."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from tokenrec.analysis.study_rows import (
    CurvePoint,
    Difference,
    ReliabilityBin,
    Result,
)
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import task_names
from tokenrec.evaluation.freeze import freeze_time
from tokenrec.runtime.files import write_json
from tokenrec.runtime.versions import versions
from tokenrec.study.comparisons import Baselines, average
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
    binary = {task.name for task in dataset.schema.binary_tasks}
    tasks = tuple(
        name
        for name in task_names(dataset.schema, folder.base.data)
        if name in binary and name not in folder.base.data.auxiliary
    )
    baselines = Baselines(out, dataset, tasks)
    # Each run once: the first final run of a model is one of the search.
    runs = list(dict.fromkeys([*search_runs(study), *final]))

    results: list[dict[str, Any]] = []
    reliability: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    positives: dict[str, dict[str, int]] = {}
    for split in study.splits:
        tables = _split_tables(
            folder, name, dataset, split, runs, final, sizes, baselines
        )
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
        "ensembles": {name: list(of) for name, of in study.ensembles.items()},
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
    baselines: Baselines,
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
      baselines: those of the study.
    """
    results: list[dict[str, Any]] = []
    reliability: list[dict[str, Any]] = []
    live: dict[str, dict[int, ScoredSplit]] = {}
    frozen: dict[str, dict[int, ScoredSplit]] = {}
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
        about = (name, run.model, run.seed, run.learning_rate, split)
        report = scored.metrics(calibration=run in final)
        results += [row | cost for row in result_rows(*about, report)]
        if run not in final:
            continue
        reliability += reliability_rows(name, run, split, report)
        live.setdefault(run.model, {})[run.seed] = scored
        if folder.study.freeze_at:
            scored = folder.scores(run, split, frozen=True)
            if scored is not None:
                rows = result_rows(*about, scored.metrics(), frozen=True)
                results += [row | cost for row in rows]
                frozen.setdefault(run.model, {})[run.seed] = scored
    if not live:
        return _SplitTables(results, [], [], None)

    # All runs scored the same impressions, which `difference_rows` checks.
    example = next(iter(next(iter(live.values())).values()))
    positives = {
        task: int((example.labels[:, k] == 1).sum())
        for k, task in enumerate(example.tasks)
    }
    study = folder.study
    differences: list[dict[str, Any]] = []
    for scores in (live, frozen) if frozen else (live,):
        is_frozen = scores is frozen
        end = freeze_time(dataset, split, study.freeze_at) if is_frozen else None
        others = [
            *average(study.ensembles, study.seeds, scores),
            *baselines.scores(split, example, end),
        ]
        for other, scored in others:
            results += result_rows(
                name,
                other,
                BASELINE_SEED,
                None,
                split,
                scored.metrics(),
                frozen=is_frozen,
            )
            # Compared with the reference like a model of one seed.
            scores[other] = {BASELINE_SEED: scored}
        if study.reference in scores:
            differences += difference_rows(
                name, split, scores, study.reference, study.draws, frozen=is_frozen
            )
    return _SplitTables(results, reliability, differences, positives)
