"""Errors that a user can act on, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_INPUT = 2
EXIT_MEMORY = 3
EXIT_BAD_STEPS = 4
EXIT_HUNG = 5
EXIT_STORAGE = 74  # EX_IOERR of sysexits.h: a storage fault that may pass
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: a later attempt may succeed

# Characters of a name that are compared with the known ones.
_LONGEST_NAME = 200


class InputError(ValueError):
    """Wrong input.

    The message names the field, its value, the reason and the remedy.
    """


class StorageError(OSError):
    """A read or write that failed again and again, though nothing is wrong with it.

    The disk, the network or the object store behind the path is at fault, and the same
    command may succeed later. The message names the path and the reason.
    """


class NonFiniteError(ArithmeticError):
    """A training step whose loss or gradient is not finite.

    The message names the step and the log rows of its batch.
    """


class Stopped(Exception):
    """A training run that a signal stopped after it had saved a checkpoint.

    Attributes:
      signal: number of the signal, which decides the exit code.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, else the known names.

    >>> suggest("widht", ["width", "heads"])
    "; did you mean 'width'?"
    >>> suggest("zzz", ["width", "heads"])
    '; known: heads, width'
    """
    candidates = sorted(known)
    # A name of a caller may be of megabytes, which would take seconds to compare.
    closest = difflib.get_close_matches(name[:_LONGEST_NAME], candidates, n=1)
    if closest:
        return f"; did you mean '{closest[0]}'?"
    return f"; known: {', '.join(candidates)}"
