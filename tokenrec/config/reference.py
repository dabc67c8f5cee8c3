"""List every config field with its type, default, allowed values and documentation.

`tokenrec config` prints the list, and `to_markdown` makes a reference page of it.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
import types
from typing import Any, Literal, NamedTuple, get_origin

from tokenrec.config.config import Config
from tokenrec.config.fields import (
    ConfigField,
    field_texts,
    list_fields,
    list_sections,
)

_WIDTH = 80
_INDENT = "    "


class FieldRow(NamedTuple):
    """A config field as documentation.

    Attributes:
      name: sections and field, such as `model.width`.
      type: type as Python writes it, such as `tuple[int, ...]`.
      default: value in a config that does not set it.
      choices: all allowed values; empty if they are not a fixed list.
      allowed: bounds in words, such as "at least 1"; empty without any.
      text: documentation, one line.
    """

    name: str
    type: str
    default: Any
    choices: tuple[str, ...]
    allowed: str
    text: str


def field_rows() -> list[FieldRow]:
    """List all config fields, section by section."""
    # Texts of top-level fields, then those of each section under its full names.
    texts = field_texts(Config)
    for prefix, section in list_sections(Config):
        texts = texts | {
            f"{prefix}.{name}": text for name, text in field_texts(section).items()
        }
    return [_row(item, texts[item.name]) for item in list_fields(Config)]


def to_markdown() -> str:
    """Write the reference page of all config fields."""
    parts = [
        "# Config fields",
        "Every field of a config, for readers who write one or override fields on the "
        "command line (`--config.model.width=128`). `tokenrec config` prints this "
        "list, and `tokenrec config NAME` the values of a config.",
    ]
    rows = field_rows()
    for section, description in section_texts().items():
        parts += [f"## {section}", description] if section else []
        for row in rows:
            if _section(row.name) != section:
                continue
            facts = f"`{row.type}`, default `{row.default!r}`"
            limits = ", ".join(f"`{choice}`" for choice in row.choices) or row.allowed
            parts.append(f"### `{row.name}`")
            parts.append(f"{facts}; {limits}." if limits else f"{facts}.")
            parts.append(row.text)
    return "\n\n".join(parts) + "\n"


def to_text(config: Config | None = None) -> str:
    """Write all fields for a terminal of 80 columns.

    Args:
      config: config whose values are shown; None shows the defaults.
    """
    blocks: list[str] = []
    values = _values(config)
    rows = field_rows()
    for section, description in section_texts().items():
        blocks += [_wrap(f"[{section}] {description}", "")] if section else []
        for row in rows:
            if _section(row.name) != section:
                continue
            limits = f"one of {', '.join(row.choices)}" if row.choices else row.allowed
            facts = f"{row.type}, {limits}" if limits else row.type
            blocks.append(
                "\n".join(
                    [
                        _value_line(row, values[row.name]),
                        _wrap(facts, _INDENT),
                        _wrap(row.text, _INDENT),
                    ]
                )
            )
    return "\n\n".join(blocks)


def to_diff(config: Config) -> str:
    """Write the fields of a config that differ from the defaults, a line each."""
    values = _values(config)
    lines = [
        _value_line(row, values[row.name])
        for row in field_rows()
        if values[row.name] != row.default
    ]
    return "\n".join(lines) or "every field has its default"


def to_records(
    config: Config | None = None, *, diff: bool = False
) -> list[dict[str, Any]]:
    """List all fields as JSON objects.

    Args:
      config: config whose values are added as `value`; None adds none.
      diff: list only the fields that differ from the defaults.
    """
    values = _values(config)
    records: list[dict[str, Any]] = []
    for row in field_rows():
        if diff and values[row.name] == row.default:
            continue
        record = row._asdict()
        if config is not None:
            record["value"] = values[row.name]
        records.append(record)
    return records


@functools.cache
def section_texts() -> dict[str, str]:
    """Description of each section by its name; that of top-level fields is empty."""
    texts = {"": ""}
    for name, section in list_sections(Config):
        texts[name] = _one_line(inspect.getdoc(section) or "")
    return texts


def _row(item: ConfigField, text: str) -> FieldRow:
    choices = item.bounds.choices
    allowed = "" if choices else item.bounds.describe()
    if allowed and get_origin(item.type) in (tuple, dict):
        allowed = f"each {allowed}"
    return FieldRow(
        name=item.name,
        type=_type_name(item.type),
        default=item.default,
        choices=choices,
        allowed=allowed,
        text=_one_line(text),
    )


def _values(config: Config | None) -> dict[str, Any]:
    config = config or Config()
    return {item.name: item.value_in(config) for item in list_fields(Config)}


def _value_line(row: FieldRow, value: Any) -> str:
    line = f"{row.name} = {value!r}"
    return line if value == row.default else f"{line:<40}  (default {row.default!r})"


def _type_name(hint: Any) -> str:
    # Choices are listed apart.
    if get_origin(hint) is Literal:
        return "str"
    if isinstance(hint, types.GenericAlias):
        return str(hint)
    return hint.__name__


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
