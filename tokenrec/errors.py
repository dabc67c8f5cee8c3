"""Errors that a user can act on, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_INPUT = 2
EXIT_MEMORY = 3
EXIT_BAD_STEPS = 4
EXIT_HUNG = 5
EXIT_PREEMPTED = 75  # sysexits.h: try again


class InputError(ValueError):
    """Wrong input: the message names the field, the value, the reason and the remedy."""


class NonFiniteError(ArithmeticError):
    """A step produced a loss or gradient that is not finite; the message names the step and the batch."""


class Stopped(Exception):
    """A signal asked the run to stop; the message names the step, which is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the known name nearest to `name`, or the list of known names.

    >>> suggest("widht", ["width", "heads"])
    "; did you mean 'width'?"
    >>> suggest("zzz", ["width", "heads"])
    '; known: heads, width'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}"
