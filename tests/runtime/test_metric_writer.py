"""What a run leaves in its log on disk, across kills and restarts."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import struct
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tokenrec.errors import InputError, StorageError
from tokenrec.runtime import files
from tokenrec.runtime import retry as retry_module
from tokenrec.runtime.metric_writer import JsonlWriter, read_log
from tokenrec.runtime.progress import ProgressDisplay
from tokenrec.runtime.run_log import open_run_log
from tokenrec.runtime.throughput import Throughput


def lines(workdir: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in lines(workdir)]


def events(workdir: Path) -> list[Event]:
    """Events of all files, the oldest file first."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            # A record is its length, a checksum of that, the bytes and their checksum.
            (size,) = struct.unpack_from("<Q", data, position)
            start = position + 12
            found.append(Event.FromString(data[start : start + size]))
            position = start + size + 4
    return found


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    return [
        (e.step, v.tag, v.simple_value)
        for e in events(workdir)
        for v in e.summary.value
    ]


def test_each_log_is_a_line_at_once_and_a_tensorboard_scalar(tmp_path):
    with open_run_log(tmp_path / "run") as log:
        log.write(10, {"loss": 0.5, "examples_per_second": np.float32(100)})
        (line,) = lines(tmp_path / "run")
        assert line.pop("time") > 0
        assert line == {
            "step": 10,
            "train/loss": 0.5,
            "train/examples_per_second": 100.0,
        }
        log.write(10, {"macro_auc": 0.75, "is_click/auc": 0.75}, prefix="valid")
    assert lines(tmp_path / "run")[1]["valid/is_click/auc"] == 0.75
    assert scalars(tmp_path / "run") == [
        (10, "train/loss", 0.5),
        (10, "train/examples_per_second", 100.0),
        (10, "valid/macro_auc", 0.75),
        (10, "valid/is_click/auc", 0.75),
    ]


def test_undefined_and_non_finite_values_are_null(tmp_path):
    with open_run_log(tmp_path) as log:
        log.write(1, {"loss": math.nan, "norm": math.inf, "auc": None, "rate": 0.1})
    (line,) = lines(tmp_path)
    assert [line[f"train/{name}"] for name in ("loss", "norm", "auc", "rate")] == [
        None,
        None,
        None,
        0.1,
    ]
    assert [tag for _, tag, _ in scalars(tmp_path)] == ["train/rate"]


def test_resume_leaves_each_step_once(tmp_path):
    with open_run_log(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.write(step, {"loss": step})
    with open_run_log(tmp_path, start_step=20) as log:
        assert steps(tmp_path) == [10, 20]
        for step in (30, 40):
            log.write(step, {"loss": -step})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, -30),
        (40, -40),
    ]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    # TensorBoard hides what the killed run wrote from this step on.
    assert starts[-1] == 21


def test_an_evaluation_repeated_at_the_restored_step_replaces_the_old_line(tmp_path):
    with open_run_log(tmp_path) as log:
        log.write(20, {"loss": 1})
        log.write(20, {"is_click/auc": 0.1}, prefix="valid")
        log.write(20, {"is_click/auc": 0.2}, prefix="test")
    with open_run_log(tmp_path, start_step=20) as log:
        log.write(20, {"is_click/auc": 0.3}, prefix="valid")
        log.write(30, {"loss": 2})
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
    with open_run_log(tmp_path) as log:
        log.write(0, {"auc": 0.5}, prefix="valid")
        log.write(10, {"loss": 1})
    with open_run_log(tmp_path):
        assert lines(tmp_path) == []


def test_the_torn_last_line_of_a_killed_run_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "time": 1.0, "train/loss": 1.0}\n{"step": 20, "tim')
    with open_run_log(tmp_path, start_step=20) as log:
        log.write(30, {"loss": 3})
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
        open_run_log(tmp_path, start_step=20)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_kill_during_the_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    with open_run_log(tmp_path) as log:
        for step in (10, 20):
            log.write(step, {"loss": step})

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run_log(tmp_path, start_step=10)
    assert steps(tmp_path) == [10, 20]


def test_everything_is_closed_when_the_run_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    display = ProgressDisplay(Throughput(), total_steps=100)
    log = open_run_log(tmp_path, more=[display])
    log.write(10, {"loss": 0.25})
    with pytest.raises(ArithmeticError), log:
        raise ArithmeticError
    assert display._bar is not None
    assert display._bar.disable  # tqdm's mark of a closed bar
    with pytest.raises(ValueError, match="closed file"):
        log.write(20, {"loss": 0.25})
    assert scalars(tmp_path) == [(10, "train/loss", 0.25)]
    log.close()


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a disk that is always full"
)
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    writer = JsonlWriter(tmp_path)
    with Path("/dev/full").open("ab", buffering=0) as full:
        writer.close()
        monkeypatch.setattr(writer, "_file", full)
        monkeypatch.setattr(writer, "_path", Path("/dev/full"))
        with pytest.raises(
            InputError, match=r"log in '/dev' cannot be written: No space left.*rerun"
        ):
            writer.write(1, {"loss": 0.5})


class Flaky:
    """An open file whose writes fail, and write a part, as they are told."""

    def __init__(self, file: Any, errors: list[int]) -> None:
        self._file = file
        self._errors = errors

    def write(self, data: bytes) -> int:
        if self._errors:
            number = self._errors.pop(0)
            if number:
                raise OSError(number, os.strerror(number))
            return self._file.write(data[:5])
        return self._file.write(data)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(retry_module, "_DELAYS", (0.0,) * 4)


def test_a_fault_that_passes_leaves_each_line_whole(tmp_path, monkeypatch, no_delay):
    with contextlib.closing(JsonlWriter(tmp_path)) as writer:
        # A part, an error, a part, and the rest.
        flaky = Flaky(writer._file, [0, errno.EIO, errno.EIO, 0])
        monkeypatch.setattr(writer, "_file", flaky)
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        (1, 0.5),
        (2, 0.25),
    ]


def test_a_fault_that_persists_is_a_storage_error(tmp_path, monkeypatch, no_delay):
    with contextlib.closing(JsonlWriter(tmp_path)) as writer:
        monkeypatch.setattr(writer, "_file", Flaky(writer._file, [errno.EIO] * 9))
        with pytest.raises(StorageError, match=rf"{tmp_path}/metrics\.jsonl'"):
            writer.write(1, {"loss": 0.5})


def test_a_deleted_log_is_made_again_and_says_so(tmp_path, capsys):
    with contextlib.closing(JsonlWriter(tmp_path)) as writer:
        writer.write(1, {"loss": 1})
        (tmp_path / "metrics.jsonl").unlink()
        writer.write(2, {"loss": 2})
        writer.write(3, {"loss": 3})
        assert steps(tmp_path) == [2, 3]
    error = capsys.readouterr().err
    assert error.count("was deleted or moved") == 1
    assert str(tmp_path / "metrics.jsonl") in error


def test_a_log_that_was_replaced_is_continued(tmp_path):
    with contextlib.closing(JsonlWriter(tmp_path)) as writer:
        writer.write(1, {"loss": 1})
        copy = tmp_path / "copy"
        copy.write_bytes((tmp_path / "metrics.jsonl").read_bytes())
        copy.replace(tmp_path / "metrics.jsonl")
        writer.write(2, {"loss": 2})
    assert steps(tmp_path) == [1, 2]


def test_reading_and_cutting_a_large_log_takes_little_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = ", ".join(f'"train/metric_{number}": 0.125' for number in range(50))
    with path.open("w") as file:
        for step in range(1, 5_001):
            file.write(f'{{"step": {step}, {values}}}\n')
    size = path.stat().st_size
    assert size > 5_000_000
    tracemalloc.start()
    try:
        # Nothing is dropped, then half of the lines.
        for start_step in (5_000, 2_500):
            JsonlWriter(tmp_path, start_step=start_step).close()
        count = sum(1 for _ in read_log(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2_500
    assert peak < size / 10


def test_a_fault_of_tensorboard_s_file_does_not_end_or_stop_the_run(tmp_path, capsys):
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        open_run_log(tmp_path) as log,
    ):
        (_, tensorboard) = log._writers
        # Its thread writes to a disk that is full from now on.
        events = tensorboard._events._events
        # Under the lock, as the thread may be about to flush.
        with events._lock:
            events._py_recordio_writer._writer.close()
            events._py_recordio_writer._writer = full
        # More than the queue of the thread holds. In a thread: a write that waits for
        # room would never end.
        training = threading.Thread(
            target=lambda: [log.write(step, {"loss": 0.5}) for step in range(1, 31)],
            daemon=True,
        )
        training.start()
        training.join(60)
        assert not training.is_alive()
    assert steps(tmp_path) == list(range(1, 31))
    assert capsys.readouterr().err.count("TensorBoard gets no more metrics") == 1


def test_a_writer_that_cannot_be_closed_does_not_keep_the_others_open(tmp_path):
    closed = []

    class Writer:
        def write(self, step, values, prefix="train"):
            pass

        def close(self):
            closed.append(self)
            raise InputError("no space left")

    with pytest.raises(InputError, match="no space left"):
        open_run_log(tmp_path, more=[Writer(), Writer()]).close()
    assert len(closed) == 2


def test_tensorboard_shows_the_config_as_text(tmp_path):
    open_run_log(tmp_path, config={"model": {"width": 64}}).close()
    (event,) = [e for e in events(tmp_path) if e.summary.value]
    assert event.summary.value[0].tag == "config/text_summary"
    assert b'"width": 64' in event.summary.value[0].tensor.string_val[0]
