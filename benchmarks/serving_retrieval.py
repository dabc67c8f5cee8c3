"""Ask servers of retrieval artifacts for items: processor time and latency of a request.

    python -m benchmarks.serving_retrieval --model next_item=DIR generation=DIR --out STEM

Each model has two server processes, one that keeps prefixes and one that keeps none. The
requests are the golden ones of the artifact, in turn, by one client that waits for each
answer: first as they are, then with the ten best items excluded, which makes the server
search among allowed items alone. All users have come once before the clock starts, so
the server that keeps prefixes holds all of them. Every answer is compared with the golden
one. Processor time is that of the server process.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving import stage_means
from benchmarks.serving_process import PACKAGES, ServerProcess, golden_rows, served

_KIND = {"content-type": "application/json"}
_STAGES = ("parse", "encode", "queue", "prefill", "retrieve")
# Relative, of numbers above 1: a batch of another size rounds otherwise.
_TOLERANCE = 1e-5


@contextlib.contextmanager
def connected(port: int) -> Iterator[http.client.HTTPConnection]:
    """Connect to a server of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        yield connection


def ask(connection: http.client.HTTPConnection, request: dict[str, Any]) -> Any:
    """Ask for items.

    Raises:
      RuntimeError: there is no answer.
    """
    connection.request("POST", "/v1/retrieve", json.dumps(request), _KIND)
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text[:200]!r}")
    return json.loads(text)


def check(row: dict[str, Any], found: dict[str, Any]) -> None:
    """Check an answer: golden scores, and the golden items but for ties.

    Raises:
      RuntimeError: it is another one.
    """
    wanted = np.array(row["scores"][: len(found["scores"])])
    apart = np.abs(wanted - found["scores"]) / np.maximum(1.0, np.abs(wanted))
    moved = sum(a != b for a, b in zip(row["items"], found["items"], strict=False))
    if not apart.max(initial=0.0) <= _TOLERANCE or moved > 2:
        raise RuntimeError(f"an answer differs: {apart.max()}, {moved} items moved")


def measure(
    server: ServerProcess, rows: Sequence[dict[str, Any]], count: int, masks: bool
) -> dict[str, Any]:
    """Ask `count` times; return what it cost."""
    latencies = []
    with connected(server.port) as connection:
        before = stage_means(server.port)
        cpu = server.cpu_seconds()
        for number in range(count):
            row = rows[number % len(rows)]
            request = row["request"] | {"k": 10}
            if masks:
                request["exclude"] = row["items"][:10]
            begin = time.perf_counter()
            found = ask(connection, request)
            latencies.append(time.perf_counter() - begin)
            if masks and set(found["items"]) & set(request["exclude"]):
                raise RuntimeError("an item is in the answer that was excluded")
            if not masks:
                check(row, found)
        cpu = server.cpu_seconds() - cpu
    after = stage_means(server.port)
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    result: dict[str, Any] = {
        "requests": count,
        "CPU ms a request": 1e3 * cpu / count,
        "p50 ms": 1e3 * statistics.median(latencies),
        "hits": spent["prefix_hits_total"] / count,
        "compiles": int(after["compiles_since_ready"]),
    }
    for stage in _STAGES:
        times = spent.get(f"{stage} count", 0)
        result[f"{stage} ms"] = 1e3 * spent[f"{stage} sum"] / times if times else None
    return result


def measure_model(
    name: str, model: Path, count: int, flags: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model."""
    manifest = json.loads((model / "manifest.json").read_text())
    rows = golden_rows(model)
    for cache in ("512", "0"):
        with served(model, "--cache-mb", cache, *flags) as server:
            measure(server, rows, len(rows), masks=False)
            for masks in (False, True):
                yield {
                    "model": name,
                    "head": manifest["head"],
                    "items": manifest["items"],
                    "events": manifest["events"],
                    "prefixes": "kept" if cache != "0" else "none",
                    "excluded": 10 if masks else 0,
                } | measure(server, rows, count, masks)


def named_path(text: str) -> tuple[str, Path]:
    """Parse NAME=DIR.

    >>> named_path("generation=models/generation")[0]
    'generation'
    """
    name, _, path = text.partition("=")
    return name, Path(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=named_path, nargs="+", required=True, metavar="NAME=DIR"
    )
    parser.add_argument("--requests", type=int, default=200, help="of each row")
    parser.add_argument("--compile-cache", help="as of `tokenrec serve`")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    flags = ["--max-batch", "1"]
    if args.compile_cache is not None:
        flags += ["--compile-cache", args.compile_cache]
    results = []
    for name, model in args.model:
        for row in measure_model(name, model, args.requests, flags):
            results.append(row)
            print(json.dumps(row), flush=True)
    if args.out is not None:
        models = " ".join(f"{name}=DIR" for name, _ in args.model)
        write_result(
            args.out,
            results,
            {"clients": 1, "k": 10},
            f"python -m benchmarks.serving_retrieval --model {models} --requests "
            f"{args.requests} --out {args.out}",
            title="Items of retrieval artifacts over HTTP",
            packages=PACKAGES,
        )


if __name__ == "__main__":
    run_script(main)
