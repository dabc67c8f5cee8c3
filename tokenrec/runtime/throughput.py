"""Training speed: examples per second and seconds per step, without other work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class Throughput:
    """Measure examples per second of training time.

    Work that is not training (evaluation, saving, and steps that compile) runs inside
    `with throughput.excluded():`, and its examples are not added.

    Args:
      clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # Start of the current interval, moved forward by all time that is excluded.
        self._interval_start = clock()
        self._interval_examples = 0
        self._interval_steps = 0
        self._total_examples = 0
        self._total_steps = 0
        self._total_seconds = 0.0

    def add(self, examples: int) -> None:
        """Add one step of `examples` examples, made since the last call of `rate`."""
        self._interval_examples += examples
        self._interval_steps += 1

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time that is spent inside."""
        start = self._clock()
        try:
            yield
        finally:
            # Also after an error: the caller may go on, as after a stopped evaluation.
            self._interval_start += self._clock() - start

    def rate(self) -> float | None:
        """Examples per second since the last call; None if no time passed.

        Call it when the host has waited for the devices: steps are dispatched
        asynchronously, so the clock means nothing before that.
        """
        now = self._clock()
        seconds, examples = now - self._interval_start, self._interval_examples
        self._total_seconds += seconds
        self._total_examples += examples
        self._total_steps += self._interval_steps
        self._interval_start = now
        self._interval_examples = 0
        self._interval_steps = 0
        return examples / seconds if seconds > 0 else None

    def average(self) -> float | None:
        """Examples per second over all calls of `rate`; None if no time passed."""
        if self._total_seconds <= 0:
            return None
        return self._total_examples / self._total_seconds

    @property
    def training_seconds(self) -> float:
        """Training time up to the last call of `rate`."""
        return self._total_seconds

    def seconds_per_step(self) -> float | None:
        """Mean over all calls of `rate`; None before the first step that is timed."""
        # Steps that compile are not added, so this can be long after the first one.
        if not self._total_steps:
            return None
        return self._total_seconds / self._total_steps
