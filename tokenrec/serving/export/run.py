"""Export a run as an artifact: a folder that answers requests without the trainer.

The folder is written beside its place under another name, checks itself against
`tokenrec predict`, and is renamed when it is whole. docs/guides/serving.md describes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.serving.artifact import MANIFEST_FILE, digest_manifest, file_entry
from tokenrec.serving.export.checks import Predicted, check_answers, write_golden
from tokenrec.serving.export.files import write_files
from tokenrec.serving.export.requests import predicted_items, predicted_requests
from tokenrec.serving.program_files import check_flatbuffers
from tokenrec.sharding import make_run_mesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Requests that are compared with `tokenrec predict`.
CHECKED_REQUESTS = 256
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
    max_k: int | None = None,
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
      max_k: retrieval: the longest answer; None for `files.default_max_k`.

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
    check_flatbuffers()
    config = load_run_config(workdir, data)
    check_config(config, max_k)
    mesh = make_run_mesh(config)
    partial = out.with_name(f".{out.name}.incomplete-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        with jax.set_mesh(mesh):
            run = open_run(workdir, checkpoint, data)
            check_schema(run.model.schema)
            split = _check_split(run)
            predict: Callable[..., Iterator[Predicted]] = (
                predicted_items
                if config.data.objective == "retrieval"
                else predicted_requests
            )
            predicted = list(predict(run, split, mesh, CHECKED_REQUESTS))
        if tolerance is None:
            tolerance = _TOLERANCES[config.model.dtype]
        manifest = write_artifact(
            run, split, predicted, partial, platforms, tolerance, max_k
        )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def write_artifact(
    run: OpenedRun,
    split: str,
    predicted: Sequence[Predicted],
    folder: Path,
    platforms: Sequence[str],
    tolerance: float,
    max_k: int | None = None,
) -> dict[str, Any]:
    """Write an artifact into a folder, and check its scores; call it without a mesh.

    Args:
      run: the run.
      split: split of the requests.
      predicted: requests to compare, and what `predict` answers.
      folder: an empty folder.
      platforms: as in `export_run`.
      tolerance: as in `export_run`.
      max_k: as in `export_run`.

    Returns:
      The manifest.

    Raises:
      InputError: an answer differs from its prediction, or `max_k` is too large.
    """
    items = run.dataset.known_items
    if max_k is not None and max_k > items:
        raise InputError(
            f"--max-k {max_k} is more than the {items} items of the catalogue; lower it"
        )
    manifest = write_files(run, folder, platforms, tolerance, max_k)
    manifest["checked"] = {"split": split, "requests": len(predicted)}
    _write_manifest(folder, manifest)
    manifest["checked"] |= check_answers(folder, predicted, tolerance)
    write_golden(folder, predicted, manifest.get("max_k"))
    _write_manifest(folder, manifest)
    return manifest


def check_config(config: Config, max_k: int | None = None) -> None:
    """Check that the model of a config can be exported.

    Args:
      config: config of the run.
      max_k: the longest answer that was asked for.

    Raises:
      InputError: it cannot; names the field.
    """
    data, head = config.data, config.head
    if data.objective == "retrieval":
        beams = head.beams if head.retrieval == "semantic_id" else None
        if max_k is not None and (max_k < 1 or (beams and max_k > beams)):
            most = "the items of the catalogue" if beams is None else f"{beams} beams"
            raise InputError(
                f"--max-k {max_k} must be at least 1 and at most {most}"
                f"{' (head.beams)' if beams else ''}; change it"
            )
        return
    if max_k is not None:
        raise InputError(
            f"--max-k {max_k} is the longest answer of a retrieval run, and the run has "
            f"data.objective='{data.objective}'; leave it out"
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
