"""Data sets whose files were damaged, or edited into something that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.fuzz_targets import make_targets, without_digests
from tests.data.memory_source import MemorySource
from tests.data.test_dataset import SHARD, assert_logs_equal
from tokenrec.checkpoint.run_folder import SCHEMA_FILE, check_schema
from tokenrec.data import metadata, records
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.catalogue import LONGEST_ITEM_ID
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.tokenizer import load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_targets(folder)
    return folder / "data"


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "set")


@pytest.fixture
def before(sound: Path, tmp_path: Path) -> Path:
    """A data set from before there were checksums."""
    return without_digests(sound, tmp_path / "before")


def read_all(directory: Path) -> None:
    data = open_dataset(directory)
    for split in data.splits:
        data.load(split)
        data.row_marks(split)
    for table in ("plan", "item_id", "tags", "tab"):
        load_vocabulary(directory, table)
    load_tokenizer(directory)


FILES = [
    *("tokenrec.json", "dataset_info.json", "features.json", "tokenizer.json", SHARD),
    *(
        "items/item_id.npy",
        "items/ids.npy",
        "items/dense.npy",
        "chunks/train.npy",
        "chunks/valid.npy",
        "chunks/test.npy",
        "marks/train.npy",
        "marks/valid.npy",
        "marks/test.npy",
    ),
    *(f"vocabularies/{table}.parquet" for table in ("item_id", "plan", "tab", "tags")),
]


def test_every_file_is_in_the_list_of_those_to_damage(data: Path) -> None:
    files = {
        path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()
    }
    assert files - {"LICENSE"} == {
        *FILES,
        SHARD.replace("train", "valid"),
        SHARD.replace("train", "test"),
    }


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_however_it_was_damaged(data: Path, name: str) -> None:
    read_all(data)
    path = data / name
    content = path.read_bytes()
    middle = len(content) // 2 if name != SHARD else content.index(b"user_id") + 9
    for damaged in (
        content[:middle],
        b"",
        content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            read_all(data)
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        read_all(data)
    path.mkdir()
    with pytest.raises(InputError, match=path.name):
        read_all(data)


def test_a_file_that_may_not_be_read_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def refuse(self: Path, *args: Any, **named: Any) -> Any:
        if self.name == "dense.npy":
            raise PermissionError(13, "Permission denied")
        return usual(self, *args, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        InputError, match=r"dense\.npy' cannot be read: Permission denied"
    ):
        open_dataset(data)


def test_a_data_set_from_before_there_were_checksums_opens(
    data: Path, before: Path
) -> None:
    read_all(before)
    assert_logs_equal(
        open_dataset(before).load("train"), open_dataset(data).load("train")
    )
    assert "ids_digest" not in open_dataset(before).schema.to_json()


def edit_metadata(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / metadata.METADATA_FILE
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def smaller_table(value: dict[str, Any]) -> None:
    value["schema"]["tables"]["tab"] = 3


def test_an_edited_schema_is_refused(data: Path, before: Path) -> None:
    edit_metadata(data, smaller_table)
    with pytest.raises(InputError, match=r"tokenrec\.json' is damaged or was changed"):
        open_dataset(data)
    edit_metadata(before, smaller_table)
    with pytest.raises(
        InputError,
        match=r"split 'train', chunks 0 .* feature 'tab' is 3 in row .* not 0 to 2",
    ):
        open_dataset(before).load("train")
    edit_metadata(before, lambda value: value["schema"]["tables"].pop("tags"))
    with pytest.raises(InputError, match="feature 'tags' has no size of its table"):
        open_dataset(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("counts"), "has no 'counts'"),
        (
            lambda value: value["counts"].update(items="8"),
            "'counts' must be a mapping of strings to whole numbers",
        ),
        (lambda value: value["counts"].update(items=0), r"counts\['items'\]=0"),
        (
            lambda value: value["key_types"].update(user_id="int32"),
            r"key_types\['user_id'\]='int32'",
        ),
        (lambda value: value.update(schema=[]), "no JSON object"),
        (lambda value: value["schema"].update(features=3), "not a JSON array"),
        (
            lambda value: value["schema"]["features"][0].update(length="1"),
            "length='1' is not a whole number",
        ),
        (
            lambda value: value["schema"]["features"][0].update(kind=["dense"]),
            r"kind=\['dense'\] is not one of",
        ),
        (lambda value: value["schema"]["features"][0].pop("entity"), "entity"),
        (
            lambda value: value["schema"]["features"][1].update(deviation=0),
            "deviation=0 must be positive",
        ),
        (lambda value: value["schema"]["tables"].update(tab=2**31), "rows=2147483648"),
        (lambda value: value.update(extra=1), "'extra' is no field"),
    ],
)
def test_metadata_that_says_something_impossible_is_refused(
    before: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_metadata(before, change)
    with pytest.raises(InputError, match=message):
        open_dataset(before)


def edit_rows(directory: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change the log rows of every training chunk, and write the shard again."""
    data_set = open_dataset(directory)
    dtype, count = (
        records.row_dtype(data_set.metadata.schema),
        data_set.num_chunks("train"),
    )
    written = [
        r
        for block in records.read_records(directory, "train", [count], 0, count)
        for r in block
    ]
    writer = ArrayRecordWriter(str(directory / SHARD), "group_size:1")
    for record in written:
        chunk = records.decode(record)
        rows = np.frombuffer(chunk.rows, dtype).copy()
        change(rows)
        writer.write(records.encode(chunk._replace(rows=rows.tobytes())))
    writer.close()


def set_to(
    field: str, value: float, column: int | None = None
) -> Callable[[np.ndarray], object]:
    def change(rows: np.ndarray) -> None:
        rows[field][-1 if column is None else (-1, column)] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("item", 8), r"the item is 8 in row \d+ .* not 0 to 7"),
        (set_to("item", -1), "the item is -1"),
        (set_to("row_ids", 99, 0), "an id of the feature 'tab' is 99"),
        (set_to("row_ids", -5, 0), "an id of the feature 'tab' is -5"),
        (set_to("row_dense", np.inf, 1), "feature 'vector' is inf"),
        (set_to("action_dense", -np.inf, 0), "feature 'seconds' is -inf"),
        (set_to("labels", 2, 0), "a label is 2"),
        (set_to("flags", 17), "flags is 17"),
        (set_to("request", -2), "request is -2"),
        (set_to("time", -(10**6)), "has the time -1000000, before"),
    ],
)
def test_an_edited_row_is_refused_when_it_is_read(
    data: Path, change: Callable[[np.ndarray], object], message: str
) -> None:
    edit_rows(data, change)
    with pytest.raises(InputError, match=f"split 'train', chunks 0 to .*{message}"):
        open_dataset(data).load("train")


def test_rows_that_leave_another_chunk_are_missed(data: Path) -> None:
    sizes: list[int] = []
    edit_rows(data, lambda rows: sizes.append(len(rows)))
    one, other = sizes.index(min(sizes)), sizes.index(max(sizes))
    count = len(sizes)
    written = [
        r
        for block in records.read_records(data, "train", [count], 0, count)
        for r in block
    ]
    written[one], written[other] = written[other], written[one]
    writer = ArrayRecordWriter(str(data / SHARD), "group_size:1")
    for record in written:
        writer.write(record)
    writer.close()
    with pytest.raises(
        InputError, match="does not fit the schema or the index of chunks"
    ):
        open_dataset(data).load("train")


def test_a_record_that_is_no_chunk_is_refused(data: Path) -> None:
    count = open_dataset(data).num_chunks("train")
    writer = ArrayRecordWriter(str(data / SHARD), "group_size:1")
    for _ in range(count):
        writer.write(b"\xff\xff")
    writer.close()
    with pytest.raises(InputError, match="a record is not a chunk of rows"):
        open_dataset(data).load("train")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids", lambda a: np.where(a == 2, 999, a), "an id of the feature '.*' is 999"),
        ("ids", lambda a: a[:-1], r"ids has the shape \(7, "),
        ("ids", lambda a: a.astype(np.float32), "of float32"),
        ("ids", lambda a: a.astype(np.int64), "of int64"),
        ("item_id", lambda a: a[:, None], r"item_id has the shape \(8, 1\)"),
        (
            "dense",
            lambda a: np.ones((8, 1), np.float32),
            r"dense has the shape \(8, 1\)",
        ),
    ],
)
def test_an_edited_catalogue_is_refused(
    before: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    path = before / "items" / f"{name}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(InputError, match=message):
        open_dataset(before)


def log(items: list[str], tabs: list[int]) -> MemorySource:
    return MemorySource(
        {
            "user_id": [1] * len(items),
            "item_id": items,
            "time_ms": range(len(items)),
            "tab": tabs,
        }
    )


def test_a_run_refuses_a_data_set_of_the_same_sizes_whose_ids_stand_for_other_values(
    tmp_path: Path,
) -> None:
    sets = {
        "same": log(["a", "b"], [1, 2]),
        "tabs": log(["a", "b"], [1, 3]),
        "items": log(["a", "c"], [1, 2]),
    }
    prepare(log(["a", "b"], [1, 2]), tmp_path / "first")
    schema = open_dataset(tmp_path / "first").schema
    (tmp_path / SCHEMA_FILE).write_text(json.dumps(schema.to_json(), indent=1) + "\n")
    for name, source in sets.items():
        prepare(source, tmp_path / name)
        other = open_dataset(tmp_path / name).schema
        assert other.tables == schema.tables
        if name == "same":
            check_schema(other, tmp_path)
        else:
            with pytest.raises(
                InputError, match=r"values of the vocabularies|items of the catalogue"
            ):
                check_schema(other, tmp_path)


def test_missing_values_of_training_rows_are_counted_for_every_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "user_id": [1, 2, 2, 3],
        "split": [0, 0, 0, 1],
        "price": [1.0, float("nan"), None, None],
        "reaction": [5, None, 6, None],
        "tab": [1, 2, 3, 4],
    }
    users = {
        "user_id": [1, 2, 3],
        "age": [float("nan"), 5.0, None],
        "city": [1, 2, None],
    }
    items = {"item_id": [7, 8], "tags": [[1, None], []], "author": [3, 3]}
    source = MemorySource(rows | {"time_ms": [1, 2, 3, 4]}, users, items)
    counts = prepare(source, tmp_path / "set").counts
    missing = {
        name: count for name, count in counts.items() if name.startswith("missing")
    }
    assert missing == {
        "missing_train_price": 2,
        "missing_train_age": 1,
        "missing_train_duration": 1,
        "missing_train_place": 3,
        "missing_train_reaction": 1,
    }
    said = capsys.readouterr().err
    assert "never known in training: duration, place; check the columns" in said
    # Impressions have no action: `price` is not listed.
    assert "missing in most training rows: age 50%\n" in said


def test_a_notice_lists_the_first_of_many_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = [Feature(f"f{i}", "categorical", "context") for i in range(12)]
    schema = Schema(tuple(features), (Task("click"),))
    source = MemorySource({"user_id": [1]}, schema=schema)
    prepare(source, tmp_path / "set")
    said = capsys.readouterr().err
    assert "never known in training: f0, f1, f2, f3, f4, f5, f6, f7 and 4 more;" in said


@pytest.mark.parametrize(
    ("item", "message"),
    [("x\0", "a NUL at its end"), ("x" * (LONGEST_ITEM_ID + 1), "1025 characters")],
)
def test_an_item_id_that_numpy_would_not_keep_is_refused(
    tmp_path: Path, item: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"item_id='x.* has {message}"):
        prepare(log(["x", item], [1, 1]), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
