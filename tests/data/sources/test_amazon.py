"""Tests of the source amazon: lines to rows, leave-one-out splits, and refused files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenrec.cli.main import main
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import MISSING, UNKNOWN, columns
from tokenrec.data.sources.amazon import DAY_MS, START_MS, AmazonSource
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError

SEQUENCES = "7 30 10 30 20\n3 10 20 40 50 60\n9 20 10\n"
ATTRIBUTES = {"10": [1, 2], "20": [2], "30": [5, 5, 4, 3], "60": [9], "77": [1]}


def write(root: Path, sequences: str = SEQUENCES, attributes: Any = ATTRIBUTES) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "Toys.txt").write_text(sequences)
    if attributes is not None:
        (root / "Toys_item2attributes.json").write_text(json.dumps(attributes))
    return root


def rows(source: AmazonSource) -> list[dict[str, Any]]:
    return [row for batch in source.rows() for row in batch.to_pylist()]


def prepared(tmp_path: Path, **files: Any) -> Dataset:
    prepare(AmazonSource(write(tmp_path / "raw", **files), "Toys"), tmp_path / "set")
    return open_dataset(tmp_path / "set")


def test_last_item_is_test_and_the_one_before_it_valid(tmp_path: Path) -> None:
    found = [
        (row["user_id"], row["item_id"], row["split"])
        for row in rows(AmazonSource(write(tmp_path), "Toys"))
    ]
    assert found == [
        *((7, 30, 0), (7, 10, 0), (7, 30, 1), (7, 20, 2)),
        *((3, 10, 0), (3, 20, 0), (3, 40, 0), (3, 50, 1), (3, 60, 2)),
        *((9, 20, 0), (9, 10, 0)),  # too short to hold anything out
    ]


def test_the_last_item_alone_can_be_held_out(tmp_path: Path) -> None:
    """With `held_out=1` rows of valid become train, and the test rows stay the same."""
    source = AmazonSource(write(tmp_path), "Toys", held_out=1)
    assert [row["split"] for row in rows(source)] == [
        *(0, 0, 0, 2),
        *(0, 0, 0, 0, 2),
        *(0, 2),
    ]
    assert source.provenance.counts["short_users"] == 0
    prepare(source, tmp_path / "set")
    assert open_dataset(tmp_path / "set").splits == ("train", "test")
    with pytest.raises(InputError, match="held_out=3 must be 2, valid and test, or 1"):
        AmazonSource(tmp_path, "Toys", held_out=3)


def test_batches_that_cut_a_sequence_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = AmazonSource(write(tmp_path), "Toys")
    whole = rows(source)
    monkeypatch.setattr("tokenrec.data.sources.amazon.ROWS_PER_BATCH", 3)
    assert rows(source) == whole


def test_every_row_is_a_scored_event_at_its_place_in_the_sequence(
    tmp_path: Path,
) -> None:
    found = rows(AmazonSource(write(tmp_path), "Toys"))
    assert all(row["event"] and row["scored"] and row["request"] == -1 for row in found)
    assert [(row["time_ms"] - START_MS) / DAY_MS for row in found] == [
        *range(4),
        *range(5),
        *range(2),
    ]


def test_short_users_and_cut_attributes_are_counted(tmp_path: Path) -> None:
    source = AmazonSource(write(tmp_path), "Toys", attributes=2)
    assert source.provenance.counts == {"short_users": 1, "attributes_cut": 1}
    assert {
        row["item_id"]: row["attributes"] for row in source.items().to_pylist()
    } == {**{10: [1, 2], 20: [2], 30: [5, 4], 40: None, 50: None, 60: [9]}}
    counts = prepare(source, tmp_path / "set").counts
    assert (counts["short_users"], counts["attributes_cut"], counts["rows_train"]) == (
        1,
        1,
        7,
    )


def test_schema_has_items_and_their_attributes_and_no_task(tmp_path: Path) -> None:
    schema = AmazonSource(write(tmp_path), "Toys").schema
    assert [(f.name, f.kind, f.entity, f.length) for f in schema.features] == [
        ("item_id", "categorical", "item", 1),
        ("attributes", "multi_valued", "item", 3),  # item 30 has three different ones
    ]
    assert schema.tasks == ()


def test_without_the_file_of_attributes_there_is_no_such_feature(
    tmp_path: Path,
) -> None:
    source = AmazonSource(write(tmp_path, attributes=None), "Toys")
    assert [f.name for f in source.schema.features] == ["item_id"]
    assert source.items().to_pydict() == {"item_id": [10, 20, 30, 40, 50, 60]}
    assert source.provenance.counts == {"short_users": 1}


def test_cold_item_is_unknown_and_yet_in_the_catalogue(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    place = columns(data.schema.group("catalogue")).ids
    item, attributes = (
        data.catalogue.ids[:, slice(*place[name])] for name in ("item_id", "attributes")
    )
    assert load_vocabulary(data.directory, "item_id").tolist() == [10, 20, 30, 40]
    assert load_vocabulary(data.directory, "attributes").tolist() == [1, 2, 3, 4, 5]
    assert data.catalogue.item_id.tolist() == [10, 20, 30, 40, 50, 60]
    assert item[:, 0].tolist() == [2, 3, 4, 5, UNKNOWN, UNKNOWN]
    assert attributes[[0, 3, 5]].tolist() == [
        *([2, 3, MISSING], [MISSING, MISSING, MISSING], [UNKNOWN, MISSING, MISSING])
    ]


def test_prepared_splits_hold_the_history_and_the_held_out_item(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    item = data.catalogue.item_id
    train, valid, test = (data.load(split) for split in ("train", "valid", "test"))
    assert (train.num_chunks, valid.num_chunks, test.num_chunks) == (3, 2, 2)
    assert sorted(train.flags.tolist()) == [EVENT | SCORED | LEARNED] * 7
    for log, wanted in (
        (valid, {7: [30, 10, 30], 3: [10, 20, 40, 50]}),
        (test, {7: [30, 10, 30, 20], 3: [10, 20, 40, 50, 60]}),
    ):
        parts = [
            slice(*pair) for pair in zip(log.start[:-1], log.start[1:], strict=True)
        ]
        assert {
            int(u): item[log.item[part]].tolist()
            for u, part in zip(log.user_id, parts, strict=True)
        } == wanted
        for part in parts:
            assert log.flags[part].tolist() == [EVENT] * (
                part.stop - part.start - 1
            ) + [EVENT | SCORED]


def test_data_set_without_tasks_users_and_actions_has_empty_columns(
    tmp_path: Path,
) -> None:
    log = prepared(tmp_path).load("train")
    assert log.labels.shape == (7, 0)
    assert log.user_ids.shape == (3, 0)
    assert log.action_dense.shape == (7, 0)
    assert np.array_equal(np.sort(log.user_id), [3, 7, 9])


def test_data_set_without_tasks_opens_in_tensorflow_datasets(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    data = prepared(tmp_path)
    assert len(tfds.builder_from_directory(data.directory).as_data_source("train")) == 3


def test_command_line_prepares_the_named_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write(tmp_path / "raw"), tmp_path / "set"
    assert (
        main(
            [
                "prepare",
                "amazon",
                "--root",
                str(root),
                "--name",
                "Toys",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "items 6" in capsys.readouterr().out
    metadata = open_dataset(out).metadata
    assert metadata.source == "amazon Toys"
    assert sorted(metadata.checksums) == ["Toys.txt", "Toys_item2attributes.json"]


def test_missing_file_names_the_data_sets_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name='Toy'.*holds no Toy\.txt.*\(Toys\)"):
        AmazonSource(write(tmp_path), "Toy")


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ("1 2 3\n4 5 x\n", r"Toys\.txt, line 2: 'x' is not an id"),
        ("1 2\n\n4 -5\n", r"Toys\.txt, line 3: '-5' is not an id"),
        (
            "1 9223372036854775808\n",
            r"Toys\.txt, line 1: '9223372036854775808' is not an id",
        ),
        ("1 2 3\n4\n", r"Toys\.txt, line 2: user 4 has no item"),
        ("1 2 3\n4 5\n1 6\n", r"Toys\.txt, line 3: user 1 has a sequence in line 1"),
        ("\n", r"Toys\.txt holds no sequence"),
    ],
)
def test_malformed_line_is_refused(
    tmp_path: Path, sequences: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AmazonSource(write(tmp_path, sequences), "Toys")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ([1], r"Toys_item2attributes\.json holds a list"),
        ({"a": [1]}, "item 'a' is not a whole number"),
        ({"1": 2}, "item 1 has 2"),
        ({"1": [True]}, r"item 1 has \[True\]"),
    ],
)
def test_malformed_attributes_are_refused(
    tmp_path: Path, attributes: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        AmazonSource(write(tmp_path, attributes=attributes), "Toys")


def test_attributes_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "Toys_item2attributes.json").write_text('{"1": [2')
    with pytest.raises(
        InputError, match=r"Toys_item2attributes\.json' is not JSON: .*line 1 column 9"
    ):
        AmazonSource(tmp_path, "Toys")


def test_room_for_no_attribute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="attributes=0 must be at least 1"):
        AmazonSource(write(tmp_path), "Toys", attributes=0)
