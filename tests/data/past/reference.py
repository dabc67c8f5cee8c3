"""Statistics of the past by their definitions: a loop over pairs of log rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from tokenrec.data.past.declaration import (
    ALL,
    UNITS_MS,
    KeyStatistics,
    PastStatistics,
    duration_ms,
    half_life_ms,
    last_events,
)
from tokenrec.data.past.keys import hash_column

Row = dict[str, Any]


@dataclasses.dataclass
class Reference:
    """Features of log rows, computed one by one.

    Attributes:
      rows: log rows, with the features of user and item joined to them.
      declared: the declaration, with all tasks named.
      tasks: all labels.
    """

    rows: Sequence[Row]
    declared: PastStatistics
    tasks: Sequence[str]

    def __post_init__(self) -> None:
        self.counted = self._join_repeats()

    def features(self, row: Row, frozen_at: int | None = None) -> dict[str, float]:
        """All features of one row, NaN where missing.

        Args:
          row: the row.
          frozen_at: rows from this time on are as if they were not in the log.
        """
        end = row["time_ms"]
        if frozen_at is not None:
            end = min(end, frozen_at)
        past = [other for other in self.counted if other["time_ms"] < end]
        events = [other for other in past if other["event"]]
        self._last = sorted(
            (other for other in events if other["user_id"] == row["user_id"]),
            key=lambda o: (o["time_ms"], hash_of_item(o["item_id"]), o["scored"]),
        )
        out: dict[str, float] = {}
        for part in self.declared.keys:
            for horizon in part.horizons:
                out |= self._of_key(part, horizon, row, past)
        for match in self.declared.matches:
            for horizon in match.horizons:
                weights = self._weights(match.key, horizon, row, events)
                for task in (None, *(match.tasks or ())):
                    total = sum(
                        w
                        for w, other in weights
                        if task is None or other[f"label_{task}"] == 1
                    )
                    has_key = bool(_keys(match.key, row))
                    out[match.count(task, horizon)] = total if has_key else math.nan
        out |= self._times(row, events)
        if self.declared.unscored != "full" and not row["scored"]:
            out = dict.fromkeys(out, math.nan)
        return out

    def _join_repeats(self) -> list[Row]:
        groups: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            key = tuple(row[n] for n in ("user_id", "item_id", "time_ms", "scored"))
            first = groups.setdefault(key, dict(row))
            for task in self.tasks:
                labels = (first[f"label_{task}"], row[f"label_{task}"])
                first[f"label_{task}"] = max(
                    labels, key=lambda x: -1 if x is None else x
                )
        return [
            row
            for row in groups.values()
            if row["event"] or any(row[f"label_{t}"] is not None for t in self.tasks)
            if row["scored"] or self.declared.unscored != "skip"
        ]

    def _of_key(
        self, part: KeyStatistics, horizon: str, row: Row, past: Sequence[Row]
    ) -> dict[str, float]:
        out = {}
        chain = [self._weights(key, horizon, row, past) for key in part.chain()]
        for task in part.tasks or ():
            label = f"label_{task}"
            known = [sum(w for w, o in c if o[label] is not None) for c in chain]
            positive = [sum(w for w, o in c if o[label] == 1) for c in chain]
            overall = share = (positive[-1] + 1) / (known[-1] + 2)
            for n, p in reversed(list(zip(known, positive, strict=True))[:-1]):
                share = (p + part.strength * share) / (n + part.strength)
            rate = math.log(share / (1 - share)) - math.log(overall / (1 - overall))
            out[part.rate(task, horizon)] = rate if known[0] > 0 else math.nan
        for name in part.means:
            with_value = [[(w, o) for w, o in c if o[name] is not None] for c in chain]
            number = [sum(w for w, _ in c) for c in with_value]
            total = [sum(w * o[name] for w, o in c) for c in with_value]
            mean = overall = total[-1] / number[-1] if number[-1] else math.nan
            for n, t in reversed(list(zip(number, total, strict=True))[:-1]):
                mean = (t + part.strength * mean) / (n + part.strength)
            out[part.mean(name, horizon)] = mean - overall if number[0] else math.nan
        count = sum(w for w, _ in chain[0])
        out[part.count(horizon)] = count if _keys(part.key, row) else math.nan
        return out

    def _weights(
        self, key: tuple[str, ...], horizon: str, row: Row, past: Sequence[Row]
    ) -> list[tuple[float, Row]]:
        """Earlier rows with the key, and what each counts."""
        number = last_events(horizon)
        if number is None:
            return _weights(key, horizon, row, past)
        if "user_id" in key:
            past = self._last[-number:]
        return _weights(key, ALL, row, past)

    def _times(self, row: Row, events: Sequence[Row]) -> dict[str, float]:
        times = self.declared.times
        mine = [other for other in events if other["user_id"] == row["user_id"]]
        out = dict.fromkeys(("past_gap", "past_idle", "past_session"), math.nan)
        if mine:
            last = max(other["time_ms"] for other in mine)
            gap = row["time_ms"] - last
            out["past_gap"] = gap / 1000
            lengths = [
                other[times.idle_after]
                for other in mine
                if other["time_ms"] == last and other[times.idle_after] is not None
            ]
            if lengths:
                out["past_idle"] = (gap - max(lengths) * UNITS_MS[times.unit]) / 1000
            # Backwards from the row, until a gap ends the session.
            longest = duration_ms(times.session) or 0
            moment, count = row["time_ms"], 0
            for time in sorted({other["time_ms"] for other in mine}, reverse=True):
                if moment - time >= longest:
                    break
                moment = time
                count += sum(other["time_ms"] == time for other in mine)
            out["past_session"] = count
        return out


def hash_of_item(item: int) -> int:
    """What decides which of several events at one time are the last."""
    return int(hash_column(pa.array([item]), "item_id").values[0])


def _keys(key: tuple[str, ...], row: Row) -> list[tuple[Any, ...]]:
    """Every combination of the values of a row's key columns."""
    keys: list[tuple[Any, ...]] = [()]
    for name in key:
        value = row.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        keys = [(*k, v) for k in keys for v in dict.fromkeys(values)]
    return keys


def _weights(
    key: tuple[str, ...], horizon: str, row: Row, past: Sequence[Row]
) -> list[tuple[float, Row]]:
    """Earlier rows with the row's key and what each counts, once for each shared key."""
    half_life = half_life_ms(horizon)
    mine = _keys(key, row)
    out = []
    for other in past:
        shared = len(set(mine) & set(_keys(key, other)))
        age = row["time_ms"] - other["time_ms"]
        # About a hundred half-lives later nothing is left.
        if half_life is not None and age > 150 * half_life:
            continue
        weight = 1.0 if half_life is None else 2.0 ** (-age / half_life)
        out += [(weight, other)] * shared
    return out
