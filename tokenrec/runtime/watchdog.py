"""Watchdog: end a run that makes no progress, so that its scheduler can restart it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tokenrec.errors import EXIT_HUNG
from tokenrec.runtime.files import write_json
from tokenrec.runtime.paths import as_path

HUNG_FOLDER = "hung"
# Checks within the time that a phase may take, and the longest time between two.
_CHECKS = 20
_MAX_CHECK_SECONDS = 5.0


class Watchdog:
    """End the process with `EXIT_HUNG` when a phase takes too long; a context manager.

    Before that, the watchdog prints the phase of this process, the stack of every thread
    and the phases of the other processes to stderr. Processes that wait for each other
    hang together, and each of them writes its phase to `WORKDIR/hung`; one that wrote
    none was stopped, or its machine is gone.

    Args:
      seconds: longest time of a phase; 0 never ends the process.
      workdir: folder of the run, which all processes share.
      index: number of this process.
      count: number of processes.
    """

    def __init__(
        self, seconds: float, workdir: Path, index: int = 0, count: int = 1
    ) -> None:
        self._seconds = seconds
        self._folder = as_path(workdir) / HUNG_FOLDER
        self._index = index
        self._count = count
        self._phase = "start"
        self._phase_start = time.monotonic()
        self._finished = threading.Event()
        # A daemon: it must not keep a process alive that ends in another way.
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def __enter__(self) -> Watchdog:
        if self._seconds:
            # A file of an earlier start would be taken for the phase of this one.
            self._phase_file(self._index).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finished.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter_phase(self, phase: str) -> None:
        """Start a new phase; its time begins now.

        Args:
          phase: what the process does now, for the message.
        """
        # No lock: in between, the watchdog sees the earlier time, as before this call.
        self._phase, self._phase_start = phase, time.monotonic()

    def is_hung(self, now: float) -> bool:
        """Whether the phase takes too long at the time `now` of `time.monotonic`."""
        return now - self._phase_start > self._seconds

    def _watch(self) -> None:
        interval = min(self._seconds / _CHECKS, _MAX_CHECK_SECONDS)
        while not self._finished.wait(interval):
            if self.is_hung(time.monotonic()):
                try:
                    self._report(
                        self._phase, time.monotonic() - self._phase_start, interval
                    )
                finally:
                    # Also if stderr cannot be written. An orderly exit would wait for
                    # the thread that hangs.
                    os._exit(EXIT_HUNG)

    def _report(self, phase: str, seconds: float, interval: float) -> None:
        print(
            f"tokenrec: process {self._index} of {self._count} hangs: {phase}, for "
            f"{seconds:,.0f} s (train.hang_seconds={self._seconds:g}); stacks of its "
            "threads:",
            file=sys.stderr,
        )
        # The stacks of all threads; the main thread is the one that waits.
        faulthandler.dump_traceback(sys.stderr)
        try:
            write_json(
                self._phase_file(self._index),
                {"phase": phase, "seconds": round(seconds)},
            )
            if self._count > 1:
                # The other processes check as often, and write their phases meanwhile.
                time.sleep(4 * interval)
                for index in range(self._count):
                    print(self._describe_process(index), file=sys.stderr)
        except OSError as error:
            print(f"tokenrec: '{self._folder}': {error}", file=sys.stderr)
        sys.stderr.flush()

    def _phase_file(self, index: int) -> Path:
        return self._folder / f"process-{index}.json"

    def _describe_process(self, index: int) -> str:
        try:
            report = json.loads(self._phase_file(index).read_bytes())
        except FileNotFoundError:
            return (
                f"tokenrec: process {index}: no report; it was stopped, its machine is "
                "gone, or it does not wait"
            )
        return (
            f"tokenrec: process {index}: {report['phase']}, for {report['seconds']:,} s"
        )
