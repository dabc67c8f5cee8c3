"""Report the first problem of a pass, whichever worker met it.

A problem is ((step, number of the part or partition), message), and the least is the
first one. It travels through the pipeline as data: Beam retries a worker that raises an
exception, and returns the exception as text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tokenrec.data.beam.engine import beam_library
from tokenrec.data.beam.shared_files import load_records, save_scan_result
from tokenrec.errors import InputError


def save_first_problem(problems: Sequence[Any], work: str) -> None:
    """Add the steps that save the first problem of a pass for `raise_first_problem`.

    Args:
      problems: collections of problems.
      work: folder that all workers see.
    """
    beam = beam_library()
    _ = (
        problems
        | "All problems" >> beam.Flatten()
        | "First problem"
        >> beam.CombineGlobally(functools.partial(min, default=None)).without_defaults()
        | "Save problem" >> beam.Map(save_scan_result, work, "problem")
    )


def raise_first_problem(work: str) -> None:
    """Raise an InputError with the problem that a pass saved in `work`, if any."""
    for _, message in load_records(work, "scan/problem"):
        raise InputError(message)
