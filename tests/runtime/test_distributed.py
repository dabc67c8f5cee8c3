"""Two processes of four devices train as one process of eight does, and fail together.

The processes are real; XLA gives each of them four virtual CPU devices.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest

from tests.counted import count_rows
from tests.runtime.forked import KILL, KILLED_AT, rows_by_step, run_processes
from tests.worlds import mesh_of
from tokenrec.cli.main import main
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.sharding import local_batch_indices

# A process that hangs fails the test after this time; no result depends on it.
WAIT_SECONDS = 300
# Write the log rows of each batch to a file, and run command lines one after another.
DRIVER = """
import sys
from tokenrec.cli.main import main
from tokenrec.runtime.distributed import initialize
from tests.counted import count_in_file
count_in_file(sys.argv.pop(1))
initialize(sigterm_stops_run=True)
sys.exit(max([main(line.split()) for line in sys.argv[1:]]))
"""
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
# Fewer features compile in less time: three are left, of users, of items and of what happened.
EXCLUDED = "interests,age,hour,load,genre,price,vector,code,place,reaction,seconds"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(SyntheticSource(1_500, users=40, items=30), out)
    return out


def train_line(data: Path | str, workdir: Path, **fields: object) -> str:
    """Command line of a small training run; `fields` overrides config fields."""
    values = {
        "model.width": 4,
        "model.layers": 1,
        "model.windows": "()",
        "tokens.maker": "linear",
        "mesh.fsdp": 2,
        "data.exclude": EXCLUDED,
        "data.paradigm": "nio",
        "data.overlap": 0,
        "data.events": 4,
        "data.batch_size": 16,
        "data.eval_batch_size": 16,
        "optim.warmup_steps": 1,
        "optim.steps": 400,
        "train.eval_every": 0,
        "train.log_every": 1,
    }
    line = [
        "train",
        "--config=synthetic",
        "--quiet",
        f"--data={data}",
        f"--workdir={workdir}",
    ]
    return " ".join(
        line + [f"--config.{name}={value}" for name, value in (values | fields).items()]
    )


@contextlib.contextmanager
def started(folder: Path, *lines: list[str]) -> Iterator[list[subprocess.Popen]]:
    """Start a process for each list of command lines; the end of the block kills them."""
    with socket.socket(socket.AF_INET6) as holder, contextlib.ExitStack() as stack:
        # Another program does not get the port while it is held like this, but the
        # coordinator of JAX does, because it shares ports.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        running = []
        for index, own_lines in enumerate(lines):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{holder.getsockname()[1]}",
                "JAX_NUM_PROCESSES": str(len(lines)),
                "JAX_PROCESS_ID": str(index),
                "XLA_FLAGS": FLAGS,
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            rows_file = str(folder / f"{index}.rows")
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, rows_file, *own_lines],
                env=environment,
                stdout=stack.enter_context((folder / f"{index}.out").open("w")),
                stderr=stack.enter_context((folder / f"{index}.err").open("w")),
                cwd=Path(__file__).parents[2],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        yield running


def finished(folder: Path, *lines: list[str]) -> list[int]:
    """Run command lines in processes and return the exit codes."""
    with started(folder, *lines) as running:
        return [process.wait(WAIT_SECONDS) for process in running]


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step."""
    records = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        record["step"]: record["train/loss"]
        for record in records
        if "train/loss" in record
    }


def checkpoints(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(
        int(path.name)
        for path in workdir.glob("checkpoints/*")
        if path.name.isdecimal()
    )


def test_two_processes_equal_one_and_resume_after_a_kill(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `two`: two processes, killed and resumed as two. `alone`: a copy of it, resumed as
    # one process. `one`: one process that is never interrupted.
    two, one, alone = (tmp_path / name for name in ("two", "one", "alone"))
    # 1. Kill two processes.
    often = {"train.save_every": 2}
    killed = run_processes(
        tmp_path / "first",
        2,
        f"{train_line(data, two, **often)} --distributed{KILL}",
        devices=4,
    )
    assert killed == [-signal.SIGKILL] * 2, (tmp_path / "first/0.err").read_text()
    step = checkpoints(two)[-1]
    assert 4 <= step < KILLED_AT
    shutil.copytree(two, alone)

    # 2. Resume for four steps, then evaluate and predict: two processes, and one.
    stop = often | {"train.stop_at": step + 4}
    written = {
        name: (tmp_path / f"{name}.json", tmp_path / f"{name}.parquet")
        for name in ("two", "one")
    }

    def evaluate_and_predict(name: str) -> list[str]:
        run = f"--workdir={two} --split=valid --checkpoint=latest"
        return [
            f"evaluate {run} --json={written[name][0]}",
            f"predict {run} --out={written[name][1]}",
        ]

    lines = [
        f"{line} --distributed"
        for line in (train_line(data, two, **stop), *evaluate_and_predict("two"))
    ]
    second = tmp_path / "second"
    codes = run_processes(second, 2, *lines, devices=4)
    assert codes == [0, 0], (second / "0.err").read_text()
    assert ["rows" in (second / f"{n}.out").read_text() for n in range(2)] == [
        True,
        False,
    ]
    counted: dict[Path, list[list[int]]] = {one: [], alone: []}
    for workdir, seen in counted.items():
        monkeypatch.setattr(
            "tokenrec.active_run.train_batches", count_rows(seen.append)
        )
        assert main(train_line(data, workdir, **stop).split()) == 0
    for line in evaluate_and_predict("one"):
        assert main(line.split()) == 0

    # 3. Step by step, all of them read the log rows that one process reads.
    before = rows_by_step(tmp_path / "first", 0)[:step]
    assert all(before)
    assert before + rows_by_step(second, 0) == counted[one]
    assert before + counted[alone] == counted[one]

    # 4. The losses agree. Sums over devices have another order in one process:
    # measured 4.1e-6 and 4.2e-6.
    resumed, uninterrupted = losses(two), losses(one)
    assert list(resumed) == list(uninterrupted) == list(range(1, step + 5))
    assert resumed == pytest.approx(uninterrupted, rel=3e-5)
    assert losses(alone) == pytest.approx(uninterrupted, rel=3e-5)
    # 5. Every score of one checkpoint is the same, bit for bit.
    assert json.loads(written["two"][0].read_text()) == json.loads(
        written["one"][0].read_text()
    )
    assert pq.read_table(written["two"][1]).equals(pq.read_table(written["one"][1]))


def test_all_processes_fail_when_settings_differ_or_one_has_no_data(
    data: Path, tmp_path: Path
) -> None:
    workdir, missing = tmp_path / "run", tmp_path / "missing"
    right, lost = train_line(data, workdir), train_line(missing, workdir)
    other = train_line(data, workdir, **{"model.width": 8, "optim.steps": 9})
    # The driver has joined the processes, so without the flag `main` returns an exit
    # code and the second line runs; with the flag the process ends.
    assert finished(
        tmp_path, [right, f"{right} --distributed"], [other, f"{lost} --distributed"]
    ) == [2, 2]
    for index, source in enumerate(("process 1: ", "")):
        error = (tmp_path / f"{index}.err").read_text()
        assert f"tokenrec: {source}the processes have different settings" in error
        assert "config model.width: 4 in process 0, 8 in process 1" in error
        assert "config optim.steps: 400 in process 0, 9 in process 1" in error
        assert f"tokenrec: {source}data '{missing}' is not a prepared data set" in error
    assert not workdir.exists()


def test_a_process_without_the_others_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert main([*train_line(data, tmp_path / "run").split(), "--distributed"]) == 2
    assert "JAX_NUM_PROCESSES='two' is not a whole number" in capsys.readouterr().err


def test_a_batch_that_the_devices_cannot_share_names_its_field() -> None:
    mesh = mesh_of(2, 2, 2)
    assert local_batch_indices(mesh, 8, "data.batch_size").tolist() == list(range(8))
    with pytest.raises(
        InputError, match=r"data\.batch_size = 6 is not a multiple of the 4 devices"
    ):
        local_batch_indices(mesh, 6, "data.batch_size")
    assert jax.process_count() == 1
