"""Tests of what `prepare` says of a log: joins, labels of one class, leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.leaks import find_leaks
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.preparation.summary import summarise
from tokenrec.errors import InputError


def source(**changes: Any) -> MemorySource:
    rows: dict[str, Any] = {
        "user_id": [1, 2, 3, 1],
        "item_id": ["a", "b", "c", "b"],
        "time_ms": [1, 2, 3, 4],
        "label_click": pa.array([0, 1, 1, 0], pa.int8()),
        "label_like": pa.array([0, 1, 0, 1], pa.int8()),
    }
    users = {"user_id": [1, 2, 3], "city": [1, 1, 2], "age": [3.0, 2.0, 1.0]}
    items = {"item_id": ["a", "b", "c"], "author": [1, 2, 3], "duration": [1.0] * 3}
    return MemorySource(
        rows | changes.get("rows", {}),
        users | changes.get("users", {}),
        items | changes.get("items", {}),
    )


def test_ids_without_a_row_in_their_table_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = prepare(
        source(items={"item_id": ["a", "x", "y"]}, users={"user_id": [1, 2, 9]}),
        tmp_path / "out",
    ).counts
    assert (counts["items_without_row"], counts["users_without_row"]) == (2, 1)
    said = capsys.readouterr().err
    assert "items of the log without a row in the table of items: 2;" in said
    assert "users of the log without a row in the table of users: 1;" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"items": {"item_id": ["0a", "0b", "0c"]}},
            r"none of the 3 items of the log is among the 3 of items\(\): the log has "
            r"item_id='a', the table item_id='0a'.*leading zeros",
        ),
        (
            {"users": {"user_id": [10, 20, 30]}},
            r"none of the 3 users .* 3 of users\(\): the log has user_id=1, the table "
            "user_id=10",
        ),
    ],
)
def test_a_table_that_matches_nothing_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(source(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_one_class_and_of_none_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = {
        "label_click": pa.array([1] * 4, pa.int8()),
        "label_like": pa.array([None] * 4, pa.int8()),
    }
    counts = prepare(source(rows=labels), tmp_path / "out").counts
    assert counts["labelled_train_click"] == counts["positives_train_click"] == 4
    assert counts["labelled_train_like"] == 0
    said = capsys.readouterr().err
    assert "task 'click' has one class alone in train: all 4 labels are 1" in said
    assert "no impression of train has a label of task 'like'" in said


def test_a_clean_log_draws_no_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(
        source(
            rows={"tab": [1] * 4, "place": [2] * 4, "price": [1.0] * 4}
            | {"reaction": [1, 2, 3, 4]},
            items={"tags": [[1], [2], [3]]},
        ),
        tmp_path / "out",
    )
    assert capsys.readouterr().err == ""


def test_the_summary_tells_splits_and_labels(tmp_path: Path) -> None:
    rows = {"split": pa.array([0, 0, 1, 1], pa.int8()), "scored": [True] * 3 + [False]}
    text = summarise(prepare(source(rows=rows), tmp_path / "out"))
    assert text.splitlines() == [
        "users 3, items 3, repeats_dropped 0",
        "split  rows  scored  events  click=1  click=0  like=1  like=0",
        "-----  ----  ------  ------  -------  -------  ------  ------",
        "train     2       2       2        1        1       1       1",
        "valid     2       1       2        1        0       0       1",
    ]


def big_log(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, 4_000)
    return {
        "user_id": rng.integers(0, 200, 4_000),
        # As many items as rows of one: an id alone tells nothing of an unseen row.
        "item_id": np.arange(4_000) // 2,
        "time_ms": np.arange(4_000),
        "label_click": pa.array(label, pa.int8()),
        "tab": rng.integers(0, 5, 4_000),
        "reaction": label,
    }


def leaking(name: str, label: np.ndarray) -> Any:
    rng = np.random.default_rng(1)
    noise = rng.random(len(label))
    return {
        "tab": np.where(noise < 0.995, label, 1 - label),
        "place": pa.array(rng.integers(0, 3, len(label)), mask=label == 0),
    }[name]


@pytest.mark.parametrize("name", ["tab", "place"])
def test_a_feature_that_tells_the_label_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    columns = big_log(2)
    label = np.asarray(columns["label_click"])
    prepare(MemorySource(columns | {name: leaking(name, label)}), tmp_path / "out")
    (leak,) = find_leaks(open_dataset(tmp_path / "out"))
    assert (leak.feature, leak.task) == (name, "click")
    assert 0.99 < leak.auc <= 1
    assert f"feature '{name}' predicts task 'click' by itself" in (
        capsys.readouterr().err
    )


def test_ids_and_actions_are_no_leaks(tmp_path: Path) -> None:
    # `reaction` is the label, which a model sees for earlier events.
    prepare(MemorySource(big_log(3)), tmp_path / "out")
    assert find_leaks(open_dataset(tmp_path / "out")) == []


def test_a_number_is_compared_by_its_size_in_both_directions(tmp_path: Path) -> None:
    columns = big_log(4)
    label = np.asarray(columns["label_click"])
    users = {
        "user_id": list(range(200)),
        "age": [float(u) for u in range(200)],
    }
    # Young users click.
    columns["user_id"] = np.where(label, columns["user_id"] % 90, 110) + 0
    prepare(MemorySource(columns, users), tmp_path / "out")
    (leak,) = find_leaks(open_dataset(tmp_path / "out"))
    assert leak == ("age", "click", 1.0)
