"""The short form of `benchmarks/fuzz_readers.py`: 108 of its cases, and what it reports."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fuzz_readers
from benchmarks.fuzz_targets import Target, make_targets
from tokenrec.errors import InputError


def test_damaged_files_end_in_equal_data_or_a_refusal(tmp_path: Path) -> None:
    rows, failures = fuzz_readers.fuzz(make_targets(tmp_path), range(9), tmp_path)
    assert not failures, "\n".join(failures)
    assert all(row["refused"] for row in rows)
    assert sum(row["cases"] for row in rows) == 12 * 9


@pytest.mark.parametrize("rule", ["equal", "sound"])
def test_a_crash_and_other_data_are_told_with_their_seed(
    tmp_path: Path, rule: str
) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "file").write_text("000000")

    def read(folder: Path) -> str:
        text = (
            (folder / "file").read_bytes().decode("latin-1")
            if (folder / "file").is_file()
            else "!"
        )
        if len(text) < 6:
            raise InputError("short") if text != "!" else KeyError("file")
        return text

    target = Target("one", rule, tmp_path / "sound", ("file",), read)
    rows, failures = fuzz_readers.fuzz([target], range(60), tmp_path)
    row = rows[0]
    assert row["refused"] + row["equal"] + row["other data"] + row["failures"] == 60
    assert row["refused"]
    assert any(
        "KeyError" in failure and failure.startswith("--target 'one' --only ")
        for failure in failures
    )
    assert any("other data than" in failure for failure in failures) == (
        rule == "equal"
    )
    assert bool(row["other data"]) == (rule == "sound")


def test_every_kind_of_damage_occurs_and_a_seed_says_which(tmp_path: Path) -> None:
    path, ends = tmp_path / "file", []
    for _ in range(2):
        for seed in range(60):
            path.write_bytes(b"0123456789" * 20)
            fuzz_readers.damage(path, np.random.default_rng(seed))
            ends.append(
                "folder"
                if path.is_dir()
                else path.read_bytes()
                if path.exists()
                else "gone"
            )
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert ends[:60] == ends[60:]
    assert {"folder", "gone"} <= set(ends)
    sizes = {len(end) for end in ends if isinstance(end, bytes)}
    assert min(sizes) < 200 < max(sizes)
    assert 200 in sizes


def test_the_result_is_written_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        warnings, "simplefilter", lambda action: None
    )  # it would outlast the test
    fuzz_readers.main(
        ["--cases", "3", "--target", "config.json", "--out", str(tmp_path / "result")]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert [
        (row["target"], row["cases"], row["failures"]) for row in result["rows"]
    ] == [("config.json", 3, 0)]
    assert "--cases 3" in result["command"]
