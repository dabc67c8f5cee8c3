"""Limits of the operating system for this process."""

from __future__ import annotations

import resource

from tokenrec.errors import InputError

# A small run opens about 40 files at once, and the shards of a large one many more.
_MIN_OPEN_FILES = 128
# Enough for every run; a limit of a billion makes some libraries slow.
_WANTED_OPEN_FILES = 65_536


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
            f"this process may open {max(soft, most)} files at once (`ulimit -n`), and a run needs "
            f"{_MIN_OPEN_FILES}; raise the limit with `ulimit -n 4096`, or where the "
            "job is started, and rerun the same command"
        )


def open_file_limit() -> int:
    """Return the number of files that this process may open at once."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
