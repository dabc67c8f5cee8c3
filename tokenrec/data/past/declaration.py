"""Declare statistics of the past: what is counted, by which keys, over which time.

docs/guides/data.md describes the JSON form, with an example.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from tokenrec.data.schema import Entity, Feature, Schema

ALL = "all"
# Milliseconds of each unit of a duration such as "7d".
UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([1-9]\d{0,8})(ms|s|m|h|d)")
_LAST = re.compile(r"last ([1-9]\d{0,3})")

Unscored = Literal["count", "skip", "full"]


@dataclasses.dataclass(frozen=True)
class KeyStatistics:
    """Rates, means and counts of the log rows that share a key.

    Attributes:
      key: columns: `user_id`, `item_id`, categorical and multi-valued features of the
        user, the item or the row. Of a multi-valued one, all values count: a rate is
        that of the log rows of any of them.
      tasks: labels whose rates are features; None for all.
      means: dense features of the row or the action whose means are features.
      horizons: "all" for all the past, a half-life such as "7d", or "last 20" for the
        last 20 events of the user, with `user_id` in the key. Of several events at one
        time, a hash of the item decides which are the last.
      parent: key towards which a rate of few log rows is smoothed; None for the key
        less its last column, `()` for the rate of all log rows.
      strength: log rows of evidence that the parent's rate is worth.
      name: what the names of the features call the key; empty for its columns, joined
        with `_`.
    """

    key: tuple[str, ...]
    tasks: tuple[str, ...] | None = None
    means: tuple[str, ...] = ()
    horizons: tuple[str, ...] = (ALL,)
    parent: tuple[str, ...] | None = None
    strength: float = 20.0
    name: str = ""

    @property
    def label(self) -> str:
        """What the names of the features call the key."""
        return self.name or "_".join(self.key)

    def chain(self) -> list[tuple[str, ...]]:
        """The key, its parent, the parent's, and at last that of all log rows, `()`."""
        keys = [self.key, self.key[:-1] if self.parent is None else self.parent]
        while keys[-1]:
            keys.append(keys[-1][:-1])
        return keys

    def rate(self, task: str, horizon: str) -> str:
        """Name of a rate."""
        return _named("rate", self.label, task, _suffix(horizon))

    def mean(self, feature: str, horizon: str) -> str:
        """Name of a mean."""
        return _named("mean", self.label, feature, _suffix(horizon))

    def count(self, horizon: str) -> str:
        """Name of the count of log rows."""
        return _named("count", self.label, _suffix(horizon))


@dataclasses.dataclass(frozen=True)
class Matches:
    """How many earlier events of the user share something with the row.

    Attributes:
      of: `item_id`, or a categorical or multi-valued feature of the item or the row. Of
        a multi-valued one, the matches of all values are added up.
      tasks: labels; for each, events with a positive label are counted too. None for
        all.
      horizons: as in `KeyStatistics`.
    """

    of: str
    tasks: tuple[str, ...] | None = None
    horizons: tuple[str, ...] = (ALL,)

    @property
    def key(self) -> tuple[str, str]:
        """The key by which they are counted."""
        return "user_id", self.of

    def count(self, task: str | None, horizon: str) -> str:
        """Name of the count of events, or of those with a positive label."""
        return _named("matches", self.of, task or "", _suffix(horizon))


@dataclasses.dataclass(frozen=True)
class UserTimes:
    """Times since the user's earlier events, in seconds.

    Attributes:
      gap: whether the time since the last event is a feature, `past_gap`.
      idle_after: a dense feature of the action (time watched), or empty. The feature
        `past_idle` is the gap less this one of the last event.
      unit: unit of `idle_after`.
      session: empty, or a duration such as "30m": the feature `past_session` counts the
        events of the user's session, which ends with a gap of at least that.
    """

    gap: bool = False
    idle_after: str = ""
    unit: str = "s"
    session: str = ""


@dataclasses.dataclass(frozen=True)
class PastStatistics:
    """Statistics of strictly earlier log rows, of all users, as features of a log row.

    Log rows count if they are events or have a known label; those that `prepare` would
    join count once.

    Attributes:
      keys: rates, means and counts by key.
      matches: counts of the user's events that share something with the row.
      times: times since the user's events.
      unscored: what rows that are no impressions do. "count": they count for later
        rows, and their own statistics are missing. "skip": nothing. "full": they count
        and have statistics of their own.
    """

    keys: tuple[KeyStatistics, ...] = ()
    matches: tuple[Matches, ...] = ()
    times: UserTimes = UserTimes()
    unscored: Unscored = "count"

    def features(self, schema: Schema) -> tuple[Feature, ...]:
        """Describe the features, in the order in which they enter the schema.

        Args:
          schema: schema of the source, whose tasks and features are named.
        """
        return tuple(self._features(schema))

    def of_tasks(self, schema: Schema) -> PastStatistics:
        """The same with all binary tasks named where none is."""
        all_tasks = tuple(task.name for task in schema.binary_tasks)

        def named[T: (KeyStatistics, Matches)](part: T) -> T:
            tasks = all_tasks if part.tasks is None else part.tasks
            return dataclasses.replace(part, tasks=tasks)

        return dataclasses.replace(
            self,
            keys=tuple(map(named, self.keys)),
            matches=tuple(map(named, self.matches)),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with all fields, to compare declarations."""
        value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> PastStatistics:
        """Convert from a JSON object, the inverse of `to_json`; nothing is checked."""

        def fields(part: dict[str, Any]) -> dict[str, Any]:
            return {n: tuple(v) if isinstance(v, list) else v for n, v in part.items()}

        return PastStatistics(
            tuple(KeyStatistics(**fields(part)) for part in value["keys"]),
            tuple(Matches(**fields(part)) for part in value["matches"]),
            UserTimes(**value["times"]),
            value["unscored"],
        )

    def _features(self, schema: Schema) -> Iterator[Feature]:
        full = self.of_tasks(schema)
        for part in full.keys:
            entity = _entity(schema, part.key)
            per_row = entity == "item"
            for horizon in part.horizons:
                for task in part.tasks or ():
                    name = part.rate(task, horizon)
                    yield Feature(name, "dense", entity, per_row=per_row)
                for feature in part.means:
                    name = part.mean(feature, horizon)
                    yield Feature(name, "dense", entity, per_row=per_row)
                name = part.count(horizon)
                yield Feature(name, "dense", entity, transform="log1p", per_row=per_row)
        for match in full.matches:
            entity = _entity(schema, (match.of,))
            per_row = entity == "item"
            for horizon in match.horizons:
                for counted in (None, *(match.tasks or ())):
                    name = match.count(counted, horizon)
                    yield Feature(
                        name, "dense", entity, transform="log1p", per_row=per_row
                    )
        for name in time_names(self.times):
            yield Feature(name, "dense", "context", transform="log1p")


def time_names(times: UserTimes) -> list[str]:
    """Names of the features of the user's times."""
    given = {
        "past_gap": times.gap,
        "past_idle": times.idle_after,
        "past_session": times.session,
    }
    return [name for name, wanted in given.items() if wanted]


def duration_ms(text: str) -> int | None:
    """Parse a duration; None if the text is something else.

    >>> duration_ms("30m"), duration_ms("7d"), duration_ms("soon")
    (1800000, 604800000, None)
    """
    match = _DURATION.fullmatch(text)
    return int(match[1]) * UNITS_MS[match[2]] if match else None


def last_events(horizon: str) -> int | None:
    """Number of events of a horizon such as "last 20"; None of the others."""
    match = _LAST.fullmatch(horizon)
    return int(match[1]) if match else None


def horizon_of(key: tuple[str, ...], horizon: str) -> str:
    """The horizon of a parent key: last events need a user, of all rows it is "all"."""
    return ALL if last_events(horizon) and "user_id" not in key else horizon


def half_life_ms(horizon: str) -> int | None:
    """Half-life of a horizon that was checked, in milliseconds; None for all the past."""
    return None if horizon == ALL else duration_ms(horizon)


def _entity(schema: Schema, key: tuple[str, ...]) -> Entity:
    """The entity of a key's features: the item if a column of the key is of the item.

    What depends on the item must not be context: a retrieval request has the context of
    its goal, which would give the goal away, and the candidates of a query share one.
    """
    of_item = {f.name for f in schema.features if f.entity == "item"} | {"item_id"}
    return "context" if of_item.isdisjoint(key) else "item"


def _suffix(horizon: str) -> str:
    return "" if horizon == ALL else horizon.replace(" ", "")


def _named(*parts: str) -> str:
    return "_".join(part for part in parts if part)
