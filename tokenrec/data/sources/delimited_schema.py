"""Read and check the JSON schema of `delimited.py`.

The file has four parts, of which `features` and `tasks` are those of `Schema`:

    {
      "features": [{"name": "device", "kind": "categorical", "entity": "context"}],
      "tasks": [{"name": "click"}],
      "columns": {"user_id": "uid", "time_ms": "ts"},
      "key_types": {"user_id": "int64"}
    }

`columns` maps a name to the column of the file that holds it; a name without an entry
is the name of its column. `key_types` says "int64" for ids and categorical values that
are integers; all others are strings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenrec.data.schema import Schema
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import read_json

KEYS = ("user_id", "item_id", "time_ms")
# Columns that are read only if `columns` names them, and their types.
OPTIONAL = {"request": pa.int64(), "event": pa.bool_(), "scored": pa.bool_()}

_RESERVED = (*KEYS, *OPTIONAL, "split")
# The id of an entity may be a categorical feature of that entity, under its own name.
_KEY_FEATURES = (("user_id", "user"), ("item_id", "catalogue"))
_TYPES = {"int64": pa.int64(), "string": pa.string()}
_PARTS = {"features": list, "tasks": list, "columns": dict, "key_types": dict}


@dataclasses.dataclass(frozen=True)
class SchemaFile:
    """A schema, and where its names are in the files.

    Attributes:
      schema: features and tasks.
      columns: name to column of the file, where they differ.
      key_types: name of an id or a categorical feature to "int64" or "string".
    """

    schema: Schema
    columns: Mapping[str, str]
    key_types: Mapping[str, str]

    def column(self, name: str) -> str:
        """Return the column of the file that holds `name`."""
        return self.columns.get(name, name)

    def value_type(self, name: str) -> pa.DataType:
        """Return the type of an id or of the values of a categorical feature."""
        return _TYPES[self.value_type_name(name)]

    def value_type_name(self, name: str) -> str:
        """Return "int64" or "string".

        It is the declared type; without one, that of the id or label that is read from
        the same column; otherwise string.
        """
        if name in self.key_types:
            return self.key_types[name]
        column = self.column(name)
        for key in ("user_id", "item_id"):
            if column == self.column(key):
                return self.key_types.get(key, "string")
        is_label = column in {self.column(task.name) for task in self.schema.tasks}
        return "int64" if is_label else "string"


def read_schema(path: Path) -> SchemaFile:
    """Read a schema file, and check every name in it.

    Raises:
      InputError: the file cannot be read, a part or a name is unknown, or a value has
        the wrong type; names the file and the field.
    """
    value = read_json(path, "schema", "correct the schema file")
    _check_parts(path, value)
    try:
        schema = Schema.from_json(
            {part: value.get(part, []) for part in ("features", "tasks")}
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    _check_feature_names(path, schema)
    schema_file = SchemaFile(
        schema, value.get("columns", {}), value.get("key_types", {})
    )
    _check_columns(path, schema_file)
    _check_key_types(path, schema_file)
    _check_shared_tables(path, schema_file)
    return schema_file


def _check_parts(path: Path, value: Any) -> None:
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: holds a {type(value).__name__}, but must hold a JSON object with "
            f"{', '.join(_PARTS)}; correct the schema file"
        )
    _check_known(path, "schema", value, _PARTS)
    for part, kind in _PARTS.items():
        if not isinstance(value.get(part, kind()), kind):
            wanted = "array" if kind is list else "object"
            raise InputError(
                f"{path}: '{part}' must be a JSON {wanted}; correct the schema file"
            )


def _check_feature_names(path: Path, schema: Schema) -> None:
    """Refuse features with the name of a key, unless they are that key."""
    for feature in schema.features:
        is_key = (
            feature.kind == "categorical"
            and (feature.name, feature.group) in _KEY_FEATURES
        )
        if feature.name in _RESERVED and not is_key:
            raise InputError(
                f"{path}: feature '{feature.name}' has the name of a key; give it "
                'another one, and its column under "columns": '
                f'{{"another": "{feature.name}"}}'
            )


def _check_columns(path: Path, schema_file: SchemaFile) -> None:
    names = [f.name for f in schema_file.schema.features]
    names += [task.name for task in schema_file.schema.tasks]
    _check_known(path, "columns", schema_file.columns, [*KEYS, *OPTIONAL, *names])
    for name, column in schema_file.columns.items():
        if not isinstance(column, str):
            raise InputError(
                f"{path}: columns['{name}']={column!r} must be the name of a column; "
                "write it as a string"
            )


def _check_key_types(path: Path, schema_file: SchemaFile) -> None:
    typed = [f.name for f in schema_file.schema.features if f.has_vocabulary]
    names = ["user_id", "item_id", *typed]
    _check_known(path, "key_types", schema_file.key_types, names)
    for name, kind in schema_file.key_types.items():
        if not isinstance(kind, str) or kind not in _TYPES:
            raise InputError(
                f"{path}: key_types['{name}']={kind!r} is no type"
                f"{suggest(str(kind), _TYPES)}"
            )


def _check_shared_tables(path: Path, schema_file: SchemaFile) -> None:
    """Refuse two types of values in one embedding table: its vocabulary is sorted."""
    first_of_table: dict[str, str] = {}
    for feature in schema_file.schema.features:
        if not feature.has_vocabulary:
            continue
        first = first_of_table.setdefault(feature.table_name, feature.name)
        kinds = [schema_file.value_type_name(n) for n in (first, feature.name)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{path}: features '{first}' ({kinds[0]}) and '{feature.name}' "
                f"({kinds[1]}) share table '{feature.table_name}'; give them one type "
                "under key_types"
            )


def _check_known(
    path: Path, part: str, names: Iterable[str], known: Iterable[str]
) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"{path}: {part} has no '{name}'{suggest(name, known)}")
