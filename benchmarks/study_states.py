"""What the runs of a study are like inside, as tables beside its results, which `tokenrec report` draws: effective
ranks, spectra, and what is attended to.

    python -m benchmarks.study_states --study DIR [--models MODEL ...] [--data DATA]

Measures event states of the newest checkpoint of each run at its model's learning rate. Ranks of earlier steps, which a
run logs with `train.log_states`, are of one batch and no match for these; the report draws them among the learning
curves. Attention is that of the first seed: of events in user-centric runs, and of targets in others, to each part of
the stream.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import run_script
from tokenrec.analysis.attention_maps import attention_mass, run_maps
from tokenrec.analysis.event_states import collapse_report
from tokenrec.analysis.rank import LEAST_ROWS
from tokenrec.analysis.study_files import Mass, Rank, SingularValue, StudyFiles, read_study
from tokenrec.analysis.summary import chosen_rates
from tokenrec.errors import InputError, suggest
from tokenrec.study.jobs import RUN
from tokenrec.study.plan import Job
from tokenrec.study.results import write_rows

_LAYER = "layer_"
STREAMS = 64  # that attention is the mean of


def measured_jobs(files: StudyFiles, models: Sequence[str]) -> list[Job]:
    """Every seed of these models at their chosen rates; if none is named, of all that are no rivals.

    Raises:
      InputError: the study trained no such model, or one that is named is of another kind than TokenFormer.
    """
    rates, base = chosen_rates(files.results), files.about.base.get("model", {}).get("kind", "tokenformer")
    kinds = {model: files.about.arms.get(model, {}).get("model.kind", base) for model in rates}
    for model in models:
        if model not in rates:
            raise InputError(f"--models {model} has no run in this study{suggest(model, rates)}")
        if kinds[model] != "tokenformer":
            raise InputError(
                f"--models {model} is of model.kind='{kinds[model]}', which has no event states; leave it out"
            )
    wanted = models or [model for model in rates if kinds[model] == "tokenformer"]
    done = dict.fromkeys((row.model, row.learning_rate, row.seed) for row in files.results)
    return [Job(m, rate, s) for m, rate, s in done if rate is not None and rate == rates[m] and m in wanted]


def state_rows(study: str, job: Job, report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `Rank` and of `SingularValue` from the `collapse_report` of a run."""
    who = {"study": study, "model": job.model, "seed": job.seed}
    layers = {int(name.removeprefix(_LAYER)): of for name, of in report["layers"].items() if name.startswith(_LAYER)}
    ranks = [
        who | {"step": report["step"], "layer": layer, "effective_rank": found["effective_rank"]}
        for layer, found in layers.items()
    ]
    spectra = [
        who | {"layer": layer, "index": index, "singular_value": value}
        for layer, found in layers.items()
        for index, value in enumerate(found["spectrum"])
    ]
    return ranks, spectra


def mass_rows(study: str, model: str, run: Path, data: Path | None, split: str) -> list[dict[str, Any]]:
    """Rows of `Mass`: where the attention of what is scored goes."""
    maps, rows = run_maps(run, data, split, STREAMS), []
    reader = "target" if maps.layout.candidates else "event"
    for layer, weights in enumerate(maps.weights):
        for source, of_heads in attention_mass(weights, maps.layout, maps.valid)[reader].items():
            place = {"study": study, "model": model, "layer": layer, "source": source}
            rows += [place | {"head": head, "value": float(value)} for head, value in enumerate(of_heads)]
    return rows


def write_tables(folder: Path, models: Sequence[str], data: Path | None, split: str, rows: int) -> None:
    """`ranks.parquet`, `spectra.parquet` and `attention.parquet` of a study's folder, replaced once all is measured."""
    files = read_study(folder)
    ranks, spectra, masses = [], [], []
    for job in measured_jobs(files, models):
        run = folder / job.folder / RUN
        report = collapse_report(run, split, checkpoint="latest", data=data, rows=rows, clusters=())
        of_run = state_rows(files.about.study, job, report)
        ranks += of_run[0]
        spectra += of_run[1]
        if job.model not in {mass["model"] for mass in masses}:
            masses += mass_rows(files.about.study, job.model, run, data, split)
        found = [f"{of['effective_rank']:.1f}" for of in report["layers"].values()]
        print(f"{job.model}, seed {job.seed}, step {report['step']:,}: {', '.join(found)}", flush=True)
    write_rows(folder / "ranks.parquet", ranks, Rank)
    write_rows(folder / "spectra.parquet", spectra, SingularValue)
    write_rows(folder / "attention.parquet", masses, Mass)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="the --out folder of `tokenrec study`")
    parser.add_argument("--models", nargs="+", default=[], help="default: all of the study but rivals")
    parser.add_argument("--data", type=Path, help="data set, if it is not where the runs read it")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--rows", type=int, default=LEAST_ROWS, help="event states to draw from each run")
    flags = parser.parse_args(argv)
    write_tables(flags.study, flags.models, flags.data, flags.split, flags.rows)


if __name__ == "__main__":
    run_script(main)
