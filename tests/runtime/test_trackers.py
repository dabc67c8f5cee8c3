"""Metrics in Weights & Biases and MLflow, without a network."""

from __future__ import annotations

import contextlib
import json
import signal
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenrec.config import Config
from tokenrec.config.validate import validate
from tokenrec.errors import InputError, NonFiniteError, Stopped
from tokenrec.runtime.run_log import open_run_log

CONFIG = {"model": {"width": 64, "windows": (32, 16)}, "train": {"trackers": ()}}
# Trackers import packages that warn on their own.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No tracker reaches a server, nor files outside the test's folder."""
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def write_run(workdir: Path, tracker: str, start_step: int = 0) -> None:
    with open_run_log(
        workdir, start_step=start_step, config=CONFIG, trackers=(tracker,)
    ) as log:
        for step in (start_step + 10, start_step + 20):
            log.write(step, {"loss": 1 / step, "norm": float("nan"), "auc": None})
        log.write(start_step + 20, {"recall@10": 0.25}, prefix="valid")


def wandb_payloads(file: Path) -> Iterator[bytes]:
    """Records of an offline file: a file header, then LevelDB's log format."""
    data, position, parts = file.read_bytes(), 7, b""
    while position < len(data):
        # A header does not cross the end of a block of 32 KiB.
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def wandb_records(folder: Path) -> tuple[set[str], dict[int, dict[str, float]]]:
    """Run ids and, for each step, the metrics that an offline folder holds."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    run_ids, steps = set(), {}
    for payload in wandb_payloads(file):
        record = wandb_internal_pb2.Record.FromString(payload)
        if record.WhichOneof("record_type") == "run":
            run_ids.add(record.run.run_id)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        metrics = {name: value for name, value in values.items() if "/" in name}
        steps.setdefault(int(values["_step"]), {}).update(metrics)
    return run_ids, steps


def test_wandb_gets_every_step_and_a_resumed_run_goes_on_in_the_same_one(
    offline, tmp_path
):
    pytest.importorskip("wandb")
    workdir = tmp_path / "run"
    write_run(workdir, "wandb")
    # W&B names an offline folder by the second in which it starts.
    second = time.strftime("%S")
    while time.strftime("%S") == second:
        time.sleep(0.05)
    write_run(workdir, "wandb", start_step=20)
    folders = sorted((workdir / "wandb").glob("offline-run-*"))
    (first_ids, first), (second_ids, second) = map(wandb_records, folders)
    assert first_ids == second_ids
    assert len(first_ids) == 1
    assert first == {
        10: {"train/loss": 0.1},
        20: {"train/loss": 0.05, "valid/recall@10": 0.25},
    }
    assert sorted(second) == [30, 40]


def test_mlflow_gets_every_step_and_a_resumed_run_goes_on_in_the_same_one(
    offline, tmp_path
):
    mlflow = pytest.importorskip("mlflow")
    workdir = tmp_path / "run"
    write_run(workdir, "mlflow")
    write_run(workdir, "mlflow", start_step=20)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workdir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tokenrec")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "64"
    assert run.data.params["model.windows"] == "[32, 16]"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {
        10: 0.1,
        20: 0.05,
        30: 1 / 30,
        40: 0.025,
    }
    history = client.get_metric_history(run.info.run_id, "valid/recall_at_10")
    assert [point.step for point in history] == [20, 40]
    assert set(run.data.metrics) == {"train/loss", "valid/recall_at_10"}


ENDS = {
    "finished": (None, "FINISHED", (0, False)),
    "preempted": (Stopped("SIGTERM", signal.SIGTERM), "KILLED", (1, True)),
    "interrupted": (KeyboardInterrupt(), "KILLED", (1, True)),
    "failed": (NonFiniteError("step 7"), "FAILED", (1, False)),
}


def end_run(workdir: Path, tracker: str, error: BaseException | None) -> None:
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, open_run_log(workdir, trackers=(tracker,)) as log:
        log.write(10, {"loss": 1})
        if error is not None:
            raise error


@pytest.mark.parametrize("end", ENDS)
def test_mlflow_shows_how_a_run_ended(offline, tmp_path, end):
    mlflow = pytest.importorskip("mlflow")
    error, status, _ = ENDS[end]
    end_run(tmp_path / "run", "mlflow", error)
    uri = f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tokenrec")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status
    # A resumed run that reaches its end is finished after all.
    end_run(tmp_path / "run", "mlflow", None)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("end", ENDS)
def test_wandb_shows_how_a_run_ended(offline, tmp_path, end):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    error, _, (exit_code, is_preempted) = ENDS[end]
    end_run(tmp_path / "run", "wandb", error)
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = [
        wandb_internal_pb2.Record.FromString(payload)
        for payload in wandb_payloads(file)
    ]
    kinds = [record.WhichOneof("record_type") for record in records]
    (exit_record,) = [record.exit for record in records if record.HasField("exit")]
    assert exit_record.exit_code == exit_code
    assert ("preempting" in kinds) == is_preempted


@pytest.mark.parametrize(
    ("tracker", "owner", "method"),
    [("wandb", "Run", "log"), ("mlflow", "MlflowClient", "log_batch")],
)
def test_a_tracker_that_fails_later_does_not_end_the_run(
    offline, tmp_path, monkeypatch, capsys, tracker, owner, method
):
    module = pytest.importorskip(tracker)
    with open_run_log(tmp_path / "run", trackers=(tracker,)) as log:
        log.write(10, {"loss": 1})

        def fail(*_, **__):
            raise ConnectionResetError("connection lost")

        monkeypatch.setattr(getattr(module, owner), method, fail)
        for step in (20, 30):
            log.write(step, {"loss": 1})
    warning = capsys.readouterr().err
    assert warning.count(f"{tracker} failed and gets no more metrics of this run") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(
    tmp_path, monkeypatch, tracker
):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(InputError, match=rf"pip install '\.\[{tracker}\]'"):
        open_run_log(tmp_path, trackers=(tracker,))


def test_a_damaged_file_of_run_ids_is_named(offline, tmp_path):
    pytest.importorskip("mlflow")
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(InputError, match=r"trackers\.json' is not JSON.*delete it"):
        open_run_log(tmp_path, trackers=("mlflow",))


def test_a_config_with_an_unknown_tracker_is_refused():
    config = Config()
    config.train.trackers = ("wandb", "comet")
    with pytest.raises(
        InputError, match=r"train\.trackers=.*: 'comet' must be wandb, mlflow"
    ):
        validate(config)
