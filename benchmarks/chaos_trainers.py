"""A second trainer, and a reader of the log that ends, for `chaos.py`."""

from __future__ import annotations

import socket
import time

from chaos_lab import Lab
from chaos_lineage import await_moment
from chaos_outcome import Outcome, refused, survived
from chaos_process import Failure, Process
from chaos_signals import steps_until

# The first trainer is held longer than the second one may take to be refused.
_HOLD_SECONDS = 40


def two_trainers(lab: Lab) -> Outcome:
    """Start two trainers in one folder: one trains, and the other one is refused."""
    lineage = lab.rested()
    with (
        # The first to train is held at a save, so that its run does not end.
        lab.injected("write", r"sums\.json", skip=1, hold=_HOLD_SECONDS) as fault,
        lineage.started(fault.variables) as (one,),
    ):
        if lab.chance.random() < 0.5:
            await_moment(lineage, one, fault.reached)
        with lineage.started(fault.variables) as (other,):
            first, second = _winner_and_loser(one, other)
            words = second.refusal(
                str(lineage.workdir), str(first.popen.pid), socket.gethostname()
            )
            fault.release()
            step = lineage.step()
            if not first.wait_until(lambda: lineage.step() > step):
                code = first.exit_code()
                lineage.done = code == 0
                if not lineage.done:
                    raise Failure(f"the first ended with {code}: {first.words()}")
    # Both are killed now: the next start of this run must find its folder free.
    return refused(words)


def _winner_and_loser(one: Process, other: Process) -> tuple[Process, Process]:
    """Wait until one of two trainers has ended; return the other one first."""
    while one.popen.poll() is None and other.popen.poll() is None:
        time.sleep(0.01)
    return (one, other) if one.popen.poll() is None else (other, one)


def dead_log_reader(lab: Lab) -> Outcome:
    """Close the reader's end of stdout and stderr: the run must reach its end."""
    lineage = lab.lineage()
    with lineage.started(pipe=True) as (process,):
        steps_until(lineage, process, 0.5)
        process.close_pipe()
        step = lineage.step()
        code = process.exit_code()
    if code != 0:
        raise Failure(
            f"its log was closed at step {step}; it ended at {lineage.step()} with {code}"
        )
    lineage.done = True
    return survived(f"trained from step {step} to {lineage.step()}")
