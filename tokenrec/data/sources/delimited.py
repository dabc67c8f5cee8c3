"""Read your own log: CSV or Parquet files, described by a JSON schema.

docs/guides/data.md has a complete example. The files:

- the log, one file or more: a row per impression or event, in any order, with
  `user_id`, `item_id`, `time_ms`, a label per task, and features of the row and of the
  action;
- users (optional): a row per user, with `user_id` and features of the user;
- items (optional): a row per item, with `item_id` and features of the item.

The schema names the columns that are read (`delimited_schema.py`); all others are left
out. Splits are made by time: rows before `valid_from` are train, rows before
`test_from` valid, the rest test. It may declare statistics of the past
(tokenrec/data/past), which are added to the log rows.

Nothing can check here what a column means. A column that is known only after the item
was shown (watch time, quantity, another label) must have the entity `action`, which the
model sees for earlier events only. Licence and citation are those of the log's owner.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.arrow_spool import spooled_table
from tokenrec.data.past.features import PastFeatures
from tokenrec.data.past.source import with_features
from tokenrec.data.schema import Feature
from tokenrec.data.source import Frozen, LogPart, Provenance
from tokenrec.data.sources.delimited_columns import (
    ColumnSpec,
    candidate_specs,
    log_specs,
    read_columns,
    refuse_repeats,
    table_specs,
)
from tokenrec.data.sources.delimited_files import expand
from tokenrec.data.sources.delimited_notes import Notes
from tokenrec.data.sources.delimited_schema import SchemaFile, read_schema
from tokenrec.data.sources.delimited_splits import TimeSplits
from tokenrec.errors import InputError

# Values of the optional columns where the schema does not name them.
_DEFAULTS = {"request": -1, "event": True, "scored": True}


class DelimitedSource:
    """Log rows of the user's own files.

    It is a `PartitionedSource`, whose parts are files, and with statistics of the past
    a `StatefulSource`.

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
      like: the rows are those of `prepare(like=...)`, which need no split; `valid_from`
        and `test_from` are not read.
      candidates: paths of rows that are to be ranked, with `like`: the columns of the
        log without labels and features of actions. They are scored and no events; rows
        of the log are then events that are not scored, unless it has such columns.

    Raises:
      InputError: the schema, a file or a value is wrong. Rows and tables are checked
        while they are read.
    """

    state_head = ""

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
        like: bool = False,
        candidates: Sequence[Path] = (),
    ) -> None:
        # 1. Schema.
        schema_paths: list[Path] = []
        if isinstance(schema, SchemaFile):
            self._schema_file = schema
        else:
            schema_paths = [Path(schema)]
            self._schema_file = read_schema(Path(schema))
        self.schema = schema_of_files = self._schema_file.schema
        self.statistics = self._schema_file.statistics
        self._past: PastFeatures | None = None
        if self.statistics is not None:
            self._past = PastFeatures(self.statistics, schema_of_files)
            self.schema = with_features(schema_of_files, self._past)
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise InputError(
                f"delimiter={delimiter!r} must be one character, and neither a quote "
                "nor a line break; for tabs write it as '\\t'"
            )
        self._delimiter = delimiter

        # 2. Files.
        files = self._schema_file.files
        self._candidates = expand(candidates)
        if self._candidates and not like:
            raise InputError(
                f"candidates={self._candidates[0]} are ranked by a run that is trained; "
                "add --like RUN, or give them as rows of the log"
            )
        # With candidates there may be no event since the run's data.
        self._log = expand(log or (() if self._candidates else files.log))
        if not self._log and not self._candidates:
            raise InputError(
                "log is empty; name at least one CSV or Parquet file (--log, or "
                '"files": {"log": [...]} in the schema)'
            )
        self._users = expand(users or files.users)
        self._items = expand(items or files.items)
        self._require_tables()

        # 3. Times of the splits.
        if like:
            valid_from = test_from = None
        else:
            valid_from = valid_from or files.valid_from
            test_from = test_from or files.test_from
            if valid_from is None:
                raise InputError(
                    "valid_from is not given; say when the valid split begins "
                    '(--valid-from, or "files": {"valid_from": ...} in the schema)'
                )
        self._splits = TimeSplits(self._schema_file, valid_from, test_from)

        # 4. What is said and counted while reading.
        self._said: set[str] = set()
        self._counts: dict[str, int] = {}
        self._counts_of: dict[str, dict[str, int]] = {}
        self.provenance = Provenance(
            name="delimited",
            licence="that of the log's owner",
            citation="the user's own log",
            files=(
                *schema_paths,
                *self._log,
                *self._candidates,
                *self._users,
                *self._items,
            ),
            counts=self._counts,
        )

    def users(self) -> pa.Table:
        return self._read_table("user_id", self._users, self.schema.group("user"))

    def items(self) -> pa.Table:
        return self._read_table("item_id", self._items, self.schema.group("catalogue"))

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the log rows, with statistics in the order of time, else of the files.

        Raises:
          InputError: a value is wrong; or, at the end, train or valid is empty.
        """
        if self._past is None:
            yield from self._read_rows()
            return
        # `prepare` has read the tables, and they are read here if nobody did.
        self._past.require_tables(self)
        yield from self._past.add_to(self._read_rows())

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the totals of the statistics, as `StatefulSource`."""
        return {} if self._past is None else self._past.state()

    def frozen(self) -> Frozen | None:
        """Describe the frozen statistics, as `FreezingSource`."""
        return None if self._past is None else self._past.describe_frozen()

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on from the totals of an earlier log, as `StatefulSource`."""
        if self._past is not None:
            self._past.resume(state, last_time_ms)

    def without_statistics(self) -> DelimitedSource:
        """Return the same files without statistics, as `SourceWithStatistics`."""
        plain = copy.copy(self)
        plain.schema = self._schema_file.schema
        plain.statistics = plain._past = None
        return plain

    def _read_rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the log rows in the order of the files."""
        earliest: int | None = None
        latest: int | None = None
        notes = Notes(self._said)
        readers = [(path, self._read_log) for path in self._log]
        readers += [(path, self._read_candidates) for path in self._candidates]
        for path, read in readers:
            for batch in read(path, notes):
                time = batch.column("time_ms").to_numpy()
                first, last = int(time.min()), int(time.max())
                earliest = first if earliest is None else min(earliest, first)
                latest = last if latest is None else max(latest, last)
                yield batch
        if earliest is None or latest is None:
            paths = [str(path) for path, _ in readers]
            raise InputError(
                f"{', '.join(paths)}: no rows; a log needs at least a "
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
          InputError: see `TimeSplits.check`.
        """
        self._splits.check(earliest, latest)

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

    def _read_candidates(self, path: Path, notes: Notes) -> Iterator[pa.RecordBatch]:
        """Yield rows that are to be ranked, with null labels and outcomes."""
        specs = candidate_specs(self._schema_file)
        kept = {"event", "scored", *(spec.name for spec in specs)}
        lost = [s for s in log_specs(self._schema_file) if s.name not in kept]
        for batch in read_columns(path, specs, notes, delimiter=self._delimiter):
            for spec in lost:
                nulls = pa.nulls(batch.num_rows, spec.type)
                batch = batch.append_column(spec.name, nulls)
            for name, value in (("event", False), ("scored", True)):
                flags = pa.array(np.full(batch.num_rows, value))
                batch = batch.append_column(name, flags)
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
        defaults = dict(_DEFAULTS)
        if self._candidates:
            defaults["scored"] = False
        for name, default in defaults.items():
            if name not in batch.schema.names:
                values = pa.array(np.full(batch.num_rows, default))
                batch = batch.append_column(name, values)
        split = self._splits.split_of(batch.column("time_ms").to_numpy())
        return batch.append_column("split", pa.array(split))

    def _read_table(
        self, key: str, paths: Sequence[Path], features: Sequence[Feature]
    ) -> pa.Table:
        """Read the table of users or items; an empty one where there is no file."""
        specs = table_specs(self._schema_file, key, features)
        schema = pa.schema([(spec.name, spec.type) for spec in specs])
        notes = Notes(self._said)
        batches = (
            batch
            for path in paths
            for batch in read_columns(path, specs, notes, delimiter=self._delimiter)
        )
        table = spooled_table(batches, schema)
        if paths:
            refuse_repeats(paths[0], specs[0].column, table.column(key))
        self._finish(key, notes)
        if self._past is not None:
            self._past.describe(key, table)
        return table
