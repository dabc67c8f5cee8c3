"""`prepare` with less memory than its ids need makes the same data set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.data import memory_limit, vocabulary
from tokenrec.data.memory_limit import LEAST_BYTES
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.spilled_values import SpilledValues
from tokenrec.errors import InputError

FEATURES = (
    Feature("user_id", "categorical", "user"),
    Feature("city", "categorical", "user"),
    Feature("age", "dense", "user"),
    Feature("item_id", "categorical", "item"),
    Feature("tags", "multi_valued", "item", length=3, table="tag"),
    Feature("price", "dense", "item"),
    Feature("query", "categorical", "context"),
    Feature("clicked_tag", "categorical", "action", table="tag"),
)
SCHEMA = Schema(FEATURES, (Task("click"),))


def source(rows: range, name: type = str) -> MemorySource:
    random = np.random.default_rng(rows.start)
    count = len(rows)
    ids = [f"u{i}" if name is str else i for i in range(300)]
    items = [f"it\N{SNOWMAN}{i}" if name is str else -i for i in range(90)]

    def column(values: list, missing: float = 0.0) -> pa.Array:
        chosen = pa.array(values).take(pa.array(random.integers(0, len(values), count)))
        absent = pa.array(random.random(count) < missing)
        return pa.compute.if_else(absent, pa.nulls(count, chosen.type), chosen)

    time = np.sort(random.integers(rows.start, rows.stop, count))
    log = {
        "user_id": column(ids),
        "item_id": column(items),
        "time_ms": time,
        "split": (time > 1000).astype(np.int8),
        "label_click": pa.array(random.integers(-1, 2, count), pa.int8()),
        "query": column([f"q{i}" for i in range(400)], 0.2),
        "clicked_tag": column(["x", "y", "z"], 0.3),
    }
    return MemorySource(
        log,
        {"user_id": ids[:200], "city": ids[1:201], "age": np.arange(200.0)},
        {
            "item_id": items[::2],
            "tags": [["x", "w"], None, ["z", "y", "x"]] * 15,
            "price": np.linspace(1, 2, 45),
        },
        SCHEMA,
        batch_rows=70,
    )


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def tiny_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Spill after each block, map every array, sort a few at a time; count spills."""
    monkeypatch.setattr(memory_limit, "_VALUES", 0)
    monkeypatch.setattr(memory_limit, "_ARRAY", 0)
    monkeypatch.setattr(memory_limit, "_BYTES_OF_A_SORTED_VALUE", LEAST_BYTES // 64)
    monkeypatch.setattr(memory_limit, "BLOCK_ROWS", 64)
    monkeypatch.setattr(vocabulary, "_VALUES_AT_ONCE", 50)
    append, spilled = SpilledValues.append, []

    def counted(self: SpilledValues, values: pa.Array) -> None:
        spilled.append(len(values))
        append(self, values)

    monkeypatch.setattr(SpilledValues, "append", counted)
    return spilled


@pytest.mark.parametrize("name", [str, int])
def test_spilled_ids_make_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_memory: list[int], name: type
) -> None:
    with monkeypatch.context() as ample:
        ample.setattr(memory_limit, "_VALUES", 1)
        prepare(source(range(1500), name), tmp_path / "a")
        assert not tiny_memory
    prepare(
        source(range(1500), name),
        tmp_path / "b",
        memory=LEAST_BYTES,
        scratch=tmp_path / "scratch",
    )
    assert len(tiny_memory) > 15
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list((tmp_path / "scratch").iterdir())

    # Rows that are later than these, with the frozen values.
    later = source(range(1500, 1700), name)
    prepare(later, tmp_path / "d", like=tmp_path / "b", memory=LEAST_BYTES)
    monkeypatch.setattr(memory_limit, "_VALUES", 1)
    prepare(later, tmp_path / "c", like=tmp_path / "a")
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_too_little_memory_is_refused_before_the_log_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"memory=1048576 bytes .* raise it"):
        prepare(source(range(10)), tmp_path / "a", memory=2**20)
    assert not list(tmp_path.iterdir())
