"""What the runs of a study are like inside, as tables beside its results, which `tokenrec report` draws: effective
ranks, spectra, information on the label, and what is attended to.

    python -m benchmarks.study_states --study DIR [--models MODEL ...] [--data DATA]

Measures event states of the newest checkpoint of each run at its model's learning rate. Ranks of earlier steps, which a
run logs with `train.log_states`, are of one batch and no match for these; the report draws them among the learning
curves. Attention is that of the first seed: of events in user-centric runs, and of targets in others, to each part of
the stream, and as maps.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import run_script
from tokenrec.analysis.attention_maps import AttentionMaps, run_maps
from tokenrec.analysis.attention_mass import attention_mass
from tokenrec.analysis.event_states import collapse_report
from tokenrec.analysis.rank import LEAST_ROWS
from tokenrec.analysis.study_files import (
    TOKENS,
    Cell,
    Information,
    Mass,
    Rank,
    SingularValue,
    StudyFiles,
    read_study,
)
from tokenrec.analysis.summary import chosen_rates
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import write_json
from tokenrec.study.jobs import RUN_FOLDER
from tokenrec.study.plan import TrainingRun
from tokenrec.study.results import write_rows

_LAYER = "layer_"
STREAMS = 64  # that attention is the mean of
BLOCKS = 32  # of rows of the stream, that a map shows


def measured_jobs(files: StudyFiles, models: Sequence[str]) -> list[TrainingRun]:
    """Every seed of these models at their chosen rates; if none is named, of all that are no rivals.

    Raises:
      InputError: the study trained no such model, or one that is named is of another kind than TokenFormer.
    """
    rates, base = (
        chosen_rates(files.results),
        files.about.base.get("model", {}).get("kind", "tokenformer"),
    )
    kinds = {
        model: files.about.arms.get(model, {}).get("model.kind", base)
        for model in rates
    }
    for model in models:
        if model not in rates:
            raise InputError(
                f"--models {model} has no run in this study{suggest(model, rates)}"
            )
        if kinds[model] != "tokenformer":
            raise InputError(
                f"--models {model} is of model.kind='{kinds[model]}', which has no event states; leave it out"
            )
    wanted = models or [model for model in rates if kinds[model] == "tokenformer"]
    done = dict.fromkeys(
        (row.model, row.learning_rate, row.seed) for row in files.results
    )
    return [
        TrainingRun(m, rate, s)
        for m, rate, s in done
        if rate is not None and rate == rates[m] and m in wanted
    ]


class Tables(NamedTuple):
    """Rows of the tables, by their kind."""

    ranks: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    information: list[dict[str, Any]]


def state_rows(study: str, job: TrainingRun, report: dict[str, Any]) -> Tables:
    """Rows from the `collapse_report` of a run."""
    who, rows = (
        {"study": study, "model": job.model, "seed": job.seed},
        Tables([], [], []),
    )
    for name, found in report["layers"].items():
        layer = who | {
            "layer": int(name.removeprefix(_LAYER))
            if name.startswith(_LAYER)
            else TOKENS
        }
        rows.ranks.append(
            layer | {"step": report["step"], "effective_rank": found["effective_rank"]}
        )
        rows.spectra.extend(
            layer | {"index": index, "singular_value": value}
            for index, value in enumerate(found["spectrum"])
        )
        rows.information.extend(
            layer | {"task": task, "clusters": int(count), "nats": one["corrected"]}
            for task, by_count in found["information"].items()
            for count, one in by_count.items()
        )
    return rows


def mass_rows(study: str, model: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """Rows of `Mass`: where the attention of what is scored goes."""
    reader, rows = "target" if maps.layout.candidates else "event", []
    for layer, weights in enumerate(maps.weights):
        for source, of_heads in attention_mass(weights, maps.layout, maps.valid)[
            reader
        ].items():
            place = {"study": study, "model": model, "layer": layer, "source": source}
            rows += [
                place | {"head": head, "value": float(value)}
                for head, value in enumerate(of_heads)
            ]
    return rows


def cell_rows(study: str, model: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """Rows of `Cell`: the stream in at most `BLOCKS` blocks of rows."""
    size = maps.layout.rows
    first = np.unique(
        np.linspace(0, size, min(size, BLOCKS), endpoint=False).astype(int)
    )
    reads = np.add.reduceat(maps.valid.sum(axis=0), first)
    rows = []
    for layer, weights in enumerate(maps.weights):
        given = np.where(maps.valid[:, :, None], weights.mean(axis=1), 0).sum(axis=0)
        blocks = np.add.reduceat(np.add.reduceat(given, first, axis=1), first, axis=0)
        place = {"study": study, "model": model, "layer": layer}
        rows += [
            place
            | {
                "query": int(first[q]),
                "key": int(first[k]),
                "value": float(blocks[q, k] / reads[q]),
            }
            for q in np.flatnonzero(reads)
            for k in range(len(first))
        ]
    return rows


def write_tables(
    folder: Path,
    models: Sequence[str],
    data: Path | None,
    split: str,
    rows: int,
    command: str,
) -> None:
    """`ranks`, `spectra`, `information`, `attention` and `maps.parquet` and `states.json` of a study's folder, replaced
    once all is measured.
    """
    files = read_study(folder)
    study, tables, drawn = files.about.study, Tables([], [], []), set()
    masses, cells = [], []
    for job in measured_jobs(files, models):
        run = folder / job.folder / RUN_FOLDER
        report = collapse_report(run, split, checkpoint="latest", data=data, rows=rows)
        for table, of_run in zip(tables, state_rows(study, job, report), strict=True):
            table += of_run
        if job.model not in drawn:
            drawn.add(job.model)
            maps = run_maps(run, data, split, STREAMS)
            masses += mass_rows(study, job.model, maps)
            cells += cell_rows(study, job.model, maps)
        found = [f"{of['effective_rank']:.1f}" for of in report["layers"].values()]
        print(
            f"{job.model}, seed {job.seed}, step {report['step']:,}: {', '.join(found)}",
            flush=True,
        )
    write_rows(folder / "ranks.parquet", tables.ranks, Rank)
    write_rows(folder / "spectra.parquet", tables.spectra, SingularValue)
    write_rows(folder / "information.parquet", tables.information, Information)
    write_rows(folder / "attention.parquet", masses, Mass)
    write_rows(folder / "maps.parquet", cells, Cell)
    write_json(folder / "states.json", {"command": command})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study", type=Path, required=True, help="the --out folder of `tokenrec study`"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], help="default: all of the study but rivals"
    )
    parser.add_argument(
        "--data", type=Path, help="data set, if it is not where the runs read it"
    )
    parser.add_argument("--split", default="valid")
    parser.add_argument(
        "--rows",
        type=int,
        default=LEAST_ROWS,
        help="event states to draw from each run",
    )
    flags = parser.parse_args(argv)
    words = ["python", "-m", "benchmarks.study_states", f"--study={flags.study}"]
    words += [
        *(["--models", *flags.models] if flags.models else []),
        f"--split={flags.split}",
        f"--rows={flags.rows}",
    ]
    write_tables(
        flags.study,
        flags.models,
        flags.data,
        flags.split,
        flags.rows,
        shlex.join(words),
    )


if __name__ == "__main__":
    run_script(main)
