"""Run a study: the search, the final runs, and the tables of their results.

`run_study` is `tokenrec study` without the report. It needs no plotting package.
"""

from __future__ import annotations

from pathlib import Path

from tokenrec.config import data_directory, semantic_ids_path
from tokenrec.data.dataset import open_dataset
from tokenrec.errors import InputError
from tokenrec.evaluation.freeze import freeze_time
from tokenrec.study.jobs import Budget, BudgetSpent, run_missing
from tokenrec.study.plan import Study, search_runs
from tokenrec.study.study_folder import StudyFolder
from tokenrec.study.study_tables import write_tables


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
    """Train and score what is missing, then write the tables of the study.

    The tables are `results.parquet`, `differences.parquet`, `reliability.parquet`,
    `curves.parquet`, `flops.json` and `study.json` in `out`. If the budget ends before the study does,
    they hold the runs that are done.

    Args:
      study: the plan.
      name: name of the study in its tables.
      out: folder of the study; an existing one is resumed.
      data: folder of the data set; None for that of the base config.
      command: the command line that `study.json` records.
      side_by_side: number of runs at a time.
      tables_only: begin no run, and write the tables of the runs that are done.

    Raises:
      InputError: the study, its data set or `out` do not fit together, or a run failed.
      BudgetSpent: `cpu_hours` were not enough.
      Stopped: a signal arrived.
    """
    folder = StudyFolder(study, out, data)
    dataset = open_dataset(
        data_directory(folder.base),
        folder.base.data.exclude,
        semantic_ids_path(folder.base),
    )
    absent = [split for split in study.splits if split not in dataset.splits]
    if absent:
        raise InputError(
            f"splits={study.splits!r} of the study: the data set has no {absent[0]}, "
            f"only {', '.join(dataset.splits)}; leave it out, or prepare the data set "
            "with it"
        )
    if study.freeze_at:
        for split in study.splits:
            # For its error, before hours of training.
            freeze_time(dataset, split, study.freeze_at)
    # Refused before the folder is made, so that a slip leaves nothing behind.
    if tables_only and not folder.chosen_rates():
        raise InputError(
            f"--out '{out}' holds no finished run of '{name}'; leave out --tables-only "
            "to begin the runs"
        )
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(out, study.cpu_hours)
    try:
        if not tables_only:
            # The rates of the final runs are known once the whole search is done.
            search = [folder.search_request(run) for run in search_runs(study)]
            run_missing(search, budget, side_by_side)
            final = [
                folder.request(run, study.splits, frozen=bool(study.freeze_at))
                for run in folder.final_runs()
            ]
            run_missing(final, budget, side_by_side)
    # The tables of what is done are worth having when the budget ends.
    except BudgetSpent:
        if folder.chosen_rates():
            write_tables(folder, name, dataset, budget.spent, command)
        raise
    write_tables(folder, name, dataset, budget.spent, command)
