"""Files of a lease: their contents, and how they are created and changed.

The protocol that uses them is in lease.py. Nothing here retries or waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from tokenrec.runtime.paths import create_exclusively, is_remote
from tokenrec.runtime.process_identity import ProcessIdentity, this_process
from tokenrec.runtime.retry import raise_storage_errors

_NAME = re.compile(r"lease-([1-9][0-9]*)\.json")
_PARTIAL_PREFIX = ".lease-"
# All files have this size, so that a heartbeat changes bytes in place.
_SIZE = 1024
# What file systems without hard links answer.
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclasses.dataclass(frozen=True)
class LeaseRecord:
    """Contents of a lease.

    Attributes:
      token: random, different for each lease.
      process: the process that holds it.
      since: when it was taken, by the clock of the holder.
      heartbeat: time of the last heartbeat, by the clock of the holder.
      beats: number of heartbeats.
      inode: number of its file, which a copy of the folder does not have.
    """

    token: str
    process: ProcessIdentity
    since: str
    heartbeat: str
    beats: int = 0
    inode: int = 0

    @classmethod
    def of_this_process(cls) -> LeaseRecord:
        """A new record, with a token of its own."""
        now = _clock()
        return cls(secrets.token_hex(16), this_process(), now, now)

    @classmethod
    def parse(cls, data: bytes | None) -> LeaseRecord | None:
        """The record in a file; None without a file, or if it holds something else."""
        try:
            value: dict[str, Any] = json.loads(data or b"")
            process = ProcessIdentity(
                host=str(value["host"]),
                boot=str(value["boot"]),
                pid_namespace=str(value["pid_namespace"]),
                pid=int(value["pid"]),
                started=int(value["started"]),
            )
            return cls(
                token=str(value["token"]),
                process=process,
                since=str(value["since"]),
                heartbeat=str(value["heartbeat"]),
                beats=int(value["beats"]),
                inode=int(value["inode"]),
            )
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            return None

    @property
    def holder(self) -> str:
        """The process, in words."""
        return f"process {self.process.pid} on {self.process.host}"

    def next_beat(self) -> LeaseRecord:
        """The record of the next heartbeat."""
        return dataclasses.replace(self, heartbeat=_clock(), beats=self.beats + 1)

    def to_bytes(self, descriptor: int | None = None) -> bytes:
        """Contents of the file that is open as `descriptor`; None for an object."""
        fields = {
            "token": self.token,
            **dataclasses.asdict(self.process),
            "since": self.since,
            "heartbeat": self.heartbeat,
            "beats": self.beats,
            "inode": 0 if descriptor is None else os.fstat(descriptor).st_ino,
        }
        return json.dumps(fields).encode().ljust(_SIZE - 1) + b"\n"


def lease_path(workdir: Path, number: int) -> Path:
    """File of a lease."""
    return workdir / f"lease-{number}.json"


def _numbers(workdir: Path) -> list[int]:
    if is_remote(workdir):
        with raise_storage_errors(workdir):
            names = [path.name for path in workdir.glob("lease-*.json")]
    else:
        names = os.listdir(workdir)
    matches = [_NAME.fullmatch(name) for name in names]
    return [int(match[1]) for match in matches if match]


def highest_number(workdir: Path) -> int:
    """Number of the lease; 0 without one."""
    return max(_numbers(workdir), default=0)


def read_lease(path: Path) -> bytes | None:
    """First bytes of a file; None if it does not exist."""
    # Opened anew each time: a network disk then asks its server.
    try:
        with raise_storage_errors(path), path.open("rb") as file:
            return file.read(_SIZE)
    except FileNotFoundError:
        return None


def is_original(path: Path, record: LeaseRecord) -> bool:
    """Whether a record was written into this file, and not copied here."""
    if is_remote(path):
        # Nothing tells an object from its copy.
        return False
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino == record.inode
    return False


def read_token(path: Path) -> str:
    """Token in a file; empty if it does not exist or holds something else."""
    record = LeaseRecord.parse(read_lease(path))
    return record.token if record else ""


def create_lease(workdir: Path, number: int, record: LeaseRecord) -> bool:
    """Create the file of a lease with its contents in one step.

    After an error it may be called again.

    Args:
      workdir: folder of the run.
      number: number of the lease.
      record: its contents.

    Returns:
      Whether this process has created it; False if it existed.
    """
    path = lease_path(workdir, number)
    if is_remote(path):
        with raise_storage_errors(path):
            return create_exclusively(path, record.to_bytes())
    partial = workdir / f"{_PARTIAL_PREFIX}{record.token}"

    try:
        _write_new(partial, record)
        os.link(partial, path)
    except FileExistsError:
        # The answer of a network disk may have been lost, and the request repeated.
        return read_token(path) == record.token
    except FileNotFoundError:
        # The trainer that was faster has deleted the partial file.
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return _create_without_links(path, record)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, record: LeaseRecord) -> bool:
    try:
        _write_new(path, record)
    except FileExistsError:
        return read_token(path) == record.token
    except OSError:
        # Half a file would pass for the lease of someone else.
        path.unlink(missing_ok=True)
        raise
    return True


def _write_new(path: Path, record: LeaseRecord) -> None:
    with path.open("xb") as file:
        file.write(record.to_bytes(file.fileno()))
        file.flush()
        os.fsync(file.fileno())


def write_heartbeat(path: Path, record: LeaseRecord) -> bool:
    """Write a heartbeat into a lease in place; return False if it has another token.

    An object is replaced. If it was taken over and deleted since its token was read, it
    is there again; its number is lower than that of the new lease, and does not count.
    """
    if is_remote(path):
        if read_token(path) != record.token:
            return False
        with raise_storage_errors(path):
            path.write_bytes(record.to_bytes())
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # The file that is open is the one that is changed, whatever its name means now.
        found = LeaseRecord.parse(os.pread(descriptor, _SIZE, 0))
        if found is None or found.token != record.token:
            return False
        os.pwrite(descriptor, record.to_bytes(descriptor), 0)
        return True
    finally:
        os.close(descriptor)


def delete_lease(path: Path) -> None:
    """Delete the file of a lease, if it is there."""
    with raise_storage_errors(path):
        path.unlink(missing_ok=True)


def delete_earlier(workdir: Path, number: int) -> None:
    """Delete leases before this one, and files that killed processes left behind."""
    # They do not count. What cannot be deleted now is deleted at the next start.
    with contextlib.suppress(OSError), raise_storage_errors(workdir):
        for other in _numbers(workdir):
            if other < number:
                delete_lease(lease_path(workdir, other))
        for partial in workdir.glob(f"{_PARTIAL_PREFIX}*"):
            partial.unlink(missing_ok=True)


def _clock() -> str:
    """Local time with its zone, for messages."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
