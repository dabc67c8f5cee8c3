"""Check a config: types, allowed values, and fields against each other.

All problems are reported at once. Fields are checked against each other also when some
have no usable value: these are replaced by their defaults, and a message that names one
of them is dropped. The sizes of a language model are read from its `config.json` here.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, cast

from tokenrec.config.backbones import is_decoder
from tokenrec.config.config import Config
from tokenrec.config.cross_checks import cross_check
from tokenrec.config.fields import Bounds, list_fields
from tokenrec.config.problems import ConfigProblem, raise_problems
from tokenrec.config.types import has_type, hint_name
from tokenrec.errors import suggest

_BOUNDS = {field.name: field.bounds for field in list_fields(Config)}


def validate(config: Config, found: Sequence[ConfigProblem] = ()) -> Config:
    """Return the config if nothing is wrong with it.

    The config is checked on its own. The data set is checked against it when opened.

    Args:
      config: the config to check.
      found: problems of reading it, which are reported with those found here.

    Returns:
      The config; of a language model whose sizes it lacks, a copy that has them
      (`tokenrec.language.architecture`).

    Raises:
      InputError: a line for each problem, with field, value, reason and remedy.
      StorageError: the disk with the `config.json` of a language model is at fault.
    """
    # 1. Each field on its own, except those that are reported already.
    reported = {problem.field for problem in found if problem.field}
    problems = [
        problem
        for problem in _field_problems(config, "")
        if problem.field not in reported
    ]
    # 2. The sizes of a language model.
    unusable = reported | {problem.field for problem in problems}
    checked = _with_defaults(config, "", unusable)
    if is_decoder(checked.model):
        # Imported late: few runs need it, and it imports `tokenrec.config.load`.
        from tokenrec.language.architecture import (
            ARCHITECTURE_FIELDS,
            with_architecture,
        )

        checked, more = with_architecture(checked)
        problems += more
        if more:
            unusable.update(ARCHITECTURE_FIELDS)
    # 3. Fields against each other, without conclusions from those that have no value.
    problems += [
        ConfigProblem("", text)
        for text in cross_check(checked)
        if not any(_names(text, field) for field in unusable)
    ]
    raise_problems([*found, *problems])
    return checked if is_decoder(checked.model) else config


def _field_problems(section: Any, prefix: str) -> Iterator[ConfigProblem]:
    """Yield the fields of the wrong type, and values that are not allowed."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        name = prefix + item.name
        value, hint = getattr(section, item.name), hints[item.name]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, cast(type, hint)):
                yield from _field_problems(value, f"{name}.")
            else:
                text = f"{name}={value!r} must be a {cast(type, hint).__name__}"
                yield ConfigProblem(name, text)
            continue
        text = _value_problem(name, value, hint, _BOUNDS[name])
        if text:
            yield ConfigProblem(name, text)


def _value_problem(name: str, value: Any, hint: Any, bounds: Bounds) -> str:
    """Message for a value that a field cannot have; empty if it can."""
    # A wrong word gets the closest choice, a value of another type gets the type.
    if bounds.choices and isinstance(value, str):
        if value in bounds.choices:
            return ""
        return f"{name}={value!r} is not a choice{suggest(value, bounds.choices)}"
    if not has_type(value, hint):
        return f"{name}={value!r} is not {hint_name(hint)}"
    if isinstance(value, dict):
        wrong = [
            f"{name}[{key!r}]={entry!r}"
            for key, entry in value.items()
            if not bounds.allows(entry)
        ]
    elif isinstance(value, (tuple, list)):
        wrong = [
            f"{name}={value!r}: {entry!r}"
            for entry in value
            if not bounds.allows(entry)
        ]
    else:
        wrong = [] if bounds.allows(value) else [f"{name}={value!r}"]
    return f"{wrong[0]} must be {bounds.describe()}" if wrong else ""


def _with_defaults[T](section: T, prefix: str, unusable: set[str]) -> T:
    """Copy a config, with defaults for the fields that have no usable value."""
    defaults: Any = type(section)()
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cast(Any, section)):
        name = prefix + item.name
        value = getattr(section, item.name)
        if name in unusable:
            value = getattr(defaults, item.name)
        elif dataclasses.is_dataclass(value):
            value = _with_defaults(value, f"{name}.", unusable)
        values[item.name] = value
    return type(section)(**values)


def _names(text: str, field: str) -> bool:
    """Whether a message names a field, or one of the section `field`."""
    return re.search(rf"(?<![\w.]){re.escape(field)}\b", text) is not None
