"""Tests of features of several values: separators, empty parts, printed lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError


class Items:
    """A table of items with a feature of several values, read with a small log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.separators: dict[str, str] = {}
        self.key_types: dict[str, str] = {}
        (folder / "log.csv").write_text(
            "user_id,item_id,time_ms,click\nu,0,1,1\nu,1,5,0\n"
        )

    def source(
        self, values: Any, kind: str, suffix: str = ".parquet"
    ) -> DelimitedSource:
        feature = {"name": "tags", "kind": kind, "entity": "item", "length": 2}
        if kind == "semantic_id":
            feature["codes"] = 9
        schema = {
            "features": [feature],
            "tasks": [{"name": "click"}],
            "separators": self.separators,
            "key_types": self.key_types,
        }
        (self.folder / "schema.json").write_text(json.dumps(schema))
        path = self.folder / f"items{suffix}"
        ids = [str(number) for number in range(len(values))]
        table = pa.table({"item_id": ids, "tags": values})
        if suffix == ".parquet":
            pa.parquet.write_table(table, path)
        else:
            pa.csv.write_csv(table, path)
        return DelimitedSource(
            self.folder / "schema.json", [self.folder / "log.csv"], None, path, "3"
        )

    def read(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.source(*args, **kwargs).items().column("tags").to_pylist()

    def problem(self, *args: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.read(*args)
        return str(caught.value)


@pytest.fixture
def items(tmp_path: Path) -> Items:
    return Items(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("separator", ["|", ";", ", ", "^", " ", ".", "\t"])
def test_text_is_split_at_the_separator_of_the_feature(items, separator, suffix):
    if separator != "|":
        items.separators = {"tags": separator}
    text = [f"b{separator}a", "c", None]
    assert items.read(text, "multi_valued", suffix) == [["b", "a"], ["c"], None]
    items.key_types = {"tags": "int64"}
    text = [f"-3{separator}2", "1", None]
    assert items.read(text, "multi_valued", suffix) == [[-3, 2], [1], None]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_parquet_lists_are_lists(items, kind):
    values = pa.array([["b|c", " a"], [], None], pa.list_(pa.string()))
    if kind != pa.list_(pa.string()):
        values = values.cast(kind)
    assert items.read(values, "multi_valued") == [["b|c", " a"], [], None]


@pytest.mark.parametrize(
    ("values", "text", "integers"),
    [
        ([[3.0], [4.0, None]], [["3"], ["4", None]], [[3], [4, None]]),
        ([3, None], [["3"], None], [[3], None]),
        (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [["1", "2"]], [[1, 2]]),
    ],
)  # fmt: skip
def test_lists_of_numbers_and_single_numbers_are_lists_too(
    items, values, text, integers
):
    assert items.read(values, "multi_valued") == text
    items.key_types = {"tags": "int64"}
    assert items.read(values, "multi_valued") == integers


@pytest.mark.parametrize(
    "values",
    [
        ["1|2.5", None],
        [" 1 | 2.5", None],
        [[1, 2.5], None],
        pa.array([[1, 2.5], None], pa.large_list(pa.float64())),
        [["1", "2.5"], None],
    ],
)
def test_vectors_are_read_from_text_and_lists(items, values):
    assert items.read(values, "embedding") == [[1.0, 2.5], None]


def test_vectors_are_read_from_lists_of_a_fixed_size(items):
    values = pa.array([[1, 2.5], [3, 4]], pa.list_(pa.float32(), 2))
    assert items.read(values, "embedding") == [[1.0, 2.5], [3.0, 4.0]]


def test_parts_are_stripped_and_empty_parts_left_out_which_is_counted_and_said(
    items, capsys
):
    values = ["a| b||c ", "|", "d", None, "e|f"]
    source = items.source(values, "multi_valued", ".csv")
    for _ in range(2):
        assert source.items().column("tags").to_pylist() == [
            ["a", "b", "c"],
            [],
            ["d"],
            None,
            ["e", "f"],
        ]
    assert source.provenance.counts == {"cleaned_lists_tags": 2}
    said = capsys.readouterr().err
    assert "column 'tags': 2 lists such as 'a| b||c ' have empty parts" in said
    assert said.count("\n") == 1


def test_runs_of_spaces_are_one_separator_and_nothing_is_said(items, capsys):
    items.separators = {"tags": " "}
    assert items.read(["a  b ", "c"], "multi_valued") == [["a", "b"], ["c"]]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["embedding", "semantic_id"])
@pytest.mark.parametrize("value", ["1|", "|2", "|"])
def test_an_empty_part_of_a_vector_is_refused(items, kind, value):
    message = items.problem(["1|2", value], kind)
    for word in ("row 2", repr(value), "is missing"):
        assert word in message


@pytest.mark.parametrize(
    "value",
    ["['a', 'b']", '["a"]', "[1, 2]", "[7]", "[]", "('a', 'b')", " [ 'a' ] ", "[1.5]"],
)
@pytest.mark.parametrize("kind", ["multi_valued", "embedding"])
def test_a_printed_list_is_refused(items, value, kind):
    message = items.problem([None, value], kind)
    for word in ("row 2", "column 'tags'", repr(value), "printed list", "'|'"):
        assert word in message


def test_a_tag_in_brackets_is_a_tag(items):
    assert items.read(["[deleted]|(live)"], "multi_valued") == [["[deleted]", "(live)"]]


@pytest.mark.parametrize(
    ("other", "word"),
    [(";", "a semicolon"), (",", "a comma"), (" ", "a space"), ("^", "a caret")],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_another_separator_than_the_declared_one_is_said(
    items, capsys, other, word, suffix
):
    items.read([f"a{other}b", f"b{other}c", "a", None], "multi_valued", suffix)
    said = capsys.readouterr().err
    for part in (
        word,
        "2 of 3",
        f"'a{other}b'",
        f'"separators": {{"tags": "{other}"}}',
    ):
        assert part in said


@pytest.mark.parametrize(
    "values", [["a;b|c", "d;e"], ["a b", "c", "d", "e"], ["a", "b"], [None, None]]
)
def test_nothing_is_said_where_the_separator_is_used_or_others_are_rare(
    items, capsys, values
):
    items.read(pa.array(values, pa.string()), "multi_valued")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (["1|x"], "embedding", ["row 1", "'1|x'", "holds 'x'", "is not float", "'|'"]),
        (["1;2"], "semantic_id", ["row 1", "'1;2'", "is not int64", "separators"]),
        ([[1, 2.5]], "semantic_id", ["row 1", "holds 2.5", "is not int64"]),
        ([1.5], "embedding", ["column 'tags'", "is double, but a list is needed"]),
        ([{"a": 1}], "multi_valued", ["struct", "a list is needed"]),
        ([[[1]]], "multi_valued", ["column 'tags'", "list"]),
    ],
)
def test_what_is_no_list_is_named(items, values, kind, words):
    message = items.problem(values, kind)
    for word in words:
        assert word in message


def test_the_row_of_a_wrong_value_counts_empty_and_missing_lists(items):
    values = [None, [], ["1", "2"], ["3", "x"]]
    assert "row 4" in items.problem(values, "embedding")
