"""Outcome of a fault of `chaos.py`."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chaos_lab import Lab
from chaos_process import Failure, Missed

# Runs that may reach their end before the moment of a fault.
_TRIES = 5


class Outcome(NamedTuple):
    """Outcome of a fault.

    Attributes:
      ended: "survived", "refused_clearly" or "failed".
      words: what happened, or the last lines of the process.
    """

    ended: str
    words: str


# A fault raises Failure if the run does not do what it must, and Missed to be tried again.
Fault = Callable[[Lab], Outcome]


def survived(words: str = "") -> Outcome:
    """Outcome of a fault after which the run goes on, or resumes."""
    return Outcome("survived", words)


def refused(words: str) -> Outcome:
    """Outcome of a fault that a message names, after which the command ends."""
    return Outcome("refused_clearly", words)


def outcome_of(fault: Fault, lab: Lab) -> Outcome:
    """Inject a fault; whatever goes wrong, in the run or in the lab, is an outcome."""
    lab.begin_fault()
    try:
        for _ in range(_TRIES):
            try:
                return fault(lab)
            except Missed:
                continue
        outcome = Outcome("failed", f"the moment was missed {_TRIES} times")
    except Failure as failure:
        outcome = Outcome("failed", str(failure))
    except Exception as error:  # noqa: BLE001 - the lab's own faults are results, too
        outcome = Outcome("failed", describe(error))
    lab.drop_current()
    return outcome


def describe(error: BaseException) -> str:
    """Where an error was raised, its type and its first line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    text = "".join(traceback.format_exception_only(error)).strip()
    return f"chaos itself: {place}{text.splitlines()[0][:500]}"
