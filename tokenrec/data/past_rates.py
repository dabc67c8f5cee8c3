"""Features of a log row from strictly earlier log rows: past rates and counts of a key.

A *key* is a video, an author, a user, ...; a *rate* says how often log rows of this key
had a positive label, compared with all log rows. For a log row with key k at time t,
let p and n be the positive and the known labels among the log rows j of the key with
`t_j < t`, and g the share of positives among all log rows with `t_j < t`:

    g    = (P + 1) / (N + 2)                      P, N: the same sums over all keys
    rate = logit((p + s g) / (n + s)) - logit(g)  s: `strength`, in log rows of evidence

The rate is 0 for an average key, in units of log-odds. The prior `s g` shrinks the rate
of a key with few log rows towards the average. `log(1 + count)` goes with it, so that a
model can tell a certain rate from an uncertain one.

The inequality is strict, and log rows of all users are counted. So neither the log row
itself, nor a log row shown at the same moment, nor anything later enters a feature
(tests/data/test_no_leak.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from tokenrec.data.schema import Entity, Feature
from tokenrec.errors import InputError


@dataclasses.dataclass(frozen=True)
class RateKey:
    """A key to count by.

    Attributes:
      name: what the names of the features call it.
      entity: the entity that the features describe.
    """

    name: str
    entity: Entity


class PastRates:
    """Running totals per key, which turn log rows in the order of time into features.

    Memory grows with the number of distinct keys, not with the number of log rows.

    Attributes:
      keys: what to count by.
      tasks: labels whose rates are features.
      strength: log rows of evidence that the overall rate g is worth.

    Raises:
      InputError: `strength` is not positive.
    """

    def __init__(
        self, keys: Sequence[RateKey], tasks: Sequence[str], *, strength: float = 20.0
    ) -> None:
        if not strength > 0:
            raise InputError(
                f"strength={strength} must be above 0: a rate of few rows needs a "
                "prior; 20 is usual"
            )
        self.keys = tuple(keys)
        self.tasks = tuple(tasks)
        self.strength = strength
        # Columns of all totals: log rows, then known and positive labels of each task.
        width = 1 + 2 * len(self.tasks)
        self._counters = {key.name: _Counters(width) for key in self.keys}
        self._overall = np.zeros(width, np.int64)
        self._latest: int | None = None

    def features(self) -> tuple[Feature, ...]:
        """Describe the features: `rate_KEY_TASK` per key and task, `count_KEY` per key.

        They change from log row to log row, so those of an item have `per_row`.
        """
        features: list[Feature] = []
        for key in self.keys:
            per_row = key.entity == "item"
            for task in self.tasks:
                name = f"rate_{key.name}_{task}"
                features.append(Feature(name, "dense", key.entity, per_row=per_row))
            features.append(
                Feature(
                    f"count_{key.name}",
                    "dense",
                    key.entity,
                    transform="log1p",
                    per_row=per_row,
                )
            )
        return tuple(features)

    def update(
        self,
        time_ms: np.ndarray,
        keys: Mapping[str, np.ndarray],
        labels: Mapping[str, np.ndarray],
        counted: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Compute features of R log rows, and then count them for later log rows.

        Args:
          time_ms: `[R] int64`, ascending, and all later than those of the call before.
          keys: key name -> `[R] int64`, at least 0, or -1 where the log row has no such
            key.
          labels: task -> `[R] int8`, 1, 0, or -1 where unknown, which is not counted.
          counted: `[R] bool`, log rows that count for later ones; all by default.

        Returns:
          Feature name -> `[R] float32`. A rate is NaN if no known label is before it;
          rate and count are NaN if the log row has no key.

        Raises:
          InputError: the log rows are not in the order of time.
        """
        if not len(time_ms):
            return {f.name: np.zeros(0, np.float32) for f in self.features()}
        self._check_order(time_ms)

        # 1. What each log row adds to the totals.
        values = self._values(labels, counted, len(time_ms))

        # 2. Totals over all keys: the log rows of earlier calls, and the strictly
        #    earlier ones of this call.
        one_group = np.arange(len(time_ms)) == 0
        overall = self._overall + _sum_earlier(one_group, time_ms, values)
        self._overall += values.sum(0, dtype=np.int64)

        # 3. The same per key, and the features.
        features: dict[str, np.ndarray] = {}
        for key in self.keys:
            before, present = self._before(key.name, keys[key.name], time_ms, values)
            for index, task in enumerate(self.tasks):
                rate = self._rate(before, overall, index)
                known = before[:, 1 + 2 * index]
                rate[~present | (known == 0)] = np.nan
                features[f"rate_{key.name}_{task}"] = rate.astype(np.float32)
            count = np.where(present, before[:, 0], np.nan)
            features[f"count_{key.name}"] = count.astype(np.float32)
        return features

    def state(self) -> dict[str, np.ndarray]:
        """Return all totals, from which `resume` goes on."""
        arrays: dict[str, np.ndarray] = {"rates_overall": self._overall}
        for name, counters in self._counters.items():
            arrays[f"rates_{name}_ids"] = counters.ids
            arrays[f"rates_{name}_totals"] = counters.totals
        return arrays

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from totals that `state` returned, of the same keys and tasks.

        Raises:
          InputError: they are of other keys or tasks.
        """
        expected = {name: array.shape[1:] for name, array in self.state().items()}
        given = {name: array.shape[1:] for name, array in state.items()}
        if given != expected:
            raise InputError(
                f"the totals {sorted(given)} are not those of the keys "
                f"{sorted(self._counters)} and tasks {list(self.tasks)}; prepare the "
                "earlier data set again"
            )
        self._overall = np.array(state["rates_overall"])
        for name in self._counters:
            self._counters[name] = _Counters.of(
                np.array(state[f"rates_{name}_ids"]),
                np.array(state[f"rates_{name}_totals"]),
            )

    def _check_order(self, time_ms: np.ndarray) -> None:
        # Not even equal to the call before: its log rows are counted already, and a log
        # row of the same time must not count.
        follows = self._latest is None or time_ms[0] > self._latest
        if (np.diff(time_ms) < 0).any() or not follows:
            raise InputError(
                f"time_ms={time_ms[0]} follows {self._latest}: rates need rows in the "
                "order of time; sort them with `time_ordered`"
            )
        self._latest = int(time_ms[-1])

    def _values(
        self, labels: Mapping[str, np.ndarray], counted: np.ndarray | None, rows: int
    ) -> np.ndarray:
        """Compute what each log row adds to the totals: `[R, width] int32`, 0 or 1."""
        entering = np.ones(rows, bool) if counted is None else counted
        values = np.empty((rows, 1 + 2 * len(self.tasks)), np.int32)
        values[:, 0] = entering
        for index, task in enumerate(self.tasks):
            values[:, 1 + 2 * index] = entering & (labels[task] >= 0)
            values[:, 2 + 2 * index] = entering & (labels[task] == 1)
        return values

    def _rate(self, before: np.ndarray, overall: np.ndarray, index: int) -> np.ndarray:
        """The rate of task number `index`, `[R] float64`, by the equation above."""
        known, positive = 1 + 2 * index, 2 + 2 * index
        # One imaginary positive and one negative keep g inside (0, 1) at the start.
        share = (overall[:, positive] + 1.0) / (overall[:, known] + 2.0)
        rate = (before[:, positive] + self.strength * share) / (
            before[:, known] + self.strength
        )
        return np.log(rate / (1 - rate)) - np.log(share / (1 - share))

    def _before(
        self, name: str, key: np.ndarray, time_ms: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum the strictly earlier log rows of each log row's key; then count these.

        Returns:
          before: `[R, width] int64`.
          present: `[R] bool`, the log row has a key.
        """
        before = np.zeros(values.shape, np.int64)
        present = key >= 0
        rows = np.flatnonzero(present)
        if not len(rows):
            return before, present
        # Sort by key, stably: the log rows of a key are a run in the order of time.
        rows = rows[np.argsort(key[rows], kind="stable")]
        group_start = np.ones(len(rows), bool)
        group_start[1:] = key[rows][1:] != key[rows][:-1]
        ids = key[rows][group_start]
        group = np.cumsum(group_start) - 1
        before[rows] = self._counters[name].get(ids)[group] + _sum_earlier(
            group_start, time_ms[rows], values[rows]
        )
        self._counters[name].add(
            ids, np.add.reduceat(values[rows], np.flatnonzero(group_start))
        )
        return before, present


def _sum_earlier(
    group_start: np.ndarray, time_ms: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Sum over the earlier log rows of a group, those of the same time excluded.

    With the exclusive cumulative sum c over all log rows, the sum is
    `c[first of the tie] - c[first of the group]`.

    Args:
      group_start: `[R] bool`, True where a run of log rows, a group, begins.
      time_ms: `[R] int64`, ascending within a group.
      values: `[R, width] int32`.

    Returns:
      `[R, width] int64`.
    """
    exclusive = np.cumsum(values, axis=0, dtype=np.int64) - values
    index = np.arange(len(values))
    tie_start = group_start.copy()
    tie_start[1:] |= time_ms[1:] != time_ms[:-1]
    first_of_group = np.maximum.accumulate(np.where(group_start, index, 0))
    first_of_tie = np.maximum.accumulate(np.where(tie_start, index, 0))
    return exclusive[first_of_tie] - exclusive[first_of_group]


class _Counters:
    """Totals per id, in arrays sorted by id.

    Attributes:
      ids: `[N] int64`, ascending.
      totals: `[N, width] int32`.
    """

    def __init__(self, width: int) -> None:
        self.ids = np.zeros(0, np.int64)
        self.totals = np.zeros((0, width), np.int32)

    @staticmethod
    def of(ids: np.ndarray, totals: np.ndarray) -> _Counters:
        """Totals `[N, width]` of ascending `ids: [N]`."""
        counters = _Counters(totals.shape[1])
        counters.ids, counters.totals = ids, totals
        return counters

    def get(self, ids: np.ndarray) -> np.ndarray:
        """Totals of distinct `ids: [N]`, zero for new ones: `[N, width] int64`."""
        place, known = self._find(ids)
        totals = np.zeros((len(ids), self.totals.shape[1]), np.int64)
        totals[known] = self.totals[place[known]]
        return totals

    def add(self, ids: np.ndarray, totals: np.ndarray) -> None:
        """Add `totals: [N, width]` to the ascending, distinct `ids: [N]`."""
        place, known = self._find(ids)
        self.totals[place[known]] += totals[known].astype(np.int32)
        self.ids = np.insert(self.ids, place[~known], ids[~known])
        self.totals = np.insert(self.totals, place[~known], totals[~known], axis=0)

    def _find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place of each id in the sorted arrays, and whether it is there."""
        place = np.searchsorted(self.ids, ids)
        known = place < len(self.ids)
        known[known] = self.ids[place[known]] == ids[known]
        return place, known
