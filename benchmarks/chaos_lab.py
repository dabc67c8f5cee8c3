"""Runs of `chaos.py`: those under faults, and the undisturbed ones for comparison."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from chaos_compare import Differences, progress
from chaos_config import BATCH, ROWS, run_config
from chaos_lineage import Lineage, await_moment, xla_flags
from chaos_process import Failure, Injection, Missed, Process

ROOT = Path(__file__).parents[1]


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
            "XLA_FLAGS": xla_flags(1),
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
        values = run_config(self.steps, processes) | overrides
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
