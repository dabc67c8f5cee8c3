"""Several real processes that run command lines together, and are killed where a test says.

They are forked from one that has imported tokenrec, because imports take most of the
time of so small a run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

from tokenrec import active_run
from tokenrec.cli.main import main
from tokenrec.data.pipeline import train_batches
from tokenrec.runtime.distributed import initialize
from tokenrec.train_loop import train  # noqa: F401 - imported before the fork

# A process that hangs is an error after this time; no result depends on it.
WAIT_SECONDS = 300
# Ends a line whose process is to be killed: by SIGKILL, as it takes this batch but
# before it is used. With a checkpoint every two steps, that of step 4 is complete by then.
KILL = "KILL"
KILLED_AT = 7


def _work(
    folder: Path, number: int, count: int, devices: int, port: int, lines: list[str]
) -> None:
    """Be one of `count` processes; write the log rows of each batch to a file."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
    }
    initialize(sigterm_stops_run=True)
    for index, line in enumerate(lines):
        rows_file = folder / f"{index}-{number}.rows"
        is_killed = line.endswith(KILL)

        def counted(*args, rows_file=rows_file, is_killed=is_killed, **named):
            with rows_file.open("a", buffering=1) as file:
                for taken, host in enumerate(train_batches(*args, **named)):
                    if is_killed and taken == KILLED_AT:
                        os.kill(os.getpid(), signal.SIGKILL)
                    rows = host.rows[host.rows >= 0]
                    print(json.dumps(sorted(rows.tolist())), file=file)
                    yield host

        active_run.train_batches = counted  # type: ignore[assignment]
        code = main(line.removesuffix(KILL).split())
        if code:
            sys.exit(code)


def run_processes(
    folder: Path, count: int, *lines: str, devices: int = 1
) -> list[int | None]:
    """Run command lines in each of `count` processes, and return their exit codes.

    Args:
      folder: is made, with `NUMBER.out` and `NUMBER.err` of each process and
        `LINE-NUMBER.rows`.
      count: number of processes.
      lines: command lines, run in turn.
      devices: virtual CPU devices of a process.
    """
    folder.mkdir()
    multiprocessing.set_forkserver_preload([__name__])
    context = multiprocessing.get_context("forkserver")
    with socket.socket(socket.AF_INET6) as holder:
        # Held like this, the port is free for JAX alone.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        port = holder.getsockname()[1]
        processes = [
            context.Process(
                target=_work,
                args=(folder, number, count, devices, port, [*lines]),
                daemon=True,
            )
            for number in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(WAIT_SECONDS)
        hanging = [n for n, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
    assert not hanging, f"processes {hanging} still run after {WAIT_SECONDS} s"
    return [process.exitcode for process in processes]


def rows_by_step(folder: Path, line: int) -> list[list[int]]:
    """Log rows of each batch, those of all processes together."""
    by_process = [
        file.read_text().splitlines() for file in folder.glob(f"{line}-*.rows")
    ]
    return [
        sorted(row for part in parts for row in json.loads(part))
        for parts in zip(*by_process, strict=True)
    ]
