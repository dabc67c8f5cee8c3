"""Measure the trained models of a study from the inside, for `tokenrec report`.

    python -m benchmarks.study_states --study DIR [--models MODEL ...] [--data DATA]

Adds tables to the folder of the study: effective ranks, spectra, information on the
label, attention mass and attention maps (docs/methods.md section 5). The event states
are those of the newest checkpoint of each run at the chosen rate of its model. Ranks
that a run logs during training (`train.log_states`) come from one batch and are not
comparable with these; the report draws them among the learning curves.

Attention is measured for the first seed of a model: that of events in user-centric
runs, and that of targets in others.
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
from tokenrec.analysis.rate_search import chosen_rates
from tokenrec.analysis.study_files import StudyFiles, read_study
from tokenrec.analysis.study_rows import (
    TOKENS,
    AttentionShare,
    EffectiveRank,
    LabelInformation,
    MapCell,
    SingularValue,
)
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import write_json
from tokenrec.study.jobs import RUN_FOLDER
from tokenrec.study.plan import TrainingRun
from tokenrec.study.results import write_rows

_LAYER = "layer_"
# Streams that attention is the mean of.
STREAMS = 64
# Blocks of positions in each direction of a map.
BLOCKS = 32


def measured_runs(files: StudyFiles, models: Sequence[str]) -> list[TrainingRun]:
    """List every seed of the models at their chosen rates.

    Args:
      files: tables of the study.
      models: names of models; empty for all TokenFormers of the study.

    Raises:
      InputError: the study trained no such model, or one that is named is no
        TokenFormer.
    """
    rates = chosen_rates(files.results)
    base = files.info.base.get("model", {}).get("kind", "tokenformer")
    kinds = {
        model: files.info.arms.get(model, {}).get("model.kind", base) for model in rates
    }
    for model in models:
        if model not in rates:
            raise InputError(
                f"--models {model} has no run in this study{suggest(model, rates)}"
            )
        if kinds[model] != "tokenformer":
            raise InputError(
                f"--models {model} is of model.kind='{kinds[model]}', which has no "
                "event states; leave it out"
            )
    wanted = models or [model for model in rates if kinds[model] == "tokenformer"]
    # Every metric of a run is a row of the results.
    runs = dict.fromkeys(
        (row.model, row.learning_rate, row.seed) for row in files.results
    )
    return [
        TrainingRun(model, rate, seed)
        for model, rate, seed in runs
        if rate is not None and rate == rates[model] and model in wanted
    ]


class StateTables(NamedTuple):
    """Rows of the tables of event states.

    Attributes:
      ranks: rows of `EffectiveRank`.
      spectra: rows of `SingularValue`.
      information: rows of `LabelInformation`.
    """

    ranks: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    information: list[dict[str, Any]]


def state_rows(study: str, run: TrainingRun, report: dict[str, Any]) -> StateTables:
    """Make the rows of a run from its `collapse_report`.

    Args:
      study: name of the study.
      run: the run.
      report: its report.
    """
    columns = {"study": study, "model": run.model, "seed": run.seed}
    tables = StateTables([], [], [])
    for name, measured in report["layers"].items():
        is_block = name.startswith(_LAYER)
        number = int(name.removeprefix(_LAYER)) if is_block else TOKENS
        layer = columns | {"layer": number}
        tables.ranks.append(
            layer
            | {"step": report["step"], "effective_rank": measured["effective_rank"]}
        )
        tables.spectra.extend(
            layer | {"index": index, "singular_value": value}
            for index, value in enumerate(measured["spectrum"])
        )
        tables.information.extend(
            layer
            | {"task": task, "clusters": int(count), "nats": estimate["corrected"]}
            for task, by_count in measured["information"].items()
            for count, estimate in by_count.items()
        )
    return tables


def mass_rows(study: str, model: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """Make the rows of `AttentionShare`: the mass from the tokens that are scored.

    Args:
      study: name of the study.
      model: name of the model.
      maps: attention of one of its runs.
    """
    query = "target" if maps.layout.candidates else "event"
    rows = []
    for layer, weights in enumerate(maps.weights):
        by_source = attention_mass(weights, maps.layout, maps.valid)[query]
        for source, by_head in by_source.items():
            columns = {"study": study, "model": model, "layer": layer, "source": source}
            rows += [
                columns | {"head": head, "value": float(value)}
                for head, value in enumerate(by_head)
            ]
    return rows


def cell_rows(study: str, model: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """Make the rows of `MapCell`: the maps in at most `BLOCKS` x `BLOCKS` cells.

    Args:
      study: name of the study.
      model: name of the model.
      maps: attention of one of its runs.
    """
    size = maps.layout.length
    # First position of each block.
    first = np.unique(
        np.linspace(0, size, min(size, BLOCKS), endpoint=False).astype(int)
    )
    # Valid queries of each block, over all streams: padding is no query.
    queries = np.add.reduceat(maps.valid.sum(axis=0), first)
    rows = []
    for layer, weights in enumerate(maps.weights):
        mean = weights.mean(axis=1)
        shares = np.where(maps.valid[:, :, None], mean, 0).sum(axis=0)
        blocks = np.add.reduceat(np.add.reduceat(shares, first, axis=1), first, axis=0)
        columns = {"study": study, "model": model, "layer": layer}
        for q in np.flatnonzero(queries):
            for k in range(len(first)):
                value = float(blocks[q, k] / queries[q])
                cell = {"query": int(first[q]), "key": int(first[k]), "value": value}
                rows.append(columns | cell)
    return rows


def write_tables(
    folder: Path,
    models: Sequence[str],
    data: Path | None,
    split: str,
    rows: int,
    command: str,
) -> None:
    """Measure the models and write the tables, once all are measured.

    The files are `ranks`, `spectra`, `information`, `attention` and `maps.parquet`, and
    `states.json`, in the folder of the study.

    Args:
      folder: folder of the study.
      models: names of models; empty for all TokenFormers.
      data: folder of the data set, if it is not where the runs read it.
      split: name of the split.
      rows: event states to draw from each run.
      command: the command line that `states.json` records.
    """
    files = read_study(folder)
    study = files.info.study
    tables = StateTables([], [], [])
    shares: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    with_maps = set()
    for run in measured_runs(files, models):
        workdir = folder / run.folder / RUN_FOLDER
        report = collapse_report(
            workdir, split, checkpoint="latest", data=data, rows=rows
        )
        for table, of_run in zip(tables, state_rows(study, run, report), strict=True):
            table += of_run
        if run.model not in with_maps:
            with_maps.add(run.model)
            maps = run_maps(workdir, data, split, STREAMS)
            shares += mass_rows(study, run.model, maps)
            cells += cell_rows(study, run.model, maps)
        ranks = [f"{of['effective_rank']:.1f}" for of in report["layers"].values()]
        print(
            f"{run.model}, seed {run.seed}, step {report['step']:,}: "
            f"{', '.join(ranks)}",
            flush=True,
        )
    write_rows(folder / "ranks.parquet", tables.ranks, EffectiveRank)
    write_rows(folder / "spectra.parquet", tables.spectra, SingularValue)
    write_rows(folder / "information.parquet", tables.information, LabelInformation)
    write_rows(folder / "attention.parquet", shares, AttentionShare)
    write_rows(folder / "maps.parquet", cells, MapCell)
    write_json(folder / "states.json", {"command": command})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--study", type=Path, required=True, help="the --out folder of `tokenrec study`"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        help="default: all TokenFormers of the study",
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
    if flags.models:
        words += ["--models", *flags.models]
    words += [f"--split={flags.split}", f"--rows={flags.rows}"]
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
