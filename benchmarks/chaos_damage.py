"""Damage to files of checkpoints and data sets, for `chaos.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from chaos_compare import losses
from chaos_config import LARGE_FILE
from chaos_lab import Lab
from chaos_lineage import Lineage
from chaos_outcome import Fault, Outcome, refused, survived
from chaos_process import Failure, Process
from chaos_signals import resumes

from tokenrec.errors import EXIT_INPUT

# Steps of the short run that reads a damaged data set.
DATA_STEPS = 40
# Damages one of these files and says how.
Damage = Callable[[Lab, list[Path]], str]


def flip(lab: Lab, files: list[Path]) -> str:
    """Flip a bit anywhere in a file."""
    file = lab.chance.choice(files)
    data = bytearray(file.read_bytes())
    position = lab.chance.randrange(len(data))
    data[position] ^= 1 << lab.chance.randrange(8)
    file.write_bytes(data)
    return f"a bit of byte {position:,} of {len(data):,} in {file.name}"


def truncate(lab: Lab, files: list[Path]) -> str:
    """Cut off the end of a file."""
    file = lab.chance.choice(files)
    with file.open("r+b") as opened:
        opened.truncate(lab.chance.randrange(file.stat().st_size))
    return f"end of {file.name}"


def remove(lab: Lab, files: list[Path]) -> str:
    """Delete a file."""
    file = lab.chance.choice(files)
    file.unlink()
    return f"{file.name} gone"


def empty_list(lab: Lab, files: list[Path]) -> str:
    """Replace a JSON file by one that holds an empty list."""
    file = lab.chance.choice(files)
    file.write_text("[]")
    return f"{file.name} holds []"


def make_unreadable(lab: Lab, files: list[Path]) -> str:
    """Put a folder in the file's place: root can read any file, but not a folder."""
    file = lab.chance.choice(files)
    file.unlink()
    file.mkdir()
    return f"{file.name} unreadable"


def files_of(folder: Path, *, above: int = 0) -> list[Path]:
    """Files of a folder that are larger than `above` bytes, without checksum files."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.stat().st_size > above
        and path not in checksum_files(folder)
    )


def large_files_of(folder: Path) -> list[Path]:
    """Files of a checkpoint above 64 KiB."""
    return files_of(folder, above=LARGE_FILE)


def checksum_files(folder: Path) -> list[Path]:
    """The checksum files of a checkpoint."""
    return sorted(folder.glob("sums*.json"))


def in_checkpoint(
    damage: Damage,
    files: Callable[[Path], list[Path]] = files_of,
    processes: int = 1,
) -> Fault:
    """Damage the latest checkpoint, which the next start must set aside.

    Args:
      damage: the damage.
      files: lists the files of a checkpoint to choose from.
      processes: number of processes of the run.
    """

    def fault(lab: Lab) -> Outcome:
        lineage = lab.rested(processes)
        latest = lineage.checkpoints()[-1]
        choice = files(latest)
        if not choice:
            raise Failure(f"checkpoint {latest.name} has no such file")
        harmed = damage(lab, choice)
        lineage.damaged = latest
        words = resumes(lineage, f"checkpoint {latest.name} is damaged")
        if f"damaged-{latest.name}" not in lineage.set_aside():
            raise Failure(f"{harmed}: not set aside: {words}")
        _forget(lineage)
        return survived(f"{harmed}: {words}")

    return fault


def without_checksums(lab: Lab) -> Outcome:
    """Delete a checksum file: the checkpoint must be used, and get it again."""
    lineage = lab.rested()
    latest = lineage.checkpoints()[-1]
    harmed = remove(lab, checksum_files(latest))
    words = resumes(lineage, f"checkpoint {latest.name} had no checksums")
    if lineage.set_aside():
        raise Failure(f"{harmed}: {lineage.set_aside()} set aside: {words}")
    return survived(f"{harmed}: {words}")


def _forget(lineage: Lineage) -> None:
    """Delete what was set aside: the disk is small."""
    for name in lineage.set_aside():
        shutil.rmtree(lineage.workdir / "checkpoints" / name)


def in_data(damage: Damage) -> Fault:
    """Damage a data set: it must be refused, or make no difference."""

    def fault(lab: Lab) -> Outcome:
        expected = losses(lab.whole(1).workdir)
        copy, workdir = lab.new_path("copy"), lab.new_path("short")
        shutil.copytree(lab.data, copy)
        harmed = damage(lab, files_of(copy))
        line = lab.train_line(workdir, copy, train__stop_at=DATA_STEPS)
        with Process(lab, line) as process:
            code = process.exit_code()
            if code == EXIT_INPUT:
                return refused(f"{harmed}: {process.refusal(str(copy))}")
            words = process.words()
        logged = losses(workdir)
        shutil.rmtree(copy)
        shutil.rmtree(workdir, ignore_errors=True)
        same = {step: expected[step] for step in range(1, DATA_STEPS + 1)}
        if code == 0 and logged == same:
            return survived(f"{harmed}: makes no difference")
        raise Failure(f"{harmed}: exit code {code}, {words}")

    return fault
