"""`tokenrec study`: the search, the seeds of the best, the scores, the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.analysis.study_files import CurvePoint, Difference, Result
from tokenrec.config import Config, data_directory, semantic_ids_path
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.pipeline import task_names
from tokenrec.errors import InputError
from tokenrec.evaluation.baselines import split_baselines
from tokenrec.runtime.files import read_json, write_json
from tokenrec.runtime.versions import versions
from tokenrec.study.jobs import (
    FIGURES_FILE,
    Budget,
    BudgetSpent,
    RunRequest,
    diverged,
    finish,
    is_done,
)
from tokenrec.study.plan import (
    CHOSEN_BY,
    Study,
    TrainingRun,
    base_config,
    final_jobs,
    first_jobs,
    job_config,
)
from tokenrec.study.results import (
    BASELINE_SEED,
    Scored,
    best_rates,
    curve_rows,
    difference_rows,
    rate_of,
    read_scores,
    result_rows,
    sort_keys,
    write_rows,
)


def run_study(
    study: Study,
    name: str,
    out: Path,
    data: Path | None,
    *,
    command: str,
    side_by_side: int = 1,
    tables_only: bool = False,
) -> None:
    """Trains and scores what is not done, and writes `results.parquet`, `differences.parquet`, `curves.parquet`,
    `flops.json` and `study.json` to `out`; what there is, if the budget is used up.

    Args:
      data: folder of the data set, instead of the base config's.
      command: what stands in `study.json`.
      tables_only: begin no run, and write the tables of those that are done.

    Raises:
      InputError: the study, its data set or `out` do not go together, or a run failed.
      Spent: `cpu_hours` were not enough.
      Stopped: a signal came.
    """
    grid = _Grid(study, out, data)
    dataset = open_dataset(
        data_directory(grid.base), grid.base.data.exclude, semantic_ids_path(grid.base)
    )
    absent = [split for split in study.splits if split not in dataset.splits]
    if absent:
        raise InputError(
            f"splits={study.splits!r} of the study: the data set has no {absent[0]}, but {', '.join(dataset.splits)}; "
            "leave it out, or prepare the data set with it"
        )
    if tables_only and not grid.chosen():
        raise InputError(
            f"--out '{out}' holds no run of '{name}' that is done; leave out --tables-only to begin them"
        )
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(out, study.cpu_hours)
    try:
        if not tables_only:
            finish([grid.first(job) for job in first_jobs(study)], budget, side_by_side)
            finish(
                [grid.task(job, study.splits) for job in grid.finals()],
                budget,
                side_by_side,
            )
    except BudgetSpent:
        if grid.chosen():
            _write(grid, name, dataset, budget.spent, command)
        raise
    _write(grid, name, dataset, budget.spent, command)


class _Grid:
    """The runs of a study in a folder."""

    def __init__(self, study: Study, out: Path, data: Path | None) -> None:
        self.study, self.out, self.data = study, out, data
        self.base = base_config(study, data)

    def task(self, job: TrainingRun, splits: tuple[str, ...]) -> RunRequest:
        config = job_config(self.study, job, self.data)
        return RunRequest(self.out / job.folder, config, splits, self.study.checkpoint)

    def first(self, job: TrainingRun) -> RunRequest:
        """A run of the search; the first of each model has its figures too."""
        return self.task(job, (CHOSEN_BY,))._replace(
            described=job.learning_rate == self.study.rates_of(job.model)[0]
        )

    def figures(self) -> dict[str, tuple[int, float]]:
        """Parameters, and FLOPs of an example forward, of the models that are described."""
        found = {}
        for job in first_jobs(self.study):
            path = self.out / job.folder / FIGURES_FILE
            if path.is_file():
                told = read_json(
                    path, "figures", "remove it, and start the study again"
                )
                parameters = told["parameters"]
                found[job.model] = (
                    parameters["dense"] + parameters["tables"],
                    told["flops_per_example"],
                )
        return found

    def scored(self, job: TrainingRun, split: str) -> Scored | None:
        """None, if that is not done."""
        if not is_done(self.task(job, (split,))):
            return None
        return read_scores(self.out / job.folder / f"{split}.parquet")

    def chosen(self) -> dict[str, float]:
        """The learning rate of each model with the best macro AUC on valid, of what is done."""
        values = {}
        for job in first_jobs(self.study):
            found = self.scored(job, CHOSEN_BY)
            if found is not None:
                values[job.model, job.learning_rate] = found.metrics()["macro_auc"]
        return best_rates(values)

    def finals(self) -> list[TrainingRun]:
        return final_jobs(self.study, self.chosen())


def _write(
    grid: _Grid, name: str, dataset: Dataset, spent: float, command: str
) -> None:
    """The tables of what is done."""
    study, chosen, figures = grid.study, grid.chosen(), grid.figures()
    finals = final_jobs(study, chosen)
    jobs = list(dict.fromkeys([*first_jobs(study), *finals]))
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    positives: dict[str, dict[str, int]] = {}
    for split in study.splits:
        final: dict[str, dict[int, Scored]] = {}
        for job in jobs:
            found = grid.scored(job, split)
            if found is None:
                continue
            # A budget may end before the model's first run, which has its figures, and after another one beside it.
            parameters, _ = figures.get(job.model, (None, None))
            cost = {
                "examples_per_second": rate_of(grid.out / job.folder),
                "parameters": parameters,
            }
            made = result_rows(
                name, job.model, job.seed, job.learning_rate, split, found.metrics()
            )
            rows += [row | cost for row in made]
            if job in finals:
                final.setdefault(job.model, {})[job.seed] = found
        if not final:
            continue
        some = next(iter(next(iter(final.values())).values()))
        positives[split] = {
            task: int((some.labels[:, k] == 1).sum())
            for k, task in enumerate(some.tasks)
        }
        for baseline, scored in _baselines(dataset, grid.base, split, some):
            rows += result_rows(
                name, baseline, BASELINE_SEED, None, split, scored.metrics()
            )
            final[baseline] = {BASELINE_SEED: scored}
        if study.reference in final:
            differences += difference_rows(
                name, split, final, study.reference, study.draws
            )
    write_rows(grid.out / "results.parquet", rows, Result)
    write_rows(grid.out / "differences.parquet", differences, Difference)
    curves = [
        row for job in jobs for row in curve_rows(name, job, grid.out / job.folder)
    ]
    write_rows(grid.out / "curves.parquet", curves, CurvePoint)
    write_json(
        grid.out / "flops.json", {model: flops for model, (_, flops) in figures.items()}
    )
    value = {
        **{"study": name, "command": command, "base": dataclasses.asdict(grid.base)},
        **{
            "arms": {model: dict(fields) for model, fields in study.models.items()},
            "chosen": chosen,
        },
        **{
            "learning_rates": sorted({job.learning_rate for job in first_jobs(study)}),
            "seeds": list(study.seeds),
        },
        **{
            "reference": study.reference,
            "cpu_hours": study.cpu_hours,
            "spent_cpu_hours": round(spent, 3),
        },
        "diverged": [
            str(job.folder.relative_to("runs"))
            for job in jobs
            if diverged(grid.task(job, ()))
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
    write_json(grid.out / "study.json", value)


def _baselines(
    dataset: Dataset, config: Config, split: str, like: Scored
) -> Iterator[tuple[str, Scored]]:
    """What needs no model, on the rows of `like`."""
    log = dataset.load(split)
    rows = np.flatnonzero(log.flags & SCORED > 0)
    order = sort_keys(
        np.repeat(log.user_id, np.diff(log.start))[rows],
        dataset.catalogue.item_id[log.item[rows]],
        log.time[rows],
    )
    for name, probabilities in split_baselines(
        dataset, split, task_names(dataset.schema, config.data)
    ).items():
        yield name, like._replace(scores=probabilities[order].astype(np.float32))
