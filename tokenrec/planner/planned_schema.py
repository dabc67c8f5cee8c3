"""Schemas of data sets that are not at hand: known or planned table sizes.

`compile` and `describe` need the features and table sizes of a data set, but none of
its data. A planned schema is a JSON file like the `tokenrec.json` of a prepared data
set, of which `schema` and `counts.items` are read; its `notes` say where each size
comes from. Those of the shipped configs lie in `configs/schemas/`, named like the data
set (`data.name`), and are found by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tokenrec.config import (
    Config,
    data_directory,
    data_location,
    semantic_ids_path,
)
from tokenrec.config.load import shipped_folder
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError, suggest
from tokenrec.run_length import with_steps
from tokenrec.runtime.files import read_json


def resolve_schema(config: Config) -> tuple[Schema, str]:
    """Find the schema of a config's data set.

    It is that of the prepared data set, or else the planned schema that `data.schema`
    names, or else the shipped one for `data.name`.

    Returns:
      The schema with all features, and a text that says where it was found.

    Raises:
      InputError: there is none, a folder given as `data.path` is not a data set, or the
        file is not a planned schema.
    """
    directory = data_location(config)
    path = _planned_path(config)
    if path is None:
        with _naming_planned_schemas(config):
            dataset = open_dataset(
                data_directory(config), semantic_ids=semantic_ids_path(config)
            )
        return dataset.schema, f"prepared data set {directory}"
    if config.data.semantic_ids:
        raise InputError(
            f"data.semantic_ids='{config.data.semantic_ids}' belongs to a prepared "
            f"data set, and '{directory}' is none; "
            "prepare it, or leave the semantic ids out"
        )
    return read_planned(path), f"planned schema {path.name}; no data set at {directory}"


def resolve_steps(config: Config) -> Config:
    """Set the steps of `optim.epochs` (run_length.py), if the data set is prepared.

    Without a prepared data set the config stays as it is.
    """
    if not config.optim.epochs or _planned_path(config) is not None:
        return config
    dataset = open_dataset(
        data_directory(config), config.data.exclude, semantic_ids_path(config)
    )
    return with_steps(config, dataset)


def _planned_path(config: Config) -> Path | None:
    """The planned schema that stands in for the data set; None if none does.

    A prepared data set goes first, and a `data.path` that is given must be one.
    """
    if config.data.path or (data_location(config) / METADATA_FILE).is_file():
        return None
    if config.data.schema:
        return _find(config.data.schema)
    return _shipped_schemas().get(f"{config.data.name}.json")


@contextlib.contextmanager
def _naming_planned_schemas(config: Config) -> Iterator[None]:
    """Add to the error of a missing data set that a planned schema would do."""
    try:
        yield
    except InputError as error:
        if (data_location(config) / METADATA_FILE).is_file():
            raise
        known = ", ".join(sorted(_shipped_schemas()))
        raise InputError(
            f"{error}; or plan without the data: leave --data out and give "
            "--config.data.schema=FILE, the tokenrec.json of such a data set or one of "
            f"{known}"
        ) from error


def read_planned(path: Path) -> Schema:
    """Read a planned schema.

    Raises:
      InputError: the file is not JSON, or has no `schema` or no `counts.items`.
    """
    try:
        value = read_json(path, "data.schema", "give a planned schema")
        return Schema.from_json(value["schema"] | {"items": value["counts"]["items"]})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"data.schema '{path}' is not a planned schema: "
            f"{type(error).__name__}: {error}; it needs `schema` and `counts.items`, "
            f"as in the {METADATA_FILE} of a prepared data set"
        ) from error


def _find(name: str) -> Path:
    """Path of a file, or of a shipped schema of that name."""
    path, shipped = Path(name), _shipped_schemas()
    if path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    raise InputError(
        f"data.schema='{name}' is neither a file nor a shipped schema"
        f"{suggest(name, shipped)}"
    )


def _shipped_schemas() -> dict[str, Path]:
    """Name -> file of the planned schemas that come with tokenrec."""
    return {file.name: file for file in (shipped_folder() / "schemas").glob("*.json")}
