"""The JSON schema of `delimited.py`: what is read from the user's files, and how.

`features` and `tasks` are those of `Schema`; every other part is optional:

    {
      "features": [{"name": "tags", "kind": "multi_valued", "entity": "item",
                    "length": 4}],
      "tasks": [{"name": "liked"}],
      "columns": {"user_id": "uid", "time_ms": "at"},
      "key_types": {"user_id": "int64"},
      "separators": {"tags": ";"},
      "labels": {"liked": "rating >= 4"},
      "time": {"unit": "s", "zone": "Europe/Oslo"},
      "files": {"log": ["log.csv"], "items": "items.csv", "valid_from": "2022-05-03"},
      "statistics": {"keys": ["item_id"], "times": {"gap": true}}
    }

`columns` maps a name to the column of the file that holds it; a name without an entry
is the name of its column. `key_types` says "int64" for ids and categorical values that
are integers; all others are strings. docs/guides/data.md describes the other parts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.schema import Schema
from tokenrec.data.sources import delimited_checks as checks
from tokenrec.data.sources.delimited_checks import KEYS, OPTIONAL, TYPES
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json

__all__ = [
    "DEFAULT_SEPARATOR",
    "KEYS",
    "OPTIONAL",
    "LabelRule",
    "LogFiles",
    "SchemaFile",
    "TimeFormat",
    "read_schema",
]

DEFAULT_SEPARATOR = "|"

_RULE = re.compile(
    r"\s*(?P<column>[^<>=!]*[^<>=!\s])\s*(?P<operator>>=|<=|==|!=|>|<)\s*"
    r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)\s*"
)


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """A label that is a comparison of a number: `rating >= 4`.

    Attributes:
      column: column of the file.
      operator: `>=`, `>`, `<=`, `<`, `==` or `!=`.
      number: what the column is compared with.
    """

    column: str
    operator: str
    number: int | float

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {self.number}"

    @classmethod
    def parse(cls, text: str) -> LabelRule | None:
        """Parse `COLUMN OP NUMBER`; None if the text is something else.

        >>> LabelRule.parse("rating >= 4")
        LabelRule(column='rating', operator='>=', number=4)
        >>> LabelRule.parse("rating")
        """
        match = _RULE.fullmatch(text)
        if match is None:
            return None
        digits = match["number"]
        whole = re.fullmatch(r"[+-]?\d+", digits)
        number = int(digits) if whole else float(digits)
        return cls(match["column"], match["operator"], number)


@dataclasses.dataclass(frozen=True)
class TimeFormat:
    """How times without a unit or a zone are read.

    Attributes:
      unit: of integer or decimal times since 1970 UTC: s, ms, us or ns.
      zone: of dates and date-times that name none: an IANA name, or +08:00.
    """

    unit: str = "ms"
    zone: str = "UTC"


@dataclasses.dataclass(frozen=True)
class LogFiles:
    """Files and splits of the log, as `DelimitedSource` takes them.

    Attributes:
      log: files, folders or globs of log rows.
      users: file, folder or glob of users.
      items: file, folder or glob of items.
      valid_from: first time of the valid split.
      test_from: first time of the test split.
    """

    log: tuple[Path, ...] = ()
    users: Path | None = None
    items: Path | None = None
    valid_from: str | None = None
    test_from: str | None = None


@dataclasses.dataclass(frozen=True)
class SchemaFile:
    """A schema, and how its names are read from the files.

    Attributes:
      schema: features and tasks.
      columns: name to column of the file, where they differ.
      key_types: name of an id or a categorical feature to "int64" or "string".
      separators: feature to the string between its values in text.
      labels: task to the comparison that is its label.
      time: unit and zone of times.
      files: the files, where the schema names them.
      statistics: features that count the past; None for none.
    """

    schema: Schema
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    key_types: Mapping[str, str] = dataclasses.field(default_factory=dict)
    separators: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, LabelRule] = dataclasses.field(default_factory=dict)
    time: TimeFormat = TimeFormat()
    files: LogFiles = LogFiles()
    statistics: PastStatistics | None = None

    @classmethod
    def from_json(cls, value: Any, where: str, folder: Path) -> SchemaFile:
        """Check every name of a parsed schema.

        Args:
          value: the parsed JSON.
          where: the schema's name for messages, usually its path.
          folder: where relative paths of its files begin.

        Raises:
          InputError: a part or a name is unknown, or a value has the wrong type; names
            `where` and the field.
        """
        checks.check_parts(where, value)
        try:
            schema = Schema.from_json(
                {part: value.get(part, []) for part in ("features", "tasks")}
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        columns = value.get("columns", {})
        schema = dataclasses.replace(schema, weighted="row_weight" in columns)
        key_types = value.get("key_types", {})
        separators = value.get("separators", {})
        checks.check_feature_names(where, schema)
        checks.check_columns(where, schema, columns)
        checks.check_key_types(where, schema, key_types)
        checks.check_separators(where, schema, separators)
        labels = _parse_labels(where, schema, columns, value.get("labels", {}))
        time = TimeFormat(**checks.checked_time(where, value.get("time", {})))
        files = _parse_files(where, value.get("files", {}), folder)
        statistics = None
        if "statistics" in value:
            at = f"{where}: statistics"
            statistics = parse_statistics(value["statistics"], schema, at)
        result = cls(
            schema, columns, key_types, separators, labels, time, files, statistics
        )
        kinds = {
            feature.name: result.value_type_name(feature.name)
            for feature in schema.features
            if feature.has_vocabulary
        }
        checks.check_shared_tables(where, schema, kinds)
        return result

    def column(self, name: str) -> str:
        """Return the column of the file that holds `name`."""
        rule = self.labels.get(name)
        return self.columns.get(name, name) if rule is None else rule.column

    def separator(self, name: str) -> str:
        """Return what stands between the values of a feature in text."""
        return self.separators.get(name, DEFAULT_SEPARATOR)

    def label_columns(self) -> set[str]:
        """Return the columns of binary labels as such, and not what they compare."""
        return {
            self.column(task.name)
            for task in self.schema.binary_tasks
            if task.name not in self.labels
        }

    def value_type(self, name: str) -> pa.DataType:
        """Return the type of an id or of the values of a categorical feature."""
        return TYPES[self.value_type_name(name)]

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
        return "int64" if column in self.label_columns() else "string"


def read_schema(path: Path) -> SchemaFile:
    """Read a schema file, and check every name in it.

    Raises:
      InputError: the file cannot be read, or as `SchemaFile.from_json`.
    """
    value = read_json(path, "schema", "correct the schema file")
    return SchemaFile.from_json(value, str(path), Path(path).parent)


def _parse_labels(
    where: str, schema: Schema, columns: Mapping[str, str], labels: Mapping[str, Any]
) -> dict[str, LabelRule]:
    checks.check_known(where, "labels", labels, [task.name for task in schema.tasks])
    rules = {}
    kinds = {task.name: task.kind for task in schema.tasks}
    for task, text in labels.items():
        if kinds[task] != "binary":
            raise InputError(
                f"{where}: labels['{task}']={text!r} compares a number, which gives a "
                f"binary label, but the task has the kind '{kinds[task]}'; leave it out "
                "and name the column of the label under columns"
            )
        rule = LabelRule.parse(text) if isinstance(text, str) else None
        if rule is None:
            raise InputError(
                f"{where}: labels['{task}']={text!r} is not COLUMN OP NUMBER with one "
                'of >= > <= < == !=; write it as "rating >= 4"'
            )
        if task in columns:
            raise InputError(
                f"{where}: task '{task}' has columns['{task}']='{columns[task]}' and "
                f"labels['{task}']='{rule}', which names its column too; remove one "
                "of them"
            )
        rules[task] = rule
    return rules


def _parse_files(where: str, files: Mapping[str, Any], folder: Path) -> LogFiles:
    checks.check_files(where, files)
    paths = {
        name: folder / files[name]
        for name in ("users", "items")
        if files.get(name) is not None
    }
    splits = {name: files.get(name) for name in ("valid_from", "test_from")}
    log = tuple(folder / path for path in files.get("log", []))
    return LogFiles(
        log,
        paths.get("users"),
        paths.get("items"),
        **{
            name: None if value is None else str(value)
            for name, value in splits.items()
        },
    )
