"""Tests of the errors of `prepare`: they name the value, and leave no files behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.data import records
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.errors import InputError

ONE_ROW = {"user_id": [1]}

BAD_ROWS = [
    ({"label_click": pa.array([1, 2], pa.int8())}, r"'label_click' is 2 in row 1"),
    ({"user_id": pa.array([1, None])}, r"'user_id' is null in row 1"),
    ({"item_id": pa.array([None, 1])}, r"'item_id' is null in row 0"),
    ({"time_ms": pa.array([None, 1])}, r"'time_ms' is null in row 0"),
    ({"time_ms": [1.5, 2.5]}, r"'time_ms' has the type double"),
    ({"split": [0, 3]}, r"'split' is 3 in row 1; it must be 0 to 2"),
    ({"split": [1, 1]}, r"no row has split 0"),
    ({"request": [-1, -2]}, r"'request' is -2 in row 1"),
    (
        {"request": [4, 4], "time_ms": [1, 2]},
        r"request 4 of one user has rows at time_ms 1 and 2",
    ),
    ({"event": [1, 0]}, r"'event' has the type int64"),
    ({"price": [1.0, float("inf")]}, r"'price' is inf in row 1"),
    ({"price": [1.0, -1e300]}, r"'price' is -1e\+300 in row 1"),
    ({"price": ["1", "2"]}, r"'price' has the type string"),
    ({"tab": [0.5, 1.0]}, r"'tab' has the type double"),
    ({"tabb": [0, 1]}, r"unknown column 'tabb'; did you mean 'tab'"),
    ({"event": [False, False], "scored": [False, False]}, r"nothing to learn from"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_bad_row_is_named_and_leaves_nothing_behind(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(MemorySource({"user_id": [1, 1]} | change), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_column_and_a_changed_type_are_named(tmp_path: Path) -> None:
    class Incomplete(MemorySource):
        def rows(self) -> Any:
            return (batch.drop_columns(["tab"]) for batch in super().rows())

    class Changing(MemorySource):
        def rows(self) -> Any:
            yield from MemorySource({"user_id": [1], "tab": [1]}).rows()
            yield from MemorySource({"user_id": [1], "tab": ["x"]}).rows()

    with pytest.raises(InputError, match="column 'tab' is missing"):
        prepare(Incomplete(ONE_ROW), tmp_path / "set")
    with pytest.raises(InputError, match=r"tab.*string|string.*tab"):
        prepare(Changing(ONE_ROW), tmp_path / "set")


BAD_ENTITIES = [
    ({"user_columns": {"user_id": [3, 4, 3]}}, r"users\(\): user_id=3 occurs twice"),
    (
        {"user_columns": {"user_id": ["1"]}},
        r"column 'user_id' holds int64 values, but string values came before",
    ),
    (
        {"item_columns": {"item_id": [1], "duration": [float("-inf")]}},
        r"items\(\): column 'duration' is -inf",
    ),
    (
        {"item_columns": {"item_id": [1], "tags": [5]}},
        r"'tags' has the type int64, but a multi_valued feature is a",
    ),
    (
        {"item_columns": {"item_id": [1], "colour": [5]}},
        r"items\(\): unknown column 'colour'",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_ENTITIES)
def test_a_bad_user_or_item_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(MemorySource(ONE_ROW, **change), tmp_path / "set")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 10], r"the code 10 in row 0; codes are 0 to 9"),
        ([0], r"has 1 values in row 0; its length is 2"),
    ],
)
def test_a_bad_semantic_id_is_named(
    tmp_path: Path, value: list[int], message: str
) -> None:
    schema = Schema(
        (Feature("sid", "semantic_id", "context", length=2, codes=10),),
        (Task("click"),),
    )
    with pytest.raises(InputError, match=message):
        prepare(
            MemorySource({"user_id": [1], "sid": [value]}, schema=schema),
            tmp_path / "set",
        )


def test_an_existing_folder_is_kept_unless_it_is_a_data_set_to_overwrite(
    tmp_path: Path,
) -> None:
    out = tmp_path / "set"
    prepare(MemorySource(ONE_ROW), out)
    with pytest.raises(InputError, match="exists"):
        prepare(MemorySource({"user_id": [1, 2]}), out)
    prepare(MemorySource({"user_id": [1, 2]}), out, overwrite=True)
    assert open_dataset(out).metadata.counts["users"] == 2
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a prepared data set"):
        prepare(MemorySource(ONE_ROW), precious, overwrite=True)
    assert (precious / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (
            RuntimeError("write() failed: No space left on device; writing x"),
            InputError,
        ),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.EIO, "Input/output error"), OSError),
    ],
)
def test_a_failure_while_writing_leaves_the_previous_data_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    out = tmp_path / "set"
    before = prepare(MemorySource(ONE_ROW), out)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(records.SplitWriter, "write", fail)
    with pytest.raises(expected) as caught:
        prepare(MemorySource({"user_id": [1, 2]}), out, overwrite=True)
    assert expected is not InputError or "no space left" in str(caught.value)
    assert open_dataset(out).metadata == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_what_a_dead_process_left_is_removed_and_its_moved_data_set_put_back(
    tmp_path: Path,
) -> None:
    out, dead = tmp_path / "set", 2**22 + 1  # above the largest process id of Linux
    before = prepare(MemorySource(ONE_ROW), out)
    out.rename(tmp_path / f"set.previous-{dead}")
    (tmp_path / f"set.incomplete-{dead}").mkdir()
    (tmp_path / "set.incomplete-1").mkdir()  # of a living process
    with pytest.raises(InputError, match="time_ms"):
        prepare(
            MemorySource({"user_id": [1], "time_ms": ["x"]}),
            tmp_path / "set",
            overwrite=True,
        )
    assert open_dataset(out).metadata == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", "set.incomplete-1"]
