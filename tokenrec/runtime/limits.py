"""Limits of the operating system for this process."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

from tokenrec.errors import InputError

# A small run opens about 40 files at once, and the shards of a large one many more.
_MIN_OPEN_FILES = 128
# Enough for every run; a limit of a billion makes some libraries slow.
_WANTED_OPEN_FILES = 65_536
_OPEN_FILES_ERRNOS = (errno.EMFILE, errno.ENFILE)


def raise_open_file_limit() -> None:
    """Raise the limit of open files as far as this user may.

    Raises:
      InputError: it is too low for a run. Libraries that meet the limit later report it
        as damaged shards or checkpoints.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = _WANTED_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        most = min(hard, most)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if max(soft, most) < _MIN_OPEN_FILES:
        raise InputError(
            f"this process may open {max(soft, most)} files at once (`ulimit -n`), and a "
            f"run needs {_MIN_OPEN_FILES}; raise the limit with `ulimit -n 4096`, or "
            "where the job is started, and rerun the same command"
        )


def open_file_limit() -> int:
    """Return the number of files that this process may open at once."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_files_reached(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is the limit of open files.

    Libraries report it in many ways, also as damage of what they could not open.
    """
    texts = [os.strerror(number) for number in _OPEN_FILES_ERRNOS]
    return any(
        (isinstance(link, OSError) and link.errno in _OPEN_FILES_ERRNOS)
        or any(text in str(link) for text in texts)
        for link in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
