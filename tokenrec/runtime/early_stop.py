"""Obey SIGTERM while a run has nothing to save yet.

Until the first step is trained, a signal to stop needs no checkpoint: the process ends
with `EXIT_PREEMPTED`, and a restart does the same again. Its main thread is often in C++
then (imports, joining the other processes, compiling), where Python runs no signal
handler. So a thread waits for the signal. It imports nothing heavy: it must be ready
before the imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

from tokenrec.errors import EXIT_PREEMPTED

# Time to end in an orderly way, between two phases of the start.
GRACE_SECONDS = 5.0

_MESSAGE = (
    b"tokenrec: SIGTERM: stopped before a step was trained; there was nothing to save; "
    b"rerun the command to resume\n"
)


class EarlyStop:
    """End the process on SIGTERM while that loses nothing; for the main thread.

    A later handler of SIGTERM that Python code installs works beside it. The one of
    JAX's preemption service, which is C++, replaces it.

    Attributes:
      received: whether a signal came before another handler was installed.
    """

    def __init__(self) -> None:
        self.received = False
        # Seconds between the signal and the end; None: the process does not end.
        self._grace: float | None = 0.0
        self._grace_changed = threading.Condition()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # C code writes the number of each signal there, whatever the main thread does.
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Without a handler in Python, the default action would end the process.
        signal.signal(signal.SIGTERM, self._record)
        threading.Thread(target=self._watch, name="early stop", daemon=True).start()

    def set_grace(self, seconds: float | None) -> None:
        """Set the time between the signal and the end of the process.

        Args:
          seconds: counts anew for a signal that came already; None: the process does
            not end.
        """
        with self._grace_changed:
            self._grace = seconds
            self._grace_changed.notify_all()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _watch(self) -> None:
        while True:
            if signal.SIGTERM in os.read(self._read, 64):
                self._wait_and_exit()

    def _wait_and_exit(self) -> None:
        with self._grace_changed:
            while (grace := self._grace) is not None:
                if not self._grace_changed.wait(grace):
                    # The reader of stderr may be gone.
                    with contextlib.suppress(OSError):
                        os.write(2, _MESSAGE)
                    # An orderly exit would wait for the main thread.
                    os._exit(EXIT_PREEMPTED)


_current: EarlyStop | None = None


def start() -> None:
    """End this process on SIGTERM from now on; for the start of the command line."""
    global _current
    _current = EarlyStop()


def set_grace(seconds: float | None) -> None:
    """See `EarlyStop.set_grace`; does nothing in processes that did not `start`."""
    if _current is not None:
        _current.set_grace(seconds)


def received() -> bool:
    """See `EarlyStop.received`."""
    return _current is not None and _current.received
