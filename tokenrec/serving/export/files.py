"""Write the files of an artifact, all but its manifest and its golden requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax import export

from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.id_counts import map_rare_items
from tokenrec.data.metadata import STATE
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.runtime.versions import versions
from tokenrec.serving.artifact import COUNTERS, FORMAT, FORMAT_VERSION
from tokenrec.serving.export.programs import (
    has_prefix,
    history_length,
    make_programs,
    served_weights,
    serving_model,
    weight_shapes,
)

# Programs of JAX 0.11 and later can be read by these (serving.md).
OLDEST_JAX = "0.11.0"


def write_files(
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
    from tokenrec.serving.export.live import write_live_state

    write_live_state(
        dataset.directory,
        folder / COUNTERS,
        events=config.data.events,
        exclude=config.data.exclude,
    )
