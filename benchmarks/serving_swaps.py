"""Replace the model of a server again and again under load: no request may fail.

    python -m benchmarks.serving_swaps --model DIR --swaps 100 --out benchmarks/results/serving_swaps

Two copies of an artifact take turns behind a link. Clients send its golden requests all
the time, and compare each score with that of `tokenrec predict`.

Then the server is killed with SIGKILL, at a random moment after the link has moved, and
another one is started: it must come up with the model of the link and its scores.
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
                failure = _failure(row, status, answer)
                if failure:
                    self.failures.append(failure)
                else:
                    self.answers += 1


class AfterKills:
    """Answers of servers that were started before and after a kill."""

    def __init__(self) -> None:
        self.answers, self.failures = 0, list[str]()

    def check(self, port: int, golden: Sequence[dict[str, Any]]) -> None:
        """Ask each golden request once."""
        with contextlib.closing(connect(port)) as connection:
            for row in golden:
                status, answer = ask(connection, "/v1/score", row["request"])
                failure = _failure(row, status, answer)
                if failure:
                    self.failures.append(failure)
                else:
                    self.answers += 1


def _failure(row: dict[str, Any], status: int, answer: Any) -> str:
    """What is wrong with an answer; "" if nothing is."""
    if status != 200:
        return f"{status}: {answer}"
    found = np.stack(list(answer["scores"].values()), 1)
    right = np.max(np.abs(found - row["scores"])) <= TOLERANCE
    return "" if right else "a wrong score"


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


def kill_during_swaps(
    link: Path,
    copies: Sequence[Path],
    golden: Sequence[dict[str, Any]],
    flags: Sequence[str],
    kills: int,
    swap_seconds: float,
) -> AfterKills:
    """Kill servers at random moments of a swap, and ask those that come after them."""
    after, draw = AfterKills(), np.random.default_rng(0)
    for number in range(kills):
        with served(link, *flags) as server:
            after.check(server.port, golden)
            point(link, copies[number % 2])
            # The watcher looks at the link within a second.
            time.sleep(draw.uniform(0.0, 1.0 + swap_seconds))
            server.process.kill()
        with (
            served(link, *flags) as server,
            contextlib.closing(connect(server.port)) as connection,
        ):
            name = ask(connection, "/v1/models")[1]["models"][0]["name"]
            if name != copies[number % 2].name:
                after.failures.append(f"{name} serves after kill {number}")
            after.check(server.port, golden)
    return after


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
    parser.add_argument("--kills", type=int, default=5, help="during a swap")
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
        after = kill_during_swaps(
            link, copies, golden, flags, args.kills, seconds / args.swaps
        )
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
        "kills": args.kills,
        "right answers after them": after.answers,
        "failures after them": len(after.failures),
    }
    failures = clients.failures + after.failures
    print(json.dumps(row), *failures[:5], sep="\n")
    if args.out is not None:
        command = (
            f"python -m benchmarks.serving_swaps --model DIR --swaps {args.swaps} "
            f"--clients {args.clients} --kills {args.kills} --out {args.out}"
        )
        write_result(
            args.out,
            [row],
            {},
            command,
            title="A model replaced under load",
            packages=PACKAGES,
        )
    if failures or loads < args.swaps or code:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
