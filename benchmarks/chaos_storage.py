"""Faults of the storage under a run, for `chaos.py`."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from chaos_lab import Lab
from chaos_lineage import Lineage, await_moment
from chaos_outcome import Outcome, refused, survived
from chaos_process import Failure, Missed
from chaos_signals import in_a_step, resumes

from tokenrec.errors import EXIT_STORAGE

_ERRORS = (errno.EIO, errno.ESTALE)


def full_disk(lab: Lab) -> Outcome:
    """Fill the disk while a run trains: it must name the disk, and resume with room."""
    with in_a_step(lab) as (lineage, (process,)), _filled(_disk(lab)):
        code = process.exit_code()
        if code == 0:
            lineage.done = True
            raise Missed
        words = process.refusal(str(lab.disk))
    resumes(lineage)
    return survived(words)


def full_disk_at_the_start(lab: Lab) -> Outcome:
    """Start a run on a full disk."""
    lineage = lab.lineage()
    with _filled(_disk(lab)), lineage.started() as (process,):
        words = process.refusal(str(lab.disk))
    resumes(lineage)
    return refused(words)


def _disk(lab: Lab) -> Path:
    if lab.disk is None:
        raise Failure("no disk is mounted")
    return lab.disk


@contextlib.contextmanager
def _filled(disk: Path) -> Iterator[None]:
    """Fill a disk to its last byte until the end of the block."""
    filler = disk / "filler"
    try:
        # The error that the disk is full is the fault.
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        yield
    finally:
        filler.unlink()


def read_fails_once(lab: Lab) -> Outcome:
    """Let a read of the run or of its data set fail once, or twice in a row."""
    lineage = lab.rested()
    event = lab.chance.choice(["read", "read", "stat", "list", "hash"])
    return _survives(lineage, event, _under(lineage.workdir, lab.data))


def read_of_one_of_two_fails(lab: Lab) -> Outcome:
    """Let a read of one of two processes fail once, or twice in a row."""
    lineage = lab.rested(2)
    event = lab.chance.choice(["read", "hash"])
    return _survives(lineage, event, _under(lineage.workdir, lab.data))


def listing_fails_once(lab: Lab) -> Outcome:
    """Let a listing of checkpoints fail: it must not look as if there were none."""
    lineage = lab.rested()
    return _survives(lineage, "list", _under(lineage.workdir / "checkpoints"))


def write_fails_once(lab: Lab) -> Outcome:
    """Let a write of the run fail once, or twice in a row."""
    lineage = lab.rested()
    event = lab.chance.choice(["write", "write", "rename", "make", "fsync", "remove"])
    return _survives(lineage, event, _under(lineage.workdir))


def _survives(lineage: Lineage, event: str, match: str) -> Outcome:
    """Let calls of a process fail; the run must go on, and save.

    Args:
      lineage: the run.
      event: the call.
      match: regular expression for its path.
    """
    lab = lineage.lab
    number = lab.chance.choice(_ERRORS)
    with lab.injected(
        event,
        match,
        skip=lab.chance.randrange(12),
        times=lab.chance.choice([1, 1, 2]),
        errno=number,
    ) as fault:
        victim = lab.chance.randrange(lineage.processes)
        with lineage.started(fault.variables, only=victim) as running:
            process = running[victim]
            await_moment(lineage, process, fault.reached)
            step = lineage.step()
            # Checkpoints of later steps, so that one of them is complete.
            going_on = process.wait_until(
                lambda: lineage.step() > step + 10 and lineage.is_rested()
            )
            harmed = f"{errno.errorcode[number]} at {fault.events()}"
            code, words = process.popen.poll(), process.words()
            if not going_on and code != 0:
                raise Failure(f"{harmed}: it ended with {code}: {words}")
            lineage.done = code == 0
        if lineage.set_aside():
            raise Failure(f"{harmed}: {lineage.set_aside()} set aside: {words}")
        if "Traceback" in process.output():
            raise Failure(f"{harmed}: a traceback: {words}")
    return survived(f"{harmed}: {words}")


def storage_fails_for_good(lab: Lab) -> Outcome:
    """Let all reads or writes of checkpoints fail: exit 74, and resume without it."""
    lineage = lab.rested()
    event = lab.chance.choice(["hash", "read", "write"])
    number = lab.chance.choice(_ERRORS)
    with (
        lab.injected(
            event,
            _under(lineage.workdir / "checkpoints"),
            skip=lab.chance.choice([0, 0, 5, 20]),
            times=-1,
            errno=number,
        ) as fault,
        lineage.started(fault.variables) as (process,),
    ):
        await_moment(lineage, process, fault.reached)
        code, words = process.exit_code(), process.words()
        harmed = f"{errno.errorcode[number]} at {fault.events()}"
        if code == 0:
            lineage.done = True
            raise Missed
        if code != EXIT_STORAGE or str(lineage.workdir) not in words:
            raise Failure(f"{harmed}: exit code {code}: {words}")
        if "Traceback" in process.output():
            raise Failure(f"{harmed}: a traceback beside its message: {words}")
    if lineage.set_aside():
        raise Failure(f"{harmed}: {lineage.set_aside()} set aside: {words}")
    resumes(lineage)
    return survived(f"{harmed}: {words}")


def _under(*folders: Path) -> str:
    """Regular expression for the paths of these folders and in them."""
    return "^(" + "|".join(re.escape(str(folder)) for folder in folders) + ")(/|$)"
