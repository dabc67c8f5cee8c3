"""What is counted by which key, and the features that its totals give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tokenrec.data.past import measures as m
from tokenrec.data.past.declaration import (
    KeyStatistics,
    Matches,
    PastStatistics,
    horizon_of,
    last_events,
)
from tokenrec.data.past.rates import smoothed_mean, smoothed_rate
from tokenrec.data.past.runs import TotalOverflowError
from tokenrec.errors import InputError

Key = tuple[str, ...]


class Entries(NamedTuple):
    """What log rows add to the totals of a key. E entries.

    Attributes:
      rows: `[E] int64`, ascending; the row of each, which has several where a column of
        the key has several values.
      keys: `[E] uint64`.
      time: `[E] int64`, milliseconds.
      values: `[E, width] float64`.
    """

    rows: np.ndarray
    keys: np.ndarray
    time: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class KeyedTotals:
    """Totals of a key before each row.

    Attributes:
      present: `[R] bool`, the row has the key.
      by_horizon: horizon -> measure -> `[R] float64`.
    """

    present: np.ndarray
    by_horizon: Mapping[str, Mapping[str, np.ndarray]]

    def of(self, measure: str, horizon: str) -> np.ndarray:
        return self.by_horizon[horizon][measure]


@dataclasses.dataclass
class KeyPlan:
    """What is counted by a key, in the order of first need."""

    measures: list[str] = dataclasses.field(default_factory=list)
    horizons: list[str] = dataclasses.field(default_factory=list)

    def add(self, measures: Iterable[str], horizons: Iterable[str]) -> None:
        self.measures = list(dict.fromkeys((*self.measures, *measures)))
        self.horizons = list(dict.fromkeys((*self.horizons, *horizons)))

    def running(self) -> list[str]:
        """Horizons of running totals: all the past and half-lives."""
        return [h for h in self.horizons if last_events(h) is None]

    def windows(self) -> list[str]:
        """Horizons of the user's last events."""
        return [h for h in self.horizons if last_events(h) is not None]


def plan_keys(declared: PastStatistics) -> dict[Key, KeyPlan]:
    """What is counted by each key; `()` is the key of all rows."""
    plans: dict[Key, KeyPlan] = {}
    for part in declared.keys:
        needed = [m.ROWS]
        for task in part.tasks or ():
            needed += [m.known(task), m.positive(task)]
        for feature in part.means:
            needed += [m.valued(feature), m.value_of(feature)]
        plans.setdefault(part.key, KeyPlan()).add(needed, part.horizons)
        # Without rates and means there is nothing to smooth.
        for parent in part.chain()[1:] if len(needed) > 1 else ():
            horizons = [horizon_of(parent, horizon) for horizon in part.horizons]
            plans.setdefault(parent, KeyPlan()).add(needed[1:], horizons)
    for match in declared.matches:
        needed = [m.EVENTS, *map(m.positive_events, match.tasks or ())]
        plans.setdefault(match.key, KeyPlan()).add(needed, match.horizons)
    return plans


def features_of_key(
    part: KeyStatistics, totals: Mapping[Key, KeyedTotals]
) -> dict[str, np.ndarray]:
    """Rates, means and counts of a key, `[R] float64` each."""
    out: dict[str, np.ndarray] = {}
    present = totals[part.key].present
    for horizon in part.horizons:

        def chain(measure: str, horizon: str = horizon) -> list[np.ndarray]:
            return [
                totals[key].of(measure, horizon_of(key, horizon))
                for key in part.chain()
            ]

        for task in part.tasks or ():
            out[part.rate(task, horizon)] = smoothed_rate(
                chain(m.known(task)), chain(m.positive(task)), part.strength
            )
        for feature in part.means:
            out[part.mean(feature, horizon)] = smoothed_mean(
                chain(m.valued(feature)), chain(m.value_of(feature)), part.strength
            )
        rows = totals[part.key].of(m.ROWS, horizon)
        out[part.count(horizon)] = np.where(present, rows, np.nan)
    return out


def features_of_matches(match: Matches, totals: KeyedTotals) -> dict[str, np.ndarray]:
    """Counts of the user's events that match, `[R] float64` each."""
    out: dict[str, np.ndarray] = {}
    for horizon in match.horizons:
        for task in (None, *(match.tasks or ())):
            measure = m.EVENTS if task is None else m.positive_events(task)
            count = totals.of(measure, horizon)
            out[match.count(task, horizon)] = np.where(totals.present, count, np.nan)
    return out


def overflow_problem(key: Key, plan: KeyPlan, error: TotalOverflowError) -> InputError:
    """Say which sum is too large, and what to do."""
    return InputError(
        f"statistics of {'_'.join(key) or 'all rows'}: the sum of "
        f"'{plan.measures[error.column]}' is too large for exact sums; give the "
        'feature "transform": "log1p"'
    )
