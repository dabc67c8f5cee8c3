"""Processes of `chaos.py`: a tokenrec command, what it says, and a fault inside of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tokenrec.errors import EXIT_INPUT

if TYPE_CHECKING:
    from chaos_lab import Lab

# A process that takes longer counts as hung; the watchdog must end it before that.
LIMIT_SECONDS = 300
# Messages of a run that is well.
_USUAL = ("; the update was not made; ",)


class Failure(Exception):
    """A run did not do what it must after a fault; the text says what it did."""


class Missed(Exception):
    """A run reached its end before the moment of the fault, which is tried again."""


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
