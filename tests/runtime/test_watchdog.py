"""The watchdog reports where a run hangs, and ends it; processes are real, for that."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tokenrec.errors import EXIT_HUNG
from tokenrec.runtime.watchdog import Watchdog

HANGS = """
import sys, time
from pathlib import Path
from tokenrec.runtime.watchdog import Watchdog

def waiting_for_nobody():
    time.sleep(100)

workdir, index, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Watchdog(0.5, workdir, index, count) as watchdog:
    watchdog.enter_phase(f"step {7 + index}: waiting for the devices")
    waiting_for_nobody()
"""


def started(workdir: Path, index: int, count: int) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HANGS, str(workdir), str(index), str(count)]
    return subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def test_processes_that_hang_report_their_phase_and_which_one_is_silent(
    tmp_path: Path,
) -> None:
    # The third process of the run was stopped.
    running = [started(tmp_path, index, 3) for index in range(2)]
    for index, process in enumerate(running):
        errors = process.communicate()[1]
        assert process.returncode == EXIT_HUNG
        phase = f"step {7 + index}: waiting for the devices"
        assert f"process {index} of 3 hangs: {phase}" in errors
        assert "in waiting_for_nobody" in errors  # the stack
        assert "process 2: no report" in errors


def test_every_phase_starts_the_time_anew(tmp_path: Path) -> None:
    watchdog = Watchdog(10, tmp_path)
    for number in range(3):
        before = time.monotonic()
        watchdog.enter_phase(f"step {number}")
        assert not watchdog.is_hung(before + 9)
        assert watchdog.is_hung(time.monotonic() + 11)


def test_leaving_the_watchdog_ends_its_thread_and_leaves_no_report(
    tmp_path: Path,
) -> None:
    with Watchdog(3600, tmp_path):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "hung").exists()


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a disk that is always full"
)
def test_a_process_that_hangs_ends_even_if_it_cannot_print(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-c", HANGS, str(tmp_path), "0", "1"],
            stderr=full,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    assert process.returncode == EXIT_HUNG
