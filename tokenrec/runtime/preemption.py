"""Signals that ask a run to stop: heard at once, obeyed between steps, when the state is whole and can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequested(Exception):
    """Raised where work that takes long is to be left."""


class StopSignals:
    """Hears SIGTERM, by which schedulers announce the end, and Ctrl-C. A context manager: leaving it takes the earlier
    handlers back.

    A second Ctrl-C is a KeyboardInterrupt at once. With several processes JAX hears SIGTERM, of which one is enough,
    and all stop at the same call of `asked`; Ctrl-C ends a process there. In a thread that is not the main one,
    which hears no signal, none is asked.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self._calls = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if (
            jax.process_count() == 1
            and threading.current_thread() is threading.main_thread()
        ):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int | None:
        """The signal to obey now, or None. All processes must call it equally often."""
        self._calls += 1
        told = jax.process_count() > 1 and jax.config.jax_enable_preemption_service
        if told and multihost_utils.reached_preemption_sync_point(self._calls):
            self.heard = int(signal.SIGTERM)
        return self.heard

    def obey(self) -> None:
        """As `asked`; raises Heard instead."""
        if self.asked() is not None:
            raise StopRequested

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.heard is not None:
            raise KeyboardInterrupt
        self.heard = number
