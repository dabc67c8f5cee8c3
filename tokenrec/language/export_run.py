"""Give the language model of a run back, in the format that its ecosystem reads.

model.safetensors, config.json, ..   the language model, adapters merged, new rows added
tokenizer.json                       with the new words (new_words.py)
tokenrec.safetensors                 makers, heads and embedding tables, by name
tokenrec.json, tokenrec_schema.json  config of the run, and features of its data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import to_json
from tokenrec.config.backbones import BACKBONES, is_decoder
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.language.export import ExportedCheckpoint, write_checkpoint
from tokenrec.language.new_words import (
    add_tokens,
    count_tokens,
    new_words,
    place_rows,
)
from tokenrec.language.tensor_files import open_tensor_files
from tokenrec.language.tensor_writer import TensorSpec, write_tensor_file
from tokenrec.language.weight_names import (
    find_naming,
    weight_layouts,
)
from tokenrec.runtime.local_copy import local_copy
from tokenrec.serving.export.served_model import served_weights, serving_model
from tokenrec.sharding import make_run_mesh
from tokenrec.tuning import group_of, split_frozen

MAKERS_FILE = "tokenrec.safetensors"
RUN_CONFIG_FILE = "tokenrec.json"
SCHEMA_FILE = "tokenrec_schema.json"
_ADAPTERS = "adapters"


class ExportedModel(NamedTuple):
    """What `export_language_model` wrote.

    Attributes:
      step: step of the checkpoint.
      checkpoint: the language model.
      new_words: tokens that it did not have before.
      others: number of weights in `tokenrec.safetensors`.
    """

    step: int
    checkpoint: ExportedCheckpoint
    new_words: tuple[str, ...]
    others: int


def export_language_model(
    workdir: Path,
    out: Path,
    *,
    checkpoint: str = "best",
    data: Path | None = None,
    dtype: str = "",
) -> ExportedModel:
    """Write the language model of a run as a Hugging Face checkpoint.

    Args:
      workdir: folder of the run.
      out: folder to make.
      checkpoint: "best", "latest" or a step.
      data: folder of the data set, if it has moved.
      dtype: type of the weights; empty for that of each tensor in `model.pretrained`.

    Raises:
      InputError: the run has no language model, `out` exists, or `model.pretrained` is
        needed and is not there.
    """
    if out.exists():
        raise InputError(f"--out '{out}' exists; name a new folder, or remove it")
    config = load_run_config(workdir, data)
    if not is_decoder(config.model):
        kinds = [kind for kind, spec in BACKBONES.items() if spec.decoder]
        raise InputError(
            f"--format=hf with model.kind='{config.model.kind}': only language models "
            f"have this format, {', '.join(kinds)}; use --format=artifact"
        )
    with jax.set_mesh(make_run_mesh(config)):
        run = open_run(workdir, checkpoint, data)
        weights = served_weights(run.model, run.state)
    folder = config.model.pretrained
    source = local_copy(folder) if folder else None
    params: dict[str, np.ndarray] = weights["params"]
    words = new_words(params, _levels(run), tied=config.model.decoder.tied)
    # What is frozen is that of the source, in its type.
    trained, _ = split_frozen(config, params)
    of_model = {
        name: value
        for name, value in trained.items()
        if group_of(name) in ("base", "words", _ADAPTERS)
    }
    first = count_tokens(source)
    first = config.model.decoder.vocabulary if first is None else first
    extra: dict[str, np.ndarray] = {}
    for name, rows in words.rows.items():
        vectors = _word_vectors(run, of_model, name, source)
        of_model[name], extra[name] = place_rows(vectors, rows, first)
    others = {
        name: value
        for name, value in params.items()
        if group_of(name) not in ("base", "words", _ADAPTERS)
        and name not in words.weights
    } | _tables(run, weights["tables"])

    def add_files(partial: Path) -> None:
        if words.names and count_tokens(partial) is not None:
            add_tokens(partial, words.names, first)
        _write_others(partial, others)
        (partial / RUN_CONFIG_FILE).write_text(to_json(config))
        (partial / SCHEMA_FILE).write_text(_schema_json(run.model.schema))

    exported = write_checkpoint(
        out,
        config,
        of_model,
        source=source,
        extra_rows=extra,
        dtype=dtype,
        add_files=add_files,
    )
    if config.model.windows:
        print(
            f"tokenrec: model.windows={config.model.windows} is no part of this format: "
            "other programs use the model's own windows alone",
            file=sys.stderr,
        )
    return ExportedModel(
        run.step, exported, words.names, sum(value.size for value in others.values())
    )


def _levels(run: OpenedRun) -> tuple[int, ...]:
    """Codes of each level, where the head generates semantic ids."""
    config = run.model.config
    generates = (
        config.data.objective == "retrieval" and config.head.retrieval == "semantic_id"
    )
    return run.model.schema.levels if generates else ()


def _word_vectors(
    run: OpenedRun, params: dict[str, np.ndarray], name: str, source: Path | None
) -> np.ndarray:
    """Vectors of the model's own words, `[V, d]`: trained, or those of the source."""
    count = run.model.config.model.decoder.vocabulary
    if name in params:
        return params[name][:count]
    # Frozen weights come from a folder.
    assert source is not None
    files = open_tensor_files(source)
    layout = weight_layouts(run.model.config.model)[name]
    tensor = find_naming(files.tensors).full(layout.tensors[0])
    return np.asarray(files.view(tensor))


def _tables(run: OpenedRun, stacks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embedding tables by name, `"tables/NAME": [rows, width]`."""
    embedder = serving_model(run.model).embedder
    tables = {}
    for name, stack in embedder.stacks.items():
        for table, start in stack.offsets.items():
            rows = embedder.tables[table]
            tables[f"tables/{table}"] = stacks[name][start : start + rows]
    return tables


def _write_others(folder: Path, weights: dict[str, np.ndarray]) -> None:
    specs = [
        TensorSpec(name, value.dtype, value.shape)
        for name, value in sorted(weights.items())
    ]
    write_tensor_file(
        folder / MAKERS_FILE, specs, (weights[spec.name] for spec in specs)
    )


def _schema_json(schema: Schema) -> str:
    return json.dumps(schema.to_json(), indent=1) + "\n"
