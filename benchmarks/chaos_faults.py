"""Faults of `chaos.py`: each disturbs a real process or file once, and judges the end."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from chaos_lab import PATIENCE, Lab, Lineage, Process, losses

from tokenrec.errors import EXIT_HUNG, EXIT_INPUT, EXIT_PREEMPTED

# Steps of the short run that reads a damaged data set.
DATA_STEPS = 40


class Outcome(NamedTuple):
    """Outcome of a fault.

    Attributes:
      ended: "survived", "refused_clearly" or "failed".
      words: what happened, or the last lines of the process.
    """

    ended: str
    words: str


Fault = Callable[[Lab], Outcome]
SURVIVED = Outcome("survived", "")


def _survived(words: str = "") -> Outcome:
    return Outcome("survived", words)


def _failed(words: str) -> Outcome:
    return Outcome("failed", words)


def _resumes(lineage: Lineage, message: str = "") -> Outcome:
    """Rerun the command, which must make a step; then kill it.

    The run is compared with the undisturbed one when it has reached its end.

    Args:
      lineage: the disturbed run.
      message: text that must be on stderr; empty for none.
    """
    with lineage.started() as running:
        first_step = lineage.step()
        logged = losses(lineage.workdir)
        moved = running[0].wait_until(lambda: losses(lineage.workdir) != logged)
        if not moved:
            code = running[0].exit_code()
            lineage.done = code == 0
            if not lineage.done:
                return _failed(
                    f"started again at step {first_step}, it ended with {code}: "
                    f"{running[0].words()}"
                )
        words = running[0].words()
        if message and message not in words:
            return _failed(f"'{message}' is not in its output: {words}")
    return _survived(words if message else "")


def _disturbed(
    lab: Lab, when: Callable[[Lineage, Process], bool], signals: Sequence[int]
) -> Outcome | Lineage:
    """Send signals to a run of one process and wait for its end.

    Args:
      lab: the lab.
      when: waits for the moment of the signals; False if the process ended before.
      signals: sent one after another; the last one decides the exit code.

    Returns:
      The run, or a failure.
    """
    while True:
        lineage = lab.lineage()
        with lineage.started() as (process,):
            if not when(lineage, process):
                # The run may have reached its last step first: try the next one.
                if process.popen.poll() == 0:
                    lineage.done = True
                    continue
                return _failed(
                    f"ended with {process.popen.poll()} before the fault: {process.words()}"
                )
            for number in signals:
                process.popen.send_signal(number)
            code = process.exit_code()
            if code == 0:
                lineage.done = True
                continue
        expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: EXIT_PREEMPTED}[
            signal.Signals(signals[-1])
        ]
        if code != expected:
            return _failed(f"exit code {code}, not {expected}: {process.words()}")
        return lineage


def _in_a_step(lineage: Lineage, process: Process) -> bool:
    # The log is cut back to the checkpoint first, and may grow to the same step again.
    first_step = lineage.step()
    if not process.wait_until(lambda: lineage.step() > first_step):
        return False
    time.sleep(lineage.lab.chance.uniform(0, 1.0))
    return process.popen.poll() is None


def _at_start(lineage: Lineage, process: Process) -> bool:
    time.sleep(lineage.lab.chance.uniform(0, 6.0))
    return process.popen.poll() is None


def _in_a_save(lineage: Lineage, process: Process) -> bool:
    if not _in_a_step(lineage, process) or not process.wait_until(
        lineage.saving, 0.0005
    ):
        return False
    time.sleep(lineage.lab.chance.uniform(0, 0.03))
    return process.popen.poll() is None


def _killed(when: Callable[[Lineage, Process], bool]) -> Fault:
    def fault(lab: Lab) -> Outcome:
        lineage = _disturbed(lab, when, [signal.SIGKILL])
        return lineage if isinstance(lineage, Outcome) else SURVIVED

    return fault


def _preempted(lab: Lab) -> Outcome:
    lineage = _disturbed(lab, _in_a_step, [signal.SIGTERM])
    if isinstance(lineage, Outcome):
        return lineage
    saved = int(lineage.checkpoints()[-1].name)
    if saved != lineage.step():
        return _failed(
            f"stopped by SIGTERM at step {lineage.step()}, but the last checkpoint is {saved}"
        )
    return _survived(f"saved step {saved}")


def _damaged_checkpoint(damage: Callable[[Lab, Path], str]) -> Fault:
    def fault(lab: Lab) -> Outcome:
        # SIGTERM saves a checkpoint with the checksums of its files.
        lineage = _disturbed(lab, _in_a_step, [signal.SIGTERM])
        if isinstance(lineage, Outcome):
            return lineage
        latest = lineage.checkpoints()[-1]
        harmed = damage(lab, latest)
        outcome = _resumes(lineage, f"checkpoint {latest.name} is damaged")
        return outcome._replace(words=f"{harmed}: {outcome.words}")

    return fault


def _flip(lab: Lab, folder: Path) -> str:
    file = _some_file(lab, folder)
    data = bytearray(file.read_bytes())
    position = lab.chance.randrange(len(data))
    data[position] ^= 1 << lab.chance.randrange(8)
    file.write_bytes(data)
    return f"one bit of {file.name}"


def _truncate(lab: Lab, folder: Path) -> str:
    file = _some_file(lab, folder)
    with file.open("r+b") as opened:
        opened.truncate(lab.chance.randrange(file.stat().st_size))
    return f"end of {file.name}"


def _remove(lab: Lab, folder: Path) -> str:
    file = _some_file(lab, folder)
    file.unlink()
    return f"{file.name} gone"


def _unreadable(lab: Lab, folder: Path) -> str:
    """Put a folder in the file's place: root can read any file, but not a folder."""
    file = _some_file(lab, folder)
    file.unlink()
    file.mkdir()
    return f"{file.name} unreadable"


def _some_file(lab: Lab, folder: Path) -> Path:
    """Draw a file, all with equal probability.

    The checksum files of a checkpoint are left alone: without them no damage is known.
    """
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size and not path.match("sums.*.json")
    ]
    return lab.chance.choice(sorted(files))


def _damaged_data(damage: Callable[[Lab, Path], str]) -> Fault:
    def fault(lab: Lab) -> Outcome:
        lab.started += 1
        copy = lab.folder / f"copy-{lab.started}"
        workdir = lab.folder / f"short-{lab.started}"
        shutil.copytree(lab.data, copy)
        harmed = damage(lab, copy)
        with Process(
            lab, lab.train_line(workdir, copy, train__stop_at=DATA_STEPS)
        ) as process:
            code = process.exit_code()
            words = process.words()
        logged = losses(workdir)
        shutil.rmtree(copy)
        shutil.rmtree(workdir, ignore_errors=True)
        if code == EXIT_INPUT and str(copy) in words:
            return Outcome("refused_clearly", f"{harmed}: {words}")
        expected = losses(lab.whole(1).workdir)
        if code == 0 and logged == {
            step: expected[step] for step in range(1, DATA_STEPS + 1)
        }:
            return _survived(f"{harmed}: makes no difference")
        return _failed(f"{harmed}: exit code {code}, {words}")

    return fault


def _full_disk(lab: Lab) -> Outcome:
    assert lab.disk is not None
    while True:
        lineage = lab.lineage()
        filler = lab.disk / "filler"
        with lineage.started() as (process,):
            if not _in_a_step(lineage, process):
                lineage.done = process.popen.poll() == 0
                if lineage.done:
                    continue
                return _failed(f"ended before the fault: {process.words()}")
            # The error that the disk is full is the fault.
            with (
                filler.open("wb", buffering=0) as file,
                contextlib.suppress(OSError),
            ):
                while True:
                    file.write(bytes(1 << 16))
            code = process.exit_code()
            words = process.words()
        filler.unlink()
        if code == 0:
            lineage.done = True
            continue
        if code != EXIT_INPUT or str(lab.disk) not in words:
            return _failed(f"exit code {code}: {words}")
        return _resumes(lineage)._replace(words=words)


def _of_two(number: signal.Signals) -> Fault:
    def fault(lab: Lab) -> Outcome:
        while True:
            lineage = lab.lineage(2)
            victim = lab.chance.randrange(2)
            with lineage.started() as running:
                if not _in_a_step(lineage, running[0]):
                    if running[0].exit_code() == 0:
                        lineage.done = True
                        continue
                    return _failed(f"ended before the fault: {running[0].words()}")
                running[victim].popen.send_signal(number)
                other = 1 - victim
                code = running[other].exit_code()
                words = running[other].words()
            if code == 0:
                lineage.done = True
                continue
            if code is None:
                return _failed(f"process {other} still waits after {PATIENCE} s")
            # The watchdog must notice a process that is stopped but not dead.
            if number == signal.SIGSTOP and code != EXIT_HUNG:
                return _failed(f"process {other} ended with {code}: {words}")
            return _survived(f"process {other} ended with {code}: {words}")

    return fault


def _preempted_two(lab: Lab) -> Outcome:
    while True:
        lineage = lab.lineage(2)
        with lineage.started() as running:
            if not _in_a_step(lineage, running[0]):
                if running[0].exit_code() == 0:
                    lineage.done = True
                    continue
                return _failed(f"ended before the fault: {running[0].words()}")
            running[lab.chance.randrange(2)].popen.send_signal(signal.SIGTERM)
            codes = [process.exit_code() for process in running]
        if codes == [0, 0]:
            lineage.done = True
            continue
        if codes != [EXIT_PREEMPTED] * 2:
            return _failed(
                f"exit codes {codes}: {running[0].words()} {running[1].words()}"
            )
        return _survived(f"saved step {lineage.checkpoints()[-1].name}")


def _killed_prepare(lab: Lab) -> Outcome:
    lab.started += 1
    out = lab.folder / f"prepared-{lab.started}"
    with Process(lab, lab.prepare_line(out)) as process:
        time.sleep(lab.chance.uniform(0, 2.0))
        process.popen.send_signal(signal.SIGKILL)
        process.exit_code()
    if out.exists() and _contents(out) != _contents(lab.data):
        return _failed("a killed prepare left part of a data set under its name")
    again = [*lab.prepare_line(out), "--overwrite"]
    with Process(lab, again) as process:
        code = process.exit_code()
    same = code == 0 and _contents(out) == _contents(lab.data)
    left = [path.name for path in lab.folder.glob(f".*{out.name}*")]
    shutil.rmtree(out, ignore_errors=True)
    if not same:
        return _failed(f"exit code {code}: {process.words()}")
    return _survived(f"left {left}" if left else "")


def _killed_predict(lab: Lab) -> Outcome:
    lab.started += 1
    outs = [
        lab.folder / f"scores-{lab.started}-{name}.parquet"
        for name in ("killed", "whole")
    ]
    lines = [
        [
            "predict",
            f"--workdir={lab.whole(1).workdir}",
            "--split=valid",
            "--checkpoint=latest",
            f"--out={out}",
        ]
        for out in outs
    ]
    with Process(lab, lines[0]) as process:
        time.sleep(lab.chance.uniform(0, 9.0))
        process.popen.send_signal(signal.SIGKILL)
        process.exit_code()
    lab.run(lines[1])
    if outs[0].exists() and outs[0].read_bytes() != outs[1].read_bytes():
        return _failed("a killed predict left part of its output under its name")
    lab.run(lines[0])
    same = outs[0].read_bytes() == outs[1].read_bytes()
    return SURVIVED if same else _failed("predict after a kill differs")


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


KINDS: dict[str, Fault] = {
    "kill in a step": _killed(_in_a_step),
    "kill at the start": _killed(_at_start),
    "kill in a save": _killed(_in_a_save),
    "SIGTERM": _preempted,
    "SIGTERM of one of two": _preempted_two,
    "SIGSTOP of one of two": _of_two(signal.SIGSTOP),
    "kill of one of two": _of_two(signal.SIGKILL),
    "bit of a checkpoint": _damaged_checkpoint(_flip),
    "end of a checkpoint": _damaged_checkpoint(_truncate),
    "file of a checkpoint gone": _damaged_checkpoint(_remove),
    "full disk": _full_disk,
    "bit of the data": _damaged_data(_flip),
    "end of the data": _damaged_data(_truncate),
    "unreadable data": _damaged_data(_unreadable),
    "kill in prepare": _killed_prepare,
    "kill in predict": _killed_predict,
}


def usable_kinds(kinds: Sequence[str], lab: Lab) -> list[str]:
    """Leave out the full disk if none can be mounted, and print that."""
    if lab.disk is None and "full disk" in kinds:
        print("full disk: left out, because this user may not mount a file system")
        return [kind for kind in kinds if kind != "full disk"]
    return list(kinds)
