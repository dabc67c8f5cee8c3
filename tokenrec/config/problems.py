"""Problems of a config, collected so that one error reports all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenrec.errors import InputError


class ConfigProblem(NamedTuple):
    """Something wrong in a config.

    Attributes:
      field: field or section without a usable value, which other checks must not read;
        empty if every field has one.
      text: message with field, value, reason and remedy.
    """

    field: str
    text: str


def raise_problems(problems: Sequence[ConfigProblem]) -> None:
    """Raise one InputError with a line for each problem, if there are any."""
    lines = list(dict.fromkeys(problem.text for problem in problems))
    if len(lines) == 1:
        raise InputError(lines[0])
    if lines:
        raise InputError(
            f"the config has {len(lines)} problems:\n  " + "\n  ".join(lines)
        )
