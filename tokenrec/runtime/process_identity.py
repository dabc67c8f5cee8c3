"""Identity of a process, by which another one on its machine can tell if it has ended.

A process id alone does not do: ids are used again, and each container has its own.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
# Fields of /proc/PID/stat that follow the name of the program, see proc(5).
_STATE, _START_TIME = 0, 19
# States of a process that has ended but that its parent has not waited for.
_ENDED_STATES = ("Z", "X")


@dataclasses.dataclass(frozen=True)
class ProcessIdentity:
    """Names one process among all that ever run.

    Attributes:
      host: name of its machine.
      boot: random id of the machine's boot; empty if it is not known.
      pid_namespace: the numbering that `pid` belongs to, one for each container; empty
        if it is not known.
      pid: its process id.
      started: clock ticks from the boot to its start; 0 if that is not known.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: int

    def is_running(self) -> bool | None:
        """Whether the process still runs; None if that cannot be seen from here.

        It can be seen on the same boot of a machine and in the same container.
        """
        here = this_process()
        comparable = (
            self.boot
            and self.pid_namespace
            and self.started
            and here.started
            and (self.boot, self.pid_namespace) == (here.boot, here.pid_namespace)
        )
        if not comparable:
            return None
        fields = _stat_fields(self.pid)
        if fields is not None:
            same = int(fields[_START_TIME]) == self.started
            return same and fields[_STATE] not in _ENDED_STATES
        # With the mount option `hidepid`, /proc hides the processes of other users.
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return None
        return None


def this_process() -> ProcessIdentity:
    """Identity of the calling process. Without Linux's /proc, parts are not known."""
    pid = os.getpid()
    try:
        boot = _BOOT_ID.read_text().strip()
        namespace = os.readlink(_PID_NAMESPACE)
        # A container may see the /proc of its host, which numbers processes otherwise.
        own_proc = os.readlink("/proc/self") == str(pid)
    except OSError:
        return ProcessIdentity(socket.gethostname(), "", "", pid, 0)
    fields = _stat_fields(pid) if own_proc else None
    started = int(fields[_START_TIME]) if fields else 0
    return ProcessIdentity(socket.gethostname(), boot, namespace, pid, started)


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the program's name; None without such a file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    # A process that ends while its file is read is reported by ProcessLookupError.
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name may contain spaces and parentheses.
    return text.rpartition(")")[2].split()
