"""Retry reads and writes that fail for a moment, as those of a network disk do.

A fault of the storage is neither wrong input nor damage: the file may be healthy and the
next attempt may succeed. So it is tried again a few times, and if it persists the error
is a `StorageError`, with an exit code of its own that schedulers restart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenrec.errors import InputError, StorageError

# Seconds before each further attempt; a network disk that fails over takes seconds.
_DELAYS = (0.1, 0.4, 1.6, 6.4)

# What a disk or network reports when it is at fault itself. Not in the list: a full
# disk, missing files and rights, which the user has to change.
TRANSIENT_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ENOLCK,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ENOTCONN,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)
# Texts in errors of C++ libraries, which carry no number: TensorStore and ArrayRecord
# render the error of the operating system or the status of an object store.
_TRANSIENT_TEXTS = (
    *(os.strerror(number).lower() for number in sorted(TRANSIENT_ERRNOS)),
    "unavailable:",
    "deadline_exceeded:",
    "aborted:",
)

# Classes of the clients of object stores; s3fs and gcsfs pass them on.
_TRANSIENT_CLASSES = frozenset(
    {
        "aiohttp.client_exceptions.ClientConnectionError",
        "aiohttp.client_exceptions.ClientPayloadError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "google.auth.exceptions.TransportError",
        "requests.exceptions.ConnectionError",
    }
)
_GCS_ERROR = "gcsfs.retry.HttpError"


def is_transient(error: BaseException) -> bool:
    """Whether an error is a fault of the storage that may pass.

    Args:
      error: an OSError, or the error of a library that reads and writes files.
    """
    if isinstance(error, StorageError):
        return True
    if isinstance(error, InputError):
        return False
    if is_fault_of_object_store(error):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT_ERRNOS
    if isinstance(error, OSError | RuntimeError | ValueError):
        text = str(error).lower()
        return any(known in text for known in _TRANSIENT_TEXTS)
    return False


def is_fault_of_object_store(error: BaseException) -> bool:
    """Whether the client of an object store says that the network or server fails."""
    # These clients need not be installed, so their classes are known by their names.
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if names & _TRANSIENT_CLASSES or isinstance(error, TimeoutError):
        return True
    code = getattr(error, "code", None)
    return _GCS_ERROR in names and code is not None and _is_server_fault(int(code))


def _is_server_fault(status: int) -> bool:
    """Whether an HTTP status asks for another attempt."""
    return status >= 500 or status in (408, 429)


def retry[T](action: Callable[[], T], path: os.PathLike[str] | str) -> T:
    """Call a function that reads or writes a path, again if the storage is at fault.

    Args:
      action: the function; it must be safe to call again after it has failed.
      path: what it reads or writes, for messages.

    Returns:
      What `action` returns. An error that is not transient is passed on as it is.

    Raises:
      StorageError: the last attempt failed like those before it.
    """
    for delay in _DELAYS:
        try:
            return action()
        except Exception as error:
            # A StorageError was tried again where it arose.
            if isinstance(error, StorageError) or not is_transient(error):
                raise
            print(
                f"tokenrec: '{os.fspath(path)}': {_reason(error)}; trying again in "
                f"{delay:g} s",
                file=sys.stderr,
            )
            time.sleep(delay)
    try:
        return action()
    except Exception as error:
        if isinstance(error, StorageError) or not is_transient(error):
            raise
        raise storage_error(error, path, attempts=len(_DELAYS) + 1) from error


@contextlib.contextmanager
def raise_storage_errors(path: os.PathLike[str] | str) -> Iterator[None]:
    """Turn what the client of an object store raises for a fault into a StorageError.

    Some of these errors are no OSError, which callers expect of a read or write.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not is_transient(error):
            raise
        raise storage_error(error, path) from error


def storage_error(
    error: BaseException, path: os.PathLike[str] | str, attempts: int = 1
) -> StorageError:
    """Build the StorageError for a transient error.

    Args:
      error: the error of the last attempt.
      path: what was read or written.
      attempts: number of attempts.
    """
    times = "" if attempts == 1 else f", {attempts} times"
    # Without errno: `str` of an OSError with one would begin with its number.
    return StorageError(
        f"'{os.fspath(path)}' cannot be read or written{times}: {_reason(error)}; the "
        "storage is at fault and not the file: rerun the same command when it is back"
    )


def _reason(error: BaseException) -> Any:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).strip().partition("\n")[0][:300]
