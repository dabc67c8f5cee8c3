"""A sample is bounded, and its quantiles are those of the whole table."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.schema_inference.logs import write_csv
from tokenrec.data.schema_inference.sample import read_sample
from tokenrec.errors import InputError

ROWS = 50_000


@pytest.fixture
def columns() -> dict[str, np.ndarray]:
    return {"time": np.arange(ROWS), "user": np.arange(ROWS) % 100}


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_quantiles_of_a_part_are_those_of_the_file(
    tmp_path: Path, columns: dict[str, np.ndarray], order: str
) -> None:
    if order == "shuffled":
        columns["time"] = np.random.default_rng(0).permutation(ROWS)
    file = write_csv(tmp_path / "log.csv", columns)
    sample = read_sample([file], sample_bytes=file.stat().st_size // 10)
    assert not sample.complete
    assert 0.07 * ROWS < sample.table.num_rows < 0.11 * ROWS
    assert sample.rows == pytest.approx(ROWS, rel=0.05)
    time = sample.table["time"].cast(pa.int64()).to_numpy()
    assert np.quantile(time, [0, 0.8, 0.9, 1]) == pytest.approx(
        [0, 0.8 * ROWS, 0.9 * ROWS, ROWS], abs=0.04 * ROWS
    )
    assert set(sample.table["user"].to_pylist()) == {str(u) for u in range(100)}


def test_rows_of_a_part_are_rows_of_the_file(
    tmp_path: Path, columns: dict[str, np.ndarray]
) -> None:
    file = write_csv(tmp_path / "log.csv", columns)
    table = read_sample([file], sample_bytes=100_000).table
    times = table["time"].cast(pa.int64()).to_numpy()
    assert (table["user"].cast(pa.int64()).to_numpy() == times % 100).all()
    assert len(np.unique(times)) == len(times)


def test_parquet_is_sampled_from_all_parts(
    tmp_path: Path, columns: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenrec.data.schema_inference.sample.SAMPLE_ROWS", 5000)
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "log.parquet")
    sample = read_sample([tmp_path / "log.parquet"])
    assert sample.table.num_rows < 6000
    assert sample.rows == pytest.approx(ROWS, rel=0.05)
    time = sample.table["time"].to_numpy()
    assert np.quantile(time, 0.8) == pytest.approx(0.8 * ROWS, rel=0.02)


def test_first_and_last_of_many_parts_are_read(tmp_path: Path) -> None:
    for part in range(20):
        write_csv(tmp_path / "log" / f"part-{part:02}.csv", {"part": [part] * 10})
    sample = read_sample([tmp_path / "log"])
    parts = {int(part) for part in sample.table["part"].to_pylist()}
    assert {0, 19} < parts
    assert not sample.complete
    assert sample.rows == 200


def test_a_compressed_file_is_sampled_to_its_end(
    tmp_path: Path, columns: dict[str, np.ndarray]
) -> None:
    file = write_csv(tmp_path / "log.csv", columns)
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_sample([packed]).table.num_rows == ROWS
    assert read_sample([packed]).complete
    size = file.stat().st_size
    sample = read_sample([packed], sample_bytes=size // 10)
    assert not sample.complete
    assert 0.04 * ROWS < sample.table.num_rows < 0.11 * ROWS
    assert sample.rows == pytest.approx(ROWS, rel=0.1)
    time = sample.table["time"].cast(pa.int64()).to_numpy()
    assert len(np.unique(time)) == len(time)
    assert np.quantile(time, [0, 0.8, 1]) == pytest.approx(
        [0, 0.8 * ROWS, ROWS], abs=0.08 * ROWS
    )


def test_line_breaks_in_quotes_do_not_hurt(tmp_path: Path) -> None:
    rows = "".join(f'{i},"two\nlines, {i}"\n' for i in range(2000))
    (tmp_path / "log.csv").write_text("row,text\n" + rows)
    table = read_sample([tmp_path / "log.csv"], sample_bytes=8000, blocks=4).table
    whole = [t for t in table["text"].to_pylist() if t and t.startswith("two\nlines")]
    assert len(whole) > 0.9 * table.num_rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\n", "has no rows"),
        ("7,b0,5.0,1369699200\n8,b1,4.0,1369699300\n", "looks like a row"),
        ("", "empty"),
        ("PAR1 not Parquet", "cannot be"),
    ],
)
def test_a_file_without_rows_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sample([tmp_path / "log.csv"])


def test_parts_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", {"x": [1]})
    write_csv(tmp_path / "b.csv", {"y": [1]})
    with pytest.raises(InputError, match=r"b\.csv: has the columns y, but"):
        read_sample([tmp_path / "a.csv", tmp_path / "b.csv"])
