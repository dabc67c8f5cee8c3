"""A table that is mapped from a temporary file."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from tokenrec.data.arrow_spool import spooled_table

SCHEMA = pa.schema([("id", pa.string()), ("tags", pa.list_(pa.int64()))])


def batch(first: int, rows: int) -> pa.RecordBatch:
    ids = [None if i % 7 == 0 else f"id {i}" for i in range(first, first + rows)]
    tags = [None if i % 5 == 0 else [i] * (i % 4) for i in range(first, first + rows)]
    return pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.string()), pa.array(tags, pa.list_(pa.int64()))],
        schema=SCHEMA,
    )


def test_a_table_is_that_of_its_batches_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = [batch(i * 1000, 1000) for i in range(50)]
    before = pa.total_allocated_bytes()
    table = spooled_table(iter(batches), SCHEMA)
    assert pa.total_allocated_bytes() - before < table.nbytes / 10
    assert not list(tmp_path.iterdir())
    column = table["id"]
    assert table == pa.Table.from_batches(batches)
    # The map lasts as long as anything that was read from it.
    del table
    gc.collect()
    assert column.slice(49_990).to_pylist() == batches[-1]["id"][990:].to_pylist()
    assert spooled_table(iter(()), SCHEMA) == SCHEMA.empty_table()


def test_an_error_while_reading_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fails():
        yield batch(0, 10)
        raise ValueError("a wrong value")

    with pytest.raises(ValueError, match="a wrong value"):
        spooled_table(fails(), SCHEMA)
    assert not list(tmp_path.iterdir())
