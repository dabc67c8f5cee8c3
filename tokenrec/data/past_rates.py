"""Past rates: how often each key (a video, an author, a user, ...) had a positive label before a row's time.

A rate counts rows of a strictly earlier time only, other users' rows included, so that neither the row, nor a row shown
at the same moment, nor anything later enters it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Entity, Feature
from tokenrec.errors import InputError

SPILL_MS = 6 * 3_600_000
_MOST_SPILLS = 500  # files open at once


@dataclasses.dataclass(frozen=True)
class RateKey:
    """A name for the features, and the entity that they describe."""

    name: str
    entity: Entity


class PastRates:
    """Smoothed past rates of `tasks` under `keys`, over rows that arrive in the order of time.

    With p positives among n known labels of the key's earlier rows, and g the positive share of all earlier rows, the
    rate is `logit((p + strength g) / (n + strength)) - logit(g)`: zero for an average key, in units of log-odds.
    Memory grows with the number of distinct keys, not with the number of rows.

    Attributes:
      strength: rows of evidence that the overall rate g is worth.
    """

    def __init__(
        self, keys: Sequence[RateKey], tasks: Sequence[str], *, strength: float = 20.0
    ) -> None:
        if not strength > 0:
            raise InputError(
                f"strength={strength} must be above 0: a rate of few rows needs a prior"
            )
        self.keys = tuple(keys)
        self.tasks = tuple(tasks)
        self.strength = strength
        width = 1 + 2 * len(self.tasks)
        self._counters = {key.name: _Counters(width) for key in self.keys}
        self._overall = np.zeros(width, np.int64)
        self._latest: int | None = None

    def features(self) -> tuple[Feature, ...]:
        """A `rate_KEY_TASK` per key and task and a `count_KEY` per key, dense features of the row."""
        features: list[Feature] = []
        for key in self.keys:
            item = key.entity == "item"
            features += [
                Feature(f"rate_{key.name}_{t}", "dense", key.entity, per_row=item)
                for t in self.tasks
            ]
            features += [
                Feature(
                    f"count_{key.name}",
                    "dense",
                    key.entity,
                    transform="log1p",
                    per_row=item,
                )
            ]
        return tuple(features)

    def update(
        self,
        time_ms: np.ndarray,
        keys: Mapping[str, np.ndarray],
        labels: Mapping[str, np.ndarray],
        counted: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Features of R rows from all rows before them; then the rows count for later ones.

        Args:
          time_ms: `[R] int64`, ascending, and all later than the rows of the call before.
          keys: key name -> `[R] int64`, at least 0, or -1 where the row has no such key.
          labels: task -> `[R] int8`, 1, 0, or -1 where unknown, which counts for nothing.
          counted: `[R] bool`, rows that count for later ones; all by default.

        Returns:
          Feature name -> `[R] float32`. A rate is NaN without a known label before it, all are NaN without a key.
        """
        if not len(time_ms):
            return {
                feature.name: np.zeros(0, np.float32) for feature in self.features()
            }
        if (np.diff(time_ms) < 0).any() or (
            self._latest is not None and time_ms[0] <= self._latest
        ):
            raise InputError(
                f"time_ms={time_ms[0]} follows {self._latest}: rates need rows in the order of time"
            )
        self._latest = int(time_ms[-1])
        entering = np.ones(len(time_ms), bool) if counted is None else counted
        values = np.empty((len(time_ms), 1 + 2 * len(self.tasks)), np.int32)
        values[:, 0] = entering
        for index, task in enumerate(self.tasks):
            values[:, 1 + 2 * index] = entering & (labels[task] >= 0)
            values[:, 2 + 2 * index] = entering & (labels[task] == 1)

        one_group = np.arange(len(time_ms)) == 0
        overall = self._overall + _earlier(one_group, time_ms, values)
        self._overall += values.sum(0, dtype=np.int64)
        features: dict[str, np.ndarray] = {}
        for key in self.keys:
            before, present = self._before(key.name, keys[key.name], time_ms, values)
            for index, task in enumerate(self.tasks):
                known, positive = 1 + 2 * index, 2 + 2 * index
                # One imaginary positive and negative keep g inside (0, 1) at the very start.
                share = (overall[:, positive] + 1.0) / (overall[:, known] + 2.0)
                rate = (before[:, positive] + self.strength * share) / (
                    before[:, known] + self.strength
                )
                value = np.log(rate / (1 - rate)) - np.log(share / (1 - share))
                value[~present | (before[:, known] == 0)] = np.nan
                features[f"rate_{key.name}_{task}"] = value.astype(np.float32)
            features[f"count_{key.name}"] = np.where(
                present, before[:, 0], np.nan
            ).astype(np.float32)
        return features

    def _before(
        self, name: str, key: np.ndarray, time_ms: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[R, width]` totals of the key's strictly earlier rows, and which rows have the key; then counts the rows."""
        before = np.zeros(values.shape, np.int64)
        present = key >= 0
        rows = np.flatnonzero(present)
        if not len(rows):
            return before, present
        rows = rows[np.argsort(key[rows], kind="stable")]
        group_start = np.ones(len(rows), bool)
        group_start[1:] = key[rows][1:] != key[rows][:-1]
        ids = key[rows][group_start]
        group = np.cumsum(group_start) - 1
        before[rows] = self._counters[name].get(ids)[group] + _earlier(
            group_start, time_ms[rows], values[rows]
        )
        self._counters[name].add(
            ids, np.add.reduceat(values[rows], np.flatnonzero(group_start))
        )
        return before, present


def _earlier(
    group_start: np.ndarray, time_ms: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Sums of `values: [R, width]` over the rows of the same group (a run of rows) with a strictly earlier time."""
    exclusive = np.cumsum(values, axis=0, dtype=np.int64) - values
    index = np.arange(len(values))
    tie_start = group_start.copy()
    tie_start[1:] |= time_ms[1:] != time_ms[:-1]
    first_of_group = np.maximum.accumulate(np.where(group_start, index, 0))
    first_of_tie = np.maximum.accumulate(np.where(tie_start, index, 0))
    return exclusive[first_of_tie] - exclusive[first_of_group]


class _Counters:
    """Totals per id, in arrays sorted by id."""

    def __init__(self, width: int) -> None:
        self._ids = np.zeros(0, np.int64)
        self._totals = np.zeros((0, width), np.int32)

    def get(self, ids: np.ndarray) -> np.ndarray:
        """`[N, width]` totals of distinct `ids`, zero for new ones."""
        at, known = self._find(ids)
        totals = np.zeros((len(ids), self._totals.shape[1]), np.int64)
        totals[known] = self._totals[at[known]]
        return totals

    def add(self, ids: np.ndarray, totals: np.ndarray) -> None:
        """Adds `totals: [N, width]` to ascending, distinct `ids`."""
        at, known = self._find(ids)
        self._totals[at[known]] += totals[known].astype(np.int32)
        self._ids = np.insert(self._ids, at[~known], ids[~known])
        self._totals = np.insert(self._totals, at[~known], totals[~known], axis=0)

    def _find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.searchsorted(self._ids, ids)
        known = at < len(self._ids)
        known[known] = self._ids[at[known]] == ids[known]
        return at, known


def time_ordered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in the order of their column `time_ms`; rows of equal time stay in order and in one table.

    The rows are spilled to the folder for temporary files (`TMPDIR`) by spans of six hours, so that one span at a time
    is in memory, however long the log.

    Raises:
      InputError: the times lie so far apart that they cannot be milliseconds of one log.
    """
    with tempfile.TemporaryDirectory(prefix="tokenrec-") as folder:
        spans = _spill(batches, Path(folder))
        for span in sorted(spans):
            with pa.OSFile(str(spans[span]), "rb") as file:
                table = pa.ipc.open_stream(file).read_all()
            spans[span].unlink()
            order = np.argsort(table.column("time_ms").to_numpy(), kind="stable")
            yield table.take(pa.array(order))


def _spill(batches: Iterable[pa.RecordBatch], folder: Path) -> dict[int, Path]:
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    paths: dict[int, Path] = {}
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    try:
        for batch in batches:
            span_of = batch.column("time_ms").to_numpy() // SPILL_MS
            for span in np.unique(span_of).tolist():
                if span not in writers:
                    if len(writers) == _MOST_SPILLS:
                        low, high = (
                            t * SPILL_MS // 86_400_000
                            for t in (min(writers), max(writers))
                        )
                        raise InputError(
                            f"time_ms lies in more than {_MOST_SPILLS} spans of 6 hours, between days {low} and {high} "
                            "of 1970; check that it is in milliseconds, or prepare the log without rates"
                        )
                    paths[span] = folder / f"{span}.arrow"
                    writers[span] = pa.ipc.new_stream(
                        str(paths[span]), batch.schema, options=options
                    )
                writers[span].write_batch(batch.filter(pa.array(span_of == span)))
    finally:
        for writer in writers.values():
            writer.close()
    return paths
