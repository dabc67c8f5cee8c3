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

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.serving.artifact import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    digest_manifest,
    file_entry,
)
from tokenrec.serving.export.files import write_files
from tokenrec.serving.export.requests import PredictedRequest, predicted_requests
from tokenrec.serving.program_files import check_flatbuffers
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import open_artifact
from tokenrec.sharding import make_mesh

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Requests that are compared with `tokenrec predict`, and those that the artifact keeps.
CHECKED_REQUESTS = 256
GOLDEN_REQUESTS = 64
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
    check_flatbuffers()
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
        manifest = write_artifact(run, split, predicted, partial, platforms, tolerance)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def write_artifact(
    run: OpenedRun,
    split: str,
    predicted: Sequence[PredictedRequest],
    folder: Path,
    platforms: Sequence[str],
    tolerance: float,
) -> dict[str, Any]:
    """Write an artifact into a folder, and check its scores; call it without a mesh.

    Args:
      run: a ranking run.
      split: split of the requests.
      predicted: requests to compare, and their predictions.
      folder: an empty folder.
      platforms: as in `export_run`.
      tolerance: as in `export_run`.

    Returns:
      The manifest.

    Raises:
      InputError: a score differs from its prediction.
    """
    manifest = write_files(run, folder, platforms, tolerance)
    manifest["checked"] = {"split": split, "requests": len(predicted)}
    _write_manifest(folder, manifest)
    _check_scores(folder, predicted, tolerance)
    _write_golden(folder, predicted)
    _write_manifest(folder, manifest)
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
