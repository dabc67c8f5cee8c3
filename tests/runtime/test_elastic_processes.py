"""Four processes that are killed come back as two.

The processes are real. They are forked from one that has imported tokenrec, because
imports take most of the time of so small a run.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.runtime.test_distributed import checkpoints, losses, train_line
from tokenrec import active_run
from tokenrec.checkpoint.device_history import read_history
from tokenrec.cli.main import main
from tokenrec.data.pipeline import train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.runtime.distributed import initialize
from tokenrec.train_loop import train  # noqa: F401 - imported before the fork

WAIT_SECONDS = 300
LAST = 10
# The batch at which a run is killed; the checkpoint of step 4 is complete by then.
KILLED_AT = 7


def work(folder: Path, number: int, count: int, port: int, lines: list[str]) -> None:
    """Be one of `count` processes with one device each; run command lines in turn.

    The log rows of each batch are written to a file. A line that ends in "KILL" kills
    its process with SIGKILL when it takes its last batch but before it is used.
    """
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 "
        "--xla_backend_optimization_level=0",
    }
    initialize(sigterm_stops_run=True)
    for index, line in enumerate(lines):
        rows_file = folder / f"{index}-{number}.rows"
        is_killed = line.endswith("KILL")

        def counted(*args, rows_file=rows_file, is_killed=is_killed, **named):
            with rows_file.open("a", buffering=1) as file:
                for taken, host in enumerate(train_batches(*args, **named)):
                    if is_killed and taken == KILLED_AT:
                        os.kill(os.getpid(), signal.SIGKILL)
                    rows = host.rows[host.rows >= 0]
                    print(json.dumps(sorted(rows.tolist())), file=file)
                    yield host

        active_run.train_batches = counted  # type: ignore[assignment]
        code = main(line.removesuffix("KILL").split())
        if code:
            sys.exit(code)


def run(folder: Path, count: int, *lines: str) -> list[int | None]:
    """Run command lines in `count` processes, and return their exit codes."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    with socket.socket(socket.AF_INET6) as holder:
        # Held like this, the port is free for JAX alone.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        port = holder.getsockname()[1]
        processes = [
            context.Process(target=work, args=(folder, number, count, port, [*lines]))
            for number in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(WAIT_SECONDS)
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def rows_by_step(folder: Path, line: int) -> list[list[int]]:
    """Log rows of each batch, those of all processes together."""
    files = folder.glob(f"{line}-*.rows")
    by_process = [file.read_text().splitlines() for file in files]
    return [
        sorted(row for part in parts for row in json.loads(part))
        for parts in zip(*by_process, strict=True)
    ]


def test_four_processes_that_are_killed_come_back_as_two(
    tmp_path: Path,
) -> None:
    data, whole, elastic = (tmp_path / name for name in ("set", "whole", "elastic"))
    prepare(SyntheticSource(1_500, users=40, items=30), data)
    multiprocessing.set_forkserver_preload([__name__])
    fields: dict[str, object] = {
        "mesh.fsdp": 4,
        "train.elastic": "accumulate",
        "train.save_every": 2,
        "train.eval_split": "",
        "optim.steps": LAST,
    }

    def line(workdir: Path, **more: object) -> str:
        text = train_line(data, workdir, **fields | more)
        return text.replace("--config.train.eval_split= ", "") + " --distributed"

    # 1. A run that nobody disturbs; another one is killed after some checkpoint.
    folders = [tmp_path / name for name in ("four", "two")]
    killed = run(folders[0], 4, line(whole), line(elastic) + "KILL")
    assert killed == [-signal.SIGKILL] * 4, (folders[0] / "0.err").read_text()
    saved = checkpoints(elastic)[-1]
    assert 4 <= saved < KILLED_AT
    # 2. Two processes continue.
    assert run(folders[1], 2, line(elastic)) == [0, 0], (
        folders[1] / "0.err"
    ).read_text()

    # 3. No row is lost and none is read twice.
    read = rows_by_step(folders[0], 1)[:saved]
    read += rows_by_step(folders[1], 0)
    assert read == rows_by_step(folders[0], 0)
    assert len(read) == LAST

    # 4. The losses are those of the undisturbed run.
    expected, found = losses(whole), losses(elastic)
    assert list(found) == list(expected) == list(range(1, LAST + 1))
    assert [found[step] for step in range(1, saved + 1)] == [
        expected[step] for step in range(1, saved + 1)
    ]
    # Sums over devices have another order: measured 1.7e-7.
    assert found == pytest.approx(expected, rel=3e-5)

    # 5. The record says what changed when.
    history = read_history(elastic)
    assert history is not None
    assert [
        (use.step, use.devices, use.processes, use.mesh["fsdp"], use.accumulate)
        for use in history.uses
    ] == [(0, 4, 4, 4, 1), (saved, 2, 2, 2, 2)]
    assert "2 devices in 2 processes" in (folders[1] / "0.err").read_text()
    assert "2 devices in 2 processes" not in (folders[1] / "1.err").read_text()
