"""The runs that `chaos.py` disturbs, and the undisturbed ones that they are compared with."""

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

BATCH, SAVE_EVERY = 16, 5
HANG_SECONDS = 45
PATIENCE = 300  # seconds that a process may take before it counts as hung
ROWS, USERS, ITEMS = 1_500, 40, 30
DEVICES = 2  # of each process
TINY = {
    **{
        "model.width": 4,
        "model.layers": 1,
        "model.windows": "()",
        "tokens.maker": "linear",
        "data.events": 4,
    },
    **{"data.batch_size": BATCH, "data.eval_batch_size": 32, "optim.warmup_steps": 1},
    **{
        "train.save_every": SAVE_EVERY,
        "train.log_every": 1,
        "train.eval_every": 50,
        "train.keep": 3,
    },
    **{"train.hang_seconds": HANG_SECONDS},
}


class Lineage:
    """A run and all that happens to it. `processes` of the run's command are started together."""

    def __init__(self, lab: Lab, workdir: Path, processes: int) -> None:
        self.lab, self.workdir, self.processes = lab, workdir, processes
        self.done = False

    @contextlib.contextmanager
    def started(self) -> Iterator[list[Process]]:
        """The run's processes; none outlives the block."""
        line = self.lab.train_line(self.workdir)
        with contextlib.ExitStack() as stack:
            where: dict[str, str] = {}
            if self.processes > 1:
                line = [*line, "--distributed"]
                where = stack.enter_context(_coordinator(self.processes))
            yield [
                stack.enter_context(
                    Process(
                        self.lab,
                        line,
                        where | ({"JAX_PROCESS_ID": str(i)} if where else {}),
                    )
                )
                for i in range(self.processes)
            ]

    def step(self) -> int:
        """The last step in the log."""
        return max(losses(self.workdir), default=0)

    def checkpoints(self) -> list[Path]:
        found = [
            path for path in self.workdir.glob("checkpoints/*") if path.name.isdecimal()
        ]
        return sorted(found, key=lambda path: int(path.name))

    def saving(self) -> bool:
        return any(
            not path.name.isdecimal() for path in self.workdir.glob("checkpoints/*tmp*")
        )


class Process:
    """A tokenrec command in a process of its own. A context manager: leaving it kills what still runs."""

    def __init__(
        self, lab: Lab, line: Sequence[str], more: dict[str, str] | None = None
    ) -> None:
        lab.started += 1
        self.errors = lab.folder / f"{lab.started}.err"
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tokenrec", *map(str, line)],
                env=lab.environment | (more or {}),
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

    def until(self, seen: Callable[[], bool], nap: float = 0.005) -> bool:
        """Waits until something is seen; False if the process ended before."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(nap)
        return True

    def ended(self) -> int | None:
        """The exit code; None if it hangs."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return None

    def words(self) -> str:
        """The last lines that it said."""
        lines = self.errors.read_text(errors="replace").strip().splitlines()
        own = [line for line in lines if line.startswith("tokenrec: ")]
        return " | ".join(own[-2:] or lines[-3:])


class Lab:
    """A folder with a data set, undisturbed runs of `steps`, and runs of one process and of two that suffer."""

    def __init__(self, folder: Path, chance: random.Random, steps: int) -> None:
        self.folder, self.chance, self.steps = folder, chance, steps
        self.started = 0
        self.lost_samples = self.differing_bits = 0
        self.broken: list[str] = []
        self.data = folder / "data"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("JAX_")
        } | {
            **{
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            },
            **{
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0",
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
        """A disk of 64 MiB; None where this user may not mount one."""
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
        return ["prepare", "synthetic", "--rows", str(ROWS), "--out", str(out)]

    def train_line(
        self, workdir: Path, data: Path | None = None, **fields: object
    ) -> list[str]:
        values = (
            TINY
            | {"optim.steps": self.steps}
            | {name.replace("__", "."): value for name, value in fields.items()}
        )
        line = [
            "train",
            "--config=synthetic",
            "--quiet",
            f"--data={data or self.data}",
            f"--workdir={workdir}",
        ]
        return line + [f"--config.{name}={value}" for name, value in values.items()]

    def run(self, line: Sequence[str]) -> Process:
        """A command that must do its work."""
        with Process(self, line) as process:
            if process.ended() != 0:
                raise RuntimeError(
                    f"{' '.join(map(str, line))}: {process.errors.read_text()}"
                )
        return process

    def whole(self, processes: int) -> Lineage:
        """The undisturbed run."""
        if processes not in self._whole:
            lineage = Lineage(self, self.folder / f"whole-{processes}", processes)
            with lineage.started() as running:
                codes = [process.ended() for process in running]
                if any(codes):
                    raise RuntimeError(
                        f"the undisturbed run ended with {codes}: {running[0].words()}"
                    )
            self._whole[processes] = lineage
        return self._whole[processes]

    def lineage(self, processes: int = 1) -> Lineage:
        """The run to disturb: a new one when the last is done."""
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
        """Lets the runs come to their end, and compares them."""
        for lineage in self._current.values():
            with lineage.started() as running:
                codes = [process.ended() for process in running]
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
    """The losses that the log holds for each step."""
    found: dict[int, list[float]] = {}
    for record in read_log(workdir / METRICS_FILE):
        if "train/loss" in record:
            found.setdefault(record["step"], []).append(record["train/loss"])
    return found


def lost_samples(whole: Path, other: Path) -> int:
    """Samples of steps that are not in the other log once and with the same loss, bit for bit."""
    expected, found = losses(whole), losses(other)
    return BATCH * sum(
        expected.get(step) != found.get(step) for step in expected.keys() | found.keys()
    )


def differing_bits(whole: Path, other: Path) -> int:
    """Of the whole state at the last step; another step counts as all bits."""
    count = 0
    states = [_state(path) for path in (whole, other)]
    for a, b in zip(*states, strict=True):
        same = a.shape == b.shape and a.dtype == b.dtype
        count += (
            int(np.bitwise_count(a.view(np.uint8) ^ b.view(np.uint8)).sum())
            if same
            else 8 * a.nbytes
        )
    return count


def _state(workdir: Path) -> list[np.ndarray]:
    config = from_json((workdir / "config.json").read_text())
    config.mesh.data = 1
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        state = open_run(workdir, "latest", None).state
        return [np.atleast_1d(np.asarray(leaf)) for leaf in jax.tree.leaves(state)]


@contextlib.contextmanager
def _coordinator(count: int) -> Iterator[dict[str, str]]:
    """Where the processes of a run meet. The port is held so that nobody else gets it; JAX's service shares it."""
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        yield {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{holder.getsockname()[1]}",
            "JAX_NUM_PROCESSES": str(count),
        }
