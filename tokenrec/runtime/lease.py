"""Lease of a run's folder, so that one trainer at a time writes to it.

The lease is a file in the folder, `lease-N.json`, with the identity of its holder, a
random token, and a count that the holder raises every few seconds, the heartbeat. The
highest N is the lease; an orderly exit deletes it.

Three rules make it safe, also on a network disk and without file locks:

- Whoever takes a lease creates a file that must not exist: number 1 without a lease,
  N + 1 to take over a stale number N. Of several processes one succeeds. It then checks
  that nothing has changed since it looked at N, and else withdraws.
- A lease is stale if its holder has ended, which is seen at once on the same machine; or
  if its heartbeat stands still while this process watches it. Clocks of two machines are
  never compared.
- A holder whose file is gone, or that is not the highest number any more, has lost the
  lease. It notices at its next heartbeat and before each save, and writes no more.

In an object store the file is an object, which is created on the condition that it does
not exist.

A holder that is suspended between its last check and the end of a write cannot notice.
The silence that makes a lease stale is therefore several heartbeats long.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tokenrec.errors import InputError, StorageError
from tokenrec.runtime.lease_file import (
    LeaseRecord,
    create_lease,
    delete_earlier,
    delete_lease,
    highest_number,
    is_original,
    lease_path,
    read_lease,
    read_token,
    write_heartbeat,
)
from tokenrec.runtime.paths import as_path
from tokenrec.runtime.retry import retry

# Seconds before another attempt if someone else was faster; a network disk may show its
# own directory late.
_RETRY_SECONDS = 0.2
# Looks at a higher number before the lease counts as lost.
_LOOKS = 3
# An exit does not wait longer for a heartbeat that hangs in a network disk.
_JOIN_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class LeaseTiming:
    """Seconds of the lease's waits.

    Attributes:
      heartbeat: between two heartbeats of a holder.
      silence: without a heartbeat, until a lease is stale that is held on another
        machine or in another container.
      settle: between taking over such a lease and using it.
      grace: for a holder on the same machine to end, before this process is refused: a
        killed process takes a moment to free its memory.
      poll: between two looks at a lease.
    """

    heartbeat: float = 10.0
    silence: float = 45.0
    settle: float = 5.0
    grace: float = 5.0
    poll: float = 0.5


def acquire(
    workdir: Path,
    *,
    timing: LeaseTiming | None = None,
    interrupted: Callable[[], None] = lambda: None,
) -> Lease:
    """Take the lease of a run's folder, and keep it until `Lease.release`.

    It waits up to `silence` and `settle` seconds if it cannot see whether the holder of
    an earlier lease still runs.

    Args:
      workdir: folder of the run, which exists.
      timing: the waits; None for those of `LeaseTiming`.
      interrupted: called now and then during a wait; it may raise to end it.

    Returns:
      The lease; a context manager that releases it.

    Raises:
      InputError: another trainer holds the lease, or the folder cannot be written.
      StorageError: the storage is at fault.
    """
    timing = timing or LeaseTiming()
    try:
        return _acquire(as_path(workdir), timing, interrupted)
    except StorageError:
        raise
    except OSError as error:
        raise InputError(
            f"--workdir '{workdir}': its lease cannot be written: {error.strerror}; "
            "free disk space, grant access, or give another folder"
        ) from error


def _acquire(
    workdir: Path, timing: LeaseTiming, interrupted: Callable[[], None]
) -> Lease:
    while True:
        interrupted()
        before = retry(lambda: highest_number(workdir), workdir)
        stale = _wait_until_stale(workdir, before, timing, interrupted)
        if before and stale is None:
            continue
        lease = Lease(workdir, before + 1, LeaseRecord.of_this_process(), timing)
        try:
            if lease.take(before, stale, timing.settle):
                break
        except BaseException:
            lease.withdraw()
            raise
        time.sleep(_RETRY_SECONDS)
    delete_earlier(workdir, before + 1)
    if stale is not None:
        print(
            f"tokenrec: --workdir '{workdir}': {stale.holder} left without releasing "
            "its lease; taken over",
            file=sys.stderr,
        )
    lease.start()
    return lease


class Lease:
    """The lease that this process holds; a context manager that releases it.

    Args:
      workdir: folder of the run.
      number: number of its file.
      record: contents of its file.
      timing: seconds between heartbeats.
    """

    def __init__(
        self, workdir: Path, number: int, record: LeaseRecord, timing: LeaseTiming
    ) -> None:
        self._workdir = workdir
        self._number = number
        self._path = lease_path(workdir, number)
        self._record = record
        self._interval = timing.heartbeat
        self._last_look = _now()
        self._loss = ""
        self._released = threading.Event()
        # A daemon: it must not keep a process alive that ends in another way.
        self._thread = threading.Thread(
            target=self._beat_until_released, name="lease heartbeat", daemon=True
        )

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def start(self) -> None:
        """Start the heartbeat."""
        self._last_look = _now()
        self._thread.start()

    def take(self, before: int, stale: _Stale | None, settle: float) -> bool:
        """Create the file of the lease.

        Args:
          before: number of the lease before it; 0 for none.
          stale: that lease.
          settle: see `LeaseTiming`.

        Returns:
          Whether this process now holds the lease; False if others were faster.
        """
        # 1. One process alone creates the file.
        created = retry(
            lambda: create_lease(self._workdir, self._number, self._record), self._path
        )
        if not created:
            return False
        # 2. While this process waited, other leases may have come and gone.
        unchanged = stale is None or stale.token == retry(
            lambda: read_token(lease_path(self._workdir, before)), self._workdir
        )
        if not unchanged or retry(self.find_loss, self._workdir):
            self.withdraw()
            return False
        # 3. Where creating a file is not exclusive, the last of several writers wins.
        if stale is not None and stale.is_elsewhere:
            time.sleep(settle)
            return not retry(self.find_loss, self._workdir)
        return True

    def withdraw(self) -> None:
        """Delete the file of a lease that was never used, if it is there."""
        if retry(lambda: read_token(self._path), self._path) == self._record.token:
            retry(lambda: delete_lease(self._path), self._path)

    def check(self) -> None:
        """Raise InputError if the lease is known to be lost.

        It is cheap enough for every step: it reads the file only if a heartbeat is
        overdue, as after this process was suspended.
        """
        if not self._loss and _now() - self._last_look > 2 * self._interval:
            try:
                self._look()
            except OSError as error:
                self._warn(error)
                # Not again at the next step.
                self._last_look = _now()
        self._raise_if_lost()

    def verify(self) -> None:
        """Read the lease, and raise InputError if it is lost; for use before a save.

        Raises:
          InputError: another trainer has taken the lease over, or it was deleted.
          StorageError: it cannot be read.
        """
        if not self._loss:
            retry(self._look, self._path)
        self._raise_if_lost()

    def release(self) -> None:
        """Stop the heartbeat and delete the lease, unless it is lost."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
        try:
            # One that was taken over in the meantime belongs to someone else.
            if not self._loss and not self.find_loss():
                delete_lease(self._path)
        except OSError as error:
            # The run is complete, or ends with an error of its own: both stay as they
            # are. The next trainer finds that this process has ended.
            self._warn(error)

    def find_loss(self) -> str:
        """Read the lease; say who has it if this process has lost it, else be empty."""
        highest = highest_number(self._workdir)
        for _ in range(_LOOKS):
            if highest == self._number or read_token(self._path) != self._record.token:
                break
            # A process that was about to take over an earlier lease withdraws at once.
            time.sleep(_RETRY_SECONDS)
            highest = highest_number(self._workdir)
        if highest == self._number and read_token(self._path) == self._record.token:
            return ""
        other = LeaseRecord.parse(read_lease(lease_path(self._workdir, highest)))
        if other is None:
            return f"its lease '{self._path.name}' was deleted"
        return (
            f"{other.holder} has taken it over at {other.since}, as happens after a "
            "process was suspended"
        )

    def _look(self) -> None:
        loss = self.find_loss()
        # Once lost it stays lost, whichever thread has noticed it.
        if loss:
            self._loss = loss
        self._last_look = _now()

    def _raise_if_lost(self) -> None:
        if self._loss:
            raise InputError(
                f"--workdir '{self._workdir}' no longer belongs to this process "
                f"({self._record.process.pid}): {self._loss}; it ends without saving; "
                "before you rerun the command, check that no other process trains there"
            )

    def _beat_until_released(self) -> None:
        failed = False
        while not self._loss and not self._released.wait(self._interval):
            try:
                self._look()
                self._record = self._record.next_beat()
                if not self._loss and not write_heartbeat(self._path, self._record):
                    self._look()
                failed = False
            # The disk may be back at the next heartbeat. If it is not, the next save
            # reports it; the heartbeat itself must not end the run.
            except OSError as error:
                if not failed:
                    self._warn(error)
                failed = True

    def _warn(self, error: OSError) -> None:
        print(
            f"tokenrec: the lease '{self._path}' cannot be read or written: "
            f"{error.strerror or error}; the run goes on",
            file=sys.stderr,
        )


@dataclasses.dataclass(frozen=True)
class _Stale:
    """A lease that may be taken over.

    Attributes:
      token: its token; empty if its file holds something else.
      holder: who held it, in words.
      is_elsewhere: whether it is stale by silence: whether its holder still runs cannot
        be seen from here.
    """

    token: str
    holder: str
    is_elsewhere: bool


def _wait_until_stale(
    workdir: Path,
    number: int,
    timing: LeaseTiming,
    interrupted: Callable[[], None],
) -> _Stale | None:
    """Wait until a lease is stale, or gone.

    Args:
      workdir: folder of the run.
      number: number of the lease; 0 for none.
      timing: the waits.
      interrupted: called after each look.

    Returns:
      The stale lease; None if there is none any more, or another one of this number.

    Raises:
      InputError: its holder is alive.
    """
    path = lease_path(workdir, number)
    first = retry(lambda: read_lease(path), path) if number else None
    if first is None:
        return None
    record = LeaseRecord.parse(first)
    holder = record.holder if record else "a process that wrote no name"
    token = record.token if record else ""
    running = record.process.is_running() if record else None
    if record and running and not retry(lambda: is_original(path, record), path):
        # The holder has its lease in another folder, of which this one is a copy, or
        # the file system numbers files anew: the heartbeat decides.
        running = None
    limit = timing.silence if running is None else timing.grace
    if running is None:
        print(
            f"tokenrec: --workdir '{workdir}': {holder} holds the lease; waiting up to "
            f"{timing.silence + timing.settle:g} s for a sign of life",
            file=sys.stderr,
        )
    waited, looked = 0.0, time.monotonic()
    while running is not False and waited < limit:
        time.sleep(timing.poll)
        interrupted()
        # While the disk did not answer, the holder could not write either.
        now = time.monotonic()
        waited += min(now - looked, 2 * timing.poll)
        looked = now
        latest = retry(lambda: read_lease(path), path)
        if latest is None:
            return None
        found = LeaseRecord.parse(latest)
        if found is not None and found.token != token:
            return None
        if running is None and latest != first:
            raise _in_use(workdir, path, found)
        running = record.process.is_running() if record and running else running
    if running:
        raise _in_use(workdir, path, record)
    return _Stale(token, holder, is_elsewhere=running is None)


def _in_use(workdir: Path, path: Path, record: LeaseRecord | None) -> InputError:
    known = (
        f"{record.holder} trains there since {record.since} (last heartbeat "
        f"{record.heartbeat})"
        if record
        else "another process trains there"
    )
    return InputError(
        f"--workdir '{workdir}' is in use: {known}; give another --workdir, or wait for "
        f"that process, or stop it; if it is surely gone, delete '{path}'"
    )


def _now() -> float:
    """Seconds of a clock that goes on while the machine is suspended, where it can."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
