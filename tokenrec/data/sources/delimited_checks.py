"""Check the parts of the schema file of `delimited_schema.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Schema
from tokenrec.errors import InputError, suggest

KEYS = ("user_id", "item_id", "time_ms")
# Columns that are read only if `columns` names them.
OPTIONAL = ("request", "event", "scored", "row_weight")
TYPES = {"int64": pa.int64(), "string": pa.string()}
# Units of times, and how many of each a second has.
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
LIST_KINDS = ("multi_valued", "embedding", "semantic_id")

_RESERVED = (*KEYS, *OPTIONAL, "split")
# The id of an entity may be a categorical feature of that entity, under its own name.
_KEY_FEATURES = (("user_id", "user"), ("item_id", "catalogue"))
_PARTS = {
    "features": list,
    "tasks": list,
    "columns": dict,
    "key_types": dict,
    "separators": dict,
    "labels": dict,
    "time": dict,
    "files": dict,
    "statistics": dict,
}
_FILES = ("log", "users", "items", "valid_from", "test_from")


def check_parts(where: str, value: Any) -> None:
    """Check that the file is an object of known parts, each an array or an object."""
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: holds a {type(value).__name__}, but must hold a JSON object "
            f"with {', '.join(_PARTS)}; correct the schema file"
        )
    check_known(where, "schema", value, _PARTS)
    for part, kind in _PARTS.items():
        if not isinstance(value.get(part, kind()), kind):
            wanted = "array" if kind is list else "object"
            raise InputError(
                f"{where}: '{part}' must be a JSON {wanted}; correct the schema file"
            )


def check_feature_names(where: str, schema: Schema) -> None:
    """Refuse features with the name of a key, unless they are that key."""
    for feature in schema.features:
        is_key = (
            feature.kind == "categorical"
            and (feature.name, feature.group) in _KEY_FEATURES
        )
        if feature.name in _RESERVED and not is_key:
            raise InputError(
                f"{where}: feature '{feature.name}' has the name of a key; give it "
                'another one, and its column under "columns": '
                f'{{"another": "{feature.name}"}}'
            )


def check_columns(where: str, schema: Schema, columns: Mapping[str, Any]) -> None:
    """Check that each column belongs to a name that is read."""
    names = [f.name for f in schema.features]
    names += [task.name for task in schema.tasks]
    check_known(where, "columns", columns, [*KEYS, *OPTIONAL, *names])
    for name, column in columns.items():
        if not isinstance(column, str):
            raise InputError(
                f"{where}: columns['{name}']={column!r} must be the name of a column; "
                "write it as a string"
            )


def check_key_types(where: str, schema: Schema, key_types: Mapping[str, Any]) -> None:
    """Check that each type is one, and belongs to an id or a categorical value."""
    typed = [f.name for f in schema.features if f.has_vocabulary]
    check_known(where, "key_types", key_types, ["user_id", "item_id", *typed])
    for name, kind in key_types.items():
        if not isinstance(kind, str) or kind not in TYPES:
            raise InputError(
                f"{where}: key_types['{name}']={kind!r} is no type"
                f"{suggest(str(kind), TYPES)}"
            )


def check_separators(where: str, schema: Schema, separators: Mapping[str, Any]) -> None:
    """Check that each separator is text, and belongs to a feature of several values."""
    lists = [f.name for f in schema.features if f.kind in LIST_KINDS]
    check_known(where, "separators", separators, lists)
    for name, separator in separators.items():
        if not isinstance(separator, str) or not separator:
            raise InputError(
                f"{where}: separators['{name}']={separator!r} must be the text between "
                'two values; write it as ";"'
            )


def checked_time(where: str, time: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments of `TimeFormat`, checked."""
    check_known(where, "time", time, ("unit", "zone"))
    unit, zone = time.get("unit", "ms"), time.get("zone", "UTC")
    if not isinstance(unit, str) or unit not in UNITS:
        raise InputError(
            f"{where}: time['unit']={unit!r} is no unit of time; known: "
            f"{', '.join(UNITS)}"
        )
    try:
        if offset_of(zone) is None:
            # Arrow knows the zones that it can convert; the epoch is a time in each.
            pc.assume_timezone(pa.array([0], pa.timestamp("ms")), zone)
    except (pa.ArrowException, TypeError) as error:
        raise InputError(
            f"{where}: time['zone']={zone!r} is no time zone; write an IANA name such "
            "as Europe/Oslo, or +08:00"
        ) from error
    return {"unit": unit, "zone": zone}


def offset_of(zone: str) -> int | None:
    """Return the milliseconds of a zone such as +08:00; None for one with a name.

    Raises:
      TypeError: it is no string.

    >>> offset_of("-03:30"), offset_of("UTC")
    (-12600000, None)
    """
    match = re.fullmatch(r"([+-])(\d\d):?([0-5]\d)", zone)
    if match is None:
        return None
    minutes = 60 * int(match[2]) + int(match[3])
    return (-1 if match[1] == "-" else 1) * minutes * 60_000


def check_files(where: str, files: Mapping[str, Any]) -> None:
    """Check names and types of the files and the splits."""
    check_known(where, "files", files, _FILES)
    log = files.get("log", [])
    if not isinstance(log, list) or not all(isinstance(path, str) for path in log):
        raise InputError(
            f"{where}: files['log']={log!r} must be a list of paths; write it as "
            '["log.csv"]'
        )
    for name in _FILES[1:]:
        value = files.get(name)
        whole = name.endswith("_from") and type(value) is int
        if not (value is None or isinstance(value, str) or whole):
            kind = "a time" if name.endswith("_from") else "a path"
            raise InputError(
                f"{where}: files['{name}']={value!r} must be {kind}; write it as a "
                "string"
            )


def check_shared_tables(where: str, schema: Schema, kinds: Mapping[str, str]) -> None:
    """Refuse two types of values in one embedding table: its vocabulary is sorted.

    Args:
      where: name of the schema, for messages.
      schema: the features.
      kinds: type of each feature with a vocabulary.
    """
    first_of_table: dict[str, str] = {}
    for feature in schema.features:
        if feature.name not in kinds:
            continue
        first = first_of_table.setdefault(feature.table_name, feature.name)
        if kinds[first] != kinds[feature.name]:
            raise InputError(
                f"{where}: features '{first}' ({kinds[first]}) and '{feature.name}' "
                f"({kinds[feature.name]}) share table '{feature.table_name}'; give "
                "them one type under key_types"
            )


def check_known(
    where: str, part: str, names: Iterable[str], known: Iterable[str]
) -> None:
    """Refuse the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"{where}: {part} has no '{name}'{suggest(name, known)}")
