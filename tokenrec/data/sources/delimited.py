"""A user's own log: CSV or Parquet files and a JSON schema. `docs/data.md` describes both."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Feature, Schema
from tokenrec.data.source import LogPart, Provenance
from tokenrec.data.sources.tabular import read_batches
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import read_json

_KEYS = ("user_id", "item_id", "time_ms")
_OPTIONAL = {"request": pa.int64(), "event": pa.bool_(), "scored": pa.bool_()}
_DEFAULTS = {"request": -1, "event": True, "scored": True}
_RESERVED = (*_KEYS, *_OPTIONAL, "split")
_KEY_FEATURES = (
    ("user_id", "user"),
    ("item_id", "catalogue"),
)  # an id as a categorical feature of its own entity
_NOT_FINITE = (
    "is no finite float32; correct it, or leave the field empty where it is missing"
)
_KEY_TYPES = {"int64": pa.int64(), "string": pa.string()}


@dataclasses.dataclass(frozen=True)
class _Output:
    """One column that the source yields: its name there, the column of the file, and its type."""

    name: str
    column: str
    type: pa.DataType
    feature: Feature | None = None


class DelimitedSource:
    """Rows of the user's own files (data/source.py), split by `time_ms`.

    Args:
      schema_file: JSON with `features`, `tasks`, and optionally `columns` and `key_types`.
      log: files of rows, .csv, .csv.gz or .parquet, in any order.
      users, items: files with a row per user or item; None where the schema has no feature of them but the id itself.
      valid_from, test_from: where valid and test begin: ISO date or time (UTC), or integer milliseconds. Without
        `test_from` there is no test split.

    Raises:
      InputError: the schema, a file or a value is wrong; rows and tables are checked while they are read.
    """

    def __init__(
        self,
        schema_file: Path,
        log: Sequence[Path],
        users: Path | None,
        items: Path | None,
        valid_from: str,
        test_from: str | None,
    ) -> None:
        self._log, self._users, self._items = [Path(p) for p in log], users, items
        if not self._log:
            raise InputError("log is empty; name at least one CSV or Parquet file")
        given = [Path(p) for p in (users, items) if p is not None]
        for path in [Path(schema_file), *self._log, *given]:
            if not path.is_file():
                raise InputError(f"{path}: no such file; check the path")
        self._valid_from = _milliseconds("valid_from", valid_from)
        self._test_from = (
            None if test_from is None else _milliseconds("test_from", test_from)
        )
        if self._test_from is not None and self._test_from <= self._valid_from:
            raise InputError(
                f"test_from={test_from} must be later than valid_from={valid_from}"
            )
        self.schema, self._columns, self._types = _read_schema(Path(schema_file))
        for file, group, role in (
            (users, "user", "user_id"),
            (items, "catalogue", "item_id"),
        ):
            features = self.schema.group(group)  # type: ignore[arg-type]
            lost = [f.name for f in features if f.name != role]
            if file is None and lost:
                option = role.replace("_id", "s")
                raise InputError(
                    f"{option} is not given, but the schema has {', '.join(lost)} of them; add --{option}"
                )
        self.provenance = Provenance(
            name="delimited",
            licence="that of the log's owner",
            citation="the user's own log",
            files=(Path(schema_file), *self._log, *given),
        )

    def users(self) -> pa.Table:
        return self._entities("user_id", self._users, self.schema.group("user"))

    def items(self) -> pa.Table:
        return self._entities("item_id", self._items, self.schema.group("catalogue"))

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Rows in the order of the files. Ends with an InputError if train or valid is empty."""
        earliest, latest = None, None
        for path in self._log:
            for batch in self._read_log(path):
                time = batch.column("time_ms").to_numpy()
                earliest = int(
                    time.min() if earliest is None else min(earliest, time.min())
                )
                latest = int(time.max() if latest is None else max(latest, time.max()))
                yield batch
        if earliest is None or latest is None:
            raise InputError(
                f"{', '.join(map(str, self._log))}: no rows; a log needs at least a header and rows"
            )
        self.check_times(earliest, latest)

    def row_parts(self) -> list[LogPart]:
        """A part for each file of the log."""
        return [
            LogPart(str(path), functools.partial(self._read_log, path))
            for path in self._log
        ]

    def user_parts(self) -> list[LogPart]:
        """The file of users, if there is one."""
        if self._users is None:
            return []
        outputs = self._entity_outputs("user_id", self.schema.group("user"))
        return [
            LogPart(
                str(self._users), functools.partial(_read, Path(self._users), outputs)
            )
        ]

    def check_times(self, earliest: int, latest: int) -> None:
        """Raises an InputError if train or valid has no time between these two."""
        empty = (
            "train"
            if earliest >= self._valid_from
            else "valid"
            if latest < self._valid_from
            else ""
        )
        if empty:
            raise InputError(
                f"valid_from={_moment(self._valid_from)} leaves {empty} empty: column '{self._column('time_ms')}' runs "
                f"from {_moment(earliest)} to {_moment(latest)}, read as milliseconds since 1970 UTC; move valid_from "
                "or correct the times"
            )

    def _read_log(self, path: Path) -> Iterator[pa.RecordBatch]:
        outputs = [
            _Output(name, self._column(name), self._type(name)) for name in _KEYS
        ]
        outputs += [
            _Output(name, self._columns[name], t)
            for name, t in _OPTIONAL.items()
            if name in self._columns
        ]
        outputs += [
            _Output(f"label_{t.name}", self._column(t.name), pa.int8())
            for t in self.schema.tasks
        ]
        outputs += [
            self._feature_output(f)
            for f in (*self.schema.group("row"), *self.schema.group("action"))
        ]
        for batch in _read(path, outputs):
            yield self._complete(batch)

    def _complete(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for name, default in _DEFAULTS.items():
            if name not in batch.schema.names:
                batch = batch.append_column(
                    name, pa.array(np.full(batch.num_rows, default))
                )
        time = batch.column("time_ms").to_numpy()
        split = (time >= self._valid_from).astype(np.int8)
        if self._test_from is not None:
            split += time >= self._test_from
        return batch.append_column("split", pa.array(split))

    def _entities(
        self, key: str, path: Path | None, features: Sequence[Feature]
    ) -> pa.Table:
        outputs = self._entity_outputs(key, features)
        schema = pa.schema([(o.name, o.type) for o in outputs])
        if path is not None:
            table = pa.Table.from_batches(
                list(_read(Path(path), outputs)), schema=schema
            )
            _refuse_repeats(Path(path), outputs[0].column, table.column(key))
            return table
        return schema.empty_table()

    def _entity_outputs(self, key: str, features: Sequence[Feature]) -> list[_Output]:
        outputs = [_Output(key, self._column(key), self._type(key))]
        return outputs + [self._feature_output(f) for f in features if f.name != key]

    def _column(self, name: str) -> str:
        return self._columns.get(name, name)

    def _type(self, name: str) -> pa.DataType:
        if name == "time_ms":
            return pa.int64()
        return _KEY_TYPES[_value_type(name, self.schema, self._columns, self._types)]

    def _feature_output(self, feature: Feature) -> _Output:
        if feature.kind == "dense":
            kind = pa.float64()
        elif feature.kind == "embedding":
            kind = pa.list_(pa.float32())
        elif feature.kind == "semantic_id":
            kind = pa.list_(pa.int64())
        else:
            value = self._type(feature.name)
            kind = pa.list_(value) if feature.kind == "multi_valued" else value
        return _Output(feature.name, self._column(feature.name), kind, feature)


def _read(path: Path, outputs: Sequence[_Output]) -> Iterator[pa.RecordBatch]:
    """Batches of the outputs, checked. Outputs may share a column: the first one's type reads it, others are cast."""
    types: dict[str, pa.DataType] = {}
    for output in outputs:
        types.setdefault(output.column, output.type)
    labels = {
        o.column for o in outputs if o.name.startswith("label_") and o.feature is None
    }
    first_row = 1
    for batch in read_batches(path, types):
        if not batch.num_rows:
            continue
        arrays = []
        for output in outputs:
            values = batch.column(output.column)
            if (
                output.feature is not None and output.column in labels
            ):  # a label that is unknown is a missing feature
                values = pc.if_else(
                    pc.equal(values, -1), pa.scalar(None, values.type), values
                )
            try:
                values = values.cast(output.type)
            except pa.ArrowException as error:
                raise InputError(
                    f"{path}: column '{output.column}' as {output.name}: {error}"
                ) from error
            if output.name == "request":
                values = values.fill_null(-1)
            for bad, reason in _problems(output, values):
                if len(bad):
                    row = int(bad[0])
                    raise InputError(
                        f"{path}, row {first_row + row} (the header not counted): column '{output.column}': "
                        f"{values[row].as_py()!r} {reason}"
                    )
            arrays.append(values)
        yield pa.RecordBatch.from_arrays(
            arrays, schema=pa.schema([(o.name, o.type) for o in outputs])
        )
        first_row += batch.num_rows


def _problems(output: _Output, values: pa.Array) -> Iterator[tuple[np.ndarray, str]]:
    """Rows that break a rule, and the rule with its remedy."""
    feature = output.feature
    if feature is None and output.name.startswith("label_"):
        known = pc.is_in(values, value_set=pa.array([1, 0, -1, None], pa.int8()))
        yield (
            _where(pc.invert(known)),
            "is not a label; use 1, 0, or nothing where it is unknown",
        )
    elif feature is None:
        yield _where(pc.is_null(values)), f"is no {output.name}; every row needs one"
        if output.name == "request":
            yield (
                _where(pc.less(values, -1)),
                "is negative; use an integer from 0, or nothing for a request of one row",
            )
    elif feature.kind == "dense":
        yield _where(_too_large(values)), _NOT_FINITE
    elif feature.kind in ("embedding", "semantic_id"):
        wrong = pc.not_equal(pc.list_value_length(values), feature.length)
        yield (
            _where(wrong),
            f"has not length={feature.length} values, which the schema says; correct one of them",
        )
        inner = pc.list_flatten(values)
        bad = pc.is_null(inner)
        if feature.kind == "embedding":
            yield (
                pc.list_parent_indices(values)
                .filter(_too_large(inner).fill_null(False))
                .to_numpy(),
                _NOT_FINITE,
            )
        if feature.kind == "semantic_id":
            outside = pc.or_(pc.less(inner, 0), pc.greater_equal(inner, feature.codes))
            bad = pc.or_(bad, outside.fill_null(False))
        rows = pc.list_parent_indices(values).filter(bad).to_numpy()
        limit = (
            f"codes must lie in 0 .. {feature.codes - 1}"
            if feature.kind == "semantic_id"
            else "a value is missing"
        )
        yield (
            rows,
            f"is not a whole {feature.kind}: {limit}; correct it or leave the field empty",
        )


def _too_large(values: pa.Array) -> pa.Array:
    """Infinite, or so once it is stored as float32."""
    return pc.greater(pc.abs(values), float(np.finfo(np.float32).max))


def _where(mask: pa.Array) -> np.ndarray:
    return np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))


def _refuse_repeats(path: Path, column: str, keys: pa.ChunkedArray) -> None:
    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        key, times = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(
            f"{path}: column '{column}': {key!r} has {times} rows; keep one row for each id"
        )


def _read_schema(path: Path) -> tuple[Schema, dict[str, str], dict[str, str]]:
    """Schema, name -> column of the file, name -> "int64" or "string"; every name checked."""
    value = read_json(path, "schema", "correct the schema file")
    parts = {"features": list, "tasks": list, "columns": dict, "key_types": dict}
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object with {', '.join(parts)}")
    _require_known(path, "schema", value, parts)
    for part, kind in parts.items():
        if not isinstance(value.get(part, kind()), kind):
            raise InputError(
                f"{path}: '{part}' must be a JSON {'array' if kind is list else 'object'}"
            )
    try:
        schema = Schema.from_json(
            {part: value.get(part, []) for part in ("features", "tasks")}
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for feature in schema.features:
        is_key = (
            feature.kind == "categorical"
            and (feature.name, feature.group) in _KEY_FEATURES
        )
        if feature.name in _RESERVED and not is_key:
            raise InputError(
                f"{path}: feature '{feature.name}' has the name of a key; give it another one, and its column under "
                f'"columns": {{"another": "{feature.name}"}}'
            )
    columns, types = value.get("columns", {}), value.get("key_types", {})
    names = [f.name for f in schema.features] + [t.name for t in schema.tasks]
    _require_known(path, "columns", columns, [*_KEYS, *_OPTIONAL, *names])
    typed = [
        f.name for f in schema.features if f.kind in ("categorical", "multi_valued")
    ]
    _require_known(path, "key_types", types, ["user_id", "item_id", *typed])
    for name, column in columns.items():
        if not isinstance(column, str):
            raise InputError(
                f"{path}: columns['{name}']={column!r} must be the name of a column"
            )
    for name, kind in types.items():
        if not isinstance(kind, str) or kind not in _KEY_TYPES:
            raise InputError(
                f"{path}: key_types['{name}']={kind!r}{suggest(str(kind), _KEY_TYPES)}"
            )
    _require_equal_types(path, schema, columns, types)
    return schema, columns, types


def _value_type(
    name: str, schema: Schema, columns: Mapping[str, str], types: Mapping[str, str]
) -> str:
    """Type of an id or a categorical value: as declared, or that of a key or label in the same column, or string."""
    if name in types:
        return types[name]
    column = columns.get(name, name)
    for key in ("user_id", "item_id"):
        if column == columns.get(key, key):
            return types.get(key, "string")
    is_label = column in {columns.get(t.name, t.name) for t in schema.tasks}
    return "int64" if is_label else "string"


def _require_equal_types(
    path: Path, schema: Schema, columns: Mapping[str, str], types: Mapping[str, str]
) -> None:
    first: dict[str, str] = {}
    for name, table in [
        (f.name, f.table_name)
        for f in schema.features
        if f.kind in ("categorical", "multi_valued")
    ]:
        other = first.setdefault(table, name)
        kinds = [_value_type(n, schema, columns, types) for n in (other, name)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{path}: features '{other}' ({kinds[0]}) and '{name}' ({kinds[1]}) share table '{table}'; "
                "give them one type under key_types"
            )


def _require_known(
    path: Path, part: str, value: Iterable[str], known: Iterable[str]
) -> None:
    for name in value:
        if name not in set(known):
            raise InputError(f"{path}: {part} has no '{name}'{suggest(name, known)}")


def _milliseconds(field: str, value: Any) -> int:
    """Milliseconds since 1970 UTC of an ISO date or time, or of an integer of milliseconds.

    >>> _milliseconds("valid_from", "2022-05-03"), _milliseconds("valid_from", "1651536000000")
    (1651536000000, 1651536000000)
    """
    try:
        return int(value)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise InputError(
            f"{field}={value} is neither an ISO date or time (2022-05-03, 2022-05-03T12:00) nor integer milliseconds"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1000)


def _moment(milliseconds: int) -> str:
    """ISO time of a count of milliseconds; a count beyond the calendar as it is."""
    try:
        return str(np.datetime64(milliseconds, "ms").astype("datetime64[s]")) + "Z"
    except (ValueError, OverflowError):
        return str(milliseconds)
