"""Lost output never ends a program; the programs are real processes, for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[2]

# Prints in every way that a run does, more than a pipe or a buffer holds, and then writes
# its result to the file that it is given.
PRINTS = """
import logging, os, sys, threading
from pathlib import Path
from tqdm import tqdm
from tokenrec.runtime import std_streams

std_streams.protect()
result = Path(sys.argv[1]).open("w")
logging.basicConfig(stream=sys.stderr)
for number in range(2_000):
    print("message", number, "x" * 100, file=sys.stderr, flush=True)
    print("result", number, "x" * 100)
    sys.stdout.buffer.write(b"bytes")
    logging.error("logged")
    # As C++ libraries print: a dead reader must not kill the process there either.
    try:
        os.write(2, b"library")
    except OSError:
        pass
tqdm.write("above a bar", file=sys.stderr)
for _ in tqdm(range(3), file=sys.stderr):
    pass
thread = threading.Thread(target=print, args=("thread",), kwargs={"file": sys.stderr})
thread.start()
thread.join()
print("the end", file=sys.__stderr__)
lost = std_streams.lost_output()
result.write(f"done {lost}")
"""


def start(
    tmp_path: Path, redirection: str, *flags: str, code: str = PRINTS
) -> tuple[int, str, str]:
    """Run the program in a shell; return its exit code, its result and all output."""
    script, result = tmp_path / "program.py", tmp_path / "result"
    script.write_text(code)
    words = " ".join([sys.executable, *flags, str(script), str(result)])
    line = f"{{ {words}; echo $? > {tmp_path}/code; }} {redirection}"
    done = subprocess.run(
        ["bash", "-c", line],
        env=os.environ | {"PYTHONPATH": str(CLONE)},
        capture_output=True,
        text=True,
        check=False,
    )
    code_text = (tmp_path / "code").read_text()
    return int(code_text), result.read_text(), done.stdout + done.stderr


@pytest.mark.parametrize("flags", [(), ("-u",)])
@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        ("2>&1 | head -n 2", None),
        ("2> >(head -n 2 >&2) | cat > /dev/null", None),
        ("| head -n 2", None),
        ("> /dev/full 2>&1", 28),
        ("2> /dev/full > /dev/null", None),
        ("> /dev/null 2>&-", None),
        (">&- 2>&-", None),
        (">&- 2>&- <&-", None),
    ],
)
def test_lost_output_neither_ends_the_program_nor_reaches_its_files(
    tmp_path: Path, redirection: str, lost: int | None, flags: tuple[str, ...]
) -> None:
    code, result, output = start(tmp_path, redirection, *flags)
    # 120: Python could not flush a stream at its exit.
    assert (code, result) == (0, f"done {lost}")
    assert "Error" not in output
    assert "Exception ignored" not in output


def test_text_that_is_read_arrives_whole_and_in_order(tmp_path: Path) -> None:
    code, _, output = start(tmp_path, "2> /dev/null")
    assert code == 0
    results = [line for line in output.splitlines() if "result" in line]
    assert len(results) == 2_000
    assert "thread" not in output


def test_a_pipe_that_is_full_and_does_not_block_loses_nothing(tmp_path: Path) -> None:
    code = PRINTS.replace(
        "std_streams.protect()", "std_streams.protect(); os.set_blocking(1, False)"
    )
    exit_code, _, output = start(tmp_path, "2> /dev/null | (sleep 0.5; cat)", code=code)
    assert exit_code == 0
    assert output.count("result") == 2_000


def test_a_full_disk_that_has_room_again_gets_the_later_text(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from tokenrec.runtime import std_streams

std_streams.protect()
print("first", file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, (6, resource.RLIM_INFINITY))
print("lost", file=sys.stderr)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
print("later", file=sys.stderr)
Path(sys.argv[1]).write_text("done")
"""
    exit_code, result, _ = start(tmp_path, f"2> {tmp_path}/log", code=code)
    assert (exit_code, result) == (0, "done")
    assert (tmp_path / "log").read_text() == "first\nlater\n"


def test_sigpipe_stays_ignored(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from tokenrec.runtime import std_streams

std_streams.protect()
os.kill(os.getpid(), signal.SIGPIPE)
Path(sys.argv[1]).write_text("alive")
"""
    assert start(tmp_path, "", code=code)[:2] == (0, "alive")
