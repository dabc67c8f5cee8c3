"""Profile some steps of a run with `jax.profiler`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

PROFILE_FOLDER = "profile"


class StepProfiler:
    """Record a trace of the steps `first` to `first + count - 1`.

    The loop calls `before_step` and `after_step` around each step.

    Args:
      folder: where the trace goes; TensorBoard and XProf open it.
      first: first step of the trace.
      count: number of steps; 0 records nothing.
    """

    def __init__(self, folder: Path, first: int, count: int) -> None:
        self._folder = Path(folder)
        self._first = first
        self._count = count
        self._is_recording = False

    def before_step(self, step: int) -> None:
        """Start the trace if `step` is its first one."""
        if self._count and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._is_recording = True

    def after_step(self, step: int, outputs: Any) -> None:
        """Stop the trace if `step` is its last one.

        Args:
          step: the step that was dispatched.
          outputs: arrays that the step computes.
        """
        if self._is_recording and step == self._first + self._count - 1:
            # The devices are behind the host: the trace must hold their work too.
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Stop a trace that is still recorded."""
        if self._is_recording:
            # Before the call: if writing the trace fails, it must not be tried again.
            self._is_recording = False
            jax.profiler.stop_trace()


@contextlib.contextmanager
def profile_steps(workdir: Path, first: int, count: int) -> Iterator[StepProfiler]:
    """Profile a range of steps; the trace is in `WORKDIR/profile`.

    Args:
      workdir: folder of the run.
      first: first step of the trace. Choose one after those that compile.
      count: `train.profile_steps`, number of steps; 0 records nothing.

    Yields:
      The profiler, which the loop calls around each step.
    """
    profiler = StepProfiler(Path(workdir) / PROFILE_FOLDER, first, count)
    try:
        yield profiler
    finally:
        profiler.close()
