"""Compute the declared statistics of a log, block after block in the order of time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from tokenrec.data.past import measures as m
from tokenrec.data.past.declaration import (
    UNITS_MS,
    PastStatistics,
    duration_ms,
    half_life_ms,
    last_events,
    time_names,
)
from tokenrec.data.past.frozen import FrozenFeatures
from tokenrec.data.past.keys import Hashes, KeyColumns, combine
from tokenrec.data.past.last_events import LastEvents
from tokenrec.data.past.log_rows import check_rows
from tokenrec.data.past.plan import (
    Entries,
    Key,
    KeyedTotals,
    features_of_key,
    features_of_matches,
    overflow_problem,
    plan_keys,
)
from tokenrec.data.past.runs import TotalOverflowError
from tokenrec.data.past.totals import KeyTotals
from tokenrec.data.past.user_times import TimesOfUsers
from tokenrec.data.schema import Feature, Schema
from tokenrec.data.source import FROZEN_COLUMN, Frozen, Source
from tokenrec.data.time_order import time_blocks, time_ordered
from tokenrec.errors import InputError

# Log rows whose statistics are computed at once; where a block ends changes nothing.
_BLOCK_ROWS = 65_536


class PastFeatures:
    """Statistics of the past of a log's rows.

    Args:
      statistics: the declaration, which was checked.
      schema: schema of the source, without the statistics.
    """

    def __init__(self, statistics: PastStatistics, schema: Schema) -> None:
        self._declared = statistics.of_tasks(schema)
        self._schema = schema
        self.features: tuple[Feature, ...] = statistics.features(schema)
        self._tables: dict[str, pa.Table] = {}
        # The log that this one goes on from: its totals, and the time of its last row.
        self._earlier: tuple[Mapping[str, np.ndarray], int] | None = None
        self._plans = plan_keys(self._declared)
        self._names = {name for key in self._plans for name in key}
        self._start()
        self.frozen = FrozenFeatures(self.features)

    def describe(self, key: str, table: pa.Table) -> None:
        """Describe users or items; needed before `add_to`.

        Args:
          key: "user_id" or "item_id".
          table: `Source.users` or `Source.items`.
        """
        self._tables[key] = table.select(
            [n for n in table.column_names if n == key or n in self._names]
        )

    def require_tables(self, source: Source) -> None:
        """Read the tables of users and items, unless `describe` was given them.

        Args:
          source: a source whose `users` and `items` call `describe`.
        """
        if "user_id" not in self._tables:
            source.users()
        if "item_id" not in self._tables:
            source.items()

    def add_to(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield log rows in the order of time, with the features added.

        The column `FROZEN_COLUMN` is added too (frozen.py).

        Raises:
          InputError: a column or a value is wrong, or as `time_ordered`.
        """
        self._start()
        self.frozen = FrozenFeatures(
            self.features, None if self._earlier is None else self._earlier[1]
        )
        later = self._later(batches)
        for table in self._blocks(time_ordered(later)):
            for part in self.frozen.cut(table):
                part = part.append_column(FROZEN_COLUMN, self.frozen.of(part, self))
                yield from self.add_to_block(part).to_batches()

    def add_to_block(self, table: pa.Table) -> pa.Table:
        """Add the features to log rows, all later than those of the call before."""
        past = self._update(table)
        for feature in self.features:
            values = past[feature.name].astype(np.float32)
            column = pa.array(values, mask=np.isnan(values))
            table = table.append_column(feature.name, column)
        return table

    def describe_frozen(self) -> Frozen:
        """Describe the frozen statistics of the rows that `add_to` yielded."""
        return Frozen(tuple(f.name for f in self.features), self.frozen.times)

    def without_totals(self) -> PastFeatures:
        """The same statistics with nothing counted, to which `take_over` gives totals."""
        other = copy.copy(self)
        other._begin()
        return other

    def take_over(self, other: PastFeatures, table: pa.Table) -> None:
        """Begin with the totals of another for the keys of a block that are new here."""
        columns = self._columns.of_rows(table)
        for key in self._plans:
            _, keys = combine([columns[name] for name in key], table.num_rows)
            self._totals[key].take_over(other._totals[key], keys)
        user = columns["user_id"].first_of_each()
        for key, windows in self._windows.items():
            windows.take_over(other._windows[key], user)
        self._times.take_over(other._times, user)

    def without_counting(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Features of log rows, `[R] float64` each, which do not count for later ones."""
        return self._update(table, count=False)

    def state(self) -> dict[str, np.ndarray]:
        """Return all totals and the declaration, by names that files can have."""
        arrays = {"declaration": self._digest()}
        for part, totals in self._parts().items():
            arrays |= named_state(part, totals.state())
        return arrays

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on from what `state` returned; the rows until `last_time_ms` are left out.

        Raises:
          InputError: it is of another declaration.
        """
        given = state.get("declaration")
        if given is None or not np.array_equal(given, self._digest()):
            raise InputError(
                "the statistics are declared otherwise than those of the earlier data "
                "set, whose totals they go on from; give the same declaration, or "
                "prepare the earlier data set again"
            )
        self._earlier = state, last_time_ms

    def _start(self) -> None:
        """Begin, or go on from an earlier log, whichever times the log is read."""
        self._columns = KeyColumns(self._schema, sorted(self._names))
        for key, table in self._tables.items():
            self._columns.add_table(key, table)
        self._begin()
        if self._earlier is None:
            return
        for part, totals in self._parts().items():
            head = f"{part}_"
            totals.resume(
                {
                    name.removeprefix(head): array
                    for name, array in self._earlier[0].items()
                    if name.startswith(head)
                }
            )

    def _begin(self) -> None:
        """Begin with nothing counted."""
        session = self._declared.times.session
        self._times = TimesOfUsers(duration_ms(session) if session else None)
        self._totals = {
            key: KeyTotals(
                np.array([m.scale_of(name) for name in plan.measures]),
                [half_life_ms(horizon) for horizon in plan.running()],
            )
            for key, plan in self._plans.items()
        }
        self._windows = {
            key: LastEvents(
                [last_events(horizon) or 0 for horizon in plan.windows()],
                self._columns.most_keys(key),
                np.array([m.scale_of(name) for name in plan.measures]),
            )
            for key, plan in self._plans.items()
            if plan.windows()
        }

    def _later(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Keep the rows later than the earlier log, checked."""
        first = 0
        for batch in batches:
            rows = batch.num_rows
            batch = check_rows(batch, self._schema, first)
            first += rows
            if self._earlier is not None:
                time = batch["time_ms"].to_numpy()
                batch = batch.filter(pa.array(time > self._earlier[1]))
            if batch.num_rows:
                yield batch

    def _blocks(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Cut log rows in the order of time into what is computed at once."""
        return time_blocks(tables, _BLOCK_ROWS)

    def _parts(self) -> dict[str, KeyColumns | TimesOfUsers | KeyTotals | LastEvents]:
        """What has a state, by its name there; keys are numbered."""
        return {
            "columns": self._columns,
            "times": self._times,
            **{f"key_{i}": t for i, t in enumerate(self._totals.values())},
            **{f"last_{i}": t for i, t in enumerate(self._windows.values())},
        }

    def _digest(self) -> np.ndarray:
        text = json.dumps(self._declared.to_json(), sort_keys=True)
        return np.frombuffer(text.encode(), np.uint8)

    def _update(self, table: pa.Table, count: bool = True) -> dict[str, np.ndarray]:
        """Features of a block, `[R] float64` each; then count its rows, or not."""
        columns = self._columns.of_rows(table)
        measures = self._measures(table, columns)
        if not count:
            measures = {name: np.zeros_like(each) for name, each in measures.items()}
        totals = {
            key: self._update_key(key, table, columns, measures) for key in self._plans
        }
        out: dict[str, np.ndarray] = {}
        for part in self._declared.keys:
            out |= features_of_key(part, totals)
        for match in self._declared.matches:
            out |= features_of_matches(match, totals[match.key])
        if time_names(self._declared.times):
            out |= self._update_times(table, columns, measures)
        if self._declared.unscored != "full":
            hidden = ~m.flags(table, "scored")
            for name in out:
                out[name] = np.where(hidden, np.nan, out[name])
        return out

    def _measures(
        self, table: pa.Table, columns: Mapping[str, Hashes]
    ) -> dict[str, np.ndarray]:
        """What each row of a block adds to the totals."""
        tasks = [task.name for task in self._schema.binary_tasks]
        means = {name for part in self._declared.keys for name in part.means}
        return m.measures(
            table,
            columns,
            tasks,
            [f for f in self._schema.features if f.name in means],
            self._declared.unscored,
        )

    def _entries(
        self,
        key: Key,
        table: pa.Table,
        columns: Mapping[str, Hashes],
        measures: Mapping[str, np.ndarray],
    ) -> Entries:
        """What the rows of a block add to the totals of a key."""
        rows, keys = combine([columns[n] for n in key], table.num_rows)
        names = self._plans[key].measures
        values = np.stack([measures[name][rows] for name in names], axis=1)
        return Entries(rows, keys, table["time_ms"].to_numpy()[rows], values)

    def _update_key(
        self,
        key: Key,
        table: pa.Table,
        columns: Mapping[str, Hashes],
        measures: Mapping[str, np.ndarray],
    ) -> KeyedTotals:
        """Totals of the strictly earlier rows of each row's key; then add the block."""
        plan = self._plans[key]
        rows, keys, time, values = self._entries(key, table, columns, measures)
        try:
            before = self._totals[key].update(keys, time, values)
        except TotalOverflowError as error:
            raise overflow_problem(key, plan, error) from error
        present = np.zeros(table.num_rows, bool)
        present[rows] = True
        totals = {}
        for horizon, entries in zip(plan.running(), before, strict=True):
            total = totals[horizon] = np.zeros((table.num_rows, len(plan.measures)))
            if len(rows) == np.count_nonzero(present):
                total[rows] = entries
            else:
                # A row with several values of a column adds up their totals.
                np.add.at(total, rows, entries)
        if plan.windows():
            windows = self._update_window(key, table, columns, measures, rows, keys)
            totals |= dict(zip(plan.windows(), windows, strict=True))
        return KeyedTotals(
            present,
            {h: dict(zip(plan.measures, t.T, strict=True)) for h, t in totals.items()},
        )

    def _update_window(
        self,
        key: Key,
        table: pa.Table,
        columns: Mapping[str, Hashes],
        measures: Mapping[str, np.ndarray],
        rows: np.ndarray,
        keys: np.ndarray,
    ) -> list[np.ndarray]:
        """The same of the user's last events, `[R, measures]` for each horizon."""
        offsets = np.cumsum(np.bincount(rows, minlength=table.num_rows))
        user = columns["user_id"].first_of_each()
        time = table["time_ms"].to_numpy()
        item = columns["item_id"].first_of_each()
        return self._windows[key].update(
            np.lexsort((m.flags(table, "scored"), item, time, user)),
            user,
            time,
            measures[m.EVENTS] > 0,
            Hashes(np.append(0, offsets), keys),
            np.stack([measures[name] for name in self._plans[key].measures], axis=1),
        )

    def _update_times(
        self,
        table: pa.Table,
        columns: Mapping[str, Hashes],
        measures: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        times = self._declared.times
        length = np.full(table.num_rows, np.nan)
        if times.idle_after:
            length = m.numbers(table, times.idle_after) * UNITS_MS[times.unit]
        features = self._times.update(
            columns["user_id"].first_of_each(),
            table["time_ms"].to_numpy(),
            measures[m.EVENTS] > 0,
            length,
        )
        return {name: features[name] for name in time_names(times)}


def named_state(part: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of one part of the state, by their names in the whole."""
    return {f"{part}_{name}": array for name, array in arrays.items()}
