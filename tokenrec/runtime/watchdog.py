"""Says where a run stands when nothing moves any more, and ends it, so that its scheduler can start it again."""

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

FOLDER = "hung"
_LOOKS = 20  # in the time that a phase may take
_LONGEST_NAP = 5.0


class Watchdog:
    """Ends the process with `EXIT_HUNG` if no word of it comes for `seconds`; 0 never. A context manager.

    Before that it writes to stderr where this process stands, the stack of every thread, and where the others stand:
    processes that wait for each other hang together, and leave word in `WORKDIR/hung`. One that left none was stopped,
    or its machine is gone.
    """

    def __init__(
        self, seconds: float, workdir: Path, index: int = 0, count: int = 1
    ) -> None:
        self._seconds, self._folder, self._index, self._count = (
            seconds,
            Path(workdir) / FOLDER,
            index,
            count,
        )
        self._phase, self._since = "start", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._word(self._index).unlink(missing_ok=True)  # of an earlier start
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, phase: str) -> None:
        """Word of life: what the process does now."""
        self._phase, self._since = phase, time.monotonic()

    def hangs(self, now: float) -> bool:
        """Whether the last word is too old at a time of `time.monotonic`."""
        return now - self._since > self._seconds

    def _watch(self) -> None:
        nap = min(self._seconds / _LOOKS, _LONGEST_NAP)
        while not self._over.wait(nap):
            if self.hangs(time.monotonic()):
                self._end(self._phase, time.monotonic() - self._since, nap)

    def _end(self, phase: str, waited: float, nap: float) -> None:
        print(
            f"tokenrec: process {self._index} of {self._count} hangs: {phase}, for {waited:,.0f} s "
            f"(train.hang_seconds={self._seconds:g}); stacks of its threads:",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(sys.stderr)
        try:
            write_json(
                self._word(self._index), {"phase": phase, "seconds": round(waited)}
            )
            if self._count > 1:
                time.sleep(4 * nap)  # for the word of the others, who look as often
                print("\n".join(map(self._told, range(self._count))), file=sys.stderr)
        except OSError as error:
            print(f"tokenrec: '{self._folder}': {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_HUNG)

    def _word(self, index: int) -> Path:
        return self._folder / f"process-{index}.json"

    def _told(self, index: int) -> str:
        try:
            word = json.loads(self._word(index).read_bytes())
        except FileNotFoundError:
            return f"tokenrec: process {index}: no word; it was stopped, its machine is gone, or it does not wait"
        return f"tokenrec: process {index}: {word['phase']}, for {word['seconds']:,} s"
