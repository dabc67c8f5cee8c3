"""Runs of `chaos.py`: those under faults, and the undisturbed ones for comparison."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import jax
import numpy as np

from tokenrec.checkpoint.run_folder import open_run
from tokenrec.config import from_json
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log
from tokenrec.sharding import make_mesh

BATCH = 16
# Log rows of the data set.
ROWS = 1_500
# Devices of each process.
DEVICES = 2
# A process that takes longer counts as hung; the watchdog must end it before that.
PATIENCE = 300
HANG_SECONDS = 45
TINY = {
    "model.width": 4,
    "model.layers": 1,
    "model.windows": "()",
    "tokens.maker": "linear",
    "data.paradigm": "nio",
    "data.overlap": 0,
    "data.events": 4,
    "data.batch_size": BATCH,
    "data.eval_batch_size": 32,
    "optim.warmup_steps": 1,
    "train.save_every": 5,
    "train.log_every": 1,
    "train.eval_every": 50,
    "train.keep": 3,
    "train.hang_seconds": HANG_SECONDS,
}


class Lineage:
    """A run from its first start to its end, with all faults in between.

    Args:
      lab: the lab that owns the run.
      workdir: folder of the run.
      processes: number of processes that train it together.

    Attributes:
      done: whether the run has reached its last step.
    """

    def __init__(self, lab: Lab, workdir: Path, processes: int) -> None:
        self.lab = lab
        self.workdir = workdir
        self.processes = processes
        self.done = False

    @contextlib.contextmanager
    def started(self) -> Iterator[list[Process]]:
        """Start the run's processes; the end of the block kills them."""
        line = self.lab.train_line(self.workdir)
        with contextlib.ExitStack() as stack:
            variables: dict[str, str] = {}
            if self.processes > 1:
                line = [*line, "--distributed"]
                variables = stack.enter_context(_coordinator(self.processes))
            running = []
            for index in range(self.processes):
                if variables:
                    variables = variables | {"JAX_PROCESS_ID": str(index)}
                process = Process(self.lab, line, variables)
                running.append(stack.enter_context(process))
            yield running

    def step(self) -> int:
        """Last step in the log."""
        return max(losses(self.workdir), default=0)

    def checkpoints(self) -> list[Path]:
        """Folders of the complete checkpoints, in the order of their steps."""
        folders = [
            path for path in self.workdir.glob("checkpoints/*") if path.name.isdecimal()
        ]
        return sorted(folders, key=lambda path: int(path.name))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(
            not path.name.isdecimal() for path in self.workdir.glob("checkpoints/*tmp*")
        )


class Process:
    """A tokenrec command in a process of its own; leaving the context kills it.

    Args:
      lab: the lab, which has the environment of all processes.
      line: arguments of the command.
      variables: further environment variables.
    """

    def __init__(
        self, lab: Lab, line: Sequence[str], variables: dict[str, str] | None = None
    ) -> None:
        lab.started += 1
        self.errors = lab.folder / f"{lab.started}.err"
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tokenrec", *map(str, line)],
                env=lab.environment | (variables or {}),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.popen.kill()
        self.popen.wait()

    def wait_until(
        self, condition: Callable[[], bool], interval: float = 0.005
    ) -> bool:
        """Wait until a condition holds; return False if the process ends before.

        Args:
          condition: checked again and again.
          interval: seconds between two checks.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(interval)
        return True

    def exit_code(self) -> int | None:
        """Wait for the exit code; None if the process hangs."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None

    def words(self) -> str:
        """Last lines on stderr: messages of tokenrec, or any lines without these."""
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        messages = [line for line in lines if line.startswith("tokenrec: ")]
        return " | ".join(messages[-2:] or lines[-3:])


class Lab:
    """A folder with a data set, the undisturbed runs, and the runs under faults.

    Args:
      folder: an empty folder.
      chance: the generator of all draws.
      steps: number of steps of each run.

    Attributes:
      started: number of processes and runs started so far, for unique names.
      lost_samples: samples whose loss is missing or differs in a compared run.
      differing_bits: bits of the last states that differ in compared runs.
      broken: messages of runs that could not be finished.
      disk: a small file system; None if it cannot be mounted.
    """

    def __init__(self, folder: Path, chance: random.Random, steps: int) -> None:
        self.folder = folder
        self.chance = chance
        self.steps = steps
        self.started = 0
        self.lost_samples = 0
        self.differing_bits = 0
        self.broken: list[str] = []
        self.data = folder / "data"
        # The caller's settings of JAX must not change the runs.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("JAX_")
        }
        self.environment = inherited | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} "
            "--xla_backend_optimization_level=0",
        }
        self._whole: dict[int, Lineage] = {}
        self._current: dict[int, Lineage] = {}
        self.disk: Path | None = None

    def __enter__(self) -> Lab:
        self.run(self.prepare_line(self.data))
        self.disk = self._mount()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.disk is not None:
            subprocess.run(["umount", self.disk], check=True)

    def _mount(self) -> Path | None:
        """Mount a disk of 64 MiB; return None if this user may not."""
        disk = self.folder / "disk"
        disk.mkdir()
        options = ["-t", "tmpfs", "-o", "size=64m", "tokenrec", str(disk)]
        if (
            shutil.which("mount") is None
            or subprocess.run(["mount", *options], capture_output=True).returncode
        ):
            return None
        return disk

    def prepare_line(self, out: Path) -> list[str]:
        """Command line that prepares the data set in `out`."""
        return ["prepare", "synthetic", "--rows", str(ROWS), "--out", str(out)]

    def train_line(
        self, workdir: Path, data: Path | None = None, **fields: object
    ) -> list[str]:
        """Command line of a training run.

        Args:
          workdir: folder of the run.
          data: folder of the data set; None for that of the lab.
          fields: further config fields, with "__" for ".".
        """
        overrides = {name.replace("__", "."): value for name, value in fields.items()}
        values = TINY | {"optim.steps": self.steps} | overrides
        line = [
            "train",
            "--config=synthetic",
            "--quiet",
            f"--data={data or self.data}",
            f"--workdir={workdir}",
        ]
        return line + [f"--config.{name}={value}" for name, value in values.items()]

    def run(self, line: Sequence[str]) -> Process:
        """Run a command that must succeed."""
        with Process(self, line) as process:
            if process.exit_code() != 0:
                raise RuntimeError(
                    f"{' '.join(map(str, line))}: {process.errors.read_text()}"
                )
        return process

    def whole(self, processes: int) -> Lineage:
        """Return the undisturbed run with this number of processes; train it once."""
        if processes not in self._whole:
            lineage = Lineage(self, self.folder / f"whole-{processes}", processes)
            with lineage.started() as running:
                codes = [process.exit_code() for process in running]
                if any(codes):
                    raise RuntimeError(
                        f"the undisturbed run ended with {codes}: {running[0].words()}"
                    )
            self._whole[processes] = lineage
        return self._whole[processes]

    def lineage(self, processes: int = 1) -> Lineage:
        """Return the run to disturb; a new one if the last one is done."""
        self.whole(processes)
        known = self._current.get(processes)
        if known is None or known.done:
            if known is not None:
                self._compare(known)
            home = (
                self.disk if self.disk is not None and processes == 1 else self.folder
            )
            self.started += 1
            self._current[processes] = Lineage(
                self, home / f"run-{self.started}", processes
            )
        return self._current[processes]

    def finish(self) -> None:
        """Train the disturbed runs to their end, and compare them."""
        for lineage in self._current.values():
            with lineage.started() as running:
                codes = [process.exit_code() for process in running]
                if any(codes):
                    self.broken.append(
                        f"a run ended with {codes}: {running[0].words()}"
                    )
            self._compare(lineage)

    def _compare(self, lineage: Lineage) -> None:
        whole = self.whole(lineage.processes)
        self.lost_samples += lost_samples(whole.workdir, lineage.workdir)
        self.differing_bits += differing_bits(whole.workdir, lineage.workdir)
        shutil.rmtree(lineage.workdir)


def losses(workdir: Path) -> dict[int, list[float]]:
    """Losses in the log by step; a step that is logged twice has two."""
    by_step: dict[int, list[float]] = {}
    for record in read_log(workdir / METRICS_FILE):
        if "train/loss" in record:
            by_step.setdefault(record["step"], []).append(record["train/loss"])
    return by_step


def lost_samples(whole: Path, other: Path) -> int:
    """Count the samples of steps whose loss differs, is missing or is logged twice."""
    expected, logged = losses(whole), losses(other)
    steps = expected.keys() | logged.keys()
    return BATCH * sum(expected.get(step) != logged.get(step) for step in steps)


def differing_bits(whole: Path, other: Path) -> int:
    """Count the bits of the last states that differ; the step is one of the arrays."""
    count = 0
    states = [_last_state(path) for path in (whole, other)]
    for a, b in zip(*states, strict=True):
        if a.shape == b.shape and a.dtype == b.dtype:
            count += int(np.bitwise_count(a.view(np.uint8) ^ b.view(np.uint8)).sum())
        else:
            count += 8 * a.nbytes
    return count


def _last_state(workdir: Path) -> list[np.ndarray]:
    config = from_json((workdir / "config.json").read_text())
    config.mesh.data = 1
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        state = open_run(workdir, "latest", None).state
        return [np.atleast_1d(np.asarray(leaf)) for leaf in jax.tree.leaves(state)]


@contextlib.contextmanager
def _coordinator(count: int) -> Iterator[dict[str, str]]:
    """Variables by which the processes of a run find each other."""
    # Another program does not get the port while it is held like this, but the
    # coordinator of JAX does, because it shares ports.
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        yield {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{holder.getsockname()[1]}",
            "JAX_NUM_PROCESSES": str(count),
        }
