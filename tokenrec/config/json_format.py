"""Read and write a config as JSON, such as the `config.json` of a run."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, cast

from tokenrec.config.config import Config
from tokenrec.config.fields import list_fields, list_sections
from tokenrec.config.problems import ConfigProblem, raise_problems
from tokenrec.config.suggestions import suggest_field
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import parse_json, read_with_retries

# Fields of earlier versions, with the only value that still means what runs do now.
REMOVED_FIELDS = {"tokens.tables_backend": "exchange"}


def to_json(config: Config) -> str:
    """Write a config as JSON text; `from_json` reads it."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Read a config from JSON text. Fields that it lacks take their defaults.

    Raises:
      InputError: the text is not JSON, or has fields that do not exist; the message
        suggests the closest ones.
    """
    config, problems = parse_config(text)
    raise_problems(problems)
    return config


def read_config(path: Path) -> Config:
    """Read a config from a JSON file, such as the `config.json` of a run.

    Raises:
      InputError: the file cannot be read, or `from_json` refuses its text.
    """
    config, problems = read_config_file(path)
    raise_problems(problems)
    return config


def read_config_file(path: Path) -> tuple[Config, list[ConfigProblem]]:
    """Read a config from a JSON file, and list the fields that cannot be read.

    Raises:
      InputError: the file cannot be read, or is not JSON.
      StorageError: the storage is at fault, again and again.
    """
    where = f"config file '{path}'"
    data = read_with_retries(path.read_bytes, path, "config file", "check the path")
    try:
        config, problems = parse_config(data.decode())
    # An InputError, which does not name the path, or a UnicodeDecodeError.
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    return config, [ConfigProblem(p.field, f"{where}: {p.text}") for p in problems]


def parse_config(text: str) -> tuple[Config, list[ConfigProblem]]:
    """Read a config from JSON text, and list the fields that cannot be read.

    Raises:
      InputError: the text is not JSON.
    """
    value = parse_json(text, "the config", "give a config that `tokenrec train` wrote")
    problems: list[ConfigProblem] = []
    return _build(Config, value, "", problems), problems


def removed_field_problem(name: str, value: Any) -> str:
    """Message for a field of an earlier version; empty if its value can be ignored."""
    only = REMOVED_FIELDS[name]
    if value == only:
        return ""
    return (
        f"{name}={value!r} is no longer supported: the field was removed, and runs "
        f"behave as with '{only}'; delete the field"
    )


def _build[T](
    section_type: type[T], value: Any, prefix: str, problems: list[ConfigProblem]
) -> T:
    """Build a section from its JSON object; what cannot be read keeps its default."""
    if not isinstance(value, dict):
        name = prefix.rstrip(".")
        text = f"{name or 'the config'}={value!r} is not a JSON object of fields"
        problems.append(ConfigProblem(name, text))
        return section_type()
    hints = typing.get_type_hints(section_type)
    # Fields that are missing keep their defaults: they are newer than the file.
    fields: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if key in hints:
            fields[key] = _convert(hints[key], item, name, problems)
        elif name in REMOVED_FIELDS:
            text = removed_field_problem(name, item)
            problems += [ConfigProblem("", text)] if text else []
        else:
            problems.append(ConfigProblem("", _unknown_field(name, item)))
    return section_type(**fields)


def _convert(hint: Any, item: Any, name: str, problems: list[ConfigProblem]) -> Any:
    """Turn JSON lists into the tuples of a field; `validate` checks the type."""
    if dataclasses.is_dataclass(hint):
        return _build(cast(type, hint), item, f"{name}.", problems)
    if typing.get_origin(hint) is tuple and isinstance(item, list):
        return tuple(item)
    if hint == dict[str, tuple[str, ...]] and isinstance(item, dict):
        return {
            key: tuple(values) if isinstance(values, list) else values
            for key, values in item.items()
        }
    return item


def _unknown_field(name: str, item: Any) -> str:
    is_section = isinstance(item, dict) and "." not in name
    if is_section:
        closest = suggest(name, [section for section, _ in list_sections(Config)])
    else:
        closest = suggest_field(name, [field.name for field in list_fields(Config)])
    return f"config field '{name}' does not exist{closest}"
