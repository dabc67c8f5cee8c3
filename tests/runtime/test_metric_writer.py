"""What a run leaves on disk and on stderr, across kills and restarts; the throughput timer; the results table."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tokenrec.errors import InputError
from tokenrec.runtime import metric_writer
from tokenrec.runtime.metric_writer import (
    Logbook,
    Throughput,
    format_table,
    result_rows,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_logbook(workdir: Path, start_step: int = 0, progress: bool = False) -> Logbook:
    return Logbook(workdir, progress=progress, total_steps=100, start_step=start_step)


def lines(workdir: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in lines(workdir)]


def events(workdir: Path) -> list[Event]:
    """Events of all files, oldest file first: records of length, checksum, bytes, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    return [
        (e.step, v.tag, v.simple_value)
        for e in events(workdir)
        for v in e.summary.value
    ]


def test_each_log_is_a_line_at_once_and_a_tensorboard_scalar(tmp_path):
    with open_logbook(tmp_path / "run") as book:
        book.log(10, {"loss": 0.5, "examples_per_second": np.float32(100)})
        (line,) = lines(tmp_path / "run")
        assert line.pop("time") > 0
        assert line == {
            "step": 10,
            "train/loss": 0.5,
            "train/examples_per_second": 100.0,
        }
        book.log(10, {"macro_auc": 0.75, "is_click/auc": 0.75}, prefix="valid")
    assert lines(tmp_path / "run")[1]["valid/is_click/auc"] == 0.75
    assert scalars(tmp_path / "run") == [
        (10, "train/loss", 0.5),
        (10, "train/examples_per_second", 100.0),
        (10, "valid/macro_auc", 0.75),
        (10, "valid/is_click/auc", 0.75),
    ]


def test_undefined_and_non_finite_values_are_null(tmp_path):
    with open_logbook(tmp_path) as book:
        book.log(1, {"loss": math.nan, "norm": math.inf, "auc": None, "rate": 0.1})
    (line,) = lines(tmp_path)
    assert [line[f"train/{name}"] for name in ("loss", "norm", "auc", "rate")] == [
        None,
        None,
        None,
        0.1,
    ]
    assert [tag for _, tag, _ in scalars(tmp_path)] == ["train/rate"]


def test_resume_leaves_each_step_once(tmp_path):
    with open_logbook(tmp_path) as book:
        for step in (10, 20, 30, 40):
            book.log(step, {"loss": step})
    with open_logbook(tmp_path, start_step=20) as book:
        assert steps(tmp_path) == [10, 20]
        for step in (30, 40):
            book.log(step, {"loss": -step})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, -30),
        (40, -40),
    ]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 21  # TensorBoard hides what the killed run wrote from there on


def test_an_evaluation_repeated_at_the_restored_step_replaces_the_old_line(tmp_path):
    with open_logbook(tmp_path) as book:
        book.log(20, {"loss": 1})
        book.log(20, {"is_click/auc": 0.1}, prefix="valid")
        book.log(20, {"is_click/auc": 0.2}, prefix="test")
    with open_logbook(tmp_path, start_step=20) as book:
        book.log(20, {"is_click/auc": 0.3}, prefix="valid")
        book.log(30, {"loss": 2})
    values = [
        {k: v for k, v in line.items() if k != "time"} for line in lines(tmp_path)
    ]
    assert values == [
        {"step": 20, "train/loss": 1},
        {"step": 20, "test/is_click/auc": 0.2},
        {"step": 20, "valid/is_click/auc": 0.3},
        {"step": 30, "train/loss": 2},
    ]


def test_a_run_from_the_beginning_drops_the_lines_of_an_earlier_one(tmp_path):
    with open_logbook(tmp_path) as book:
        book.log(0, {"auc": 0.5}, prefix="valid")
        book.log(10, {"loss": 1})
    with open_logbook(tmp_path):
        assert lines(tmp_path) == []


def test_the_torn_last_line_of_a_killed_run_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "time": 1.0, "train/loss": 1.0}\n{"step": 20, "tim')
    with open_logbook(tmp_path, start_step=20) as book:
        book.log(30, {"loss": 3})
    assert steps(tmp_path) == [10, 30]


@pytest.mark.parametrize("bad", ["nonsense\n", '{"loss": 1}\n', "[1]\n"])
def test_a_foreign_line_is_an_error_that_names_file_and_line_and_leaves_the_file(
    tmp_path, bad
):
    text = '{"step": 10}\n' + bad + '{"step": 30}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(
        InputError, match=r"metrics\.jsonl: line 2 .*move the file away"
    ):
        open_logbook(tmp_path, start_step=20)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_kill_during_the_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    with open_logbook(tmp_path) as book:
        for step in (10, 20):
            book.log(step, {"loss": step})

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(metric_writer.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        open_logbook(tmp_path, start_step=10)
    assert steps(tmp_path) == [10, 20]


def test_everything_is_closed_when_the_run_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    book = open_logbook(tmp_path, progress=True)
    book.log(10, {"loss": 0.25})
    with pytest.raises(ArithmeticError), book:
        raise ArithmeticError
    assert book._file.closed
    assert book._bar is not None
    assert book._bar.disable  # tqdm's mark of a closed bar
    assert scalars(tmp_path) == [(10, "train/loss", 0.25)]
    book.close()


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="the disk that is always full is Linux's"
)
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    book = open_logbook(tmp_path)
    words = rf"the log in '{tmp_path}' cannot be written: No space left.*goes on"
    with Path("/dev/full").open("w") as full:
        book._file.close()
        monkeypatch.setattr(book, "_file", full)
        with pytest.raises(InputError, match=words):
            book.log(1, {"loss": 0.5})
        with pytest.raises(
            InputError, match=words
        ):  # what could not be written is tried again
            book.close()


def test_a_terminal_shows_a_bar_with_step_loss_speed_and_time_left(
    tmp_path, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with open_logbook(tmp_path, start_step=40, progress=True) as book:
        book.log(50, {"loss": 0.5, "examples_per_second": 1234.4})
        book.log(50, {"macro_auc": 0.75, "is_click/auc": 0.5}, prefix="valid")
        book.log(60, {"loss": 0.25, "examples_per_second": 4321})
    shown = terminal.getvalue()
    assert "valid at step 50: macro_auc 0.7500\n" in shown
    last = shown.split("\r")[-1]
    assert "60/100 steps" in last
    assert "loss 0.2500  4,321 examples/s" in last
    assert " left]" in last


def test_without_a_terminal_progress_is_a_plain_line_every_few_logs(tmp_path, capsys):
    with open_logbook(tmp_path, progress=True) as book:
        for step in range(10, 110, 10):
            book.log(step, {"loss": 1 / step, "examples_per_second": 2000})
        book.log(100, {"macro_auc": None}, prefix="valid")
    out, err = capsys.readouterr()
    assert out == ""
    first, second, last, valid = err.splitlines()
    assert first.startswith("step 10/100  loss 0.1000  2,000 examples/s  ")
    assert first.endswith(" left")
    assert second.startswith("step 60/100 ")
    assert last.startswith("step 100/100 ")
    assert valid == "valid at step 100: macro_auc -"


def test_without_progress_nothing_is_printed(tmp_path, capsys):
    with open_logbook(tmp_path) as book:
        book.log(10, {"loss": 1})
        book.log(10, {"auc": 1}, prefix="valid")
    assert capsys.readouterr() == ("", "")


def test_throughput_counts_only_the_time_of_training():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    with throughput.excluded():
        now[0] += 60  # compilation
    assert throughput.rate() is None
    for _ in range(2):
        throughput.add(300)
        now[0] += 1

    def evaluate():
        now[0] += 100
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), throughput.excluded():
        evaluate()
    now[0] += 1
    assert throughput.rate() == 200
    throughput.add(100)
    now[0] += 1
    assert throughput.rate() == 100
    assert throughput.average() == 175
    assert Throughput(clock=lambda: 0.0).average() is None


def test_results_table_groups_models_and_aligns_tasks():
    report = {
        "auc": 0.75,
        "gauc": None,
        "log_loss": 0.5,
        "normalized_entropy": 0.9,
        "positives": 1200,
        "examples": 5000,
    }
    other = report | {"auc": 0.5, "positives": 7}
    table = format_table(
        result_rows(
            {
                "tokenrec": {"tasks": {"is_click": report, "is_like": other}},
                "rates": {"tasks": {"is_click": other}},
            }
        )
    )
    assert table.splitlines() == [
        "model     task         AUC  GAUC  log loss      NE  positives  examples",
        "--------  --------  ------  ----  --------  ------  ---------  --------",
        "tokenrec  is_click  0.7500     -    0.5000  0.9000      1,200     5,000",
        "          is_like   0.5000     -    0.5000  0.9000          7     5,000",
        "rates     is_click  0.5000     -    0.5000  0.9000          7     5,000",
    ]
    assert format_table([]) == ""
