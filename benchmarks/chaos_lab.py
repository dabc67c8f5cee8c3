"""Runs of `chaos.py`: those under faults, and the undisturbed ones for comparison."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos_compare import Differences, last_step, progress, step_time

from tokenrec.checkpoint.integrity import is_verified
from tokenrec.errors import EXIT_INPUT

BATCH = 16
# Log rows of the data set.
ROWS = 1_500
# Files above this size are read in pieces, by us and by the libraries.
LARGE_FILE = 1 << 16
# Devices of each process, by the number of processes.
DEVICES = {1: 2, 2: 2, 4: 1}
# Runs of several processes are slower, and have fewer steps.
SHARES_OF_STEPS = {1: 1, 2: 2, 4: 3}
FEWEST_STEPS = 60
# A process that takes longer counts as hung; the watchdog must end it before that.
LIMIT_SECONDS = 300
HANG_SECONDS = 45
# Small, but with a file of weights above LARGE_FILE. Steps are skipped as spikes, and the
# best evaluation is not the last one.
TINY: dict[str, Any] = {
    "model.width": 32,
    "model.heads": 2,
    "model.layers": 1,
    "model.windows": "()",
    "tokens.maker": "linear",
    "tokens.embedding_dim": 8,
    "data.paradigm": "nio",
    "data.overlap": 0,
    "data.events": 4,
    "data.batch_size": BATCH,
    "data.eval_batch_size": 32,
    "optim.warmup_steps": 1,
    "optim.table_learning_rate": 0.05,
    "optim.spike_norm": 1.05,
    "optim.max_skipped": 1_000_000,
    "train.save_every": 5,
    "train.log_every": 1,
    "train.keep": 3,
    "train.hang_seconds": HANG_SECONDS,
}
# Evaluations of a run, and `train.patience`.
EVALUATIONS = 12
PATIENCE = 10
ROOT = Path(__file__).parents[1]
# Messages of a run that is well.
_USUAL = ("; the update was not made; ",)


class Failure(Exception):
    """A run did not do what it must after a fault; the text says what it did."""


class Missed(Exception):
    """A run reached its end before the moment of the fault, which is tried again."""


class Lineage:
    """A run from its first start to its end, with all faults in between.

    Args:
      lab: the lab that owns the run.
      workdir: folder of the run.
      processes: number of processes that train it together.

    Attributes:
      done: whether the run has reached its last step.
      damaged: checkpoint that the next start must not use; None if all are intact.
    """

    def __init__(self, lab: Lab, workdir: Path, processes: int) -> None:
        self.lab = lab
        self.workdir = workdir
        self.processes = processes
        self.done = False
        self.damaged: Path | None = None

    @contextlib.contextmanager
    def started(
        self,
        variables: Mapping[str, str] | None = None,
        *,
        pipe: bool = False,
        **fields: Any,
    ) -> Iterator[list[Process]]:
        """Start the run's processes; the end of the block kills them.

        Args:
          variables: further environment variables of all processes.
          pipe: see `Process`.
          fields: further config fields, with "__" for ".".

        Raises:
          Failure: the run did not resume from its latest intact checkpoint.
        """
        usable = [path for path in self.checkpoints() if path != self.damaged]
        newest = int(usable[-1].name) if usable else 0
        logged_at = step_time(self.workdir, newest)
        line = self.lab.train_line(self.workdir, None, self.processes, **fields)
        if pipe:
            line.remove("--quiet")
        with contextlib.ExitStack() as stack:
            environment = {"XLA_FLAGS": _xla_flags(self.processes), **(variables or {})}
            if self.processes > 1:
                line = [*line, "--distributed"]
                environment |= stack.enter_context(_coordinator(self.processes))
            running = []
            for index in range(self.processes):
                if self.processes > 1:
                    environment = environment | {"JAX_PROCESS_ID": str(index)}
                process = Process(self.lab, line, environment, pipe=pipe)
                running.append(stack.enter_context(process))
            yield running
        # Steps that are trained again give the same values, and another time.
        if step_time(self.workdir, newest) != logged_at:
            raise Failure(
                f"it did not resume from checkpoint {newest}, but trained its steps "
                f"again: {running[0].words()}"
            )
        self.damaged = None

    def step(self) -> int:
        """Last step in the log."""
        return last_step(self.workdir)

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

    def set_aside(self) -> list[str]:
        """Names of the checkpoints that were set aside as damaged."""
        return sorted(path.name for path in self.workdir.glob("checkpoints/damaged-*"))

    def is_rested(self) -> bool:
        """Whether the latest checkpoint is verified, and there is another one."""
        checkpoints = self.checkpoints()
        return len(checkpoints) > 1 and is_verified(checkpoints[-1])


class Process:
    """A tokenrec command in a process of its own; leaving the context kills it.

    Args:
      lab: the lab, which has the environment of all processes.
      line: arguments of the command.
      variables: further environment variables.
      pipe: give it a pipe as stdout and stderr, which nobody reads; see `close_pipe`.
    """

    def __init__(
        self,
        lab: Lab,
        line: Sequence[str],
        variables: Mapping[str, str] | None = None,
        *,
        pipe: bool = False,
    ) -> None:
        lab.started += 1
        self.errors = lab.folder / f"{lab.started}.err"
        with self.errors.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tokenrec", *map(str, line)],
                env=lab.environment | dict(variables or {}),
                stdout=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stderr=subprocess.STDOUT if pipe else errors,
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
        self.close_pipe()

    def close_pipe(self) -> None:
        """Close the reader's end of the pipe."""
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def send(self, number: int) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def wait_until(
        self, condition: Callable[[], bool], interval: float = 0.005
    ) -> bool:
        """Wait until a condition holds; return False if the process ends before.

        Args:
          condition: checked again and again.
          interval: seconds between two checks.
        """
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(interval)
        return True

    def exit_code(self) -> int | None:
        """Wait for the exit code; None if the process hangs."""
        try:
            return self.popen.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        """What it has written to stderr."""
        return self.errors.read_text(errors="replace")

    def words(self) -> str:
        """Last lines on stderr: messages of tokenrec, or any lines without these."""
        lines = [
            line
            for line in self.output().strip().splitlines()
            if not any(usual in line for usual in _USUAL)
        ]
        messages = [line for line in lines if line.startswith("tokenrec: ")]
        return " | ".join(messages[-2:] or lines[-3:])

    def refusal(self, *texts: str) -> str:
        """Wait for the end, which must be a refusal in one clear message.

        Args:
          texts: what the message must contain.

        Returns:
          The message.

        Raises:
          Failure: it is no refusal, or not a clear one.
        """
        code, words = self.exit_code(), self.words()
        if code != EXIT_INPUT:
            raise Failure(f"exit code {code}, not {EXIT_INPUT}: {words}")
        missing = [text for text in texts if text not in words]
        if missing:
            raise Failure(f"{missing} is not in its message: {words}")
        if "Traceback" in self.output():
            raise Failure(f"a traceback beside its message: {words}")
        return words


class Lab:
    """A folder with a data set, the undisturbed runs, and the runs under faults.

    Args:
      folder: an empty folder.
      chance: the generator of all draws.
      steps: number of steps of a run of one process.
      kept: folder that gets the runs and the output of failed faults; None keeps none.

    Attributes:
      started: number of processes and runs started so far, for unique names.
      differences: differences of the runs under faults from the undisturbed ones.
      broken: messages of runs that could not be finished or compared.
      disk: a small file system; None if it cannot be mounted.
      data: folder of the data set.
      environment: environment of all processes.
    """

    def __init__(
        self,
        folder: Path,
        chance: random.Random,
        steps: int,
        kept: Path | None = None,
    ) -> None:
        self.folder = folder
        self.chance = chance
        self.steps = steps
        self.started = 0
        self.differences = Differences()
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
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": _xla_flags(1),
        }
        self.disk: Path | None = None
        self._kept = kept
        self._first_of_fault = 0
        self._whole: dict[int, Lineage] = {}
        self._no_whole: dict[int, str] = {}
        self._current: dict[int, Lineage] = {}

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
            # A process that was just killed may still hold it.
            subprocess.run(["umount", "--lazy", self.disk], check=False)

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

    def steps_of(self, processes: int) -> int:
        """Steps of a run with this number of processes."""
        return max(FEWEST_STEPS, self.steps // SHARES_OF_STEPS[processes])

    def train_line(
        self,
        workdir: Path,
        data: Path | None = None,
        processes: int = 1,
        **fields: Any,
    ) -> list[str]:
        """Command line of a training run.

        Args:
          workdir: folder of the run.
          data: folder of the data set; None for that of the lab.
          processes: number of processes that train it together.
          fields: further config fields, with "__" for ".".
        """
        overrides = {name.replace("__", "."): value for name, value in fields.items()}
        values = {
            **TINY,
            "optim.steps": self.steps_of(processes),
            "train.eval_every": self.steps_of(processes) // EVALUATIONS,
            "train.patience": PATIENCE,
            **overrides,
        }
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
            code = process.exit_code()
            if code != 0:
                raise Failure(f"'{line[0]}' ended with {code}: {process.words()}")
        return process

    def new_path(self, name: str) -> Path:
        """Path that does not exist yet."""
        self.started += 1
        return self.folder / f"{name}-{self.started}"

    @contextlib.contextmanager
    def injected(self, event: str, match: str, **settings: Any) -> Iterator[Injection]:
        """Prepare a fault inside of a process; the end of the block lets it go on.

        Args:
          event: see `chaos_injection/sitecustomize.py`, like the others.
          match: see there.
          settings: `skip`, `times`, `errno` and `hold`.
        """
        report, release = self.new_path("report"), self.new_path("release")
        fault = {"event": event, "match": match, "skip": 0, "times": 1}
        fault |= {"errno": 0, "hold": 0, "report": str(report), "release": str(release)}
        folder = Path(__file__).with_name("chaos_injection")
        variables = {
            "CHAOS_FAULT": json.dumps(fault | settings),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        }
        try:
            yield Injection(variables, report, release)
        finally:
            release.touch()

    def whole(self, processes: int) -> Lineage:
        """Return the undisturbed run with this number of processes; train it once.

        Raises:
          Failure: it does not reach its end, now or when it was tried first.
        """
        if processes in self._no_whole:
            raise Failure(self._no_whole[processes])
        if processes not in self._whole:
            try:
                self._whole[processes] = self._train_whole(processes)
            except Failure as failure:
                self._no_whole[processes] = str(failure)
                raise
        return self._whole[processes]

    def _train_whole(self, processes: int) -> Lineage:
        lineage = Lineage(self, self.folder / f"whole-{processes}", processes)
        with lineage.started() as running:
            codes = [process.exit_code() for process in running]
            if any(codes):
                raise Failure(
                    f"the undisturbed run ended with {codes}: {running[0].words()}"
                )
        reached = progress(lineage.workdir)
        if not (reached.skipped and reached.waited and reached.best_step > 0):
            raise Failure(
                f"the undisturbed run ended with {reached}: it must skip steps, and "
                "have its best evaluation before the last one"
            )
        return lineage

    def whole_runs(self) -> dict[int, Lineage]:
        """The undisturbed runs that are trained, by number of processes."""
        return dict(self._whole)

    def lineage(self, processes: int = 1) -> Lineage:
        """Return the run to disturb; a new one if the last one is done."""
        self.whole(processes)
        known = self._current.get(processes)
        if known is not None and known.done:
            del self._current[processes]
            self._compare(known)
            known = None
        if known is None:
            home = (
                self.disk if self.disk is not None and processes == 1 else self.folder
            )
            self.started += 1
            known = Lineage(self, home / f"run-{self.started}", processes)
            self._current[processes] = known
        return known

    def rested(self, processes: int = 1) -> Lineage:
        """Return a run whose latest checkpoint is verified, with another one before it.

        Raises:
          Missed: it has reached its end.
        """
        lineage = self.lineage(processes)
        if not lineage.is_rested():
            with lineage.started() as running:
                await_moment(lineage, running[0], lineage.is_rested)
                for process in running:
                    process.send(signal.SIGTERM)
                codes = [process.exit_code() for process in running]
                lineage.done = not any(codes)
                words = running[0].words()
            if lineage.done:
                raise Missed
            if not lineage.is_rested():
                raise Failure(f"no checkpoint after SIGTERM ({codes}): {words}")
        return lineage

    def begin_fault(self) -> None:
        """Note where the output of the next fault begins."""
        self._first_of_fault = self.started

    def drop_current(self) -> None:
        """Give up the runs under faults after a failure: it must not cause others."""
        for lineage in self._current.values():
            if self._kept is not None and lineage.workdir.exists():
                shutil.copytree(
                    lineage.workdir,
                    self._kept / lineage.workdir.name,
                    dirs_exist_ok=True,
                )
            shutil.rmtree(lineage.workdir, ignore_errors=True)
        self._current.clear()
        if self._kept is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
            for number in range(self._first_of_fault, self.started + 1):
                errors = self.folder / f"{number}.err"
                if errors.exists():
                    shutil.copy(errors, self._kept)

    def finish(self) -> None:
        """Train the disturbed runs to their end, and compare them."""
        for lineage in list(self._current.values()):
            with lineage.started() as running:
                codes = [process.exit_code() for process in running]
                words = running[0].words()
            if any(codes):
                self.broken.append(f"a run ended with {codes}: {words}")
                continue
            try:
                self._compare(lineage)
            except Exception as error:  # noqa: BLE001 - a result like others
                self.broken.append(f"a run cannot be compared: {error}")
        self._current.clear()

    def _compare(self, lineage: Lineage) -> None:
        whole = self.whole(lineage.processes)
        self.differences.compare(whole.workdir, lineage.workdir, BATCH)
        shutil.rmtree(lineage.workdir)


def await_moment(
    lineage: Lineage,
    process: Process,
    condition: Callable[[], bool],
    interval: float = 0.005,
) -> None:
    """Wait for the moment of a fault.

    Args:
      lineage: the run to disturb.
      process: a process of the run.
      condition: whether the moment has come.
      interval: seconds between two checks.

    Raises:
      Missed: the run reached its end first.
      Failure: the process ended in another way.
    """
    if process.wait_until(condition, interval):
        return
    code = process.popen.poll()
    lineage.done = code == 0
    if lineage.done:
        raise Missed
    raise Failure(f"it ended with {code} before the fault: {process.words()}")


class Injection:
    """A fault inside of a process.

    Attributes:
      variables: environment variables of the process.
    """

    def __init__(self, variables: dict[str, str], report: Path, release: Path) -> None:
        self.variables = variables
        self._report = report
        self._release = release

    def reached(self) -> bool:
        """Whether the process has met the fault."""
        return self._report.exists()

    def events(self) -> str:
        """What was disturbed, without the first part of the paths."""
        if not self.reached():
            return ""
        lines = self._report.read_text().splitlines()
        return f"{lines[0]} ({len(lines)})" if lines else ""

    def release(self) -> None:
        """Let a process go on that the fault holds."""
        self._release.touch()


def _xla_flags(processes: int) -> str:
    return (
        f"--xla_force_host_platform_device_count={DEVICES[processes]} "
        "--xla_backend_optimization_level=0"
    )


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
