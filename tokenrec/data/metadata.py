"""Read and write `tokenrec.json`: the contents and the origin of a prepared data set.

The file also holds the SHA-256 digests of the other files and of itself, so that a
damaged or edited file is named instead of read as data. The shards have no digest here:
ArrayRecord stores a hash of every block in them, and raises when one is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.runtime.files import digest_file, is_file, read_json, read_with_retries
from tokenrec.runtime.paths import list_files

METADATA_FILE = "tokenrec.json"
# Folder of what a later data set goes on from (preparation/state.py).
STATE = "state"
FORMAT_VERSION = 1
# Files with a digest, as glob patterns in the folder of the data set.
CHECKED = (
    "dataset_info.json",
    "features.json",
    "tokenizer.json",
    "items/*.npy",
    "chunks/*.npy",
    "marks/*.npy",
    "frozen/*.npy",
    "vocabularies/*.parquet",
    f"{STATE}/*.npy",
)
_REMEDY = "prepare the data set again"
_FIELD_TYPES = {
    "source": str,
    "licence": str,
    "citation": str,
    "checksums": dict[str, str],
    "counts": dict[str, int],
    "options": dict[str, Any],
    "key_types": dict[str, str],
    "row_digests": dict[str, str],
    "state": dict[str, Any],
}
# Fields that data sets from before them lack.
_OPTIONAL = ("row_digests", "state")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The schema of a prepared data set, and where its data came from.

    Attributes:
      schema: features, tasks and table sizes.
      source: name of the source, such as "kuairand".
      licence: licence of the data.
      citation: how to cite the data.
      checksums: name of a source file -> SHA-256.
      counts: log rows and scored log rows per split, repeats that were dropped, users
        and items, as `prepare` counted them; and what the source itself counted.
      options: options of `prepare` that change its output (chunk_events, overlap, days
        of the splits), the SHA-256 of a tokenizer that it did not train, and which
        statistics of the past it keeps as of the start of a split ("frozen").
      key_types: "user_id" and "item_id" -> "int64" or "string".
      row_digests: split -> SHA-256 of its log rows in their order
        (preparation/row_index.py); empty for a data set from before there was one.
      state: what `prepare --like` goes on from (preparation/state.py); empty for a data
        set that cannot be gone on from.
    """

    schema: Schema
    source: str
    licence: str
    citation: str
    checksums: dict[str, str]
    counts: dict[str, int]
    options: dict[str, Any]
    key_types: dict[str, str]
    row_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write `tokenrec.json`, the last file of a data set.

        It holds the digests of the other files, so they must be complete.
        """
        files = [
            directory / name
            for name in list_files(directory)
            if any(fnmatch(name, pattern) for pattern in CHECKED)
        ]
        value = {"format_version": FORMAT_VERSION} | self.as_dict()
        value["files"] = {
            path.relative_to(directory).as_posix(): _digest_file(path) for path in files
        }
        # Last, so that it covers the digests of the files too.
        value["digest"] = _digest_value(value)
        (directory / METADATA_FILE).write_text(json.dumps(value, indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """Convert to a dict, as `dataclasses.asdict` and `Schema.as_dict`."""
        return dataclasses.asdict(self) | {"schema": self.schema.as_dict()}

    @staticmethod
    def load(directory: Path) -> Metadata:
        """Read `tokenrec.json` of a prepared data set.

        Raises:
          InputError: the folder is not a prepared data set, was written in another
            format version, or its `tokenrec.json` is damaged or was changed.
        """
        return load_manifest(directory).metadata


class Manifest(NamedTuple):
    """Contents of `tokenrec.json`.

    Attributes:
      directory: folder of the data set.
      metadata: what the data set holds.
      files: path in the folder -> SHA-256; empty for a data set from before there were
        digests.
    """

    directory: Path
    metadata: Metadata
    files: dict[str, str]

    def check(self, name: str) -> Path:
        """Check the digest of a file, if there is one, and return the file's path.

        Raises:
          InputError: the file is missing, cannot be read, or is not what `prepare`
            wrote.
          StorageError: the storage is at fault, again and again.
        """
        path = self.directory / name
        # A data set from before there were digests still opens; the checks of values
        # (value_checks.py) are all that protects it.
        if not self.files:
            return path
        if name not in self.files:
            raise InputError(
                f"data: '{path}' is not a file that the data set was prepared with; "
                f"{_REMEDY}"
            )
        digest = _digest_file(path)
        if digest != self.files[name]:
            raise InputError(
                f"data: '{path}' is damaged or was changed: its SHA-256 is {digest}, "
                f"not {self.files[name]} as in {METADATA_FILE}; {_REMEDY}"
            )
        return path


def load_manifest(directory: Path) -> Manifest:
    """Read `tokenrec.json`, with its digests checked.

    Raises:
      InputError: see `Metadata.load`.
    """
    directory = Path(directory)
    path = directory / METADATA_FILE
    if not is_file(path):
        raise InputError(
            f"data '{directory}' is not a prepared data set (no {METADATA_FILE}); run "
            "`tokenrec prepare`"
        )
    value = read_json(path, "data:", _REMEDY)
    if not isinstance(value, dict):
        raise InputError(
            f"data: '{path}' holds a {type(value).__name__} and no JSON object; "
            f"{_REMEDY}"
        )
    # The version comes first: the other checks are those of this version.
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"data '{directory}' has format version {version!r}, not {FORMAT_VERSION}; "
            f"{_REMEDY}"
        )
    digest = value.pop("digest", None)
    if digest is not None and digest != _digest_value(value):
        raise InputError(
            f"data: '{path}' is damaged or was changed after the data set was made; "
            f"{_REMEDY}"
        )
    del value["format_version"]
    files = value.pop("files", {})
    if not has_type(files, dict[str, str]):
        raise InputError(
            f"data: '{path}': 'files' is {files!r}, not SHA-256 digests by name; "
            f"{_REMEDY}"
        )
    return Manifest(directory, _parse_metadata(value, path), files)


def checked_file(directory: Path, name: str) -> Path | None:
    """Return the path of a file of a data set, its digest checked; None without one.

    `prepare` writes `tokenrec.json` last. In a folder without it the file is taken as
    it is.

    Raises:
      InputError: see `Metadata.load` and `Manifest.check`.
    """
    directory = Path(directory)
    files: dict[str, str] = {}
    if is_file(directory / METADATA_FILE):
        manifest = load_manifest(directory)
        files = manifest.files
        if name in files:
            return manifest.check(name)
    return directory / name if not files and is_file(directory / name) else None


def _parse_metadata(value: dict[str, Any], path: Path) -> Metadata:
    """Check the fields of `tokenrec.json` and build a `Metadata`."""
    for name in ("schema", *_FIELD_TYPES):
        if name not in value and name not in _OPTIONAL:
            raise InputError(f"data: '{path}' has no '{name}'; {_REMEDY}")
    for name, field_value in value.items():
        if name == "schema":
            continue
        if name not in _FIELD_TYPES:
            raise InputError(f"data: '{path}': '{name}' is no field of it; {_REMEDY}")
        if not has_type(field_value, _FIELD_TYPES[name]):
            raise InputError(
                f"data: '{path}': '{name}' must be {hint_name(_FIELD_TYPES[name])}; "
                f"{_REMEDY}"
            )
    # The size of the catalogue is a count, not a field of the stored schema.
    items = value["counts"].get("items")
    if items is None or items < 1:
        raise InputError(
            f"data: '{path}': counts['items']={items} must be at least 1; {_REMEDY}"
        )
    key_types = value["key_types"]
    for key in ("user_id", "item_id"):
        if key_types.get(key) not in ("int64", "string"):
            raise InputError(
                f"data: '{path}': key_types['{key}']={key_types.get(key)!r} is neither "
                f"int64 nor string; {_REMEDY}"
            )
    try:
        schema = _parse_schema(value["schema"], items)
    except InputError as error:
        raise InputError(f"data: '{path}': {error}; {_REMEDY}") from error
    return Metadata(**(value | {"schema": schema}))


def _parse_schema(value: Any, items: int) -> Schema:
    if not isinstance(value, dict):
        raise InputError(f"schema: {value!r} is no JSON object")
    schema = Schema.from_json(value | {"items": items})
    for feature in schema.features:
        if feature.is_integer and feature.table_name not in schema.tables:
            raise InputError(
                f"schema: feature '{feature.name}' has no size of its table "
                f"'{feature.table_name}'"
            )
    return schema


def _digest_value(value: dict[str, Any]) -> str:
    """SHA-256 of a JSON value and not of its text, so that layout does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_file(path: Path) -> str:
    """SHA-256 of a file, with retries."""
    return read_with_retries(lambda: digest_file(path), path, "data:", _REMEDY)
