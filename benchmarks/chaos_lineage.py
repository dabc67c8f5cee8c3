"""A run of `chaos.py` from its first start to its end, by one or several processes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos_compare import last_step, step_time
from chaos_process import Failure, Missed, Process

from tokenrec.checkpoint.integrity import is_verified

if TYPE_CHECKING:
    from chaos_lab import Lab

# Devices of each process, by the number of processes.
DEVICES = {1: 2, 2: 2, 4: 1}


class Lineage:
    """A run from its first start to its end, with all faults in between.

    Args:
      lab: the lab that owns the run.
      workdir: folder of the run.
      processes: number of processes that train it together.

    Attributes:
      done: whether the run has reached its last step.
      damaged: checkpoint that the next start must not use; None if all are intact.
    """

    def __init__(self, lab: Lab, workdir: Path, processes: int) -> None:
        self.lab = lab
        self.workdir = workdir
        self.processes = processes
        self.done = False
        self.damaged: Path | None = None

    @contextlib.contextmanager
    def started(
        self,
        variables: Mapping[str, str] | None = None,
        *,
        only: int | None = None,
        pipe: bool = False,
        **fields: Any,
    ) -> Iterator[list[Process]]:
        """Start the run's processes; the end of the block kills them.

        Args:
          variables: further environment variables.
          only: the process that gets them; None for all.
          pipe: see `Process`.
          fields: further config fields, with "__" for ".".

        Raises:
          Failure: the run did not resume from its latest intact checkpoint.
        """
        usable = [path for path in self.checkpoints() if path != self.damaged]
        newest = int(usable[-1].name) if usable else 0
        logged_at = step_time(self.workdir, newest)
        line = self.lab.train_line(self.workdir, None, self.processes, **fields)
        if pipe:
            line.remove("--quiet")
        with contextlib.ExitStack() as stack:
            shared = {"XLA_FLAGS": xla_flags(self.processes)}
            if self.processes > 1:
                line = [*line, "--distributed"]
                shared |= stack.enter_context(_coordinator(self.processes))
            running = []
            for index in range(self.processes):
                environment = shared | {"JAX_PROCESS_ID": str(index)}
                if only in (None, index):
                    environment |= variables or {}
                process = Process(self.lab, line, environment, pipe=pipe)
                running.append(stack.enter_context(process))
            yield running
        # Steps that are trained again give the same values, and another time.
        if step_time(self.workdir, newest) != logged_at:
            raise Failure(
                f"it did not resume from checkpoint {newest}, but trained its steps "
                f"again: {running[0].words()}"
            )
        self.damaged = None

    def step(self) -> int:
        """Last step in the log."""
        return last_step(self.workdir)

    def checkpoints(self) -> list[Path]:
        """Folders of the complete checkpoints, in the order of their steps."""
        folders = [
            path for path in self.workdir.glob("checkpoints/*") if path.name.isdecimal()
        ]
        return sorted(folders, key=lambda path: int(path.name))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(
            not path.name.isdecimal() for path in self.workdir.glob("checkpoints/*tmp*")
        )

    def set_aside(self) -> list[str]:
        """Names of the checkpoints that were set aside as damaged."""
        return sorted(path.name for path in self.workdir.glob("checkpoints/damaged-*"))

    def is_rested(self) -> bool:
        """Whether the latest checkpoint is verified, and there is another one."""
        checkpoints = self.checkpoints()
        return len(checkpoints) > 1 and is_verified(checkpoints[-1])


def await_moment(
    lineage: Lineage,
    process: Process,
    condition: Callable[[], bool],
    interval: float = 0.005,
) -> None:
    """Wait for the moment of a fault.

    Args:
      lineage: the run to disturb.
      process: a process of the run.
      condition: whether the moment has come.
      interval: seconds between two checks.

    Raises:
      Missed: the run reached its end first.
      Failure: the process ended in another way.
    """
    if process.wait_until(condition, interval):
        return
    code = process.popen.poll()
    lineage.done = code == 0
    if lineage.done:
        raise Missed
    raise Failure(f"it ended with {code} before the fault: {process.words()}")


def xla_flags(processes: int) -> str:
    """Flags of XLA for one of so many processes."""
    return (
        f"--xla_force_host_platform_device_count={DEVICES[processes]} "
        "--xla_backend_optimization_level=0"
    )


@contextlib.contextmanager
def _coordinator(count: int) -> Iterator[dict[str, str]]:
    """Variables by which the processes of a run find each other."""
    # Another program does not get the port while it is held like this, but the
    # coordinator of JAX does, because it shares ports.
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("::", 0))
        yield {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{holder.getsockname()[1]}",
            "JAX_NUM_PROCESSES": str(count),
        }
