"""Runs whose folder and data set lie in an object store, on real servers of both kinds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from orbax.checkpoint import __version__ as orbax_version
from orbax.checkpoint._src.path import gcs_utils

import tokenrec
from tests.object_servers import SCHEMES, Server, object_server
from tests.runtime.test_distributed import finished, train_line
from tests.test_train_loop import small
from tokenrec.checkpoint import object_storage
from tokenrec.checkpoint.object_storage import COMMIT_FILE
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.config import Config, to_json
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.runtime.paths import as_path, filesystem, list_files
from tokenrec.train_loop import train

ORBAX, NEEDS_ORBAX = tuple(map(int, orbax_version.split("."))), (0, 12, 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synthetic"
    # As in test_train_loop, so that its compiled programs serve here too.
    prepare(SyntheticSource(6_000, users=60, items=40), out)
    return out


@pytest.fixture(scope="module", params=SCHEMES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if request.param == "s3" and ORBAX < NEEDS_ORBAX:
        pytest.skip("checkpoints in s3:// need orbax-checkpoint 0.12.8 (extra s3)")
    with object_server(request.param, tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_version_of_orbax_without_s3_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        object_storage, "enable_s3", object_storage.enable_s3.__wrapped__
    )
    monkeypatch.delattr(gcs_utils, "get_kvstore_for_gcs", raising=False)
    with pytest.raises(InputError, match=r"s3:.*orbax-checkpoint has no .*constraints"):
        CheckpointReader(as_path("s3://bucket/run"))


@pytest.fixture(scope="module")
def remote_data(server: Server, data: Path) -> str:
    url = server.url("data/synthetic")
    filesystem(as_path(url)).put(f"{data}/", f"{url}/", recursive=True)
    return url


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def log_of(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def six_steps(data: Path) -> Config:
    """Config of a run that stops after six steps, with an evaluation where half stop."""
    # Not by `optim.steps`, which is part of the compiled step.
    config = small(data, train__save_every=2, train__log_every=1, train__eval_every=3)
    config.train.stop_at = 6
    return config


@pytest.fixture(scope="module")
def local_run(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Folder and summary of a local run, to which those in stores are equal."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    return workdir, train(six_steps(data), workdir, progress=False)


def test_a_run_in_an_object_store_equals_a_local_one(
    server: Server,
    data: Path,
    remote_data: str,
    local_run: tuple[Path, dict[str, Any]],
) -> None:
    local_workdir, local = local_run
    config = six_steps(data)
    config.data.path = remote_data
    workdir = as_path(server.url("runs/equal"))
    config.train.stop_at = 3
    train(config, workdir, progress=False)
    config.train.stop_at = 6
    remote = train(config, workdir, progress=False)
    assert remote["best"] == local["best"]
    assert remote["best_step"] == local["best_step"]
    with (
        CheckpointReader(workdir) as ours,
        CheckpointReader(local_workdir) as other,
    ):
        assert ours.steps == other.steps
    # The second start continues the log of the first one.
    steps = [record["step"] for record in log_of(workdir) if "train/loss" in record]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-1] == 6
    assert any(name.startswith("tensorboard/") for name in list_files(workdir))
    report = tokenrec.evaluate(workdir, "valid")
    assert report["step"] == remote["best_step"]
    assert report == tokenrec.evaluate(local_workdir, "valid")
    # No folder "gs:" or "s3:" beside the tests.
    assert not any(Path(f"{scheme}:").exists() for scheme in SCHEMES)


# One store each: only names of files and processes differ in what these tests do, and a run of the other one is above.
ONE = ["s3", pytest.param("gs", marks=pytest.mark.slow)]


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_killed_run_resumes_from_its_last_checkpoint(
    server: Server, data: Path, remote_data: str, tmp_path: Path
) -> None:
    config = small(data, optim__steps=400, train__save_every=2, train__log_every=1)
    config.data.path = remote_data
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    workdir = as_path(server.url("runs/killed"))
    command = [
        *(sys.executable, "-m", "tokenrec", "train", f"--config={file}"),
        *(f"--workdir={workdir}", "--quiet"),
    ]
    process = subprocess.Popen(command, env=os.environ | server.environment)
    while not list((workdir / "checkpoints").glob(f"*/{COMMIT_FILE}")):
        assert process.poll() is None, "the run ended before its first checkpoint"
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = CheckpointReader(workdir).steps[-1]
    # What a save that was killed has left: a folder without the file that Orbax adds.
    (workdir / "checkpoints" / "398" / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert CheckpointReader(workdir).steps[-1] == saved
    config.train.stop_at = saved + 2
    summary = train(config, workdir, progress=False)
    assert summary["step"] == saved + 2
    assert not list_files(workdir / "checkpoints" / "398")
    # No step before the checkpoint is missing in the log.
    steps = {record["step"] for record in log_of(workdir) if "train/loss" in record}
    assert steps >= set(range(1, saved + 1))


@pytest.mark.parametrize("server", ONE, indirect=True)
def test_a_damaged_checkpoint_is_set_aside(
    server: Server, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(data, train__save_every=2, train__keep=2)
    workdir = as_path(server.url("runs/damaged"))
    config.train.stop_at = 4
    train(config, workdir, progress=False)
    folder = workdir / "checkpoints"
    newest = CheckpointReader(workdir).steps[-1]
    arrays = [
        name
        for name in list_files(folder / str(newest))
        if name.startswith("state/d/") or "/d/" in name
    ]
    damaged = folder / str(newest) / arrays[0]
    contents = bytearray(damaged.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged.write_bytes(bytes(contents))
    summary = train(config, workdir, progress=False)
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().err
    assert summary["step"] == 4
    assert list_files(folder / f"damaged-{newest}")
    assert CheckpointReader(workdir).steps[-1] == newest


@pytest.mark.parametrize("server", ONE, indirect=True)
def test_old_checkpoints_are_deleted_whole(server: Server, data: Path) -> None:
    config = small(data, train__stop_at=6, train__save_every=1, train__keep=1)
    config.train.eval_every = 100
    workdir = as_path(server.url("runs/kept"))
    train(config, workdir, progress=False)
    steps = {name.partition("/")[0] for name in list_files(workdir / "checkpoints")}
    assert steps == {str(step) for step in CheckpointReader(workdir).steps}
    assert len(steps) == 1


@pytest.mark.parametrize("server", ONE, indirect=True)
def test_predictions_are_written_to_the_store(
    server: Server, data: Path, tmp_path: Path
) -> None:
    workdir = as_path(server.url("runs/predicted"))
    config = small(data, train__stop_at=2, train__eval_every=2)
    train(config, workdir, progress=False)
    rows = tokenrec.predict(workdir, "valid", server.url("out/scores.parquet"))
    import pyarrow.parquet as pq

    with as_path(server.url("out/scores.parquet")).open("rb") as file:
        assert pq.read_table(file).num_rows == rows > 0


def test_a_bucket_that_does_not_exist_is_named(server: Server, data: Path) -> None:
    workdir = f"{server.scheme}://no-such-bucket/run"
    with pytest.raises(InputError, match="no-such-bucket"):
        tokenrec.train(small(data), workdir, progress=False)


# Two processes: tests/runtime/test_distributed.py, in a local folder.
@pytest.mark.slow
@pytest.mark.parametrize("server", ["gs"], indirect=True)
def test_two_processes_share_a_run(
    server: Server, remote_data: str, tmp_path: Path
) -> None:
    workdir = as_path(server.url("runs/two"))
    fields = {"optim.steps": 4, "train.save_every": 2}
    line = train_line(remote_data, workdir, **fields)
    codes = finished(tmp_path, [line], [line])
    assert codes == [0, 0], (tmp_path / "0.err").read_text()
    with CheckpointReader(workdir) as checkpoints:
        last = checkpoints.steps[-1]
    names = list_files(workdir / "checkpoints" / str(last))
    # Each process writes its arrays, and the checksums of its share of the files.
    assert {"sums.0.json", "sums.1.json"} <= set(names)
    assert {name.split("/")[1] for name in names if "/ocdbt." in name} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    report = tokenrec.evaluate(workdir, "valid", checkpoint="latest")
    assert report["step"] == last
