"""A run refuses to resume on other log rows than those that it was started with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.checkpoint.run_folder import (
    ROWS_FILE,
    create_or_check_run,
    run_identity,
)
from tokenrec.config import Config
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.errors import InputError

SCHEMA = Schema(
    (
        Feature("item_id", "categorical", "item"),
        Feature("clicked", "categorical", "action"),
    ),
    (Task("click"),),
)


def made(
    out: Path, changes: dict[str, Any] | None = None, extra: int = 0, **options: int
) -> Path:
    """Prepare 400 rows and more, which all have one schema."""
    n = np.arange(400 + extra)
    # New rows follow the others: no user or item is new.
    columns: dict[str, Any] = {
        "user_id": n % 10,
        "item_id": n % 7,
        "time_ms": 1000 * n,
        "split": (n % 10 > 7).astype(np.int8),
        "label_click": (n % 3 == 0).astype(np.int8),
        "clicked": n % 2,
        "request": np.full(len(n), -1),
    }
    for name, values in (changes or {}).items():
        columns[name] = values(columns[name])
    prepare(MemorySource(columns, schema=SCHEMA), out, **options)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("rows") / "set")


def start(folder: Path | Dataset, workdir: Path) -> None:
    dataset = folder if isinstance(folder, Dataset) else open_dataset(folder)
    create_or_check_run(Config(), dataset, workdir)


def refusal(folder: Path, workdir: Path) -> str:
    with pytest.raises(InputError) as refused:
        start(folder, workdir)
    return str(refused.value)


def swapped(values: np.ndarray) -> np.ndarray:
    """Swap the first two rows of user 3."""
    values = np.array(values)
    values[[3, 13]] = values[[13, 3]]
    return values


def one_label(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values[3] = 1 - values[3]
    return values


def one_request(values: np.ndarray) -> np.ndarray:
    values = np.array(values)
    values[3] = 5
    return values


CHANGES = {
    "grown": ({}, 200, {}, "train: 320 rows in 8 chunks -> 480 rows in 8 chunks"),
    "cut otherwise": (
        {},
        0,
        {"chunk_events": 20, "overlap": 8},
        "train: 320 rows in 8 chunks -> ",
    ),
    "another time": (
        {"time_ms": lambda time: time + (time == 3000)},
        0,
        {},
        "320 rows in 8 chunks before and now, but with other users, times",
    ),
    "other items": ({"item_id": swapped}, 0, {}, "before and now, but with other"),
    "another label": (
        {"label_click": one_label},
        0,
        {},
        "before and now, but with other",
    ),
    "other requests": (
        {"request": one_request},
        0,
        {},
        "before and now, but with other",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_rows_of_the_same_schema_are_refused(
    data: Path, tmp_path: Path, name: str
) -> None:
    changes, extra, options, reason = CHANGES[name]
    made(tmp_path / "other", changes, extra, **options)
    start(data, tmp_path / "run")
    assert open_dataset(tmp_path / "other").schema == open_dataset(data).schema
    message = refusal(tmp_path / "other", tmp_path / "run")
    assert reason in message
    assert "train" in message
    assert "give --data the folder" in message
    assert f"train.warm_start='{tmp_path / 'run'}'" in message
    # The refusal leaves the run as it was.
    start(data, tmp_path / "run")


def test_copies_repeats_and_views_of_a_data_set_are_accepted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(data, tmp_path / "run")
    noted = (tmp_path / "run" / ROWS_FILE).read_text()
    start(shutil.copytree(data, tmp_path / "copy"), tmp_path / "run")
    # Prepared again, in many small shards.
    monkeypatch.setattr("tokenrec.data.records.SHARD_BYTES", 1)
    again = made(tmp_path / "again")
    assert len(list(again.glob("*train.array_record*"))) == 8
    start(again, tmp_path / "run")
    assert (tmp_path / "run" / ROWS_FILE).read_text() == noted
    # Excluded features are part of the schema, not of the rows.
    whole, part = open_dataset(data), open_dataset(data, ("clicked",))
    for split in whole.splits:
        assert whole.row_identity(split) == part.row_identity(split)


def without_rows_digests(data: Path, out: Path) -> Path:
    """The data set as a version without digests of rows would have written it."""
    shutil.copytree(data, out)
    shutil.rmtree(out / "marks")
    (out / METADATA_FILE).unlink()
    metadata = open_dataset(data).metadata
    dataclasses.replace(metadata, row_digests={}).save(out)
    value = json.loads((out / METADATA_FILE).read_text())
    del value["row_digests"], value["digest"]
    (out / METADATA_FILE).write_text(json.dumps(value))
    return out


def test_a_run_from_before_is_accepted_with_a_line_and_checked_from_then_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(data, tmp_path / "run")
    assert capsys.readouterr().err == ""
    (tmp_path / "run" / ROWS_FILE).unlink()
    start(data, tmp_path / "run")
    assert "cannot be checked" in capsys.readouterr().err
    start(data, tmp_path / "run")
    assert capsys.readouterr().err == ""
    refusal(made(tmp_path / "grown", extra=200), tmp_path / "run")


def test_a_data_set_from_before_is_compared_by_the_lengths_of_its_chunks(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = without_rows_digests(data, tmp_path / "before")
    for name, first, second in (("up", before, data), ("down", data, before)):
        run = tmp_path / name
        start(first, run)
        capsys.readouterr()
        start(second, run)
        assert "only the lengths of its chunks were compared" in capsys.readouterr().err
        # Now the digest is known, and it is not forgotten on an older copy.
        start(second, run)
        other = made(tmp_path / f"{name}-label", {"label_click": one_label})
        assert "but with other users" in refusal(other, run)
    grown = without_rows_digests(
        made(tmp_path / "grown", extra=200), tmp_path / "grown-before"
    )
    assert "320 rows in 8 chunks -> 480 rows" in refusal(grown, tmp_path / "up")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"train": {"rows": 1}}',
        '{"train": 3}',
        '{"train": {"rows": "1", "chunks": 1, "lengths_digest": "", '
        '"rows_digest": null}}',
    ],
)
def test_a_damaged_note_of_the_rows_is_named(
    data: Path, tmp_path: Path, text: str
) -> None:
    start(data, tmp_path / "run")
    (tmp_path / "run" / ROWS_FILE).write_text(text)
    message = refusal(data, tmp_path / "run")
    assert ROWS_FILE in message
    assert "delete it" in message


def test_processes_with_other_rows_are_told_apart(data: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", {"label_click": one_label})
    one, two = (run_identity(Config(), open_dataset(path)) for path in (data, other))
    differing = [name for name in one if one[name] != two[name]]
    # Counts of positive labels are part of the metadata.
    assert "data, rows of train" in differing
    assert "data, rows of valid" not in differing
    copied = shutil.copytree(data, tmp_path / "copy")
    assert run_identity(Config(), open_dataset(copied)) == one
