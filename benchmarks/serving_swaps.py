"""Replace the model of a server again and again under load: no request may fail.

    python -m benchmarks.serving_swaps --model DIR --swaps 100 --out benchmarks/results/serving_swaps

Two copies of an artifact take turns behind a link. Clients send its golden requests all
the time, and compare each score with that of `tokenrec predict`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES, golden_rows, served

TOLERANCE = 1e-6


class Clients:
    """Threads that send golden requests until they are stopped.

    Args:
      port: port of the server.
      golden: requests and their scores.
      count: threads.

    Attributes:
      answers: number of right answers.
      failures: what went wrong.
    """

    def __init__(self, port: int, golden: Sequence[dict[str, Any]], count: int) -> None:
        self._port, self._golden = port, golden
        self._stop = threading.Event()
        self.answers, self.failures = 0, list[str]()
        self._threads = [
            threading.Thread(target=self._run, args=(n,)) for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the request that is under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, place: int) -> None:
        with contextlib.closing(connect(self._port)) as connection:
            while not self._stop.is_set():
                row = self._golden[place % len(self._golden)]
                place += 1
                try:
                    status, answer = ask(connection, "/v1/score", row["request"])
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return
                if status != 200:
                    self.failures.append(f"{status}: {answer}")
                    continue
                found = np.stack(list(answer["scores"].values()), 1)
                if not np.max(np.abs(found - row["scores"])) <= TOLERANCE:
                    self.failures.append("a wrong score")
                self.answers += 1


def connect(port: int) -> http.client.HTTPConnection:
    """Connect to a server on loopback."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=120)


def ask(
    connection: http.client.HTTPConnection, path: str, body: Any = None
) -> tuple[int, Any]:
    """Send a request, with or without a body; return status and answer."""
    if body is None:
        connection.request("GET", path)
    else:
        kind = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps(body), kind)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def copy_artifact(
    model: Path, folder: Path, indent: int, copy: Callable[..., Any] = shutil.copy2
) -> Path:
    """Copy an artifact; another indent makes its manifest another one."""
    shutil.copytree(model, folder, copy_function=copy)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    # It may be a link to the one that was copied.
    path.unlink()
    path.write_text(json.dumps(manifest, indent=indent))
    return folder


def point(link: Path, folder: Path) -> None:
    """Let a link lead to another folder, in one step."""
    following = link.with_name(f"{link.name}.next")
    following.symlink_to(folder)
    os.replace(following, link)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    golden = golden_rows(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copies = [copy_artifact(args.model, folder / f"m{n}", n + 1) for n in (0, 1)]
        link = folder / "current"
        link.symlink_to(copies[0])
        flags = ("--max-batch", "2", "--max-candidates", "8")
        with served(link, *flags) as server:
            clients = Clients(server.port, golden, args.clients)
            memory, begin, loads = [server.resident_bytes()], time.perf_counter(), 0
            with contextlib.closing(connect(server.port)) as connection:
                for swap in range(1, args.swaps + 1):
                    point(link, copies[swap % 2])
                    name = copies[swap % 2].name
                    while True:
                        _, listed = ask(connection, "/v1/models")
                        if listed["last_load"]["name"] == name:
                            break
                        time.sleep(0.05)
                    loads += listed["last_load"]["outcome"] == "ok"
                    memory.append(server.resident_bytes())
            seconds = time.perf_counter() - begin
            clients.stop()
            code = server.stop()
    half = len(memory) // 2
    row = {
        "swaps": loads,
        "seconds": seconds,
        "right answers": clients.answers,
        "failures": len(clients.failures),
        "MB at the start": memory[0] / 1e6,
        "MB, first half": max(memory[:half]) / 1e6,
        "MB, second half": max(memory[half:]) / 1e6,
        "exit code": code,
    }
    print(json.dumps(row), *clients.failures[:5], sep="\n")
    if args.out is not None:
        command = (
            f"python -m benchmarks.serving_swaps --model DIR --swaps {args.swaps} "
            f"--clients {args.clients} --out {args.out}"
        )
        write_result(
            args.out,
            [row],
            {},
            command,
            title="A model replaced under load",
            packages=PACKAGES,
        )
    if clients.failures or loads < args.swaps or code:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
