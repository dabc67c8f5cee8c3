"""A run on disk: its config and the schema it was trained on, beside its checkpoints; opened again for use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from tokenrec.checkpoint.checkpointer import FOLDER, CheckpointReader
from tokenrec.config import (
    Config,
    data_directory,
    read_config,
    semantic_ids_path,
    to_json,
)
from tokenrec.config.validate import validate
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import task_names
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.runtime import distributed
from tokenrec.runtime.files import write_text_atomically
from tokenrec.state import ModelSpec, TrainState, abstract_state, build_model

CONFIG_FILE = "config.json"
SCHEMA_FILE = "schema.json"

# Sections and fields that a resumed run may change: they do not touch what is learned from the steps already made.
FREE_TO_CHANGE = (
    *(
        "train",
        "optim.max_skipped",
        "mesh",
        "data.path",
        "data.name",
        "data.schema",
        "data.eval_batch_size",
    ),
    *("head.beams", "head.top_k", "head.drop_seen"),
)


class OpenedRun(NamedTuple):
    """A trained run, opened to be used: step and state of the chosen checkpoint, and the data set it reads."""

    model: ModelSpec
    dataset: Dataset
    step: int
    state: TrainState


def create_or_check_run(config: Config, schema: Schema, workdir: Path) -> None:
    """Writes the files of a new run, or checks that an earlier run there is the same one. The first process does it.

    Raises:
      InputError: the folder holds a run with another config (the differences are listed) or data set; or other
        processes do not see it.
    """
    with distributed.raise_on_all_processes():
        if distributed.is_first_process():
            _write(config, schema, workdir)
    with distributed.raise_on_all_processes():
        if not (workdir / CONFIG_FILE).is_file():
            raise InputError(
                f"workdir '{workdir}' lacks the {CONFIG_FILE} that process 0 just wrote; give all processes one "
                "--workdir that they share"
            )
        check_schema(schema, workdir)


def _write(config: Config, schema: Schema, workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir '{workdir}' cannot be made: {error.strerror}; give another folder"
        ) from error
    path = workdir / CONFIG_FILE
    if path.is_file():
        # A field that the run's version did not have takes its default.
        before, now = (_flat(json.loads(to_json(one))) for one in (_read(path), config))
        changed = [
            f"{field}: {before.get(field)!r} -> {now.get(field)!r}"
            for field in sorted(before.keys() | now.keys())
            if before.get(field) != now.get(field) and not _may_change(field)
        ]
        if changed:
            raise InputError(
                f"workdir '{workdir}' holds a run with another config; use another --workdir, or undo\n  "
                + "\n  ".join(changed)
            )
        check_schema(schema, workdir)
    # Whole, each of them: a run killed here would be refused for half a file when it is started again.
    write_text_atomically(workdir / SCHEMA_FILE, _schema_text(schema))
    write_text_atomically(path, to_json(config))


def _read(path: Path) -> Config:
    try:
        return read_config(path)
    except InputError as error:
        raise InputError(
            f"{error}; put the run's own back: each checkpoint has a copy, 'config' in {path.parent}/{FOLDER}/STEP/"
            "_CHECKPOINT_METADATA"
        ) from error


def run_identity(config: Config, dataset: Dataset) -> dict[str, object]:
    """What must be equal in all processes of a run: each may have its own copy of the data set, of the same rows."""
    fields = {
        f"config {name}": value
        for name, value in _flat(dataclasses.asdict(config)).items()
    }
    del fields["config data.path"]
    rows = {
        f"data, rows of {split}": _digest(dataset.chunk_lengths(split).tobytes())
        for split in dataset.splits
    }
    whole = dataclasses.replace(dataset.metadata, schema=dataset.schema)
    return (
        fields
        | rows
        | {
            "data, schema and metadata": _digest(
                json.dumps(dataclasses.asdict(whole)).encode()
            )
        }
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _may_change(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in FREE_TO_CHANGE)


def _flat(value: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat |= (
            _flat(item, f"{prefix}{key}.")
            if isinstance(item, dict)
            else {prefix + key: item}
        )
    return flat


def check_schema(schema: Schema, workdir: Path) -> None:
    """Raises InputError if the data set is not the one that the run was trained on."""
    path = workdir / SCHEMA_FILE
    if path.read_text() != _schema_text(schema):
        raise InputError(
            f"the data set has another schema, vocabulary size, normalisation or semantic ids than the one this run "
            f"was trained on ('{path}'); give --data the folder it was trained on, and data.semantic_ids its file"
        )


def _schema_text(schema: Schema) -> str:
    return json.dumps(schema.to_json(), indent=1) + "\n"


def open_run(workdir: Path, checkpoint: str, data: Path | None) -> OpenedRun:
    """Opens the run in `workdir` at a checkpoint; call under `jax.set_mesh`, in all processes.

    Raises:
      InputError: no run or checkpoint there, the data set does not fit the run, or processes do not agree.
    """
    with distributed.raise_on_all_processes():
        model, dataset = open_model(workdir, data)
    distributed.assert_same_on_all_processes(
        run_identity(model.config, dataset) | {"--checkpoint": checkpoint}
    )
    with CheckpointReader(workdir) as checkpoints:
        step, state = checkpoints.load_state(checkpoint, abstract_state(model))
    return OpenedRun(model, dataset, step, state)


def open_model(workdir: Path, data: Path | None) -> tuple[ModelSpec, Dataset]:
    """The model of a run, without weights, and its data set.

    Raises:
      InputError: no run there, or the data set is not the one that it was trained on.
    """
    config = load_run_config(workdir, data)
    dataset = open_dataset(
        data_directory(config), config.data.exclude, semantic_ids_path(config)
    )
    check_schema(dataset.schema, workdir)
    return build_model(
        config, dataset.schema, task_names(dataset.schema, config.data)
    ), dataset


def load_run_config(workdir: Path, data: Path | None) -> Config:
    """The config that a run was trained with, reading its data from `data` if given."""
    path = Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"workdir '{workdir}' holds no run (no {CONFIG_FILE}); train first, or check --workdir"
        )
    config = _read(path)
    if data is not None:
        config.data.path = str(data)
    return validate(config)
