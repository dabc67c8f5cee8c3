"""RecBole's atomic files are read by the types in their headers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.schema_inference.logs import START, write_csv
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.recbole import RecBoleSource
from tokenrec.errors import InputError

ROWS = 600


def inter() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "user_id:token": [f"u{u}" for u in random.integers(0, 30, ROWS)],
        "item_id:token": random.integers(0, 40, ROWS),
        "rating:float": random.integers(1, 6, ROWS),
        "timestamp:float": START + np.sort(random.integers(0, 10**6, ROWS)),
    }


def item() -> dict[str, Any]:
    words = [f"word{i}" for i in range(200)]
    return {
        "item_id:token": np.arange(40),
        "title:token_seq": [f"{words[3 * i]} {words[3 * i + 1]}" for i in range(40)],
        "genre:token_seq": [["a b", "b", "c a", "c"][i % 4] for i in range(40)],
        "year:token": 1990 + np.arange(40) % 9,
        "price:float": np.arange(40) + 0.5,
        "vector:float_seq": [f"{i} 0.5 {-i}" for i in range(40)],
        "publisher:token": [["x|y", "x", "y", "z|x"][i % 4] for i in range(40)],
    }


def write(root: Path, tables: dict[str, dict[str, Any]], name: str = "toy") -> Path:
    for suffix, columns in tables.items():
        write_csv(root / f"{name}.{suffix}", columns, "\t")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "toy", {"inter": inter(), "item": item()})


def test_types_become_kinds(root: Path) -> None:
    schema = RecBoleSource(root).schema
    kinds = {f.name: (f.kind, f.entity, f.length) for f in schema.features}
    assert kinds["genre"] == ("multi_valued", "item", 2)
    assert kinds["year"] == ("categorical", "item", 1)
    # A bar does not separate values of a token.
    assert kinds["publisher"] == ("categorical", "item", 1)
    assert kinds["price"] == ("dense", "item", 1)
    assert kinds["vector"] == ("embedding", "item", 3)
    assert kinds["rating"][1] == "action"
    assert kinds["title"][0] == "text"
    assert [task.name for task in schema.tasks] == ["liked"]


def test_rows_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    source = RecBoleSource(root, labels=["liked: rating >= 3"])
    counts = prepare(source, tmp_path / "set").counts
    assert sum(counts[f"rows_{split}"] for split in ("train", "valid", "test")) == ROWS
    rows = open_dataset(tmp_path / "set").to_arrow("train").read_all()
    assert counts["rows_train"] == pytest.approx(0.8 * ROWS, abs=0.1 * ROWS)
    given, ids = inter(), item()
    by_key = {
        (u, i, int(t) * 1000): r
        for u, i, r, t in zip(*(list(v) for v in given.values()), strict=True)
    }
    for row in rows.to_pylist():
        rating = by_key[row["user_id"], row["item_id"], row["time_ms"]]
        assert row["rating"] == rating
        assert row["label_liked"] == int(rating >= 3)
        assert row["genre"] == ids["genre:token_seq"][row["item_id"]].split(" ")
        assert row["vector"] == [row["item_id"], 0.5, -row["item_id"]]


@pytest.mark.parametrize("per_second", [1, 1000])
def test_unit_of_time_is_found_and_said(tmp_path: Path, per_second: int) -> None:
    columns = inter()
    columns["timestamp:float"] = columns["timestamp:float"] * per_second
    source = RecBoleSource(write(tmp_path, {"inter": columns}))
    first = pa.Table.from_batches(list(source.rows()))["time_ms"][0].as_py()
    assert first == inter()["timestamp:float"][0] * 1000
    unit = {1: "seconds", 1000: "milliseconds"}[per_second]
    assert any(f"read as {unit} since 1970" in line for line in source.summary)
    # Statistics of the past are those of --statistics.
    assert not any("statistics" in line for line in source.summary)


def test_splits_may_be_given(root: Path) -> None:
    source = RecBoleSource(root, valid_from="2022-01-05")
    rows = pa.Table.from_batches(list(source.rows()))
    late = rows["time_ms"].to_numpy() >= np.datetime64("2022-01-05", "ms").astype(int)
    assert (rows["split"].to_numpy() == late).all()


def test_parts_are_small_when_pickled(root: Path) -> None:
    source = RecBoleSource(root)
    (part,) = source.row_parts()
    copy = pickle.loads(pickle.dumps(part))
    assert pa.Table.from_batches(list(copy.read())).num_rows == ROWS
    assert len(pickle.dumps(source)) < 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector:float_seq": ["1 2", "1"] * 20}, "2 values, and a vector has one"),
        ({"size": list(range(40))}, "field 'size' has no type, such as 'size:token'"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    root = write(tmp_path, {"inter": inter(), "item": item() | change})
    with pytest.raises(InputError, match=message):
        RecBoleSource(root)


def test_a_folder_of_several_data_sets_needs_a_name(root: Path, tmp_path: Path) -> None:
    write(root, {"inter": inter()}, "other")
    with pytest.raises(InputError, match="holds other, toy; name one"):
        RecBoleSource(root)
    assert RecBoleSource(root, "other").provenance.name == "recbole other"
    with pytest.raises(InputError, match="name='x'"):
        RecBoleSource(root, "x")
    with pytest.raises(InputError, match=r"holds no NAME\.inter"):
        RecBoleSource(tmp_path)
