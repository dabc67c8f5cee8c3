"""A server under slow clients, a full queue and a memory limit: no wrong score.

    python -m benchmarks.serving_pressure --model DIR --out benchmarks/results/serving_pressure

    slow clients   `--slow` connections send a byte of headers, or of a body, each second,
                   until the server closes them; sound requests go on beside them
    full queue     64 clients ask a server whose queue has 4 places
    memory         the address space of the server is limited to what it has and so many
                   MB more (RLIMIT_AS, as `ulimit -v`); sound requests of ever new users,
                   so that the prefix cache grows, and bodies of 8 MB. Then without a
                   limit again, unless the process has ended: a probe restarts it then

Every answer of 200 is compared with `tokenrec predict`. Linux.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import json
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving_faults import exchange, http_message
from benchmarks.serving_process import PACKAGES, ServerProcess, golden_rows, served

TOLERANCE = 1e-6
_SLOW = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
_BODY = _SLOW + b"content-length: 1000000\r\n\r\n"
_PAUSE_SECONDS = 1.0

type Ends = collections.Counter[str]
type Case = Callable[[ServerProcess, Sequence[dict[str, Any]]], Ends]


def ask(port: int, row: dict[str, Any], ends: Ends) -> None:
    """Send a request, and count how it ends."""
    try:
        message = http_message(json.dumps(row["request"]).encode())
        status, body = exchange(port, message, 120)
    except OSError:
        ends["closed"] += 1
        return
    if status != 200:
        ends[_refusal(status, body) if status else "closed"] += 1
        return
    found = np.stack(list(json.loads(body)["scores"].values()), 1)
    right = np.max(np.abs(found - row["scores"])) <= TOLERANCE
    ends["right" if right else "wrong"] += 1


def _refusal(status: int, body: bytes) -> str:
    """The status, and what the server calls the error; what is no JSON has no name."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f"{status} {json.loads(body)['error']['kind']}"
    return str(status)


def slow_clients(
    server: ServerProcess, golden: Sequence[dict[str, Any]], count: int
) -> Ends:
    """Hold connections open, a byte a second, while sound requests go on."""
    ends: Ends = collections.Counter()
    with contextlib.ExitStack() as stack:
        waiting = []
        for number in range(count):
            client = socket.create_connection(("127.0.0.1", server.port), 60)
            stack.enter_context(contextlib.closing(client))
            client.sendall(_BODY if number % 2 else _SLOW)
            waiting.append(client)
        number = 0
        while waiting:
            due = time.monotonic() + _PAUSE_SECONDS
            while time.monotonic() < due:
                ask(server.port, golden[number % len(golden)], ends)
                number += 1
            waiting = [client for client in waiting if _is_open(client)]
    ends["slow clients closed"] = count
    return ends


def _is_open(client: socket.socket) -> bool:
    """Send a byte; return whether the server still takes it."""
    try:
        client.sendall(b"x")
        client.setblocking(False)
        # An answer of 408, or the end.
        client.recv(4096)
    except BlockingIOError:
        client.setblocking(True)
        return True
    except OSError:
        return False
    return False


def full_queue(
    server: ServerProcess, golden: Sequence[dict[str, Any]], clients: int
) -> Ends:
    """Ask from many threads at once."""
    ends = [collections.Counter[str]() for _ in range(clients)]

    def run(place: int) -> None:
        for turn in range(10):
            ask(server.port, golden[(place + turn) % len(golden)], ends[place])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(ends, collections.Counter())


def memory_limit(
    server: ServerProcess, golden: Sequence[dict[str, Any]], megabytes: int
) -> Ends:
    """Ask while the server gets hardly any more memory, and after that."""
    ends: Ends = collections.Counter()
    pid = server.process.pid
    _limit(pid, _address_space(pid) + megabytes * 1_000_000)
    # A number that no model reads to the end: what it costs is memory.
    large = {"request": {"user": {"user_id": "x" * 8_000_000}}, "scores": []}
    for number in range(400):
        row = golden[number % len(golden)]
        ask(server.port, _of_another(row, number), ends)
        if number % 20 == 0:
            ask(server.port, large, ends)
        if server.process.poll() is not None:
            ends["the process ended"] = 1
            return ends
    _limit(pid, resource.RLIM_INFINITY)
    after: Ends = collections.Counter()
    for row in golden:
        ask(server.port, row, after)
    ends["right, limit lifted"] = after.pop("right", 0)
    for name, number in after.items():
        ends[f"{name}, limit lifted"] = number
    return ends


def _of_another(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The same request with a prefix of its own: the name of the user is part of it."""
    request = copy.copy(row["request"])
    request["user"] = request["user"] | {"user_id": -1 - number}
    return row | {"request": request}


def _limit(pid: int, limit: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _address_space(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def cases(args: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...], Case]]:
    """Yield the name of each case, flags of its server, and what is done to it."""
    one = ("--max-batch", "1", "--max-candidates", "24")
    yield "slow clients", one, functools.partial(slow_clients, count=args.slow)
    yield (
        "full queue",
        (*one, "--queue", "4"),
        functools.partial(full_queue, clients=64),
    )
    for megabytes in args.megabytes:
        run = functools.partial(memory_limit, megabytes=megabytes)
        yield f"memory, {megabytes} MB more", one, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--slow", type=int, default=300, help="slow clients")
    parser.add_argument("--megabytes", nargs="*", type=int, default=[16, 4, 0])
    parser.add_argument("--only", help="part of the name of the cases to run")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    golden = golden_rows(args.model)
    rows, failures = [], 0
    for name, flags, run in cases(args):
        if args.only and args.only not in name:
            continue
        with served(args.model, *flags) as server:
            ends = run(server, golden)
            code = server.process.poll()
            if code is None:
                ask(server.port, golden[0], last := collections.Counter())
                failures += last["right"] != 1
                code = server.stop()
        failures += ends["wrong"]
        listed = ", ".join(f"{number:,} {end}" for end, number in sorted(ends.items()))
        rows.append(
            {"case": name, "ends": listed, "wrong": ends["wrong"], "exit": code}
        )
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {"slow clients": args.slow},
            f"python -m benchmarks.serving_pressure --model DIR --out {args.out}",
            title="A server under pressure",
            packages=PACKAGES,
        )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
