"""Tests of `prepare delimited --like ... --candidates`: rows that are to be ranked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tokenrec
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.metadata import Metadata
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError

SCHEMA = {
    "features": [
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "device", "kind": "categorical", "entity": "context"},
        {"name": "seconds", "kind": "dense", "entity": "action"},
    ],
    "tasks": [{"name": "click"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [
        f"{rng.integers(0, 6)},{rng.integers(0, 9)},{t},web,{rng.random():.2f},{t % 2}"
        for t in range(100)
    ]
    header = "user_id,item_id,time_ms,device,seconds,click"
    for name, rows in (("old", lines[:80]), ("new", lines[80:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    # One candidate is of an item, and one of a user, that training had not.
    candidates = ["0,1,200,web", "0,2,200,web", "1,77,200,web", "50,3,200,"]
    (tmp_path / "candidates.csv").write_text(
        "\n".join(["user_id,item_id,time_ms,device", *candidates]) + "\n"
    )
    return tmp_path


def prepare(folder: Path, out: str, *flags: str) -> int:
    schema = str(folder / "schema.json")
    line = ["prepare", "delimited", "--schema", schema, "--out", str(folder / out)]
    return main([*line, *flags])


def test_candidates_are_scored_with_the_events_since_the_runs_data_as_history(
    folder: Path,
) -> None:
    log = str(folder / "old.csv")
    assert prepare(folder, "data", "--log", log, "--valid-from", "60") == 0
    like = ["--like", str(folder / "data")]
    candidates = ["--candidates", str(folder / "candidates.csv")]
    new = ["--log", str(folder / "new.csv")]
    assert prepare(folder, "ranked", *like, *new, *candidates) == 0
    data = open_dataset(folder / "ranked")
    rows = data.load("test")
    scored = (rows.flags & SCORED) > 0
    assert scored.sum() == 4
    assert ((rows.flags[scored] & EVENT) == 0).all()
    assert (rows.labels[scored] == -1).all()
    assert np.isnan(rows.action_dense[scored]).all()
    # The history of user 0 has events of both logs.
    (user,) = np.flatnonzero(rows.user_id == "0")
    times = rows.time[rows.start[user] : rows.start[user + 1]]
    assert (times < 80).any()
    assert ((times >= 80) & (times < 100)).any()
    # There need not be events since then.
    assert prepare(folder, "alone", *like, *candidates) == 0
    assert open_dataset(folder / "alone").load("test").num_rows < rows.num_rows


def test_flags_that_do_not_go_together_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = ["--log", str(folder / "old.csv")]
    assert prepare(folder, "data", *log, "--valid-from", "60") == 0
    like = ["--like", str(folder / "data")]
    capsys.readouterr()
    assert prepare(folder, "x", *log, *like, "--valid-from", "60") == 2
    assert "--valid-from=60 does not go with --like" in capsys.readouterr().err
    assert prepare(folder, "x", *log) == 2
    assert "valid_from is not given" in capsys.readouterr().err
    assert prepare(folder, "x", *log, *like) == 2
    assert "0 of 80 rows are later than the data set" in capsys.readouterr().err
    with pytest.raises(InputError, match="ranked by a run that is trained; add --like"):
        DelimitedSource(
            folder / "schema.json",
            [folder / "old.csv"],
            valid_from="60",
            candidates=[folder / "candidates.csv"],
        )


def test_the_api_prepares_later_rows_as_the_command_line_does(folder: Path) -> None:
    assert (
        prepare(folder, "data", "--log", str(folder / "old.csv"), "--valid-from", "60")
        == 0
    )
    like, new = folder / "data", folder / "new.csv"
    assert prepare(folder, "one", "--like", str(like), "--log", str(new)) == 0
    files = {"schema": folder / "schema.json", "log": [new]}
    tokenrec.prepare("delimited", folder / "other", like=like, **files)
    digests = [Metadata.load(folder / name).row_digests for name in ("one", "other")]
    assert digests[0] == digests[1] != {}
    with pytest.raises(
        InputError, match=r"--like .*nothing.* is not a prepared data set"
    ):
        tokenrec.prepare("delimited", folder / "x", like=folder / "nothing", **files)
