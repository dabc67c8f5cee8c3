"""Load a server: latency, processor time of a request, and what each part of it saves.

    python -m benchmarks.serving --model DIR --seconds 10 --out benchmarks/results/serving

Each arm is a server process of its own on loopback, with the same artifact, requests
and clients: `tokenrec serve` as it is, without the prefix cache, without batches,
without both, and FastAPI with a forward per request (benchmarks/serving_peer.py).

`closed` has a fixed number of clients, each of which waits for its answer before it asks
again. `open` sends at a fixed rate with random gaps, whatever the server does, and counts
latency from the time at which a request was due. Requests are those of the artifact,
with candidates of all of them up to `--candidates`, in random order: most users come
again, as in a feed. Processor time is that of the server process alone.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import re
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES, ServerProcess, golden_rows, served

_KIND = {"content-type": "application/json"}
_OPEN_CLIENTS = 64


def make_bodies(model: Path, candidates: int) -> list[bytes]:
    """Return the golden requests of an artifact, each with this many candidates."""
    requests = [row["request"] for row in golden_rows(model)]
    columns = {
        name: [v for request in requests for v in request["candidates"][name]]
        for name in requests[0]["candidates"]
    }
    pool = len(columns["item_id"])
    bodies = []
    for number, request in enumerate(requests):
        rows = [(number + place) % pool for place in range(candidates)]
        chosen = {name: [v[row] for row in rows] for name, v in columns.items()}
        bodies.append(json.dumps(request | {"candidates": chosen}).encode())
    return bodies


def closed_loop(
    port: int, bodies: Sequence[bytes], clients: int, seconds: float
) -> list[float]:
    """Return the latencies of clients that wait for each answer."""
    end = time.perf_counter() + seconds

    def run(client: int, ask: Any, latencies: list[float]) -> None:
        draw = np.random.default_rng(client)
        while (begin := time.perf_counter()) < end:
            ask(bodies[int(draw.integers(len(bodies)))])
            latencies.append(time.perf_counter() - begin)

    return _in_threads(port, clients, run)


def open_loop(
    port: int, bodies: Sequence[bytes], rate: float, seconds: float
) -> list[float]:
    """Return the latencies of requests that are due at random times of a fixed rate."""
    draw = np.random.default_rng(0)
    due = np.cumsum(draw.exponential(1 / rate, max(1, round(rate * seconds))))
    chosen = draw.integers(len(bodies), size=len(due))
    numbers, start = itertools.count(), time.perf_counter() + 0.1
    lock = threading.Lock()

    def run(client: int, ask: Any, latencies: list[float]) -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= len(due):
                return
            begin = start + due[number]
            time.sleep(max(0.0, begin - time.perf_counter()))
            ask(bodies[chosen[number]])
            latencies.append(time.perf_counter() - begin)

    return _in_threads(port, _OPEN_CLIENTS, run)


def _in_threads(port: int, clients: int, run: Any) -> list[float]:
    results: list[list[float]] = [[] for _ in range(clients)]
    errors: list[BaseException] = []

    def work(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with contextlib.closing(connection):

            def ask(body: bytes) -> None:
                connection.request("POST", "/v1/score", body, _KIND)
                answer = connection.getresponse()
                text = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {text[:200]!r}")

            try:
                run(client, ask, results[client])
            except BaseException as error:  # noqa: BLE001 - raised by the main thread
                errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(itertools.chain(*results))


def stage_means(port: int) -> dict[str, float]:
    """Return the sums and counts of the stages, in milliseconds, of a tokenrec server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    pattern = r'^tokenrec_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)$'
    return {
        f"{stage} {what}": float(number)
        for what, stage, number in re.findall(pattern, page, re.MULTILINE)
    } | {
        name: float(number)
        for name, number in re.findall(
            r"^tokenrec_(prefix_hits_total|prefix_misses_total|batch_requests_sum|"
            r"batch_requests_count|compiles_since_ready) (\S+)$",
            page,
            re.MULTILINE,
        )
    }


def arms(model: Path, candidates: int, batch: int) -> Iterator[tuple[str, Any]]:
    """Yield the name of each arm and its server, which is not started yet."""
    most = ("--max-candidates", str(candidates))
    for name, cache, size in (
        ("tokenrec serve", "512", batch),
        ("no prefix cache", "0", batch),
        ("no batches", "512", 1),
        ("neither", "0", 1),
    ):
        flags = (*most, "--cache-mb", cache, "--max-batch", str(size))
        yield name, served(model, *flags)
    with contextlib.suppress(ModuleNotFoundError):
        import fastapi  # noqa: F401 - measured where it is installed

        peer = served(model, *most, module="benchmarks.serving_peer", words=())
        yield "FastAPI, a forward per request", peer


def measure(
    server: ServerProcess, loop: str, run: Any, is_peer: bool
) -> dict[str, Any]:
    """Return a row of one loop on one server."""
    before = {} if is_peer else stage_means(server.port)
    cpu, begin = server.cpu_seconds(), time.perf_counter()
    latencies = run()
    seconds, cpu = time.perf_counter() - begin, server.cpu_seconds() - cpu
    count = len(latencies)
    row: dict[str, Any] = {
        "loop": loop,
        "requests": count,
        "requests/s": count / seconds,
        "CPU ms a request": 1e3 * cpu / count,
        "p50 ms": 1e3 * statistics.median(latencies),
        "p99 ms": 1e3 * latencies[min(count - 1, int(count * 0.99))],
    }
    if is_peer:
        return row
    after = stage_means(server.port)
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    row["batch"] = spent["batch_requests_sum"] / spent["batch_requests_count"]
    looked = spent["prefix_hits_total"] + spent["prefix_misses_total"]
    row["hits"] = spent["prefix_hits_total"] / looked if looked else None
    row["compiles"] = int(after["compiles_since_ready"])
    for stage in ("parse", "encode", "queue", "prefill", "extend"):
        times = spent.get(f"{stage} count", 0)
        row[f"{stage} ms"] = 1e3 * spent[f"{stage} sum"] / times if times else None
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8, help="of the closed loop")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5, help="of each loop")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    bodies = make_bodies(args.model, args.candidates)
    rows = []
    for name, process in arms(args.model, args.candidates, args.max_batch):
        with process as server:
            # Once over all users, so that every arm begins alike.
            closed_loop(server.port, bodies, 1, args.seconds / 5)
            is_peer = name.startswith("FastAPI")
            loops = {
                f"closed, {args.clients} clients": lambda port=server.port: closed_loop(
                    port, bodies, args.clients, args.seconds
                ),
                f"open, {args.rate:g}/s": lambda port=server.port: open_loop(
                    port, bodies, args.rate, args.seconds
                ),
            }
            for loop, run in loops.items():
                rows.append({"arm": name} | measure(server, loop, run, is_peer))
                print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        settings = {
            "candidates": args.candidates,
            "users": len(bodies),
            "bytes of a body": round(statistics.mean(map(len, bodies))),
            "seconds": args.seconds,
        }
        command = (
            f"python -m benchmarks.serving --model DIR --candidates {args.candidates} "
            f"--clients {args.clients} --max-batch {args.max_batch} --rate "
            f"{args.rate:g} --seconds {args.seconds:g} --out {args.out}"
        )
        write_result(
            args.out,
            rows,
            settings,
            command,
            title="Load on a server",
            packages=(*PACKAGES, "fastapi"),
        )


if __name__ == "__main__":
    run_script(main)
