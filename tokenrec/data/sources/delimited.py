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

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.data.source import LogPart, Provenance
from tokenrec.data.sources.delimited_columns import (
    ColumnSpec,
    log_specs,
    read_columns,
    refuse_repeats,
    table_specs,
)
from tokenrec.data.sources.delimited_files import expand
from tokenrec.data.sources.delimited_notes import Notes
from tokenrec.data.sources.delimited_schema import SchemaFile, read_schema
from tokenrec.data.sources.delimited_times import (
    UNIT_NAMES,
    are_days,
    likely_unit,
    split_time,
)
from tokenrec.errors import InputError

# Values of the optional columns where the schema does not name them.
_DEFAULTS = {"request": -1, "event": True, "scored": True}


class DelimitedSource:
    """Log rows of the user's own files, as a `PartitionedSource`; a part is a file.

    The schema may name the files and the splits (`LogFiles`); arguments that are given
    replace them. A path is a CSV or Parquet file, a folder of such, or a glob.

    `provenance.counts` has what was changed while reading, by kind and name, such as
    `cleaned_lists_tags`; it is complete when everything was read.

    Args:
      schema: JSON file, or what was read from one.
      log: paths of log rows, in any order, or one path.
      users: path of a row per user; None where users have no feature but their id.
      items: path of a row per item; None where items have no feature but their id.
      valid_from: first time of the valid split: ISO date or time, in the zone of the
        schema unless it names one, or integer milliseconds.
      test_from: first time of the test split; None for no test split.
      delimiter: what separates the fields of CSV files; None to find out from the
        header of each.

    Raises:
      InputError: the schema, a file or a value is wrong. Rows and tables are checked
        while they are read.
    """

    def __init__(
        self,
        schema: Path | SchemaFile,
        log: Sequence[Path] | Path | str = (),
        users: Path | None = None,
        items: Path | None = None,
        valid_from: str | None = None,
        test_from: str | None = None,
        *,
        delimiter: str | None = None,
    ) -> None:
        # 1. Schema.
        schema_paths: list[Path] = []
        if isinstance(schema, SchemaFile):
            self._schema_file = schema
        else:
            schema_paths = [Path(schema)]
            self._schema_file = read_schema(Path(schema))
        self.schema = self._schema_file.schema
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise InputError(
                f"delimiter={delimiter!r} must be one character, and neither a quote "
                "nor a line break; for tabs write it as '\\t'"
            )
        self._delimiter = delimiter

        # 2. Files.
        files = self._schema_file.files
        paths = [Path(log)] if isinstance(log, (Path, str)) else log
        self._log = expand(paths or files.log)
        if not self._log:
            raise InputError(
                "log is empty; name at least one CSV or Parquet file (--log, or "
                '"files": {"log": [...]} in the schema)'
            )
        self._users = _expand_optional(users or files.users)
        self._items = _expand_optional(items or files.items)
        self._require_tables()

        # 3. Times of the splits.
        valid_from = valid_from or files.valid_from
        test_from = test_from or files.test_from
        if valid_from is None:
            raise InputError(
                "valid_from is not given; say when the valid split begins "
                '(--valid-from, or "files": {"valid_from": ...} in the schema)'
            )
        zone = self._schema_file.time.zone
        self._valid_from = split_time("valid_from", valid_from, zone)
        self._test_from = (
            None if test_from is None else split_time("test_from", test_from, zone)
        )
        if self._test_from is not None and self._test_from <= self._valid_from:
            raise InputError(
                f"test_from={test_from} must be later than valid_from={valid_from}; "
                "move one of them"
            )

        # 4. What is said and counted while reading.
        self._said: set[str] = set()
        self._counts: dict[str, int] = {}
        self._counts_of: dict[str, dict[str, int]] = {}
        self.provenance = Provenance(
            name="delimited",
            licence="that of the log's owner",
            citation="the user's own log",
            files=(*schema_paths, *self._log, *self._users, *self._items),
            counts=self._counts,
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
        notes = Notes(self._said)
        for path in self._log:
            for batch in self._read_log(path, notes):
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
        self._finish("log", notes)
        self.check_times(earliest, latest)

    def row_parts(self) -> list[LogPart]:
        """Return a part for each file of the log."""
        # A partial and not a lambda: parts are pickled for the workers of Beam.
        return [
            LogPart(str(path), functools.partial(self._read_part, path))
            for path in self._log
        ]

    def user_parts(self) -> list[LogPart]:
        """Return a part for each file of users."""
        specs = table_specs(self._schema_file, "user_id", self.schema.group("user"))
        return [
            LogPart(str(path), functools.partial(self._read_part, path, specs))
            for path in self._users
        ]

    def check_times(self, earliest: int, latest: int) -> None:
        """Check that train and valid have rows.

        Raises:
          InputError: all times are in one of them, which is often a wrong unit of time.
        """
        column = self._schema_file.column("time_ms")
        form = self._schema_file.time
        runs = (
            f"column '{column}' runs from {_iso_time(earliest)} to "
            f"{_iso_time(latest)}, with numbers read as {UNIT_NAMES[form.unit]} since 1970 "
            "UTC"
        )
        if are_days(earliest, latest, form):
            raise InputError(
                f"{runs}; the numbers are days, such as 20220503; write them as "
                "2022-05-03"
            )
        unit = likely_unit(earliest, latest, form)
        if unit is not None:
            raise InputError(
                f"{runs}; they are sensible as {UNIT_NAMES[unit]}: say so in the schema, "
                f'"time": {{"unit": "{unit}"}}'
            )
        empty = ""
        if earliest >= self._valid_from:
            empty = "train"
        elif latest < self._valid_from:
            empty = "valid"
        if empty:
            raise InputError(
                f"valid_from={_iso_time(self._valid_from)} leaves {empty} empty: "
                f"{runs}; move valid_from or correct the times"
            )

    def _require_tables(self) -> None:
        """Check that each feature of a user or an item has a file to come from."""
        for option, files, features, key in (
            ("users", self._users, self.schema.group("user"), "user_id"),
            ("items", self._items, self.schema.group("catalogue"), "item_id"),
        ):
            lost = [f.name for f in features if f.name != key]
            if not files and lost:
                raise InputError(
                    f"{option} is not given, but the schema has {', '.join(lost)} of "
                    f"them; add --{option}"
                )

    def _read_log(self, path: Path, notes: Notes) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one file of the log."""
        specs = log_specs(self._schema_file)
        for batch in read_columns(path, specs, notes, delimiter=self._delimiter):
            yield self._add_defaults_and_split(batch)

    def _read_part(
        self, path: Path, specs: Sequence[ColumnSpec] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one file, of the log unless there are specs."""
        notes = Notes(self._said)
        if specs is None:
            yield from self._read_log(path, notes)
        else:
            yield from read_columns(path, specs, notes, delimiter=self._delimiter)
        notes.say()

    def _finish(self, table: str, notes: Notes) -> None:
        """Say the notes on a table, and count them once however often it is read."""
        notes.say()
        self._counts_of[table] = notes.counts
        self._counts.clear()
        for counts in self._counts_of.values():
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count

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
        self, key: str, paths: Sequence[Path], features: Sequence[Feature]
    ) -> pa.Table:
        """Read the table of users or items; an empty one where there is no file."""
        specs = table_specs(self._schema_file, key, features)
        schema = pa.schema([(spec.name, spec.type) for spec in specs])
        notes = Notes(self._said)
        batches = [
            batch
            for path in paths
            for batch in read_columns(path, specs, notes, delimiter=self._delimiter)
        ]
        table = pa.Table.from_batches(batches, schema=schema)
        if paths:
            refuse_repeats(paths[0], specs[0].column, table.column(key))
        self._finish(key, notes)
        return table


def _expand_optional(path: Path | None) -> list[Path]:
    return [] if path is None else expand([path])


def _iso_time(milliseconds: int) -> str:
    """Format milliseconds as ISO time; a number beyond the calendar stays a number."""
    try:
        return str(np.datetime64(milliseconds, "ms").astype("datetime64[s]")) + "Z"
    except (ValueError, OverflowError):
        return str(milliseconds)
