"""The runs of a study: each is `tokenrec train`, `predict` and `describe` in processes of their own, so that this one
never takes the accelerator.

A command that was stopped goes on where it was when the study is started again, and what is done is only read.
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
RUN, FIGURES_FILE = "run", "figures.json"
_CONFIG, _TRAINED, _DIVERGED, _BUDGET = (
    "config.json",
    "trained.json",
    "diverged.json",
    "budget.json",
)


class RunRequest(NamedTuple):
    """A run's folder, its config, the splits whose scores are wanted, and whether its figures are."""

    folder: Path
    config: Config
    splits: tuple[str, ...]
    checkpoint: str
    described: bool = False


class BudgetSpent(InputError):
    """The CPU-hours are used up; the message says how far the study came."""


class Budget:
    """CPU-hours of a study's commands over all its starts, in a file. Those of a command that was running when this
    process was killed are not known.
    """

    def __init__(self, folder: Path, hours: float) -> None:
        self._path, self._hours, self._lock = folder / _BUDGET, hours, threading.Lock()
        known = (
            read_json(self._path, "budget", "remove it to count anew")
            if self._path.is_file()
            else {}
        )
        self.spent: float = known.get("cpu_hours", 0.0)

    def add(self, seconds: float) -> None:
        with self._lock:
            self.spent += seconds / 3600
            write_json(self._path, {"cpu_hours": self.spent})

    def check(self, left: int) -> None:
        """Raises Spent if nothing is left for the `left` runs that are not done."""
        if self.spent >= self._hours:
            raise BudgetSpent(
                f"{self.spent:.2f} CPU-hours are spent of cpu_hours={self._hours:g}, and {left} runs are not done; "
                "raise it in the study's file and start the study again, which goes on"
            )


def is_done(task: RunRequest) -> bool:
    """Whether what the task wants is there; never of a run that diverged."""
    return not _missing(task)


def diverged(task: RunRequest) -> bool:
    """Whether its training ended with steps that are not finite. It has no scores, and is not tried again."""
    return (task.folder / _DIVERGED).is_file()


def finish(tasks: Sequence[RunRequest], budget: Budget, side_by_side: int) -> None:
    """Runs what is not done, `side_by_side` runs at a time, and says so on stderr. A run whose steps are not finite, as
    one of too high a learning rate, is left without scores, and the others go on.

    Raises:
      InputError: a folder holds a run with another config, or a command failed; its last words are in the message.
      Spent: the budget is used up; nothing was begun after that.
      Stopped: a signal came; the commands that ran were told, and saved what they had.
    """
    for task in tasks:
        _check(task)
    left = [task for task in tasks if not is_done(task) and not diverged(task)]
    with _Children() as children, ThreadPoolExecutor(side_by_side) as pool:
        made = []
        for number, task in enumerate(left):
            made.append(
                pool.submit(_finish, task, budget, children, len(left) - number)
            )
        try:
            for future in made:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if children.heard is not None:
        raise Stopped("the study was stopped; the same command goes on", children.heard)


def _finish(task: RunRequest, budget: Budget, children: _Children, left: int) -> None:
    if children.heard is not None:
        return
    budget.check(left)
    task.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(task.folder / _CONFIG, to_json(task.config))
    print(f"study: {task.folder}, {left} to do", file=sys.stderr)
    for what in _missing(task):
        ended = children.run(_line(task, what), task.folder / f"{what}.log", budget)
        if ended == EXIT_BAD_STEPS and what == "train":
            write_json(task.folder / _DIVERGED, {"config": _CONFIG, "code": ended})
            print(
                f"study: {task.folder} diverged, see train.log there; the others go on",
                file=sys.stderr,
            )
            return
        if ended and children.heard is None:
            words = (task.folder / f"{what}.log").read_text(errors="replace").strip()
            raise InputError(
                f"{task.folder}: {what} ended with code {ended}: {words[-1_000:]}"
            )
        if ended:
            return
        if what == "train":
            write_json(task.folder / _TRAINED, {"config": _CONFIG})


def _check(task: RunRequest) -> None:
    path = task.folder / _CONFIG
    if path.is_file() and read_config(path) != task.config:
        raise InputError(
            f"'{path}' is of other settings than the study's now; give another --out, or move it away"
        )


def _missing(task: RunRequest) -> list[str]:
    """Commands to make: "describe", "train", and a split for each whose scores are not there."""
    files = {"describe": FIGURES_FILE} if task.described else {}
    files |= {"train": _TRAINED} | {split: f"{split}.parquet" for split in task.splits}
    return [what for what, file in files.items() if not (task.folder / file).is_file()]


def _line(task: RunRequest, what: str) -> list[str]:
    run, config = f"--workdir={task.folder / RUN}", f"--config={task.folder / _CONFIG}"
    if what == "describe":
        return ["describe", config, f"--json={task.folder / FIGURES_FILE}"]
    if what == "train":
        return ["train", config, run, "--quiet"]
    return [
        "predict",
        run,
        f"--split={what}",
        f"--checkpoint={task.checkpoint}",
        f"--out={task.folder / what}.parquet",
    ]


class _Children(contextlib.AbstractContextManager["_Children"]):
    """Processes of this one's commands. SIGTERM and Ctrl-C are passed on to them; leaving it leaves none behind."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self._running: set[subprocess.Popen[bytes]] = set()
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Children:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, line: Sequence[str], log: Path, budget: Budget) -> int:
        """The command's exit code; its words go to `log`."""
        with log.open("w") as words:
            # A group of its own, so that a Ctrl-C reaches it once, through us.
            child = subprocess.Popen(
                [*TOKENREC, *line],
                stdout=words,
                stderr=words,
                start_new_session=True,
            )
        with self._known(child):
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        budget.add(usage.ru_utime + usage.ru_stime)
        return child.returncode

    @contextlib.contextmanager
    def _known(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        self._running.add(child)
        if self.heard is not None:  # it came before the child was known
            child.send_signal(signal.SIGTERM)
        try:
            yield
        finally:
            self._running.discard(child)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        for child in list(self._running):
            child.send_signal(signal.SIGTERM)
