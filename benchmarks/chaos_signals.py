"""Signals to the processes of runs, for `chaos.py`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from chaos_compare import progress
from chaos_config import EVALUATIONS, steps_of
from chaos_lab import Lab
from chaos_lineage import Lineage, await_moment
from chaos_outcome import Fault, Outcome, survived
from chaos_process import Failure, Missed, Process

from tokenrec.checkpoint.integrity import is_verified
from tokenrec.errors import EXIT_HUNG, EXIT_PREEMPTED

# Long enough for a process that compiles, and shorter than in other runs.
_SHORT_HANG_SECONDS = 20
# Modules whose import takes long.
_IMPORTED = "^(tokenrec.cli.main|jax|jax.numpy|grain|orbax.checkpoint|optax)$"


class Running(NamedTuple):
    """A run whose moment has come.

    Attributes:
      lineage: the run.
      processes: its processes.
    """

    lineage: Lineage
    processes: list[Process]


def resumes(lineage: Lineage, message: str = "") -> str:
    """Rerun the command, which must make a step; then kill it.

    The run is compared with the undisturbed one when it has reached its end.

    Args:
      lineage: the disturbed run.
      message: text that must be on stderr; empty for none.

    Returns:
      The messages on stderr.

    Raises:
      Failure: it does not resume, or does not say the message.
    """
    with lineage.started() as running:
        # The log is cut back to the checkpoint first, and grows to this step again.
        before = lineage.step()
        if not running[0].wait_until(lambda: lineage.step() > before):
            code = running[0].exit_code()
            lineage.done = code == 0
            if not lineage.done:
                raise Failure(
                    f"started again, it ended with {code}: {running[0].words()}"
                )
        words = running[0].words()
        if message not in running[0].output():
            raise Failure(f"'{message}' is not in its output: {words}")
    return words


def steps_until(lineage: Lineage, process: Process, seconds: float = 1.0) -> None:
    """Wait for a step of this start, and then for a random time.

    Args:
      lineage: the run.
      process: its first process.
      seconds: the longest time.
    """
    first_step = lineage.step()
    await_moment(lineage, process, lambda: lineage.step() > first_step)
    time.sleep(lineage.lab.chance.uniform(0, seconds))


@contextlib.contextmanager
def in_a_step(lab: Lab, processes: int = 1) -> Iterator[Running]:
    """Start a run and wait until it trains; the end of the block kills it.

    Args:
      lab: the lab.
      processes: number of its processes.
    """
    lineage = lab.lineage(processes)
    with lineage.started() as running:
        steps_until(lineage, running[0])
        yield Running(lineage, running)


def ends(lineage: Lineage, process: Process, *codes: int) -> str:
    """Wait for the end of a process, which must have one of these exit codes.

    Args:
      lineage: its run.
      process: the process.
      codes: the exit codes; a negative one is that of a signal.

    Returns:
      Its messages.

    Raises:
      Missed: the run reached its end first.
      Failure: it has another exit code.
    """
    code = process.exit_code()
    if code == 0:
        lineage.done = True
        raise Missed
    if code not in codes:
        raise Failure(f"exit code {code}, not {codes}: {process.words()}")
    return process.words()


def kill_in_a_step(lab: Lab) -> Outcome:
    """SIGKILL while it trains."""
    with in_a_step(lab) as (lineage, (process,)):
        process.send(signal.SIGKILL)
        ends(lineage, process, -signal.SIGKILL)
    return survived()


def kill_at_the_start(lab: Lab) -> Outcome:
    """SIGKILL during imports, the restore or the first step."""
    lineage = lab.lineage()
    with lineage.started() as (process,):
        time.sleep(lab.chance.uniform(0, 6.0))
        process.send(signal.SIGKILL)
        ends(lineage, process, -signal.SIGKILL)
    return survived()


def _signal_in_a_save(number: signal.Signals, code: int) -> Fault:
    def fault(lab: Lab) -> Outcome:
        with in_a_step(lab) as (lineage, (process,)):
            await_moment(lineage, process, lineage.saving, 0.0005)
            time.sleep(lab.chance.uniform(0, 0.03))
            process.send(number)
            ends(lineage, process, code)
        if number == signal.SIGTERM:
            _check_saved(lineage)
        return survived()

    return fault


kill_in_a_save = _signal_in_a_save(signal.SIGKILL, -signal.SIGKILL)
stop_in_a_save = _signal_in_a_save(signal.SIGTERM, EXIT_PREEMPTED)


def kill_before_the_checksums(lab: Lab) -> Outcome:
    """SIGKILL when a checkpoint has its name, and no checksums yet."""
    lineage = lab.lineage()
    with (
        lab.injected(
            "write", r"sums\.(0\.)?json", skip=lab.chance.randrange(6), hold=60
        ) as fault,
        lineage.started(fault.variables) as (process,),
    ):
        await_moment(lineage, process, fault.reached)
        process.send(signal.SIGKILL)
        ends(lineage, process, -signal.SIGKILL)
    latest = lineage.checkpoints()[-1]
    return survived(resumes(lineage, f"checkpoint {latest.name} had no checksums"))


def stop(lab: Lab) -> Outcome:
    """SIGTERM while it trains."""
    with in_a_step(lab) as (lineage, (process,)):
        process.send(signal.SIGTERM)
        ends(lineage, process, EXIT_PREEMPTED)
    return survived(_check_saved(lineage))


def _check_saved(lineage: Lineage) -> str:
    """Check that the checkpoint of the last step is there, with its checksums."""
    step, latest = lineage.step(), lineage.checkpoints()[-1]
    if int(latest.name) != step or not is_verified(latest):
        raise Failure(
            f"stopped by SIGTERM at step {step}, and the last checkpoint is "
            f"{latest.name}, verified: {is_verified(latest)}"
        )
    return f"saved step {step}"


def stop_at_the_start(lab: Lab) -> Outcome:
    """SIGTERM during the imports."""
    lineage = lab.lineage()
    with (
        lab.injected("import", _IMPORTED, skip=lab.chance.randrange(4)) as fault,
        lineage.started(fault.variables) as (process,),
    ):
        await_moment(lineage, process, fault.reached)
        time.sleep(lab.chance.uniform(0, 0.5))
        process.send(signal.SIGTERM)
        words = ends(lineage, process, EXIT_PREEMPTED)
    return survived(words)


def stop_in_an_evaluation(lab: Lab) -> Outcome:
    """SIGTERM during an evaluation, which must be abandoned, and made again later."""
    lineage = lab.lineage()
    every = steps_of(lab.steps, 1) // EVALUATIONS
    with lineage.started() as (process,):
        steps_until(lineage, process, 0)
        # The line of a step is written before its evaluation.
        await_moment(lineage, process, lambda: lineage.step() % every == 0, 0.0005)
        time.sleep(lab.chance.uniform(0, 0.1))
        process.send(signal.SIGTERM)
        ends(lineage, process, EXIT_PREEMPTED)
    _check_saved(lineage)
    reached = progress(lineage.workdir)
    if reached.assessed:
        # The evaluation was shorter than the way of the signal.
        raise Missed
    return survived(f"abandoned the evaluation of step {lineage.step()}")


def _stop_one_of(count: int) -> Fault:
    def fault(lab: Lab) -> Outcome:
        with in_a_step(lab, count) as (lineage, running):
            lab.chance.choice(running).send(signal.SIGTERM)
            for process in running:
                ends(lineage, process, EXIT_PREEMPTED)
        return survived(_check_saved(lineage))

    return fault


stop_one_of_two = _stop_one_of(2)
stop_one_of_four = _stop_one_of(4)


def _kill_one_of(count: int) -> Fault:
    def fault(lab: Lab) -> Outcome:
        with in_a_step(lab, count) as (lineage, running):
            victim = lab.chance.choice(running)
            victim.send(signal.SIGKILL)
            others = [process for process in running if process is not victim]
            codes = [process.exit_code() for process in others]
            words = others[0].words()
        return _ended_without_one(lineage, codes, words)

    return fault


kill_one_of_two = _kill_one_of(2)
kill_one_of_four = _kill_one_of(4)


def suspend_one_of_two(lab: Lab) -> Outcome:
    """SIGSTOP to a process: the watchdog of the other one must notice it."""
    lineage = lab.lineage(2)
    with lineage.started(train__hang_seconds=_SHORT_HANG_SECONDS) as running:
        steps_until(lineage, running[0])
        victim = lab.chance.randrange(2)
        running[victim].send(signal.SIGSTOP)
        code, words = running[1 - victim].exit_code(), running[1 - victim].words()
    if code not in (0, EXIT_HUNG):
        raise Failure(f"the other process ended with {code}: {words}")
    return _ended_without_one(lineage, [code], words)


def _ended_without_one(
    lineage: Lineage, codes: list[int | None], words: str
) -> Outcome:
    if None in codes:
        raise Failure(f"a process still waits for one that is gone: {words}")
    if 0 in codes:
        lineage.done = True
        raise Missed
    return survived(f"the others ended with {codes}: {words}")
