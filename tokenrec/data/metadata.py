"""`tokenrec.json`: what a prepared data set holds, where it came from, and the SHA-256 of its other files.

The shards are not among those files: ArrayRecord has a hash of every block in them, and says so when one is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json

METADATA_FILE = "tokenrec.json"
FORMAT_VERSION = 1
CHECKED = (
    "dataset_info.json",
    "features.json",
    "tokenizer.json",
    "items/*.npy",
    "chunks/*.npy",
    "vocabularies/*.parquet",
)
_AGAIN = "prepare the data set again"
_HINTS = {
    "source": str,
    "licence": str,
    "citation": str,
    "checksums": dict[str, str],
    "counts": dict[str, int],
    "options": dict[str, Any],
    "key_types": dict[str, str],
}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Everything beside the shards: the schema and where the data came from.

    Attributes:
      schema: features, tasks, table sizes.
      source: name of the source, e.g. "kuairand".
      licence, citation: of the data.
      checksums: source file name -> SHA-256.
      counts: what `prepare` counted: rows and scored rows per split, exact repeats dropped, users, items; and what
        the source counted itself.
      options: the options of `prepare` that change its output (chunk_events, overlap, split days).
      key_types: "int64" or "string" for "user_id" and "item_id".
    """

    schema: Schema
    source: str
    licence: str
    citation: str
    checksums: dict[str, str]
    counts: dict[str, int]
    options: dict[str, Any]
    key_types: dict[str, str]

    def save(self, directory: Path) -> None:
        """Writes `tokenrec.json`, last of the files of a prepared data set: it holds the digests of the others."""
        files = sorted(path for pattern in CHECKED for path in directory.glob(pattern))
        value = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        value["files"] = {
            path.relative_to(directory).as_posix(): _digest_of_file(path)
            for path in files
        }
        value["digest"] = _digest_of_value(value)
        (directory / METADATA_FILE).write_text(json.dumps(value, indent=1) + "\n")

    @staticmethod
    def load(directory: Path) -> Metadata:
        """Reads `tokenrec.json` of a prepared data set.

        Raises:
          InputError: the folder is not a prepared data set, was written in another format version, or its
            `tokenrec.json` is damaged or was changed.
        """
        return load_manifest(directory).metadata


class Manifest(NamedTuple):
    """What `tokenrec.json` says. `files`: SHA-256 by path in the folder; empty where `prepare` wrote none yet."""

    directory: Path
    metadata: Metadata
    files: dict[str, str]

    def check(self, name: str) -> Path:
        """Path of a file of the data set, whose content is the one that `prepare` wrote, so far as that is known.

        Raises:
          InputError: the file is missing or cannot be read, or its content is another.
        """
        path = self.directory / name
        if not self.files:
            return path
        if name not in self.files:
            raise InputError(
                f"data: '{path}' is not a file that the data set was prepared with; {_AGAIN}"
            )
        found = _digest_of_file(path)
        if found != self.files[name]:
            raise InputError(
                f"data: '{path}' is damaged or was changed: it has the SHA-256 {found}, and not {self.files[name]} as "
                f"{METADATA_FILE} says; {_AGAIN}"
            )
        return path


def load_manifest(directory: Path) -> Manifest:
    """Reads `tokenrec.json`; errors as in `Metadata.load`."""
    directory = Path(directory)
    path = directory / METADATA_FILE
    if not path.exists():
        raise InputError(
            f"data '{directory}' is not a prepared data set (no {METADATA_FILE}); run `tokenrec prepare`"
        )
    value = read_json(path, "data:", _AGAIN)
    if not isinstance(value, dict):
        raise InputError(
            f"data: '{path}' holds a {type(value).__name__} and no JSON object; {_AGAIN}"
        )
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"data '{directory}' has format version {version!r}, not {FORMAT_VERSION}; prepare it again"
        )
    digest = value.pop("digest", None)
    if digest is not None and digest != _digest_of_value(value):
        raise InputError(
            f"data: '{path}' is damaged or was changed after the data set was made; {_AGAIN}"
        )
    del value["format_version"]
    files = value.pop("files", {})
    if not has_type(files, dict[str, str]):
        raise InputError(
            f"data: '{path}': 'files' is {files!r}, not SHA-256 digests by name; {_AGAIN}"
        )
    return Manifest(directory, _metadata(value, path), files)


def checked_file(directory: Path, name: str) -> Path | None:
    """Path of a file of a data set after `Manifest.check`, None if the data set has no such file.

    Of a folder without `tokenrec.json`, which `prepare` writes last, the file as it is.
    """
    directory = Path(directory)
    files: dict[str, str] = {}
    if (directory / METADATA_FILE).exists():
        manifest = load_manifest(directory)
        files = manifest.files
        if name in files:
            return manifest.check(name)
    return directory / name if not files and (directory / name).exists() else None


def _metadata(value: dict[str, Any], path: Path) -> Metadata:
    for name in ("schema", *_HINTS):
        if name not in value:
            raise InputError(f"data: '{path}' has no '{name}'; {_AGAIN}")
    for name, held in value.items():
        if name != "schema" and (
            name not in _HINTS or not has_type(held, _HINTS[name])
        ):
            reason = (
                f"must be {hint_name(_HINTS[name])}"
                if name in _HINTS
                else "is no field of it"
            )
            raise InputError(f"data: '{path}': '{name}' {reason}; {_AGAIN}")
    items, keys = value["counts"].get("items"), value["key_types"]
    if items is None or items < 1:
        raise InputError(
            f"data: '{path}': counts['items']={items} must be at least 1; {_AGAIN}"
        )
    for key in ("user_id", "item_id"):
        if keys.get(key) not in ("int64", "string"):
            raise InputError(
                f"data: '{path}': key_types['{key}']={keys.get(key)!r} is neither int64 nor string; {_AGAIN}"
            )
    try:
        if not isinstance(value["schema"], dict):
            raise InputError(f"schema: {value['schema']!r} is no JSON object")
        schema = Schema.from_json(value["schema"] | {"items": items})
        for feature in schema.features:
            if feature.is_integer and feature.table_name not in schema.tables:
                raise InputError(
                    f"schema: feature '{feature.name}' has no size of its table '{feature.table_name}'"
                )
    except InputError as error:
        raise InputError(f"data: '{path}': {error}; {_AGAIN}") from error
    return Metadata(**(value | {"schema": schema}))


def _digest_of_value(value: dict[str, Any]) -> str:
    """Of the JSON value and not of its text, in which a line end more or less changes nothing."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"data: '{path}' cannot be read: {error.strerror}; {_AGAIN}"
        ) from error
