"""Stage 2: what the device computes is right.

    python -m benchmarks.gpu.correctness --out OUT [--rehearse]

In this order: attention against float64, the exchange of table rows, a train step of
each shipped config against the CPU's, and a resumed run against an undisturbed one,
whose processes run in the background from the start. A failure does not stop the rest.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import attention_values, config_steps, exchange_check, resume
from benchmarks.gpu.record import Recorder, run_stage

# Seconds of the budget that the parts after attention, and after the steps, need.
AFTER_ATTENTION, AFTER_STEPS = 60, 15


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        resume.Runs(Path(folder), rehearse=recorder.rehearse) as runs,
    ):
        attention_values.compare(recorder, AFTER_ATTENTION)
        with recorder.case(table=exchange_check.TABLE):
            exchange_check.compare(recorder)
        config_steps.compare(recorder, AFTER_STEPS)
        runs.compare(recorder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("correctness", __doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
