"""Run the commands of a study in child processes, within its budget of CPU-hours.

One training run of a study is a few commands in a folder of its own:

    describe   parameters and FLOPs of the model  -> figures.json
    train      the training itself                -> run/, then trained.json
    predict    scores of one split                -> SPLIT.parquet
    predict    the same, frozen (`freeze_at`)     -> SPLIT.frozen.parquet

Each is a `tokenrec` command in a process of its own, so that the process of the study
never holds an accelerator. A command whose file exists is not run again, and `train`
resumes from its checkpoint; a study is therefore resumed by running it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tokenrec.config import Config, read_config, to_json
from tokenrec.errors import EXIT_BAD_STEPS, InputError, Stopped
from tokenrec.runtime.files import read_json, write_json, write_text_atomically

TOKENREC = (sys.executable, "-m", "tokenrec")

# Names inside the folder of a training run.
RUN_FOLDER = "run"
DESCRIPTION_FILE = "figures.json"
FROZEN_SUFFIX = ".frozen"
_CONFIG = "config.json"
_TRAINED = "trained.json"
_DIVERGED = "diverged.json"

# Inside the folder of the study.
_BUDGET = "budget.json"


class RunRequest(NamedTuple):
    """A training run of a study, and the outputs that are wanted of it.

    Attributes:
      folder: folder of the run.
      config: config of the run.
      splits: splits whose scores are wanted.
      checkpoint: the checkpoint that is scored, "latest" or "best".
      described: whether the model's parameters and FLOPs are wanted.
      freeze_at: where not empty, frozen scores are wanted too (`predict --freeze-at`).
    """

    folder: Path
    config: Config
    splits: tuple[str, ...]
    checkpoint: str
    described: bool = False
    freeze_at: str = ""


class BudgetSpent(InputError):
    """The CPU-hours of a study are used up; the message says how many runs are left."""


class Budget:
    """CPU-hours that the commands of a study have used, summed over all its starts.

    The sum is kept in a file. Commands that were running when the process of the study
    was killed are not counted.

    Args:
      folder: folder of the study.
      hours: CPU-hours that the study may use.
    """

    def __init__(self, folder: Path, hours: float) -> None:
        self._path = folder / _BUDGET
        self._hours = hours
        self._lock = threading.Lock()
        recorded = {}
        if self._path.is_file():
            recorded = read_json(self._path, "budget", "remove it to count anew")
        self.spent: float = recorded.get("cpu_hours", 0.0)

    def add(self, seconds: float) -> None:
        """Add the CPU time of a finished command."""
        with self._lock:
            self.spent += seconds / 3600
            write_json(self._path, {"cpu_hours": self.spent})

    def check(self, left: int) -> None:
        """Raise BudgetSpent if nothing is left for the `left` unfinished runs."""
        if self.spent >= self._hours:
            raise BudgetSpent(
                f"{self.spent:.2f} CPU-hours are spent of cpu_hours={self._hours:g}, "
                f"and {left} runs are unfinished; raise cpu_hours in the study file "
                "and rerun the command to resume"
            )


def is_done(request: RunRequest) -> bool:
    """Whether all wanted outputs exist; never true of a run that diverged."""
    return not _missing(request)


def diverged(request: RunRequest) -> bool:
    """Whether the training ended with non-finite steps; such a run is not repeated."""
    return (request.folder / _DIVERGED).is_file()


def run_missing(
    requests: Sequence[RunRequest], budget: Budget, side_by_side: int
) -> None:
    """Run the commands whose outputs are missing, and report progress on stderr.

    A run that diverges, for example at too high a learning rate, is left without scores
    and the others continue.

    Args:
      requests: runs of the study.
      budget: CPU-hours of the study; no run begins once they are spent.
      side_by_side: number of runs at a time.

    Raises:
      InputError: a folder holds a run with another config, or a command failed; the
        end of its output is in the message.
      BudgetSpent: the CPU-hours are used up.
      Stopped: a signal arrived. It was passed on to the running commands, which saved
        their state.
    """
    # Before any run begins: a folder of another study is refused as a whole.
    for request in requests:
        _check_config(request)
    unfinished = [
        request
        for request in requests
        if not is_done(request) and not diverged(request)
    ]
    with _ChildProcesses() as children, ThreadPoolExecutor(side_by_side) as pool:
        futures = []
        for number, request in enumerate(unfinished):
            left = len(unfinished) - number
            futures.append(pool.submit(_run_commands, request, budget, children, left))
        try:
            for future in futures:
                future.result()
        except BaseException:
            # Runs that have not begun are dropped; running ones are waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if children.received_signal is not None:
        raise Stopped(
            "the study was stopped; rerun the command to resume",
            children.received_signal,
        )


def _run_commands(
    request: RunRequest, budget: Budget, children: _ChildProcesses, left: int
) -> None:
    """Run the missing commands of one run, in order; `left` counts unfinished runs."""
    if children.received_signal is not None:
        return
    budget.check(left)
    folder = request.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / _CONFIG, to_json(request.config))
    print(f"study: {folder}, {left} runs left", file=sys.stderr)
    for name in _missing(request):
        log = folder / f"{name}.log"
        code = children.run(_arguments(request, name), log, budget)
        # Non-finite steps are a result of the search, not a failure of the study.
        if code == EXIT_BAD_STEPS and name == "train":
            write_json(folder / _DIVERGED, {"config": _CONFIG, "code": code})
            print(
                f"study: {folder} diverged, see train.log there; the others continue",
                file=sys.stderr,
            )
            return
        # A command that was told to stop ends with a code too.
        if code and children.received_signal is None:
            output = log.read_text(errors="replace").strip()
            raise InputError(
                f"{folder}: {name} ended with code {code}: {output[-1_000:]}"
            )
        if code:
            return
        # The run's folder exists from the first step on; only this file says that the
        # training is complete.
        if name == "train":
            write_json(folder / _TRAINED, {"config": _CONFIG})


def _check_config(request: RunRequest) -> None:
    """Refuse a folder that holds a run with other settings."""
    path = request.folder / _CONFIG
    if path.is_file() and read_config(path) != request.config:
        raise InputError(
            f"'{path}' is of other settings than the study has now; give another "
            "--out, or move the folder away"
        )


def _missing(request: RunRequest) -> list[str]:
    """Names of commands without output: "describe", "train", each split, frozen too."""
    outputs = {"describe": DESCRIPTION_FILE} if request.described else {}
    outputs["train"] = _TRAINED
    outputs |= {split: f"{split}.parquet" for split in request.splits}
    if request.freeze_at:
        frozen = [split + FROZEN_SUFFIX for split in request.splits]
        outputs |= {name: f"{name}.parquet" for name in frozen}
    return [
        name for name, file in outputs.items() if not (request.folder / file).is_file()
    ]


def _arguments(request: RunRequest, name: str) -> list[str]:
    """Arguments of `tokenrec` for the command `name` of `_missing`."""
    folder = request.folder
    workdir = f"--workdir={folder / RUN_FOLDER}"
    config = f"--config={folder / _CONFIG}"
    if name == "describe":
        return ["describe", config, f"--json={folder / DESCRIPTION_FILE}"]
    if name == "train":
        return ["train", config, workdir, "--quiet"]
    split = name.removesuffix(FROZEN_SUFFIX)
    frozen = [] if split == name else [f"--freeze-at={request.freeze_at}"]
    return [
        "predict",
        workdir,
        f"--split={split}",
        f"--checkpoint={request.checkpoint}",
        f"--out={folder / name}.parquet",
        *frozen,
    ]


class _ChildProcesses(contextlib.AbstractContextManager["_ChildProcesses"]):
    """The running commands. SIGTERM and Ctrl-C are passed on to all of them.

    Attributes:
      received_signal: number of the signal that arrived; None before.
    """

    def __init__(self) -> None:
        self.received_signal: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> _ChildProcesses:
        # Python lets the main thread alone set signal handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, arguments: Sequence[str], log: Path, budget: Budget) -> int:
        """Run one command to its end.

        Args:
          arguments: arguments of `tokenrec`.
          log: file for its output.
          budget: is charged with its CPU time.

        Returns:
          Its exit code.
        """
        with log.open("w") as output:
            # A session of its own: otherwise Ctrl-C would reach the child twice, from
            # the terminal and from `_forward`.
            child = subprocess.Popen(
                [*TOKENREC, *arguments],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        with self._registered(child):
            # wait4 reports the CPU time of this child alone, threads included.
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        budget.add(usage.ru_utime + usage.ru_stime)
        return child.returncode

    @contextlib.contextmanager
    def _registered(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        self._running.add(child)
        # The signal may have arrived between the start of the child and this line.
        if self.received_signal is not None:
            child.send_signal(signal.SIGTERM)
        try:
            yield
        finally:
            self._running.discard(child)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received_signal = number
        # A copy: other threads change the set while this handler runs.
        for child in list(self._running):
            child.send_signal(signal.SIGTERM)
