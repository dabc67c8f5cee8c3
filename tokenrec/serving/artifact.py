"""Open an artifact: a folder that `tokenrec export` wrote (docs/guides/serving.md).

Every file is named in `manifest.json` with its size and SHA-256, and nothing else is
read. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.runtime.files import digest_file, read_json, read_with_retries

MANIFEST_FILE = "manifest.json"
FORMAT = "tokenrec-artifact"
# By objective. A version of tokenrec that cannot serve an artifact refuses it.
FORMAT_VERSIONS = {"ranking": 1, "retrieval": 2}
GOLDEN_FILE = "golden.jsonl"
COUNTERS = "counters"
_REMEDY = "export the run again"
_FIELDS: dict[str, Any] = {
    "format": str,
    "format_version": int,
    "versions": dict[str, str],
    "oldest_jax": str,
    "platforms": tuple[str, ...],
    "step": int,
    "objective": str,
    "paradigm": str,
    "dtype": str,
    "tolerance": float,
    "tasks": tuple[str, ...],
    "outputs": tuple[str, ...],
    "events": int,
    "candidates": int,
    "ages": bool,
    "query": bool,
    "key_types": dict[str, str],
    "ignored": tuple[str, ...],
    "schema": dict[str, Any],
    "programs": dict[str, str],
    "params": dict[str, str],
    "tables": dict[str, str],
    "vocabularies": dict[str, str],
    "rare_ids": dict[str, str],
    "files": dict[str, Any],
}
# Besides, of a retrieval run.
_RETRIEVAL_FIELDS: dict[str, Any] = {
    "head": str,
    "max_k": int,
    "drop_seen": bool,
    "items": int,
    "filter_ids": str,
    "catalogue": dict[str, str],
}


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An exported run on disk.

    Attributes:
      path: its folder.
      manifest: contents of `manifest.json`.
      schema: features of the model, without those that the run leaves out.
      digest: SHA-256 of the manifest, which holds those of all files.
    """

    path: Path
    manifest: dict[str, Any]
    schema: Schema
    digest: str

    @property
    def counters(self) -> Path | None:
        """Folder of the live state (`LiveState.open`); None if there is none."""
        inside = f"{COUNTERS}/"
        held = any(name.startswith(inside) for name in self.manifest["files"])
        return self.path / COUNTERS if held else None

    def read_bytes(self, name: str) -> bytes:
        """Read a file of the artifact.

        Raises:
          InputError: it is not in the manifest, or cannot be read.
        """
        path = self.file(name)
        return read_with_retries(path.read_bytes, path, "artifact:", _REMEDY)

    def read_array(self, name: str) -> np.ndarray:
        """Read a `.npy` file into memory.

        It is copied and not mapped: a file that is overwritten in place must not change
        the scores of a server.

        Raises:
          InputError: it is not in the manifest, or is damaged.
        """
        path = self.file(name)

        def read() -> np.ndarray:
            array = np.load(path, allow_pickle=False)
            # NumPy knows bfloat16, of frozen weights, as two bytes alone.
            is_bfloat16 = array.dtype == np.dtype("V2")
            return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

        damage = (ValueError, EOFError, SyntaxError, OverflowError, MemoryError)
        return read_with_retries(read, path, "artifact:", _REMEDY, damage=damage)

    def file(self, name: str) -> Path:
        """Path of a file of the artifact.

        Raises:
          InputError: it is not in the manifest.
        """
        if name not in self.manifest["files"]:
            raise InputError(
                f"artifact '{self.path}': '{name}' is not in its manifest; {_REMEDY}"
            )
        return self.path / name

    def golden(self) -> Iterator[tuple[Any, Any]]:
        """Yield the golden requests, as callers send them, and their answers.

        An answer is the scores `[C, O]`, or of a retrieval run the items and their
        scores, `[n]` both.
        """
        retrieval = self.manifest["objective"] == "retrieval"
        for line in self.read_bytes(GOLDEN_FILE).splitlines():
            value = json.loads(line)
            scores = value["scores"]
            yield value["request"], (value["items"], scores) if retrieval else scores

    def check_files(self) -> None:
        """Check the size and the digest of every file.

        Raises:
          InputError: a file is missing, damaged or was changed.
        """
        files = {self.path / n: e for n, e in self.manifest["files"].items()}
        # All sizes first: they cost nothing, and digests read every byte.
        for path, entry in files.items():
            if not path.is_file():
                raise InputError(f"artifact: '{path}' is missing; {_REMEDY}")
            if path.stat().st_size != entry["bytes"]:
                raise InputError(
                    f"artifact: '{path}' has {path.stat().st_size} bytes, not "
                    f"{entry['bytes']} as in {MANIFEST_FILE}; {_REMEDY}"
                )
        for path, entry in files.items():
            digest = functools.partial(digest_file, path)
            found = read_with_retries(digest, path, "artifact:", _REMEDY)
            if found != entry["sha256"]:
                raise InputError(
                    f"artifact: '{path}' is damaged or was changed: its SHA-256 is "
                    f"{found}, not {entry['sha256']} as in {MANIFEST_FILE}; {_REMEDY}"
                )


def is_artifact(path: Path) -> bool:
    """Whether a folder holds an artifact."""
    return (path / MANIFEST_FILE).is_file()


def read_artifact(path: Path, *, check: bool = True) -> Artifact:
    """Open an artifact.

    Args:
      path: its folder, or a link to it.
      check: check the digests of all files.

    Raises:
      InputError: the folder is no artifact, is of another format version, names a file
        outside of itself, or is damaged.
    """
    folder = path.resolve()
    if not is_artifact(folder):
        raise InputError(
            f"artifact '{path}': there is no {MANIFEST_FILE} in it; make one with "
            "`tokenrec export`"
        )
    manifest = read_json(folder / MANIFEST_FILE, "artifact:", _REMEDY)
    digest = _check_manifest(manifest, folder)
    for name in manifest["files"]:
        _check_name(folder, name)
    try:
        schema = Schema.from_json(manifest["schema"])
    except InputError as error:
        raise InputError(f"artifact '{folder}': {error}; {_REMEDY}") from error
    artifact = Artifact(folder, manifest, schema, digest)
    if check:
        artifact.check_files()
    return artifact


def digest_manifest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the value of a manifest, less its own digest."""
    value = {name: field for name, field in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": digest_file(path)}


def _check_manifest(manifest: Any, folder: Path) -> str:
    """Check the fields of a manifest; return its digest."""
    where = f"artifact '{folder / MANIFEST_FILE}'"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{where}: is not that of an artifact; {_REMEDY}")
    version = manifest.get("format_version")
    if version not in FORMAT_VERSIONS.values():
        known = " and ".join(map(str, FORMAT_VERSIONS.values()))
        raise InputError(
            f"{where}: has format version {version!r}, and this version reads "
            f"{known}; {_REMEDY}"
        )
    digest = digest_manifest(manifest)
    if manifest.get("digest") != digest:
        raise InputError(f"{where}: is damaged or was changed; {_REMEDY}")
    retrieval = manifest.get("objective") == "retrieval"
    for name, hint in (_FIELDS | (_RETRIEVAL_FIELDS if retrieval else {})).items():
        if not has_type(manifest.get(name), hint):
            raise InputError(f"{where}: '{name}' must be {hint_name(hint)}; {_REMEDY}")
    for name, entry in manifest["files"].items():
        if not has_type(entry, dict[str, int | str]):
            raise InputError(f"{where}: files['{name}'] is {entry!r}; {_REMEDY}")
    return digest


def _check_name(folder: Path, name: str) -> None:
    """Check that a file lies in the folder, by its name and by what is on disk."""
    parts = PurePosixPath(name).parts
    path = folder / name
    inside = bool(parts) and not PurePosixPath(name).is_absolute()
    if not inside or ".." in parts or "\\" in name or "\0" in name:
        raise InputError(
            f"artifact '{folder}': its manifest names the file {name!r}, which does not "
            f"lie in it; {_REMEDY}"
        )
    for link in (path, *path.parents):
        if link == folder:
            break
        if link.is_symlink():
            raise InputError(
                f"artifact: '{link}' is a link, and an artifact holds none; {_REMEDY}"
            )
