"""Send hostile requests to a server: none may end it, or get a wrong score.

    python -m benchmarks.serving_faults --model DIR --cases 10000 --out benchmarks/results/serving_faults

A case takes a golden request of the artifact and damages it. `json` replaces values,
lengths and names by hostile ones, and stays JSON; `bytes` flips, deletes, inserts and
repeats bytes of the whole HTTP message, headers included. An answer of 200 to a `json`
case is compared with what the artifact scores in this process; other answers must be
4xx, or a closed connection. Every 100 cases a golden request must have its scores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES, golden_rows, served

TOLERANCE = 1e-6
_CHECK_EVERY = 100
_HEAD = (
    b"POST /v1/score HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    b"content-type: application/json\r\n"
)
# Seconds to wait for the answer to a message that may not be whole.
_PATIENCE = 0.25
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 62,
    1 << 70,
    -(1 << 63),
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x" * 20_000,
    "\x00\n\r",
    "\ud83d\ude00",
    [],
    [None],
    [[[[1]]]],
    {},
    {"item_id": {"time_ms": [1]}},
    list(range(3_000)),
)


def hostile_json(request: dict[str, Any], draw: np.random.Generator) -> bytes:
    """Return the JSON of a request in which one to three values are hostile."""
    changed = copy.deepcopy(request)
    for _ in range(int(draw.integers(1, 4))):
        _change(changed, draw)
    return json.dumps(changed).encode()


def hostile_bytes(message: bytes, draw: np.random.Generator) -> bytes:
    """Return a message with one to three damages."""
    changed = bytearray(message)
    for _ in range(int(draw.integers(1, 4))):
        place = int(draw.integers(len(changed) or 1))
        kind = draw.integers(5)
        if kind == 0 and changed:
            changed[place] = int(draw.integers(256))
        elif kind == 1:
            del changed[place : place + int(draw.integers(1, 30))]
        elif kind == 2:
            changed[place:place] = draw.bytes(int(draw.integers(1, 30)))
        elif kind == 3:
            changed[place:place] = changed[: int(draw.integers(1, 80))]
        else:
            changed[place:place] = draw.choice([b"[", b'{"a":', b"\r\n", b'"', b"\xff"])
    return bytes(changed)


def http_message(body: bytes) -> bytes:
    """Return a request with this body."""
    return _HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def exchange(port: int, message: bytes, seconds: float) -> tuple[int, bytes]:
    """Send a message; return status and body of the answer, 0 without one."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        # The server may close before all is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(message)
        client.settimeout(seconds)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while part := client.recv(65536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 else 0), body


def attack(
    port: int,
    requests: Sequence[dict[str, Any]],
    cases: int,
    expected: Callable[[Any], np.ndarray],
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Send hostile requests.

    Args:
      port: port of the server.
      requests: sound requests.
      cases: hostile requests of each kind.
      expected: the scores `[C, O]` of a request, as JSON has been read.
      seed: seed of the damage.

    Returns:
      A row per kind, and a text per failure.
    """
    rows, failures = [], []
    for kind in ("json", "bytes"):
        ends: collections.Counter[str] = collections.Counter()
        for case in range(cases):
            draw = np.random.default_rng([seed, case, kind == "json"])
            request = requests[int(draw.integers(len(requests)))]
            if kind == "json":
                body = hostile_json(request, draw)
                message = http_message(body)
            else:
                body = b""
                message = hostile_bytes(
                    http_message(json.dumps(request).encode()), draw
                )
            status, answer = exchange(
                port, message, _PATIENCE if kind == "bytes" else 60
            )
            end = _end(status)
            if end == "failed":
                failures.append(f"{kind} {case}: status {status}")
            elif end == "scored" and body:
                wrong = _difference(answer, expected(orjson.loads(body)))
                if not wrong <= TOLERANCE:
                    failures.append(f"{kind} {case}: scores differ by {wrong}")
            ends[end] += 1
            if case % _CHECK_EVERY == 0:
                sound = requests[case // _CHECK_EVERY % len(requests)]
                status, answer = exchange(
                    port, http_message(json.dumps(sound).encode()), 60
                )
                if status != 200 or not _difference(answer, expected(sound)) <= (
                    TOLERANCE
                ):
                    failures.append(f"{kind} {case}: a sound request got {status}")
        names = ("refused", "closed", "scored", "failed")
        rows.append({"kind": kind, "cases": cases} | {n: ends[n] for n in names})
    return rows, failures


def _change(request: dict[str, Any], draw: np.random.Generator) -> None:
    """Change a value of a request, at any depth."""
    place: Any = request
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = keys[int(draw.integers(len(keys)))]
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            place = inner
            continue
        break
    kind = draw.integers(4)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    else:
        place[key] = copy.deepcopy(_VALUES[int(draw.integers(len(_VALUES)))])


def _end(status: int) -> str:
    if status == 0:
        return "closed"
    if status == 200:
        return "scored"
    return "refused" if 400 <= status < 500 else "failed"


def _difference(answer: bytes, expected: np.ndarray) -> float:
    found = np.stack(list(json.loads(answer)["scores"].values()), 1)
    if found.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(found - expected)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument(
        "--cases", type=int, default=10_000, help="of both kinds together"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    from tokenrec.serving.request import Limits, parse_request
    from tokenrec.serving.scorer import open_scorer

    scorer = open_scorer(args.model)

    def expected(value: Any) -> np.ndarray:
        encoded = scorer.encode(parse_request(value, Limits()))
        return scorer.score([encoded])[0]

    requests = [row["request"] for row in golden_rows(args.model)]
    flags = ("--max-batch", "1", "--max-candidates", "2000")
    with served(args.model, *flags) as server:
        before = server.resident_bytes()
        rows, failures = attack(
            server.port, requests, args.cases // 2, expected, args.seed
        )
        grown = server.resident_bytes() - before
        code = server.stop()
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
    if code != 0:
        failures.append(f"the server ended with exit code {code}")
    settings = {
        "memory grown (MB)": grown / 1e6,
        "exit code after SIGTERM": code,
        "failures": len(failures),
    }
    if args.out is not None:
        command = (
            f"python -m benchmarks.serving_faults --model DIR --cases {args.cases} "
            f"--seed {args.seed} --out {args.out}"
        )
        write_result(
            args.out,
            rows,
            settings,
            command,
            title="Hostile requests to a server",
            packages=PACKAGES,
        )
    else:
        print(json.dumps({"rows": rows} | settings, indent=1))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
