"""Read a declaration of statistics from JSON, and check it against the schema."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.past.declaration import (
    ALL,
    UNITS_MS,
    KeyStatistics,
    Matches,
    PastStatistics,
    UserTimes,
    duration_ms,
    last_events,
    time_names,
)
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError, suggest

# Shorter half-lives would cut a block of the log into too many epochs.
_LEAST_HALF_LIFE_MS = 1_000
# Of each user so many events would be kept, and looked at for each row.
_MOST_EVENTS = 200
_LONGEST_MS = 100 * 365 * UNITS_MS["d"]
_LISTS = {"keys": KeyStatistics, "matches": Matches}
# What is usually a list of one may be written as a string.
_STRING_OR_LIST = ("key", "tasks", "means", "horizons", "parent")


def parse_statistics(value: Any, schema: Schema, where: str) -> PastStatistics:
    """Convert a parsed JSON object, and check it.

    Args:
      value: the parsed JSON.
      schema: schema of the source, without the statistics.
      where: what messages begin with, such as `schema.json: statistics`.

    Raises:
      InputError: a field is unknown or has the wrong type, or as `check_statistics`.
    """
    fields = dict(_checked_object(value, PastStatistics, where))
    for name, kind in _LISTS.items():
        parts = fields.get(name, [])
        if not isinstance(parts, list):
            raise InputError(
                f"{where}: '{name}' is {parts!r}, not a JSON array; write a list of "
                "JSON objects"
            )
        fields[name] = tuple(
            _parse(part, kind, f"{where}.{name}[{number}]")
            for number, part in enumerate(parts)
        )
    fields["times"] = _parse(fields.get("times", {}), UserTimes, f"{where}.times")
    statistics = PastStatistics(**fields)
    check_statistics(statistics, schema, where)
    return statistics


def check_statistics(statistics: PastStatistics, schema: Schema, where: str) -> None:
    """Check a declaration against the schema of the source.

    Raises:
      InputError: a name is not in the schema or cannot be used so, a number or a
        duration is out of bounds, or two features would have one name.
    """
    for number, part in enumerate(statistics.keys):
        at = f"{where}.keys[{number}]"
        for field in ("key", "parent"):
            _check_key(schema, getattr(part, field) or (), f"{at}: {field}")
        if not part.key:
            raise InputError(
                f"{at}: key is empty; name a column, such as item_id, or several"
            )
        _check_names(part.means, _dense(schema, ("row", "action")), f"{at}: means")
        _check_tasks_and_horizons(part, schema, at)
        if not part.strength > 0:
            raise InputError(
                f"{at}: strength={part.strength} must be above 0: a rate of few rows "
                "needs a prior; 20 is usual"
            )
    for number, match in enumerate(statistics.matches):
        at = f"{where}.matches[{number}]"
        known = [name for name in _columns(schema) if name != "user_id"]
        _check_names([match.of], known, f"{at}: of")
        _check_tasks_and_horizons(match, schema, at)
    _check_times(statistics.times, schema, f"{where}.times")
    if statistics.unscored not in ("count", "skip", "full"):
        raise InputError(
            f"{where}: unscored={statistics.unscored!r} is no choice; known: count, "
            "full, skip"
        )
    if not (statistics.keys or statistics.matches or time_names(statistics.times)):
        raise InputError(
            f"{where}: declares nothing; add an entry under 'keys', 'matches' or "
            "'times', or leave it out"
        )
    _check_feature_names(statistics, schema, where)


def _parse[T](value: Any, kind: type[T], where: str) -> T:
    """Build a dataclass from a JSON object; a key may stand for its object."""
    if kind is KeyStatistics and isinstance(value, (str, list)):
        value = {"key": value}
    if kind is Matches and isinstance(value, str):
        value = {"of": value}
    fields = dict(_checked_object(value, kind, where))
    hints = typing.get_type_hints(kind)
    for name, given in fields.items():
        if name in _STRING_OR_LIST and isinstance(given, str):
            given = fields[name] = [given]
        if not has_type(given, hints[name]):
            raise InputError(
                f"{where}: {name}={given!r} is not {hint_name(hints[name])}"
            )
        if isinstance(given, list):
            fields[name] = tuple(given)
    missing = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.default is dataclasses.MISSING and f.name not in fields
    ]
    if missing:
        raise InputError(f"{where}: '{missing[0]}' is missing; add it")
    return kind(**fields)


def _checked_object(value: Any, kind: type, where: str) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: is {value!r}, not a JSON object; write an object with "
            f"{', '.join(known)}"
        )
    _check_names(value, known, where, "field ")
    return value


def _columns(schema: Schema) -> Iterator[str]:
    """Columns that a key may have: ids and categories that are known beforehand."""
    yield from ("user_id", "item_id")
    for feature in schema.features:
        if feature.has_vocabulary and feature.group != "action":
            yield feature.name


def _dense(schema: Schema, groups: Sequence[str]) -> list[str]:
    return [f.name for f in schema.features if f.kind == "dense" and f.group in groups]


def _check_key(schema: Schema, key: Sequence[str], where: str) -> None:
    for name in key:
        actions = [f.name for f in schema.group("action")]
        if name in actions or name in [task.name for task in schema.tasks]:
            raise InputError(
                f"{where}: '{name}' is known only after the row was shown; count by "
                "ids and by features of the user, the item or the context"
            )
        _check_names([name], _columns(schema), where)
        if list(key).count(name) > 1:
            raise InputError(f"{where}: names '{name}' twice; remove one")


def _check_tasks_and_horizons(
    part: KeyStatistics | Matches, schema: Schema, where: str
) -> None:
    for task in schema.tasks:
        if task.kind != "binary" and task.name in (part.tasks or ()):
            raise InputError(
                f"{where}: tasks: '{task.name}' has the kind '{task.kind}', and a rate "
                "is that of a binary label; name others, or count the mean of an "
                "action under means"
            )
    tasks = [task.name for task in schema.binary_tasks]
    _check_names(part.tasks or (), tasks, f"{where}: tasks")
    if not part.horizons:
        raise InputError(f"{where}: horizons is empty; leave it out, or write '{ALL}'")
    for horizon in part.horizons:
        events = last_events(horizon)
        if events is not None and events > _MOST_EVENTS:
            raise InputError(
                f"{where}: horizons='{horizon}' must be at most {_MOST_EVENTS} events, "
                "which are kept of each user; a half-life costs less"
            )
        if events is not None and "user_id" not in part.key:
            raise InputError(
                f"{where}: horizons='{horizon}' are events of the user; add user_id to "
                "the key, or write a half-life such as 7d"
            )
        if events is None and horizon != ALL:
            wanted = f"'{ALL}', a half-life or 'last 20'"
            _check_duration(horizon, f"{where}: horizons", wanted)


def _check_times(times: UserTimes, schema: Schema, where: str) -> None:
    if times.session:
        _check_duration(times.session, f"{where}: session", "a duration")
    if times.idle_after:
        actions = _dense(schema, ("action",))
        _check_names([times.idle_after], actions, f"{where}: idle_after")
    _check_names([times.unit], UNITS_MS, f"{where}: unit")


def _check_duration(text: str, where: str, wanted: str) -> None:
    milliseconds = duration_ms(text)
    if milliseconds is None:
        raise InputError(f"{where}='{text}' is not {wanted}; write it as 30m or 7d")
    if not _LEAST_HALF_LIFE_MS <= milliseconds <= _LONGEST_MS:
        raise InputError(f"{where}='{text}' must be 1 second to 100 years")


def _check_feature_names(
    statistics: PastStatistics, schema: Schema, where: str
) -> None:
    taken = {f.name for f in schema.features}
    for feature in statistics.features(schema):
        if feature.name in taken:
            raise InputError(
                f"{where}: two features would be named '{feature.name}'; give a key "
                "another 'name', or drop the entry that is there twice"
            )
        taken.add(feature.name)


def _check_names(
    names: Iterable[str], known: Iterable[str], where: str, what: str = ""
) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"{where}: has no {what}'{name}'{suggest(name, known)}")
