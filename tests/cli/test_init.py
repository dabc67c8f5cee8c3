"""`init` prints three commands that run as they are: prepare, train, evaluate."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.data.schema_inference.logs import clicks, write_csv, write_parquet
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset

# Devices are not the matter here.
pytestmark = pytest.mark.usefixtures("lone_device")

# Added to the printed command of `train`, to be fast: a small model, and one shape of
# its batches.
FAST = [
    "--config.optim.steps=2",
    "--config.optim.warmup_steps=1",
    "--config.train.eval_every=2",
    "--config.model.layers=1",
    "--config.model.windows=()",
    "--config.model.width=8",
    "--config.data.buckets=()",
    "--config.tokens.maker=linear",
    "--quiet",
]


def run_all(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[list[list[str]], str]:
    """Run init and what it prints; return the commands and the last output."""
    assert main(["init", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    commands = [
        shlex.split(line)[1:] for line in printed if line.startswith("tokenrec ")
    ]
    assert [command[0] for command in commands] == ["prepare", "train", "evaluate"]
    for command in commands:
        assert main([*command, *(FAST if command[0] == "train" else [])]) == 0
    return commands, capsys.readouterr().out


def write_tables(form: str) -> list[str]:
    """Write a log of clicks with its tables; return the arguments that name them."""
    columns = clicks()
    columns["bought"] = (columns["click"] * (np.arange(900) % 3 == 0)).astype(int)
    users = {"uid": np.arange(40), "age": np.arange(40) + 20}
    items = {
        "sku": [f"s{i}" for i in range(30)],
        "tags": [
            ["red|hot", "red", "hot", "blue", "blue|red"][i % 5] for i in range(30)
        ],
        "title": [f"The thing number {i}" for i in range(30)],
    }
    write = write_csv if form == "csv" else write_parquet
    write(Path(f"log.{form}"), columns)
    write(Path(f"users.{form}"), users)
    write(Path(f"items.{form}"), items)
    return [
        word for t in ("log", "users", "items") for word in (f"--{t}", f"{t}.{form}")
    ]


def test_a_log_of_clicks_is_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*write_tables("csv"), "--out", "my walk"]
    commands, output = run_all(arguments, capsys)
    assert "--config=ranker" in commands[1]
    assert "click" in output
    assert "bought" in output
    schema = json.loads((tmp_path / "my walk" / "run" / "schema.json").read_text())
    actions = {f["name"] for f in schema["features"] if f["entity"] == "action"}
    assert actions == {"past_click", "past_bought", "dwell"}


def test_parquet_gives_the_schema_and_the_rows_of_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    features, rows = [], []
    for form in ("csv", "parquet"):
        assert main(["init", *write_tables(form), "--out", form]) == 0
        schema = f"{form}/schema.json"
        assert (
            main(["prepare", "delimited", "--schema", schema, "--out", f"d{form}"]) == 0
        )
        features.append(json.loads(Path(schema).read_text())["features"])
        rows.append(open_dataset(Path(f"d{form}")).to_arrow("train").read_all())
    assert features[0] == features[1]
    assert rows[0] == rows[1]


def test_a_log_of_positives_without_tables_is_retrieved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = {name: clicks()[name] for name in ("uid", "sku", "ts")}
    write_csv(Path("log.csv"), columns, ";")
    arguments = ["--log", "log.csv", "--out", "walk"]
    commands, output = run_all(arguments, capsys)
    assert "--config=retriever" in commands[1]
    assert "recall@10" in output


def test_rows_shown_together_share_a_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = clicks()
    page = np.arange(900) // 3
    columns["uid"], columns["ts"] = page % 40, columns["ts"][page * 3]
    columns["page_id"] = page
    write_csv(Path("log.csv"), columns)
    assert main(["init", "--log", "log.csv", "--out", "walk"]) == 0
    assert "--config.data.candidates=4" in capsys.readouterr().out


def test_flags_and_messages_reach_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = clicks()
    columns["who"] = columns.pop("uid")
    write_csv(Path("log.csv"), columns)
    arguments = ["init", "--log", "log.csv", "--out", "walk"]
    assert main(arguments) == 2
    assert "--user COLUMN" in capsys.readouterr().err
    assert main([*arguments, "--user", "who", "--label", "long: dwell > 9"]) == 0
    schema = json.loads(Path("walk/schema.json").read_text())
    assert schema["columns"]["user_id"] == "who"
    assert schema["labels"] == {"long": "dwell > 9"}
    assert "`who` | the user | --user says so" in Path("walk/README.md").read_text()
