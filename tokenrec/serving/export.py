"""Export a run as an artifact: a folder that scores requests without this code's trainer.

The folder is written beside its place under another name, checks itself against
`tokenrec predict`, and is renamed when it is whole. docs/guides/serving.md describes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax import export

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.id_counts import map_rare_items
from tokenrec.data.metadata import STATE
from tokenrec.data.schema import Schema
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.runtime.versions import versions
from tokenrec.serving.artifact import (
    COUNTERS,
    FORMAT,
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    digest_manifest,
    file_entry,
)
from tokenrec.serving.export_programs import (
    has_prefix,
    history_length,
    make_programs,
    served_weights,
    serving_model,
    weight_shapes,
)
from tokenrec.serving.export_requests import PredictedRequest, predicted_requests
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import open_artifact
from tokenrec.sharding import make_mesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Requests that are compared with `tokenrec predict`, and those that the artifact keeps.
CHECKED_REQUESTS = 256
GOLDEN_REQUESTS = 64
# Programs of JAX 0.11 and later can be read by these (serving.md).
OLDEST_JAX = "0.11.0"
# Largest difference of a score from `predict`, by the dtype of the computation. Of a
# number that is larger than 1, relative.
_TOLERANCES = {"float32": 1e-6, "bfloat16": 2e-2}


def export_run(
    workdir: Path,
    out: Path,
    *,
    checkpoint: str = "best",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    data: Path | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Export a run.

    Args:
      workdir: folder of the run.
      out: folder to make.
      checkpoint: "best", "latest" or a step.
      platforms: what the programs are compiled for: "cpu", "cuda", "rocm", "tpu".
      data: folder of the data set, if it has moved.
      tolerance: largest difference of a score from `tokenrec predict`; None for that of
        the dtype, 1e-6 in float32.

    Returns:
      The manifest.

    Raises:
      InputError: the run or `out` is wrong, the model cannot be exported, or its
        artifact scores otherwise than `tokenrec predict`.
    """
    if out.exists():
        raise InputError(f"--out '{out}' exists; name a new folder, or remove it")
    for name in platforms:
        if name not in PLATFORMS:
            raise InputError(
                f"--platforms: '{name}' is none of {', '.join(PLATFORMS)}; name some"
            )
    config = load_run_config(workdir, data)
    check_config(config)
    mesh = make_mesh(config.mesh)
    partial = out.with_name(f".{out.name}.incomplete-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        with jax.set_mesh(mesh):
            run = open_run(workdir, checkpoint, data)
            check_schema(run.model.schema)
            split = _check_split(run)
            predicted = list(predicted_requests(run, split, mesh, CHECKED_REQUESTS))
        if tolerance is None:
            tolerance = _TOLERANCES[config.model.dtype]
        manifest = _write_files(run, partial, platforms, tolerance)
        manifest["checked"] = {"split": split, "requests": len(predicted)}
        _write_manifest(partial, manifest)
        _check_scores(partial, predicted, tolerance)
        _write_golden(partial, predicted)
        _write_manifest(partial, manifest)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_config(config: Config) -> None:
    """Check that the model of a config can be exported.

    Raises:
      InputError: it cannot; names the field.
    """
    if config.data.objective != "ranking":
        raise InputError(
            f"data.objective='{config.data.objective}': `tokenrec export` serves models "
            "of 'ranking' so far; use `tokenrec predict` for this run"
        )
    if config.data.paradigm == "uc" and config.data.events < 2:
        raise InputError(
            "data.events=1 with data.paradigm='uc': a request would have no history; "
            "train with more events"
        )


def check_schema(schema: Schema) -> None:
    """Check that a caller can send the features of a schema.

    Raises:
      InputError: a feature that is not one of items is a text.
    """
    for f in schema.features:
        if f.kind == "text" and f.group != "catalogue":
            raise InputError(
                f"feature '{f.name}' is a text of the {f.entity}, and `tokenrec export` "
                "serves texts of the catalogue alone; train with "
                f"data.exclude=('{f.name}',)"
            )


def _check_split(run: OpenedRun) -> str:
    """The split whose requests are compared: test, or what there is."""
    splits = run.dataset.splits
    for name in ("test", "valid", "train"):
        if name in splits:
            return name
    raise InputError(f"data '{run.dataset.directory}' has no split; prepare it again")


def _write_files(
    run: OpenedRun, folder: Path, platforms: Sequence[str], tolerance: float
) -> dict[str, Any]:
    """Write all but the golden requests; return the manifest less its files."""
    config, schema = run.model.config, run.model.schema
    model = serving_model(run.model)
    dataset = run.dataset
    plans = run.model.evaluated_plans
    ignored = {f.name for f in dataset.metadata.schema.features}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "oldest_jax": OLDEST_JAX,
        "platforms": list(platforms),
        "step": run.step,
        "objective": config.data.objective,
        "paradigm": config.data.paradigm,
        "dtype": config.model.dtype,
        "tolerance": tolerance,
        "tasks": [plan.task.name for plan in plans],
        "outputs": [
            name
            for plan in plans
            for name in (
                [f"score_{plan.task.name}_{of}" for of in plan.task.classes]
                if plan.task.kind == "classes"
                else [f"score_{plan.task.name}"]
            )
        ],
        "events": history_length(model),
        "candidates": (
            0
            if has_prefix(model)
            else 1
            if config.data.paradigm == "uc"
            else config.data.candidates
        ),
        "ages": reads_event_ages(config.model),
        "query": any(segment.kind == "query" for segment in parse_prompt(config)),
        "key_types": dict(dataset.metadata.key_types),
        # Features of the data set that the model does not read.
        "ignored": sorted(ignored - {f.name for f in schema.features}),
        "schema": json.loads(json.dumps(schema.to_json())),
    }
    manifest["programs"] = _write_programs(model, folder, platforms)
    manifest |= _write_weights(run, folder)
    manifest |= _write_data(run, folder)
    _write_counters(run, folder)
    return manifest


def _write_programs(
    model: Any, folder: Path, platforms: Sequence[str]
) -> dict[str, str]:
    """Export the programs with open numbers of requests and candidates."""
    (folder / "programs").mkdir()
    names = {}
    for name, program in make_programs(model).items():
        batch, candidates = export.symbolic_shape("b, c")
        exported = export.export(jax.jit(program.function), platforms=platforms)(
            weight_shapes(model), program.inputs(batch, candidates)
        )
        names[name] = f"programs/{name}.jax"
        (folder / names[name]).write_bytes(exported.serialize())
    return names


def _write_weights(run: OpenedRun, folder: Path) -> dict[str, dict[str, str]]:
    """Write each weight and each stack of tables as a `.npy` file."""
    (folder / "weights").mkdir()
    weights = served_weights(run.model, run.state)
    names: dict[str, dict[str, str]] = {}
    for part, arrays in weights.items():
        names[part] = {}
        for number, name in enumerate(sorted(arrays)):
            # Names of weights hold slashes; the manifest says which file is which.
            file = f"weights/{part}_{number:04}.npy"
            np.save(folder / file, arrays[name], allow_pickle=False)
            names[part][name] = file
    return names


def _write_data(run: OpenedRun, folder: Path) -> dict[str, dict[str, str]]:
    """Write vocabularies, rare ids, items and the tokenizer."""
    dataset, schema = run.dataset, run.model.schema
    names: dict[str, dict[str, str]] = {"vocabularies": {}, "rare_ids": {}}
    (folder / "vocabularies").mkdir()
    tables = sorted({f.table_name for f in schema.features if f.has_vocabulary})
    for number, table in enumerate(tables):
        values = pa.array(load_vocabulary(dataset.directory, table))
        names["vocabularies"][table] = _write_values(
            folder, f"vocabularies/{number:04}.parquet", values
        )
        if table in dataset.rare_ids:
            file = f"vocabularies/{number:04}_rows.npy"
            np.save(folder / file, dataset.rare_ids[table], allow_pickle=False)
            names["rare_ids"][table] = file
    (folder / "items").mkdir()
    catalogue = map_rare_items(dataset.catalogue, schema, dataset.rare_ids)
    _write_values(folder, "items/item_id.parquet", pa.array(catalogue.item_id))
    for name in ("ids", "dense"):
        array = np.ascontiguousarray(getattr(catalogue, name))
        np.save(folder / "items" / f"{name}.npy", array, allow_pickle=False)
    tokenizer = dataset.directory / TOKENIZER_FILE
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    return names


def _write_values(folder: Path, name: str, values: pa.Array) -> str:
    if pa.types.is_null(values.type):
        values = values.cast(pa.int64())
    pq.write_table(pa.table({"value": values}), folder / name)
    return name


def _write_counters(run: OpenedRun, folder: Path) -> None:
    """Write the live state that events keep up to date, if the data set has one."""
    dataset, config = run.dataset, run.model.config
    if not dataset.metadata.state or not (dataset.directory / STATE).is_dir():
        return
    from tokenrec.serving.live_export import write_live_state

    write_live_state(
        dataset.directory,
        folder / COUNTERS,
        events=config.data.events,
        exclude=config.data.exclude,
    )


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` with the digests of all other files, in place."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        path.relative_to(folder).as_posix(): file_entry(path)
        for path in paths
        if path.name != MANIFEST_FILE
    }
    manifest["digest"] = digest_manifest(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _check_scores(
    folder: Path, predicted: Sequence[PredictedRequest], tolerance: float
) -> None:
    """Check the scores of an artifact against those of `predict`.

    Raises:
      InputError: one differs by more than the tolerance.
    """
    scorer = open_artifact(folder, check=False)
    limits = _no_limits()
    requests = [
        scorer.encode(parse_request(json.loads(json.dumps(request)), limits))
        for request, _ in predicted
    ]
    scores = scorer.score(requests)
    for number, (found, (_, wanted)) in enumerate(zip(scores, predicted, strict=True)):
        difference = np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)
        # Written so that NaN fails.
        if not (difference <= tolerance).all():
            raise InputError(
                f"--tolerance {tolerance:g}: request {number} of {len(predicted)} has a "
                f"score that differs by {np.nanmax(difference):.3g} from that of "
                "`tokenrec predict`; raise the tolerance if that is rounding, and "
                "otherwise report it"
            )


def _no_limits() -> Limits:
    most = 1 << 31
    return Limits(most, most, most, most, most)


def _write_golden(folder: Path, predicted: Sequence[PredictedRequest]) -> None:
    """Keep some of the requests with the scores of `predict`, evenly spread."""
    count = min(GOLDEN_REQUESTS, len(predicted))
    chosen = [predicted[i * len(predicted) // count] for i in range(count)]
    lines = [
        json.dumps({"request": request, "scores": scores.tolist()}, allow_nan=False)
        for request, scores in chosen
    ]
    (folder / GOLDEN_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
