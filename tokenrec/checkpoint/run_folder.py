"""The folder of a run: create it, check it on resume, and open a trained run.

`WORKDIR/config.json` holds the config, `WORKDIR/schema.json` the schema of the data set
that the run is trained on, and `WORKDIR/rows.json` the identity of its log rows;
`WORKDIR/checkpoints` holds the checkpoints. With `tokens.min_count` there are the counts
of ids too, `WORKDIR/id_counts.npz`, and with `model.pretrained` the digest of its weights,
`WORKDIR/pretrained.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from tokenrec.checkpoint.pretrained import (
    add_frozen,
    record_pretrained,
    saved_part,
)
from tokenrec.checkpoint.reader import CHECKPOINTS_FOLDER, CheckpointReader
from tokenrec.config import (
    Config,
    data_directory,
    read_config,
    semantic_ids_path,
    to_json,
)
from tokenrec.config.flatten import flatten_fields
from tokenrec.config.types import has_type
from tokenrec.config.validate import validate
from tokenrec.data.dataset import Dataset, RowIdentity, open_dataset
from tokenrec.data.id_counts import (
    COUNTS_FILE,
    asks_for_counts,
    count_ids,
    load_counts,
    rare_ids,
    save_counts,
)
from tokenrec.data.pipeline import task_names
from tokenrec.data.schema import Schema
from tokenrec.data.schema_difference import schema_differences
from tokenrec.errors import InputError, StorageError
from tokenrec.runtime import distributed
from tokenrec.runtime.files import (
    is_file,
    read_json,
    write_json,
    write_text_atomically,
)
from tokenrec.runtime.paths import as_path, make_folder
from tokenrec.runtime.retry import retry
from tokenrec.state import ModelSpec, TrainState, abstract_state, build_model

CONFIG_FILE = "config.json"
SCHEMA_FILE = "schema.json"
ROWS_FILE = "rows.json"

# Sections and fields that may differ when a run resumes: they do not change what the
# steps made so far have learned.
FREE_TO_CHANGE = (
    "train",
    "optim.max_skipped",
    "mesh",
    "model.scan_unroll",
    "model.pretrained",
    "data.path",
    "data.name",
    "data.schema",
    "data.eval_batch_size",
    "head.beams",
    "head.top_k",
    "head.drop_seen",
)


class OpenedRun(NamedTuple):
    """A trained run at one checkpoint.

    Attributes:
      model: the model, without weights.
      dataset: the data set that the run reads.
      step: step of the checkpoint.
      state: state of the checkpoint.
    """

    model: ModelSpec
    dataset: Dataset
    step: int
    state: TrainState


def use_id_counts(
    config: Config, dataset: Dataset, workdir: Path, *, trained: bool
) -> None:
    """Give a data set the counts of ids that the run's `tokens.min_count` needs.

    Args:
      config: the run's config.
      dataset: the data set; its `id_counts` and `rare_ids` are set.
      workdir: folder of the run, which keeps the counts.
      trained: the run exists, and its counts are those of its folder. Otherwise they
        are counted in the training split if it has none; `create_or_check_run` writes
        them.

    Raises:
      InputError: the run exists and lacks its counts, or they are damaged.
    """
    if not asks_for_counts(config.tokens):
        return
    kept = trained or _has_counts(workdir)
    counts = load_counts(workdir, dataset.schema) if kept else count_ids(dataset)
    dataset.id_counts = counts
    dataset.rare_ids = rare_ids(counts, config.tokens)


def _has_counts(workdir: Path) -> bool:
    # The config is the last file that a new run writes: without it the counts may be
    # those of another data set.
    return is_file(workdir / CONFIG_FILE) and is_file(workdir / COUNTS_FILE)


def steps_of_run(workdir: Path, epochs: float) -> int:
    """Read the steps of a run whose length is `epochs`; 0 if the folder holds none.

    They are those of the data set that the run began with.
    """
    path = workdir / CONFIG_FILE
    if not is_file(path):
        return 0
    optim = _read_run_config(path).optim
    return optim.steps if optim.epochs == epochs else 0


def create_or_check_run(config: Config, dataset: Dataset, workdir: Path) -> None:
    """Write the files of a new run, or check that the folder holds this run.

    Args:
      config: the run's config.
      dataset: the data set.
      workdir: folder of the run.

    Raises:
      InputError: the folder holds a run with another config (the message lists the
        differences) or data set, or the processes do not share the folder.
    """
    # 1. The first process checks and writes.
    with distributed.raise_on_all_processes():
        if distributed.is_first_process():
            _write_or_check(config, dataset, workdir)
    # 2. The others must find what it wrote: each host may have a folder of this name.
    with distributed.raise_on_all_processes():
        if not is_file(workdir / CONFIG_FILE):
            raise InputError(
                f"workdir '{workdir}' lacks the {CONFIG_FILE} that process 0 has "
                "written; give all processes one --workdir that they share"
            )
        check_schema(dataset.schema, workdir)


def create_workdir(workdir: Path) -> None:
    """Create the folder of a run.

    Raises:
      InputError: it cannot be created.
      StorageError: the storage is at fault.
    """
    try:
        retry(lambda: make_folder(workdir), workdir)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(
            f"--workdir '{workdir}' cannot be created: {error.strerror or error}; give "
            "another folder"
        ) from error


def _write_or_check(config: Config, dataset: Dataset, workdir: Path) -> None:
    create_workdir(workdir)
    path = workdir / CONFIG_FILE
    rows = {split: dataset.row_identity(split) for split in dataset.splits}
    if is_file(path):
        _check_config(_read_run_config(path), config, workdir)
        check_schema(dataset.schema, workdir)
        rows = _check_rows(rows, workdir)
    # The files are replaced atomically: with half a file the run could not resume.
    write_json(
        workdir / ROWS_FILE, {split: value._asdict() for split, value in rows.items()}
    )
    write_text_atomically(workdir / SCHEMA_FILE, _schema_text(dataset.schema))
    if dataset.id_counts is not None and not _has_counts(workdir):
        save_counts(dataset.id_counts, workdir)
    record_pretrained(config, workdir)
    write_text_atomically(path, to_json(config))


def _check_rows(now: dict[str, RowIdentity], workdir: Path) -> dict[str, RowIdentity]:
    """Check that the log rows are those that the run was started with.

    Which samples are left of an epoch follows from the rows and the step alone.

    Returns:
      What the run keeps from now on: all that is known of its rows.

    Raises:
      InputError: they are others.
    """
    path = workdir / ROWS_FILE
    if not is_file(path):
        print(
            f"tokenrec: '{workdir}' is a run from before rows were compared: that the "
            "data set has the rows that it was trained on cannot be checked; those of "
            f"now are noted in {ROWS_FILE}",
            file=sys.stderr,
        )
        return now
    before = _read_rows(path)
    changed = [
        f"{split}: {_describe_change(before.get(split), now.get(split))}"
        for split in sorted(before.keys() | now.keys())
        if _rows_differ(before.get(split), now.get(split))
    ]
    if changed:
        raise InputError(
            f"the data set has other log rows than the one that '{workdir}' was trained "
            f"on ('{path}'), though its schema is the same; samples would be left out "
            "or read twice\n  " + "\n  ".join(changed) + "\n"
            "give --data the folder that it was trained on, or go on with the new rows "
            f"in a new --workdir with train.warm_start='{workdir}'"
        )
    unknown = [
        split
        for split, value in now.items()
        if None in (value.rows_digest, before[split].rows_digest)
    ]
    if unknown:
        print(
            f"tokenrec: split {', '.join(unknown)} has no digest of its rows, because "
            "an earlier version prepared it: only the lengths of its chunks were "
            "compared with those that the run was trained on",
            file=sys.stderr,
        )
    return {
        split: value._replace(
            rows_digest=value.rows_digest or before[split].rows_digest
        )
        for split, value in now.items()
    }


def _read_rows(path: Path) -> dict[str, RowIdentity]:
    remedy = "delete it, and the rows are not compared at this start"
    value = read_json(path, "the run's", remedy)
    fields = RowIdentity.__annotations__.keys()
    # Numbers of rows and chunks, and digests, of which one may be missing.
    if not has_type(value, dict[str, dict[str, int | str | None]]) or any(
        split.keys() != fields
        or not (type(split["rows"]) is type(split["chunks"]) is int)
        for split in value.values()
    ):
        raise InputError(f"the run's '{path}' is damaged; {remedy}")
    return {name: RowIdentity(**split) for name, split in value.items()}


def _rows_differ(before: RowIdentity | None, now: RowIdentity | None) -> bool:
    if before is None or now is None:
        return True
    # One of them may come from before there were digests of rows.
    if None in (before.rows_digest, now.rows_digest):
        return before._replace(rows_digest=None) != now._replace(rows_digest=None)
    return before != now


def _describe_change(before: RowIdentity | None, now: RowIdentity | None) -> str:
    def size(value: RowIdentity | None) -> str:
        if value is None:
            return "no such split"
        return f"{value.rows:,} rows in {value.chunks:,} chunks"

    if size(before) != size(now) or before is None or now is None:
        return f"{size(before)} -> {size(now)}"
    if before.lengths_digest != now.lengths_digest:
        return f"{size(now)} before and now, but the chunks have other lengths"
    return (
        f"{size(now)} before and now, but with other users, times, items, requests, "
        f"flags or labels: SHA-256 {str(before.rows_digest)[:12]} -> "
        f"{str(now.rows_digest)[:12]}"
    )


def _check_config(before: Config, now: Config, workdir: Path) -> None:
    """Raise InputError if a field differs that must stay the same on resume."""
    # By way of JSON, in which tuples and lists are equal. A field that is newer than the
    # run has its default in `before`.
    old = flatten_fields(json.loads(to_json(before)))
    new = flatten_fields(json.loads(to_json(now)))
    changed = [
        f"{field}: {old.get(field)!r} -> {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field) and not _may_change(field)
    ]
    if changed:
        raise InputError(
            f"workdir '{workdir}' holds a run with another config; use another "
            "--workdir, or undo\n  " + "\n  ".join(changed)
        )


def _read_run_config(path: Path) -> Config:
    try:
        return read_config(path)
    except InputError as error:
        raise InputError(
            f"{error}; restore the run's own config: each checkpoint has a copy, "
            f"'config' in {path.parent}/{CHECKPOINTS_FOLDER}/STEP/_CHECKPOINT_METADATA"
        ) from error


def run_identity(config: Config, dataset: Dataset) -> dict[str, object]:
    """Values that must be equal on all processes of a run.

    Each process may read its own copy of the data set, with the same log rows.
    """
    fields = {
        f"config {name}": value
        for name, value in flatten_fields(dataclasses.asdict(config)).items()
    }
    # Copies of the data set, and of a language model, may lie in different places.
    del fields["config data.path"], fields["config model.pretrained"]
    rows = {
        f"data, rows of {split}": _digest(
            json.dumps(dataset.row_identity(split)).encode()
        )
        for split in dataset.splits
    }
    # Without the digests of the rows, which would be reported twice.
    metadata = dataclasses.replace(
        dataset.metadata, schema=dataset.schema, row_digests={}
    )
    metadata_text = json.dumps(metadata.as_dict())
    return (
        fields | rows | {"data, schema and metadata": _digest(metadata_text.encode())}
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _may_change(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in FREE_TO_CHANGE)


def check_schema(
    schema: Schema, workdir: Path, *, compare_items: bool = True, like: str = ""
) -> Schema:
    """Check that a data set gives a run's model what it was trained on.

    Args:
      schema: schema of the data set.
      workdir: folder of the run.
      compare_items: whether its catalogue must have the items of the run's; a ranking
        model reads features of items alone.
      like: `ids_digest` of the data set whose items the catalogue begins with. If it is
        that of the run, more items may follow.

    Returns:
      The schema that the run was trained on.

    Raises:
      InputError: the schemas differ; the message lists in what.
    """
    path = workdir / SCHEMA_FILE
    value = read_json(path, "the run's", "give --workdir the folder of a whole run")
    try:
        trained = Schema.from_json(value)
    except InputError as error:
        raise InputError(f"the run's '{path}': {error}; restore the file") from error
    compare_items = compare_items and not (like and like == trained.ids_digest)
    differences = list(schema_differences(trained, schema, compare_items=compare_items))
    if differences:
        listed = "\n  ".join(differences)
        raise InputError(
            f"the data set is not one that this run can read: it differs from the one "
            f"that the run was trained on ('{path}') in\n  {listed}\ngive --data the "
            "folder that it was trained on, or one that was prepared with "
            f"`tokenrec prepare --like '{workdir}'`, and data.semantic_ids the file of the run"
        )
    return trained


def _schema_text(schema: Schema) -> str:
    return json.dumps(schema.to_json(), indent=1) + "\n"


def open_run(workdir: Path, checkpoint: str, data: Path | None) -> OpenedRun:
    """Open a run at a checkpoint; call it under `jax.set_mesh`, on all processes.

    Args:
      workdir: folder of the run.
      checkpoint: "best", "latest" or a step.
      data: folder of the data set; None for the one in the run's config.

    Returns:
      The opened run.

    Raises:
      InputError: the run or checkpoint does not exist, the data set does not fit the
        run, or the processes have different settings.
    """
    with distributed.raise_on_all_processes():
        model, dataset = open_model(workdir, data)
    distributed.assert_same_on_all_processes(
        run_identity(model.config, dataset) | {"--checkpoint": checkpoint}
    )
    # The shapes of the model must be those of the checkpoint.
    abstract = abstract_state(model)
    with CheckpointReader(workdir) as checkpoints:
        step, state = checkpoints.load_state(checkpoint, saved_part(model, abstract))
    state = add_frozen(model, state, abstract, workdir)
    return OpenedRun(model, dataset, step, state)


def open_model(workdir: Path, data: Path | None) -> tuple[ModelSpec, Dataset]:
    """Open the model of a run, without weights, and its data set.

    Args:
      workdir: folder of the run.
      data: folder of the data set; None for the one in the run's config.

    Raises:
      InputError: the run does not exist, or the data set is not the one that it was
        trained on.
    """
    config = load_run_config(workdir, data)
    dataset = open_dataset(
        data_directory(config), config.data.exclude, semantic_ids_path(config)
    )
    # A ranking model has no weights for items of the catalogue, only for features.
    is_ranking = config.data.objective == "ranking"
    schema = check_schema(
        dataset.schema,
        workdir,
        compare_items=not is_ranking,
        like=dataset.like_ids_digest,
    )
    use_id_counts(config, dataset, as_path(workdir), trained=True)
    tasks = task_names(schema, config.data)
    return build_model(config, schema, tasks, catalogue=dataset.catalogue), dataset


def data_of_run(workdir: Path) -> Path:
    """Find the data set that a run was trained on, and check that it still is that.

    Returns:
      Its folder.

    Raises:
      InputError: there is no run, its data set is not where it was, or it is another.
    """
    config = load_run_config(workdir, None)
    try:
        dataset = open_dataset(
            data_directory(config), config.data.exclude, semantic_ids_path(config)
        )
    except InputError as error:
        raise InputError(
            f"the data set of the run '{workdir}': {error}; if it was moved, give its "
            "folder instead of the run"
        ) from error
    check_schema(dataset.schema, workdir)
    return dataset.directory


def load_run_config(workdir: Path, data: Path | None) -> Config:
    """Load the config of a run; `data` replaces the folder of its data set if given."""
    path = as_path(workdir) / CONFIG_FILE
    if not is_file(path):
        raise InputError(
            f"workdir '{workdir}' holds no run (no {CONFIG_FILE}); train first, or check "
            "--workdir"
        )
    config = _read_run_config(path)
    # Before the validation, which then reports on the config that is used.
    if data is not None:
        config.data.path = str(data)
    return validate(config)
