"""Messages and exit codes of errors that a user can act on."""

from __future__ import annotations

import errno
import os
import signal

from tokenrec.errors import (
    EXIT_BAD_STEPS,
    EXIT_INPUT,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    EXIT_STORAGE,
    InputError,
    NonFiniteError,
    Stopped,
    StorageError,
)
from tokenrec.runtime.limits import open_file_limit, open_files_reached
from tokenrec.runtime.retry import TRANSIENT_ERRNOS, is_fault_of_object_store

# 128 + SIGINT, as a shell reports it.
EXIT_INTERRUPTED = 130

# Errors of the user's disk, paths or limits, which are reported without a traceback, with
# the remedy.
_REMEDIES = {
    errno.ENOSPC: "free disk space, or inodes (`df -i`), and rerun the same command",
    errno.EDQUOT: "free space within the quota, and rerun the same command",
    errno.EACCES: "grant access, or use another path",
    errno.EPERM: "grant access, or use another path",
    errno.EROFS: "use a path on a disk that can be written",
    errno.ENOTDIR: "a part of the path is a file; use another path",
    errno.EISDIR: "the path is a folder; use another path",
    errno.EFBIG: "raise the limit of the file size (`ulimit -f`), or use another disk",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ELOOP: "remove the loop of symbolic links",
}
# C++ libraries raise a RuntimeError or a ValueError with the text of the error alone.
_USER_TEXTS = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
)
_MAX_CHARACTERS = 500


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message and the exit code for an error that a user can act on.

    None for any other error, which keeps its traceback.
    """
    # First: libraries report it in many ways, also as damage of what they could not open.
    if open_files_reached(error):
        return (
            f"the limit of {open_file_limit():,} open files is reached: "
            f"{_first_line(error)}. Raise it with `ulimit -n 65536`, or where the job is "
            "started, and rerun the same command; if a file is called damaged here, it "
            "could not be opened",
            EXIT_INPUT,
        )
    match error:
        case InputError():
            return str(error), EXIT_INPUT
        case NonFiniteError():
            return str(error), EXIT_BAD_STEPS
        case MemoryError():
            return f"out of memory: {error}", EXIT_MEMORY
        case StorageError():
            return str(error), EXIT_STORAGE
        case Stopped():
            terminated = error.signal == signal.SIGTERM
            return str(error), EXIT_PREEMPTED if terminated else EXIT_INTERRUPTED
        case KeyboardInterrupt():
            return "interrupted", EXIT_INTERRUPTED
        # Before OSError, which only some of these errors are.
        case _ if is_fault_of_object_store(error):
            text = _first_line(error) or type(error).__name__
            return f"{text}; rerun the same command", EXIT_STORAGE
        case OSError():
            return _explain_os_error(error)
        case RuntimeError() | ValueError():
            return _explain_library_error(error)
    return None


def _explain_os_error(error: OSError) -> tuple[str, int] | None:
    if error.errno in TRANSIENT_ERRNOS:
        return f"{error}; rerun the same command", EXIT_STORAGE
    if error.errno in _REMEDIES:
        return f"{error}; {_REMEDIES[error.errno]}", EXIT_INPUT
    if error.errno == errno.ENOMEM:
        return f"out of memory: {error}", EXIT_MEMORY
    return None


def _explain_library_error(error: Exception) -> tuple[str, int] | None:
    text = str(error)
    # Before RESOURCE_EXHAUSTED, which TensorStore also says of a full disk.
    if any(known in text for known in _USER_TEXTS):
        return _first_line(error), EXIT_INPUT
    if not isinstance(error, RuntimeError):
        return None
    # A jax.errors.JaxRuntimeError. Verbs without JAX must not import its type.
    if "RESOURCE_EXHAUSTED" in text:
        return f"out of device memory: {error}", EXIT_MEMORY
    if "can't start new thread" in text:
        return (
            "the limit of processes and threads is reached (`ulimit -u`, or that of the "
            "container); raise it and rerun the same command",
            EXIT_INPUT,
        )
    return None


def _first_line(error: BaseException) -> str:
    # Errors of Orbax and TensorStore continue with many lines of their internals.
    return str(error).strip().partition("\n")[0][:_MAX_CHARACTERS]
