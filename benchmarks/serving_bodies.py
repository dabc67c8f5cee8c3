"""Processor time from the body of a request to the arrays of a model: JSON and Arrow.

    python -m benchmarks.serving_bodies --model DIR --out benchmarks/results/serving_bodies

The requests are those of an artifact, each with candidates of all of them
(`benchmarks.serving.make_bodies`), and once in JSON and once as an Arrow IPC stream. In a
round each size and type is read once, one after another, so that load on the machine
falls on both; the medians of the rounds are reported. `check` is `parse_request`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.report import run_script, write_result
from benchmarks.serving import make_bodies
from tokenrec.serving.artifact import read_artifact
from tokenrec.serving.encoder import Encoder
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.server.arrow_body import parse_arrow
from tokenrec.serving.server.score_request import parse_json

_LIMITS = Limits()
_STAGES = ("read", "check", "encode")


def arrow_stream(request: dict[str, Any]) -> bytes:
    """Return a request as an Arrow IPC stream."""
    table = pa.Table.from_pylist([request])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def encode_timed(
    encoder: Encoder, read: Callable[[Any], Any], bodies: Sequence[bytes]
) -> tuple[np.ndarray, list[Any]]:
    """Encode bodies; return the mean milliseconds of each stage, and what came out."""
    seconds, encoded = np.zeros(len(_STAGES)), []
    for body in bodies:
        # As the server holds it.
        held = bytearray(body)
        times = [time.process_time()]
        value = read(held)
        times.append(time.process_time())
        request = parse_request(value, _LIMITS)
        times.append(time.process_time())
        encoded.append(encoder.encode(request))
        times.append(time.process_time())
        seconds += np.diff(times)
    return 1e3 * seconds / len(bodies), encoded


def check_equal(one: Sequence[Any], two: Sequence[Any]) -> None:
    """Check that requests have the same arrays.

    Raises:
      RuntimeError: they do not.
    """
    for first, second in zip(one, two, strict=True):
        pairs = [(first.prefix[name], second.prefix[name]) for name in first.prefix]
        pairs += [(first.target_ids, second.target_ids)]
        pairs += [(first.target_dense, second.target_dense)]
        if not all(np.array_equal(a, b, a.dtype.kind == "f") for a, b in pairs):
            raise RuntimeError("JSON and Arrow of a request give other arrays")


def measure(
    model: Path, sizes: Sequence[int], users: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each number of candidates and type of body."""
    encoder = Encoder(read_artifact(model))
    rows = []
    for size in sizes:
        texts = make_bodies(model, size)[:users]
        kinds: dict[str, tuple[Any, list[bytes]]] = {
            "JSON": (parse_json, texts),
            "Arrow": (
                lambda body: parse_arrow(body, _LIMITS),
                [arrow_stream(json.loads(text)) for text in texts],
            ),
        }
        times: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            encoded = {}
            for kind, (read, bodies) in kinds.items():
                spent, encoded[kind] = encode_timed(encoder, read, bodies)
                times[kind].append(spent)
            check_equal(encoded["JSON"], encoded["Arrow"])
        for kind, (_, bodies) in kinds.items():
            stages = np.median(times[kind], axis=0)
            row: dict[str, Any] = {
                "candidates": size,
                "body": kind,
                "bytes": round(statistics.mean(map(len, bodies))),
            }
            named = zip(_STAGES, stages.tolist(), strict=True)
            row |= {f"{stage} ms": ms for stage, ms in named}
            rows.append(row | {"CPU ms": float(stages.sum())})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a ranking artifact")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[20, 100, 1_000], metavar="C"
    )
    parser.add_argument("--users", type=int, default=16, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    rows = measure(args.model, args.candidates, args.users, args.rounds)
    if args.out is not None:
        sizes = " ".join(map(str, args.candidates))
        write_result(
            args.out,
            rows,
            {"users": args.users, "rounds": args.rounds},
            f"python -m benchmarks.serving_bodies --model DIR --candidates {sizes} "
            f"--users {args.users} --rounds {args.rounds} --out {args.out}",
            title="Bodies of requests in JSON and Arrow",
            packages=("tokenrec", "numpy", "pyarrow", "orjson"),
        )


if __name__ == "__main__":
    run_script(main)
