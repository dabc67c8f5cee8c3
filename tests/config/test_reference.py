"""Every field is documented beside it, and the list of fields shows it."""

from __future__ import annotations

import json

import pytest

from tokenrec.config import Config
from tokenrec.config.backbones import BACKBONES
from tokenrec.config.fields import list_fields
from tokenrec.config.load import load_config
from tokenrec.config.reference import (
    field_rows,
    section_texts,
    to_diff,
    to_markdown,
    to_records,
    to_text,
)

ROWS = {row.name: row for row in field_rows()}


def test_every_field_and_section_has_a_text() -> None:
    assert list(ROWS) == [field.name for field in list_fields(Config)]
    for row in ROWS.values():
        assert row.text.endswith("."), row.name
        assert row.text[0].isupper() or row.text[0] in "`d", row.name
    assert all(text for name, text in section_texts().items() if name)


def test_rows_hold_type_default_and_allowed_values() -> None:
    assert ROWS["model.windows"].type == "tuple[int, ...]"
    assert ROWS["model.windows"].default == (32, 16)
    assert ROWS["model.windows"].allowed.startswith("each at least 1, or 0 (")
    assert ROWS["model.kind"].type == "str"
    assert ROWS["model.kind"].choices == tuple(BACKBONES)
    assert ROWS["data.paradigm"].choices == ("nio", "uc")
    assert ROWS["model.dropout"].allowed == "at least 0 and below 1"


def test_every_default_is_allowed() -> None:
    for field in list_fields(Config):
        assert isinstance(field.default, (tuple, dict)) or field.bounds.allows(
            field.default
        )


@pytest.mark.parametrize("name", ["synthetic", "lrm_1b", "kuairand_pure_uc"])
def test_text_fits_a_terminal_and_shows_the_values_of_a_config(name: str) -> None:
    config = load_config(name)
    text = to_text(config)
    assert f"model.width = {config.model.width}" in text
    lines = text.splitlines()
    # A value may be longer than a line, and is not broken.
    assert all(len(line) <= 80 for line in lines if " = " not in line)
    assert max(map(len, to_text().splitlines())) <= 80


def test_diff_shows_what_differs_from_the_defaults_only() -> None:
    config = Config()
    assert to_diff(config) == "every field has its default"
    config.model.width, config.data.exclude = 128, ("age",)
    exclude, width = to_diff(config).splitlines()
    assert exclude.split() == ["data.exclude", "=", "('age',)", "(default", "())"]
    assert width.split() == ["model.width", "=", "128", "(default", "64)"]
    records = to_records(config, diff=True)
    assert [record["name"] for record in records] == ["data.exclude", "model.width"]


def test_records_are_json_and_hold_values_only_of_a_config() -> None:
    assert "value" not in to_records()[0]
    records = {
        record["name"]: record
        for record in json.loads(json.dumps(to_records(load_config("synthetic"))))
    }
    assert records["model.width"]["value"] == 32
    assert records["model.width"]["default"] == 64


def test_markdown_names_every_field_once() -> None:
    lines = to_markdown().splitlines()
    for name in ROWS:
        assert lines.count(f"### `{name}`") == 1
    assert "`str`, default `'nio'`; `nio`, `uc`." in lines
