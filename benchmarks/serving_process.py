"""A `tokenrec serve` process for benchmarks, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenrec", "jax", "numpy", "uvicorn", "httptools", "uvloop", "orjson")


class ServerProcess:
    """A server that is ready.

    Args:
      process: its process.
      port: its port.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def cpu_seconds(self) -> float:
        """Processor time of the process so far, user and system. Linux."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        user, system = fields.split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Memory of the process now. Linux."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def served(
    model: Path,
    *flags: str,
    module: str = "tokenrec",
    words: Sequence[str] = ("serve",),
) -> Iterator[ServerProcess]:
    """Run a server until the block ends.

    Args:
      model: folder of an artifact.
      flags: further flags.
      module: module that is run.
      words: its first arguments.

    Raises:
      InputError: it ended before it was ready.
    """
    command = [sys.executable, "-m", module, *words, "--model", str(model)]
    path = os.pathsep.join([str(ROOT), *sys.path])
    process = subprocess.Popen(
        [*command, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r"is ready at http://127\.0\.0\.1:(\d+)", line)
        if match is None:
            raise InputError(f"--model '{model}': the server did not start; see above")
        yield ServerProcess(process, int(match[1]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def golden_rows(model: Path) -> list[dict[str, Any]]:
    """Requests of an artifact with their scores `[C][O]`."""
    lines = (model / "golden.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
