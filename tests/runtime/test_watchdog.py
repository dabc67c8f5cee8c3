"""A run that hangs says where and ends: in real processes, for it ends them."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from tokenrec.errors import EXIT_HUNG
from tokenrec.runtime.watchdog import Watchdog

HANGS = """
import sys, time
from pathlib import Path
from tokenrec.watchdog import Watchdog

def waiting_for_nobody():
    time.sleep(100)

workdir, index, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Watchdog(0.5, workdir, index, count) as watch:
    watch.at(f"step {7 + index}: waiting for the devices")
    waiting_for_nobody()
"""


def started(workdir: Path, index: int, count: int) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", HANGS, str(workdir), str(index), str(count)]
    return subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def test_processes_that_hang_say_where_they_stand_and_which_is_silent(
    tmp_path: Path,
) -> None:
    running = [
        started(tmp_path, index, 3) for index in range(2)
    ]  # the third was stopped, say
    for index, process in enumerate(running):
        said = process.communicate()[1]
        assert process.returncode == EXIT_HUNG
        assert (
            f"process {index} of 3 hangs: step {7 + index}: waiting for the devices"
            in said
        )
        assert "in waiting_for_nobody" in said  # the stack
        assert "process 2: no word" in said


def test_every_word_starts_the_time_anew(tmp_path: Path) -> None:
    watch = Watchdog(10, tmp_path)
    for number in range(3):
        before = time.monotonic()
        watch.at(f"step {number}")
        assert not watch.hangs(before + 9)
        assert watch.hangs(time.monotonic() + 11)


def test_leaving_it_ends_the_thread_and_leaves_no_word(tmp_path: Path) -> None:
    with Watchdog(3600, tmp_path):
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "hung").exists()
