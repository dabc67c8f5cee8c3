"""Stop a run on SIGTERM or Ctrl-C between two steps, when its state can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from tokenrec.runtime import early_stop


class StopRequested(Exception):
    """Leave long work, such as an evaluation, because the run shall stop."""


class StopSignals:
    """Record SIGTERM, which schedulers send before they end a job, and Ctrl-C.

    A context manager: leaving it restores the earlier signal handlers.

    - One process: the first signal is recorded, and a second Ctrl-C raises
      KeyboardInterrupt at once.
    - Several processes: JAX records a SIGTERM that any of them gets, and all of them
      stop at the same call of `requested`. Ctrl-C ends the process that gets it.
    - Python delivers signals to the main thread only, so in another thread of a single
      process nothing is recorded.
    - On the command line a run of one process that has nothing to save does not wait
      for the end of a step; `early_stop` ends it.

    Attributes:
      signal_received: number of the signal; None before one is known here.
    """

    def __init__(self) -> None:
        self.signal_received: int | None = None
        self._calls = 0
        self._earlier_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and in_main_thread:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._earlier_handlers[number] = signal.signal(number, self._record)
            early_stop.set_grace(early_stop.GRACE_SECONDS)
            if early_stop.received():
                self.signal_received = int(signal.SIGTERM)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        early_stop.set_grace(None)
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)

    def begin_steps(self) -> None:
        """The run has something to save from now on: a signal is only recorded."""
        early_stop.set_grace(None)

    @contextlib.contextmanager
    def nothing_to_save(self, is_so: bool = True) -> Iterator[None]:
        """Let SIGTERM end the process soon while the block runs, such as a compilation.

        Args:
          is_so: False changes nothing.
        """
        if is_so:
            early_stop.set_grace(early_stop.GRACE_SECONDS)
        try:
            yield
        finally:
            early_stop.set_grace(None)

    def requested(self) -> int | None:
        """Return the signal that stops the run now, or None.

        All processes must call it equally often: JAX agrees on a call number.
        """
        self._calls += 1
        shared = jax.process_count() > 1 and jax.config.jax_enable_preemption_service
        # JAX returns True on all processes at the same call number.
        if shared and multihost_utils.reached_preemption_sync_point(self._calls):
            self.signal_received = int(signal.SIGTERM)
        return self.signal_received

    def raise_if_requested(self) -> None:
        """Raise StopRequested if `requested` returns a signal."""
        if self.requested() is not None:
            raise StopRequested

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_received is not None:
            # The first Ctrl-C waits for the end of a step, which may never come.
            raise KeyboardInterrupt
        self.signal_received = number
