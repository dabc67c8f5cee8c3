"""A made-up study in the files of `tokenrec study`, small enough to check by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_PLACE = ["split", "task", "metric"]
RESULT = [
    "study",
    "model",
    "seed",
    "learning_rate",
    *_PLACE,
    "value",
    "examples_per_second",
    "parameters",
]
DIFFERENCE = [
    "study",
    "model",
    "reference",
    *_PLACE,
    "difference",
    "low",
    "high",
    "p_value",
    "users",
    "positives",
    "undefined_draws",
]
CURVE = ["study", "model", "seed", "learning_rate", "step", "name", "value"]
RELIABILITY = [
    "study",
    "model",
    "seed",
    "split",
    "task",
    "bin",
    "predicted",
    "observed",
    "examples",
]
RANK = ["study", "model", "seed", "step", "layer", "effective_rank"]
SPECTRUM = ["study", "model", "seed", "layer", "index", "singular_value"]
INFORMATION = ["study", "model", "seed", "layer", "task", "clusters", "nats"]
MAPS = ["study", "model", "layer", "query", "key", "value"]
ATTENTION = ["study", "model", "layer", "head", "source", "value"]

NAME = "made-up"
RATES = {
    "ours": 0.001,
    "rival": 0.01,
    "plain": 0.001,
}  # the chosen ones, of 0.001 and 0.01
CLICK_AUC = {
    "ours": (0.70, 0.72, 0.74),
    "rival": (0.73, 0.73, 0.76),
    "plain": (0.71, 0.72, 0.73),
}
SEARCH_AUC = {
    "ours": 0.69,
    "rival": 0.68,
    "plain": 0.65,
}  # macro on valid, of seed 0 at the other rate
GAPS = {"rival": (0.02, 0.005, 0.035), "plain": (0.0, -0.01, 0.01)}
POSITIVES = {"click": 2000, "rare": 57}

type Row = tuple[Any, ...]


def write_study(folder: Path, name: str = NAME, *, optional: bool = True) -> Path:
    """Write the folder of a study and return it, with or without the optional files."""
    folder.mkdir(parents=True)
    write_about(folder, name)
    write_rows(folder / "results.parquet", RESULT, result_rows(name))
    write_rows(folder / "differences.parquet", DIFFERENCE, difference_rows(name))
    if not optional:
        return folder
    models = [(model, seed) for model in RATES for seed in range(3)]
    curve = [
        (1, "train/loss", 0.7),
        (2, "train/loss", 0.6),
        (2, "valid/macro_auc", 0.7),
        (2, "train/lr", 0.1),
    ]
    curve += [(2, f"rank/layer_{n}", 3.0) for n in (1, 2, 10)]
    write_rows(
        folder / "curves.parquet",
        CURVE,
        [(name, m, s, RATES[m], *point) for m, s in models for point in curve],
    )
    bins = [(split, "click", n) for split in ("valid", "test") for n in (0, 1)]
    write_rows(
        folder / "reliability.parquet",
        RELIABILITY,
        [
            (name, m, s, split, task, n, 0.2 + 0.4 * n, 0.1 + 0.3 * n + 0.1 * s, 50)
            for m, s in models
            for split, task, n in bins
        ],
    )
    ranks = [(step, layer, 10.0 * step + layer) for step in (1, 2) for layer in (0, 1)]
    write_rows(
        folder / "ranks.parquet",
        RANK,
        [(name, m, s, t, n, r + s) for m, s in models for t, n, r in ranks],
    )
    sigma = [(layer, index, 2.0**-index) for layer in (0, 1) for index in range(4)]
    write_rows(
        folder / "spectra.parquet",
        SPECTRUM,
        [(name, m, s, *value) for m, s in models for value in sigma],
    )
    mass = [
        (layer, head, *of)
        for layer in (0, 1)
        for head in (0, 1)
        for of in (("user", 0.25), ("event 0", 0.75))
    ]
    write_rows(
        folder / "attention.parquet",
        ATTENTION,
        [(name, model, *of) for model in RATES for of in mass],
    )
    told = [
        (layer, "click", count, 0.1 + layer / count)
        for layer in (-1, 0, 1)
        for count in (50, 100)
    ]
    write_rows(
        folder / "information.parquet",
        INFORMATION,
        [(name, m, s, *of) for m, s in models for of in told],
    )
    cells = [
        (layer, q, k, 0.5 if k <= q else 0.0)
        for layer in (0, 1)
        for q in (0, 4)
        for k in (0, 4)
    ]
    write_rows(
        folder / "maps.parquet",
        MAPS,
        [(name, model, *of) for model in RATES for of in cells],
    )
    (folder / "states.json").write_text(
        json.dumps({"command": "python -m benchmarks.study_states --study=made-up"})
    )
    (folder / "flops.json").write_text(json.dumps({"ours": 2e6, "rival": 8e6}))
    return folder


def write_about(folder: Path, name: str = NAME, **changed: Any) -> None:
    about = {
        "study": name,
        "command": "tokenrec study --config=made_up --out=studies/made-up",
        "base": {"seed": 0, "model": {"width": 32}},
        "arms": {
            "ours": {},
            "rival": {"model.gate": False},
            "plain": {"model.windows": []},
        },
        "learning_rates": [0.001, 0.01],
        "seeds": [0, 1, 2],
        "cpu_hours": 2.0,
        "spent_cpu_hours": 1.25,
        "versions": {"jax": "0.12.0"},
        "reference": "ours",
        "data": {
            "rows": {"valid": 9000, "test": 9500},
            "positives": {"valid": POSITIVES, "test": POSITIVES},
        },
    }
    (folder / "study.json").write_text(json.dumps(about | changed))


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    values = zip(*rows, strict=True) if rows else ([] for _ in columns)
    pq.write_table(
        pa.table({name: list(of) for name, of in zip(columns, values, strict=True)}),
        path,
    )


def result_rows(name: str = NAME) -> list[Row]:
    """Final seeds at the chosen rates, seed 0 at the other rate, and a baseline."""
    rows: list[Row] = []
    for model, rate in RATES.items():
        for seed, auc in enumerate(CLICK_AUC[model]):
            values = {
                ("click", "auc"): auc,
                ("click", "log_loss"): 1 - auc,
                ("rare", "auc"): auc,
                ("macro", "auc"): auc,
            }
            rows += [
                (name, model, seed, rate, *of)
                for of in _on_both(values, 1000.0 + seed, 4321)
            ]
        other = {0.001: 0.01, 0.01: 0.001}[rate]
        rows.append(
            (
                name,
                model,
                0,
                other,
                "valid",
                "macro",
                "auc",
                SEARCH_AUC[model],
                1000.0,
                4321,
            )
        )
    baseline = {
        ("click", "auc"): 0.65,
        ("click", "log_loss"): 0.66,
        ("rare", "auc"): 0.6,
        ("macro", "auc"): 0.625,
    }
    return rows + [
        (name, "item_rate", -1, None, *of) for of in _on_both(baseline, None, None)
    ]


def difference_rows(
    name: str = NAME, gaps: Mapping[str, tuple[float, float, float]] = GAPS
) -> list[Row]:
    """AUC of both tasks and log loss of click, of which less is better."""
    rows: list[Row] = []
    for model, (gap, low, high) in gaps.items():
        for split in ("valid", "test"):
            who = (name, model, "ours", split)
            rows.append((*who, "click", "auc", gap, low, high, 0.01, 800, 2000, 3))
            rows.append(
                (*who, "click", "log_loss", -gap, -high, -low, 0.01, 800, 2000, 0)
            )
            rows.append((*who, "rare", "auc", gap, low, high, 0.01, 800, 57, 140))
    return rows


def _on_both(
    values: Mapping[tuple[str, str], float], speed: float | None, parameters: int | None
) -> list[Row]:
    return [
        (split, *of, value, speed, parameters)
        for split in ("valid", "test")
        for of, value in values.items()
    ]
