"""A study's results as a page, and the tables that `tokenrec report` draws, to be kept beside the other results.

    python -m benchmarks.studies --study DIR [--study DIR ...]

Writes `results/studies/NAME.md` and `NAME.json`, and copies the tables of the study, without its runs, to
`results/studies/NAME/`. A study that is not finished says so in its settings.
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
from tokenrec.analysis.study_files import MACRO, StudyFiles, read_study
from tokenrec.analysis.summary import MetricKey, Summary, search_of, summarize_study
from tokenrec.analysis.wording import decimal, interval_text, plain_spread

RESULTS = Path(__file__).parent / "results" / "studies"
TABLES = (
    "study.json",
    "results.parquet",
    "differences.parquet",
    "flops.json",
    "curves.parquet",
)
STATES = (
    "ranks.parquet",
    "spectra.parquet",
    "information.parquet",
    "attention.parquet",
    "maps.parquet",
    "states.json",
)
METRICS = ("auc", "gauc")


def seed_gaps(files: StudyFiles, summary: Summary, split: str) -> dict[str, str]:
    """Macro AUC of each model minus the reference's, seed by seed, and the p-value of a paired t-test over seeds.

    Users are not drawn here, nor are seeds in the intervals: a difference is sure where both leave 0 out.
    """
    held: dict[str, dict[int, float]] = {}
    for row in files.results:
        wanted = row.split == split and row.task == MACRO and row.metric == METRICS[0]
        if (
            wanted
            and row.value is not None
            and row.learning_rate == summary.rates.get(row.model, math.nan)
        ):
            held.setdefault(row.model, {})[row.seed] = row.value
    reference, found = held.pop(summary.reference, {}), {}
    for model, of_seed in held.items():
        gaps = [
            of_seed[seed] - reference[seed]
            for seed in sorted(of_seed.keys() & reference.keys())
        ]
        words = " ".join(decimal(gap, sign=True) for gap in gaps)
        if len(gaps) > 1 and len(set(gaps)) > 1:
            words += f" (p = {scipy.stats.ttest_1samp(gaps, 0).pvalue:.2g})"
        if gaps:
            found[model] = words
    return found


def model_rows(files: StudyFiles, summary: Summary, split: str) -> list[dict[str, Any]]:
    """A row of each model and baseline: means and deviations of every task, differences of what may be claimed."""
    rows, by_seed = [], seed_gaps(files, summary, split)
    sizes = {row.model: row.parameters for row in files.results}
    for model in (*summary.models, *summary.baselines):
        row: dict[str, Any] = {
            "model": model,
            "rate": summary.rates.get(model),
            "seeds": None,
        }
        row["seeds"] = len(summary.seeds[model]) if model in summary.seeds else None
        for task in summary.tasks[split]:
            for metric in METRICS:
                place = MetricKey(split, task, metric)
                value = summary.spreads.get(place, {}).get(model)
                row[f"{task} {metric}"] = None if value is None else plain_spread(value)
                gap = summary.differences.get(place, {}).get(model)
                if metric == METRICS[0] and (split, task) not in summary.no_claim:
                    words = (
                        None
                        if gap is None
                        else f"{decimal(gap.difference, sign=True)} {interval_text(gap)}"
                    )
                    row[f"{task} {metric} - {summary.reference}"] = (
                        by_seed.get(model) if task == MACRO else words
                    )
        row["parameters"] = sizes.get(model)
        row["MFLOP"] = (
            files.flops[model] / 1e6 if files.flops and model in files.flops else None
        )
        rows.append(row)
    return rows


def keep(folder: Path, out: Path) -> Path:
    """Writes the page and copies the tables of a study; returns the page.

    Raises:
      InputError: not a study's folder, or its tables do not go together.
    """
    files = read_study(folder)
    summary = summarize_study(files)
    name, split = files.about.study, summary.main_split
    kept = out / name
    kept.mkdir(parents=True, exist_ok=True)
    for table in (*TABLES, *STATES):
        if (folder / table).is_file():
            shutil.copyfile(folder / table, kept / table)
    tried, wanted = search_of(files.results), len(files.about.seeds)
    seeds = {model: len(summary.seeds.get(model, ())) for model in files.about.arms}
    settings = {
        "split": split,
        "learning rates": " ".join(f"{rate:g}" for rate in files.about.learning_rates),
        "best rate at the edge": ", ".join(
            m for m, rate in summary.rates.items() if tried.at_edge(m, rate)
        )
        or "none",
        "CPU-hours": round(files.about.spent_cpu_hours, 2),
        "not finished": ", ".join(
            f"{m} {n} of {wanted} seeds" for m, n in seeds.items() if n < wanted
        )
        or "nothing",
    }
    if unclaimed := [
        f"{task} ({why})" for (of, task), why in summary.no_claim.items() if of == split
    ]:
        settings["nothing is claimed of"] = ", ".join(unclaimed)
    rows = model_rows(files, summary, split)
    write_result(out / name, rows, settings, files.about.command, title=f"Study {name}")
    return out / f"{name}.md"


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
