"""Keep the results of studies: a page with settings, and the tables of the report.

    python -m benchmarks.studies --study DIR [--study DIR ...]

Writes `results/studies/NAME.md` and `NAME.json`, and copies the tables of the study
without its runs to `results/studies/NAME/`, from which `tokenrec report` draws the
report again. The settings on the page say whether the study is finished.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from benchmarks.report import run_script, write_result
from tokenrec.analysis.rate_search import search_of
from tokenrec.analysis.study_files import StudyFiles, read_study
from tokenrec.analysis.study_metrics import MetricKey
from tokenrec.analysis.study_rows import MACRO
from tokenrec.analysis.summary import StudySummary, summarize_study
from tokenrec.analysis.wording import decimal, interval_text, plain_spread

RESULTS = Path(__file__).parent / "results" / "studies"
# Files that `tokenrec study` writes.
TABLES = (
    "study.json",
    "results.parquet",
    "differences.parquet",
    "flops.json",
    "curves.parquet",
    "reliability.parquet",
)
# Files that `benchmarks/study_states.py` adds.
STATES = (
    "ranks.parquet",
    "spectra.parquet",
    "information.parquet",
    "attention.parquet",
    "maps.parquet",
    "states.json",
)
METRICS = ("auc", "gauc")


def seed_gaps(files: StudyFiles, summary: StudySummary, split: str) -> dict[str, str]:
    """Format the difference in macro AUC to the reference for each seed.

    A paired t-test over seeds complements the bootstrap over users, which does not
    resample seeds: a difference is certain if both exclude 0.

    Args:
      files: tables of the study.
      summary: summary of the study.
      split: name of the split.

    Returns:
      Model -> differences of the shared seeds and, with two or more, the p-value of the
      t-test.
    """
    values: dict[str, dict[int, float]] = {}
    for row in files.results:
        is_macro = row.split == split and row.task == MACRO and row.metric == METRICS[0]
        # A baseline has the rate None, which equals no number, NaN least of all.
        is_final = row.learning_rate == summary.rates.get(row.model, math.nan)
        if is_macro and row.value is not None and is_final:
            values.setdefault(row.model, {})[row.seed] = row.value
    reference = values.pop(summary.reference, {})
    texts = {}
    for model, by_seed in values.items():
        gaps = [
            by_seed[seed] - reference[seed]
            for seed in sorted(by_seed.keys() & reference.keys())
        ]
        if not gaps:
            continue
        text = " ".join(decimal(gap, sign=True) for gap in gaps)
        # The test is undefined for equal differences.
        if len(gaps) > 1 and len(set(gaps)) > 1:
            text += f" (p = {scipy.stats.ttest_1samp(gaps, 0).pvalue:.2g})"
        texts[model] = text
    return texts


def model_rows(
    files: StudyFiles, summary: StudySummary, split: str
) -> list[dict[str, Any]]:
    """Make a table row for each model and baseline.

    A row has mean and deviation of every task and, for tasks with a claim, the
    difference to the reference.

    Args:
      files: tables of the study.
      summary: summary of the study.
      split: name of the split.
    """
    rows = []
    by_seed = seed_gaps(files, summary, split)
    sizes = {row.model: row.parameters for row in files.results}
    for model in (*summary.models, *summary.baselines):
        seeds = summary.seeds.get(model)
        row: dict[str, Any] = {
            "model": model,
            "rate": summary.rates.get(model),
            "seeds": None if seeds is None else len(seeds),
        }
        for task in summary.tasks[split]:
            for metric in METRICS:
                key = MetricKey(split, task, metric)
                value = summary.spreads.get(key, {}).get(model)
                row[f"{task} {metric}"] = None if value is None else plain_spread(value)
                if metric == METRICS[0] and (split, task) not in summary.no_claim:
                    column = f"{task} {metric} - {summary.reference}"
                    # The macro mean has no bootstrap interval.
                    if task == MACRO:
                        row[column] = by_seed.get(model)
                    else:
                        row[column] = _difference_text(summary, key, model)
        row["parameters"] = sizes.get(model)
        flops = (files.flops or {}).get(model)
        row["MFLOP"] = None if flops is None else flops / 1e6
        rows.append(row)
    return rows


def _difference_text(summary: StudySummary, key: MetricKey, model: str) -> str | None:
    difference = summary.differences.get(key, {}).get(model)
    if difference is None:
        return None
    value = decimal(difference.difference, sign=True)
    return f"{value} {interval_text(difference)}"


def keep(folder: Path, out: Path) -> Path:
    """Write the page of a study and copy its tables.

    Args:
      folder: folder of the study.
      out: folder of the results.

    Returns:
      Path of the page.

    Raises:
      InputError: it is not the folder of a study, or its tables do not fit together.
    """
    files = read_study(folder)
    summary = summarize_study(files)
    name = files.info.study
    kept = out / name
    kept.mkdir(parents=True, exist_ok=True)
    for table in (*TABLES, *STATES):
        if (folder / table).is_file():
            shutil.copyfile(folder / table, kept / table)
    rows = model_rows(files, summary, summary.main_split)
    settings = _settings(files, summary)
    write_result(out / name, rows, settings, files.info.command, title=f"Study {name}")
    return out / f"{name}.md"


def _settings(files: StudyFiles, summary: StudySummary) -> dict[str, Any]:
    """Settings on the page, with reservations: rates at the edge, unfinished models."""
    info, split = files.info, summary.main_split
    search = search_of(files.results)
    at_edge = [
        model for model, rate in summary.rates.items() if search.at_edge(model, rate)
    ]
    wanted = len(info.seeds)
    seeds = {model: len(summary.seeds.get(model, ())) for model in info.arms}
    unfinished = [
        f"{model} {count} of {wanted} seeds"
        for model, count in seeds.items()
        if count < wanted
    ]
    settings = {
        "split": split,
        "learning rates": " ".join(f"{rate:g}" for rate in info.learning_rates),
        "best rate at the edge": ", ".join(at_edge) or "none",
        "CPU-hours": round(info.spent_cpu_hours, 2),
        "not finished": ", ".join(unfinished) or "nothing",
    }
    unclaimed = [
        f"{task} ({reason})"
        for (of_split, task), reason in summary.no_claim.items()
        if of_split == split
    ]
    if unclaimed:
        settings["nothing is claimed of"] = ", ".join(unclaimed)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study",
        type=Path,
        action="append",
        required=True,
        help="the --out folder of a study",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    for folder in flags.study:
        print(keep(folder, flags.out).read_text())


if __name__ == "__main__":
    run_script(main)
