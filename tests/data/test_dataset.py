"""Opening a prepared data set: by tensorflow-datasets, whole, in part, and damaged."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.data import records
from tokenrec.data.dataset import open_dataset
from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import columns
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError


def make(directory: Path, users: int = 40, rows: int = 300) -> Path:
    random = np.random.default_rng(0)
    time = random.integers(0, 1000, rows)
    source = MemorySource(
        {
            "user_id": [f"user {u}" for u in random.integers(0, users, rows)],
            "item_id": [f"item {i}" for i in random.integers(0, 30, rows)],
            "time_ms": time,
            "split": (time >= 800).astype(np.int8),
            "request": np.arange(rows),
            "label_click": pa.array(random.integers(0, 2, rows), pa.int8()),
            "tab": random.integers(0, 5, rows),
            "place": [["top", "side"][i] for i in random.integers(0, 2, rows)],
            "price": random.normal(size=rows),
            "reaction": random.integers(0, 3, rows),
        },
        {
            "user_id": [f"user {u}" for u in range(users)],
            "city": [f"city {u % 9}" for u in range(users)],
        },
        {"item_id": ["item 0", "item 1"], "author": [1, 2], "tags": [[1, 2], []]},
    )
    prepare(source, directory, chunk_events=5, overlap=3)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "set")


def assert_logs_equal(one: InteractionLog, other: InteractionLog) -> None:
    for field in dataclasses.fields(InteractionLog):
        np.testing.assert_array_equal(
            getattr(one, field.name), getattr(other, field.name), field.name
        )


def test_tensorflow_datasets_opens_it_without_tensorflow(directory: Path) -> None:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(directory).as_data_source("train")
    data = open_dataset(directory)
    log = data.load("train")
    assert len(source) == data.num_chunks("train") == log.num_chunks
    rows = np.frombuffer(source[3]["rows"], records.row_dtype(data.metadata.schema))
    np.testing.assert_array_equal(rows["time"], log.time[log.start[3] : log.start[4]])
    np.testing.assert_array_equal(
        rows["action_dense"], log.action_dense[log.start[3] : log.start[4]]
    )
    assert source[3]["user_id"].decode() == log.user_id[3]
    assert "tensorflow" not in sys.modules


def test_any_range_of_chunks_is_that_part_of_the_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset(directory)
    whole = data.load("train")
    np.testing.assert_array_equal(data.chunk_lengths("train"), np.diff(whole.start))
    monkeypatch.setattr(records, "READ_CHUNKS", 4)
    assert_logs_equal(data.load("train"), whole)
    part = data.load("train", 5, 16)
    rows = slice(whole.start[5], whole.start[16])
    expected = InteractionLog(
        start=whole.start[5:17] - whole.start[5],
        **{n: getattr(whole, n)[5:16] for n in ("user_id", "user_ids", "user_dense")},
        **{
            n: getattr(whole, n)[rows]
            for n in (
                "time",
                "item",
                "flags",
                "request",
                "labels",
                "row_ids",
                "row_dense",
                "action_ids",
                "action_dense",
            )
        },
    )
    assert_logs_equal(part, expected)
    assert data.load("train", 7, 7).num_rows == 0


def test_log_has_the_types_it_promises(directory: Path) -> None:
    log = open_dataset(directory).load("valid")
    types = {
        field.name: getattr(log, field.name).dtype.str[1:]
        for field in dataclasses.fields(InteractionLog)
        if getattr(log, field.name) is not None
    }
    assert types == {
        "start": "i8", "user_id": "O", "user_ids": "i4", "user_dense": "f4", "time": "i8", "item": "i4", "flags": "u1",
        "request": "i8", "labels": "i1", "row_ids": "i4", "row_dense": "f4", "action_ids": "i4", "action_dense": "f4",
    }  # fmt: skip


def test_original_values_come_back(directory: Path) -> None:
    data = open_dataset(directory)
    log = data.load("train")
    assert data.catalogue.item_id[log.item[0]].startswith("item ")
    tables = {
        name: load_vocabulary(directory, name) for name in ("place", "city", "tab")
    }
    assert tables["place"].tolist() == ["side", "top"]
    city = [tables["city"][i - 2] for i in log.user_ids[:, 0]]
    assert city == [f"city {int(u.split()[1]) % 9}" for u in log.user_id]
    with pytest.raises(InputError, match="no vocabulary"):
        load_vocabulary(directory, "price")


def test_excluded_features_disappear_everywhere(directory: Path) -> None:
    whole, data = (
        open_dataset(directory),
        open_dataset(directory, ("city", "author", "tab", "price")),
    )
    assert "tab" not in data.schema.tables
    assert "tab" in data.metadata.schema.tables
    log, full = data.load("train"), whole.load("train")
    assert log.user_ids.shape[1] == 0
    assert log.action_dense.shape == (log.num_rows, 0)
    place = columns(whole.schema.group("row")).ids["place"][0]
    np.testing.assert_array_equal(log.row_ids[:, 0], full.row_ids[:, place])
    np.testing.assert_array_equal(data.catalogue.ids, whole.catalogue.ids[:, 1:])
    with pytest.raises(InputError, match="did you mean 'city'"):
        open_dataset(directory, ("citty",))


def test_unknown_and_empty_splits_and_bad_ranges_are_refused(directory: Path) -> None:
    data = open_dataset(directory)
    assert data.splits == ("train", "valid")
    with pytest.raises(InputError, match=r"'test' of .* is empty"):
        data.load("test")
    with pytest.raises(
        InputError, match=r"'vaild' of .* is unknown; did you mean 'valid'"
    ):
        data.num_chunks("vaild")
    with pytest.raises(InputError, match="does not lie within"):
        data.load("valid", 0, 10_000)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a prepared data set"):
        open_dataset(tmp_path)


SHARD = "tokenrec-train.array_record-00000-of-00001"
FILES = [SHARD, "items/ids.npy", "chunks/train.npy", "dataset_info.json"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in FILES for d in ("missing", "empty", "half")]
    + [(SHARD, "flipped")],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = make(tmp_path / "set") / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(
            content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        )
    else:
        path.write_bytes(content[: middle if damage == "half" else 0])
    with pytest.raises(InputError, match=path.name):
        open_dataset(tmp_path / "set").load("train")


def test_a_shard_of_another_data_set_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "set") / SHARD
    path.write_bytes((make(tmp_path / "other", users=12) / SHARD).read_bytes())
    with pytest.raises(InputError, match=f"{SHARD}.*belongs to another data set"):
        open_dataset(tmp_path / "set").load("train")
