"""Read your own log: CSV or Parquet files, described by a JSON schema.

docs/guides/data.md has a complete example. The files:

- the log, one file or more: a row per impression or event, in any order, with
  `user_id`, `item_id`, `time_ms`, a label per task, and features of the row and of the
  action;
- users (optional): a row per user, with `user_id` and features of the user;
- items (optional): a row per item, with `item_id` and features of the item.

The schema names the columns that are read (`delimited_schema.py`); all others are left
out. Splits are made by time: rows before `valid_from` are train, rows before
`test_from` valid, the rest test.

Nothing can check here what a column means. A column that is known only after the item
was shown (watch time, quantity, another label) must have the entity `action`, which the
model sees for earlier events only. Licence and citation are those of the log's owner.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.data.source import LogPart, Provenance
from tokenrec.data.sources.delimited_columns import (
    ColumnSpec,
    read_columns,
    refuse_repeats,
)
from tokenrec.data.sources.delimited_schema import KEYS, OPTIONAL, read_schema
from tokenrec.errors import InputError

# Values of the optional columns where the schema does not name them.
_DEFAULTS = {"request": -1, "event": True, "scored": True}


class DelimitedSource:
    """Log rows of the user's own files, as a `PartitionedSource`; a part is a file.

    Args:
      schema_file: JSON with `features`, `tasks`, and optionally `columns` and
        `key_types`.
      log: files of log rows, .csv, .csv.gz or .parquet, in any order.
      users: file with a row per user; None where users have no feature but their id.
      items: file with a row per item; None where items have no feature but their id.
      valid_from: first time of the valid split: ISO date or time (UTC), or integer
        milliseconds.
      test_from: first time of the test split; None for no test split.

    Raises:
      InputError: the schema, a file or a value is wrong. Rows and tables are checked
        while they are read.
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
        # 1. Files.
        self._log = [Path(path) for path in log]
        self._users = users
        self._items = items
        if not self._log:
            raise InputError("log is empty; name at least one CSV or Parquet file")
        tables = [Path(path) for path in (users, items) if path is not None]
        for path in [Path(schema_file), *self._log, *tables]:
            if not path.is_file():
                raise InputError(f"{path}: no such file; check the path")

        # 2. Times of the splits.
        self._valid_from = _milliseconds("valid_from", valid_from)
        self._test_from = (
            None if test_from is None else _milliseconds("test_from", test_from)
        )
        if self._test_from is not None and self._test_from <= self._valid_from:
            raise InputError(
                f"test_from={test_from} must be later than valid_from={valid_from}; "
                "move one of them"
            )

        # 3. Schema.
        self._schema_file = read_schema(Path(schema_file))
        self.schema = self._schema_file.schema
        self._require_tables()
        self.provenance = Provenance(
            name="delimited",
            licence="that of the log's owner",
            citation="the user's own log",
            files=(Path(schema_file), *self._log, *tables),
        )

    def users(self) -> pa.Table:
        return self._read_table("user_id", self._users, self.schema.group("user"))

    def items(self) -> pa.Table:
        return self._read_table("item_id", self._items, self.schema.group("catalogue"))

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the log rows in the order of the files.

        Raises:
          InputError: a value is wrong; or, at the end, train or valid is empty.
        """
        earliest: int | None = None
        latest: int | None = None
        for path in self._log:
            for batch in self._read_log(path):
                time = batch.column("time_ms").to_numpy()
                first, last = int(time.min()), int(time.max())
                earliest = first if earliest is None else min(earliest, first)
                latest = last if latest is None else max(latest, last)
                yield batch
        if earliest is None or latest is None:
            raise InputError(
                f"{', '.join(map(str, self._log))}: no rows; a log needs at least a "
                "header and rows; check the files"
            )
        self.check_times(earliest, latest)

    def row_parts(self) -> list[LogPart]:
        """Return a part for each file of the log."""
        return [
            LogPart(str(path), functools.partial(self._read_log, path))
            for path in self._log
        ]

    def user_parts(self) -> list[LogPart]:
        """Return a part for the file of users, if there is one."""
        if self._users is None:
            return []
        specs = self._table_specs("user_id", self.schema.group("user"))
        # A partial and not a lambda: parts are pickled for the workers of Beam.
        read = functools.partial(read_columns, Path(self._users), specs)
        return [LogPart(str(self._users), read)]

    def check_times(self, earliest: int, latest: int) -> None:
        """Check that train and valid have rows.

        Raises:
          InputError: all times are in one of them, which is often a wrong unit of time.
        """
        empty = ""
        if earliest >= self._valid_from:
            empty = "train"
        elif latest < self._valid_from:
            empty = "valid"
        if empty:
            column = self._schema_file.column("time_ms")
            raise InputError(
                f"valid_from={_iso_time(self._valid_from)} leaves {empty} empty: "
                f"column '{column}' runs from {_iso_time(earliest)} to "
                f"{_iso_time(latest)}, read as milliseconds since 1970 UTC; move "
                "valid_from or correct the times"
            )

    def _require_tables(self) -> None:
        """Check that each feature of a user or an item has a file to come from."""
        for option, file, features, key in (
            ("users", self._users, self.schema.group("user"), "user_id"),
            ("items", self._items, self.schema.group("catalogue"), "item_id"),
        ):
            lost = [f.name for f in features if f.name != key]
            if file is None and lost:
                raise InputError(
                    f"{option} is not given, but the schema has {', '.join(lost)} of "
                    f"them; add --{option}"
                )

    def _read_log(self, path: Path) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one file of the log."""
        schema_file = self._schema_file
        specs = [
            ColumnSpec(name, schema_file.column(name), self._key_type(name))
            for name in KEYS
        ]
        for name, kind in OPTIONAL.items():
            if name in schema_file.columns:
                specs.append(ColumnSpec(name, schema_file.column(name), kind))
        for task in self.schema.tasks:
            column = schema_file.column(task.name)
            specs.append(ColumnSpec(f"label_{task.name}", column, pa.int8()))
        features = (*self.schema.group("row"), *self.schema.group("action"))
        specs += [self._feature_spec(feature) for feature in features]
        for batch in read_columns(path, specs):
            yield self._add_defaults_and_split(batch)

    def _add_defaults_and_split(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        for name, default in _DEFAULTS.items():
            if name not in batch.schema.names:
                values = pa.array(np.full(batch.num_rows, default))
                batch = batch.append_column(name, values)
        time = batch.column("time_ms").to_numpy()
        split = (time >= self._valid_from).astype(np.int8)
        if self._test_from is not None:
            split += time >= self._test_from
        return batch.append_column("split", pa.array(split))

    def _read_table(
        self, key: str, path: Path | None, features: Sequence[Feature]
    ) -> pa.Table:
        """Read the table of users or items; an empty one where there is no file."""
        specs = self._table_specs(key, features)
        schema = pa.schema([(spec.name, spec.type) for spec in specs])
        if path is None:
            return schema.empty_table()
        batches = list(read_columns(Path(path), specs))
        table = pa.Table.from_batches(batches, schema=schema)
        refuse_repeats(Path(path), specs[0].column, table.column(key))
        return table

    def _table_specs(self, key: str, features: Sequence[Feature]) -> list[ColumnSpec]:
        specs = [ColumnSpec(key, self._schema_file.column(key), self._key_type(key))]
        # The id may be a feature as well; it is yielded once.
        return specs + [self._feature_spec(f) for f in features if f.name != key]

    def _key_type(self, name: str) -> pa.DataType:
        return pa.int64() if name == "time_ms" else self._schema_file.value_type(name)

    def _feature_spec(self, feature: Feature) -> ColumnSpec:
        if feature.kind == "dense":
            # Read as float64, so that a number beyond float32 is refused and not inf.
            kind = pa.float64()
        elif feature.kind == "embedding":
            kind = pa.list_(pa.float32())
        elif feature.kind == "semantic_id":
            kind = pa.list_(pa.int64())
        elif feature.kind == "multi_valued":
            kind = pa.list_(self._schema_file.value_type(feature.name))
        else:
            kind = self._schema_file.value_type(feature.name)
        return ColumnSpec(
            feature.name, self._schema_file.column(feature.name), kind, feature
        )


def _milliseconds(field: str, value: Any) -> int:
    """Convert an ISO date or time, or an integer, to milliseconds since 1970 UTC.

    >>> _milliseconds("valid_from", "2022-05-03")
    1651536000000
    >>> _milliseconds("valid_from", "1651536000000")
    1651536000000
    """
    try:
        return int(value)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise InputError(
            f"{field}={value} is neither an ISO date or time nor integer milliseconds; "
            "write it as 2022-05-03, 2022-05-03T12:00 or 1651536000000"
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1000)


def _iso_time(milliseconds: int) -> str:
    """Format milliseconds as ISO time; a number beyond the calendar stays a number."""
    try:
        return str(np.datetime64(milliseconds, "ms").astype("datetime64[s]")) + "Z"
    except (ValueError, OverflowError):
        return str(milliseconds)
