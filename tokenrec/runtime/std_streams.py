"""Standard streams that lose text rather than end the program.

A training run prints for weeks. The reader of its output may die before it (`| head`, a
log collector, a closed terminal), and the disk that a log is redirected to may fill up.
Neither is a reason to lose the run.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Buffer
from typing import Any, TextIO

# Errors after which later text may find room again.
_PASSING_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_STREAMS = {"stdout": 1, "stderr": 2}


def protect() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams that never raise an OSError.

    A stream that is closed writes to /dev/null: otherwise the next file that the program
    opens would get the number of the stream, and with it what C++ libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _redirect_to_null(number)
    for name, number in _STREAMS.items():
        stream = _protected(getattr(sys, name), number)
        setattr(sys, name, stream)
        # Python flushes only the first of the two when it exits.
        setattr(sys, f"__{name}__", stream)


def lost_output() -> int | None:
    """Flush `sys.stdout`; return the error number by which text was lost, or None.

    A reader that went away, as in `| head`, has what it wanted: that is no loss.
    """
    stream = sys.stdout
    stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    lost = raw.lost if isinstance(raw, _LossyFile) else None
    return None if lost == errno.EPIPE else lost


class _LossyFile(io.FileIO):
    """A file whose writes drop what cannot be written.

    It is the lowest layer of a text stream, so that `print`, `logging`, tqdm and the
    flush at the exit of Python all go through it.

    Attributes:
      lost: number of the first error by which text was lost; None if there was none.
    """

    # Not the error itself: its traceback would keep the arrays of its callers alive.
    lost: int | None = None

    def write(self, data: Buffer, /) -> int:
        """Write all of `data`, or drop the rest of it; return its length."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:
                    # A full pipe that another program made non-blocking.
                    select.select([], [self.fileno()], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self.lost = self.lost or error.errno
            if error.errno not in _PASSING_ERRNOS:
                # For C++ libraries and child processes, which write to the number.
                _redirect_to_null(self.fileno())
        return size


def _protected(stream: TextIO | None, number: int) -> io.TextIOWrapper:
    raw = _LossyFile(number, "w", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    with contextlib.suppress(OSError):
        stream.flush()
    # With `python -u` there is no buffer between the text and the file.
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _redirect_to_null(number: int) -> None:
    # Without a free file number the stream stays as it is, and loses text again.
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        if null == number:
            os.set_inheritable(null, True)
        else:
            os.dup2(null, number)
            os.close(null)
