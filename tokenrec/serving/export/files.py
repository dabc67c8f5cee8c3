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
from tokenrec.config import HeadConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.id_counts import map_rare_items
from tokenrec.data.metadata import STATE
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.runtime.versions import versions
from tokenrec.serving.artifact import COUNTERS, FORMAT, FORMAT_VERSIONS
from tokenrec.serving.export.programs import fixed_candidates, make_programs
from tokenrec.serving.export.retrieval_programs import (
    CATALOGUE,
    catalogue_weights,
    make_retrieval_programs,
)
from tokenrec.serving.export.served_model import (
    Program,
    Weights,
    history_length,
    reads_query,
    served_weights,
    serving_model,
)

# Programs of JAX 0.11 and later can be read by these (serving.md).
OLDEST_JAX = "0.11.0"
# Items of an answer where `export` is not told: the whole catalogue is scored anyway.
DEFAULT_MAX_K = 100


def default_max_k(head: HeadConfig, items: int) -> int:
    """The longest answer of a retrieval artifact, if `export` is not told.

    Args:
      head: `head` of the run's config.
      items: V.
    """
    if head.retrieval == "semantic_id":
        # All beams are computed.
        return min(head.beams, items)
    return min(max(head.top_k, DEFAULT_MAX_K), items)


def write_files(
    run: OpenedRun,
    folder: Path,
    platforms: Sequence[str],
    tolerance: float,
    max_k: int | None = None,
) -> dict[str, Any]:
    """Write all but the golden requests; return the manifest less its files.

    Args:
      run: the run.
      folder: an empty folder.
      platforms: what the programs will run on.
      tolerance: largest difference of a score from `predict`.
      max_k: retrieval: the longest answer; None for `default_max_k`.
    """
    config, schema = run.model.config, run.model.schema
    model = serving_model(run.model)
    dataset = run.dataset
    retrieval = config.data.objective == "retrieval"
    plans = () if retrieval else run.model.evaluated_plans
    ignored = {f.name for f in dataset.metadata.schema.features}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSIONS[config.data.objective],
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
        "candidates": 0 if retrieval else fixed_candidates(model),
        "ages": reads_event_ages(config.model),
        "query": reads_query(model),
        "key_types": dict(dataset.metadata.key_types),
        # Features of the data set that the model does not read.
        "ignored": sorted(ignored - {f.name for f in schema.features}),
        "schema": json.loads(json.dumps(schema.to_json())),
    }
    weights = served_weights(run.model, run.state)
    # What training alone reads stays behind: vectors that score words.
    weights["params"] = {n: weights["params"][n] for n in model.param_shapes()}
    if retrieval:
        items = dataset.known_items
        manifest |= {
            "head": config.head.retrieval,
            "max_k": default_max_k(config.head, items) if max_k is None else max_k,
            "drop_seen": config.head.drop_seen,
            "items": items,
        }
        weights[CATALOGUE] = catalogue_weights(run)
        programs = make_retrieval_programs(
            model, weights[CATALOGUE], items, manifest["max_k"]
        )
    else:
        programs = make_programs(model)
    manifest["programs"] = _write_programs(programs, weights, folder, platforms)
    manifest |= _write_weights(weights, folder)
    manifest |= _write_data(run, folder)
    if retrieval:
        manifest["filter_ids"] = _write_filter_ids(run, folder)
    _write_counters(run, folder)
    return manifest


def _write_programs(
    programs: dict[str, Program],
    weights: Weights,
    folder: Path,
    platforms: Sequence[str],
) -> dict[str, str]:
    """Export the programs with open numbers of requests and candidates."""
    (folder / "programs").mkdir()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    names = {}
    for name, program in programs.items():
        batch, candidates = export.symbolic_shape("b, c")
        exported = export.export(jax.jit(program.function), platforms=platforms)(
            shapes, program.inputs(batch, candidates)
        )
        names[name] = f"programs/{name}.jax"
        (folder / names[name]).write_bytes(exported.serialize())
    return names


def _write_weights(weights: Weights, folder: Path) -> dict[str, dict[str, str]]:
    """Write each weight and each stack of tables as a `.npy` file."""
    (folder / "weights").mkdir()
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


def _write_filter_ids(run: OpenedRun, folder: Path) -> str:
    """Write the ids that a filter compares, unless they are those of the model."""
    if not run.dataset.rare_ids:
        return "items/ids.npy"
    name = "items/filter_ids.npy"
    ids = np.ascontiguousarray(run.dataset.catalogue.ids)
    np.save(folder / name, ids, allow_pickle=False)
    return name


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
