"""What the prefix cache saves, and the share of HTTP and Python: processor time.

    python -m benchmarks.serving_prefix --models SHORT LONG --served SHORT \\
        --out benchmarks/results/serving_prefix

Programs of an artifact, in this process, one request at a time:

    hit     `extend` of all candidates, in slices of at most 512
    miss    `prefill`, then the same
    alone   the history again for each candidate, 16 streams at a time

Then a server with one client, whose requests all find their prefix (`hit`), and one without
a cache (`miss`). The share of HTTP and Python is what the server spends beyond the
programs. Processor times are of the whole process; variants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving import closed_loop, make_bodies
from benchmarks.serving_process import PACKAGES, served
from benchmarks.timing import paired_ratio
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import Scorer, open_scorer

_SLICE = 512
_STREAMS = 16


def processor_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def variants(scorer: Scorer, body: bytes) -> dict[str, Callable[[], np.ndarray]]:
    """Return what computes the scores of a request, by name of the variant."""
    encoded = scorer.encode(parse_request(json.loads(body), Limits()))
    count = encoded.candidates
    (held,) = scorer.prefill([encoded])
    parts = [encoded.part(n, n + _SLICE) for n in range(0, count, _SLICE)]
    lone = [encoded.part(n, n + 1) for n in range(count)]

    def extend(prefix: Any) -> np.ndarray:
        return np.concatenate([scorer.extend([(prefix, part)])[0] for part in parts])

    def alone() -> np.ndarray:
        scores = []
        for start in range(0, count, _STREAMS):
            some = lone[start : start + _STREAMS]
            scores += scorer.extend(list(zip(scorer.prefill(some), some, strict=True)))
        return np.concatenate(scores)

    return {
        "hit": lambda: extend(held),
        "miss": lambda: extend(scorer.prefill([encoded])[0]),
        "alone": alone,
    }


def program_times(
    scorer: Scorer, body: bytes, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Time the variants in turns.

    Returns:
      Processor seconds of each turn by variant, and the largest difference of a score.
    """
    runs = variants(scorer, body)
    wanted = {name: run() for name, run in runs.items()}
    off = max(float(np.abs(s - wanted["alone"]).max()) for s in wanted.values())
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            # One run of the fast ones is below the resolution of the clock.
            times = 1 if name == "alone" else 20
            begin = processor_seconds()
            for _ in range(times):
                run()
            spent[name].append((processor_seconds() - begin) / times)
    return spent, off


def server_ms(
    model: Path, bodies: Sequence[bytes], seconds: float, cache: int, most: int
) -> float:
    """Processor milliseconds of a request to a server with one client."""
    flags = (
        "--cache-mb",
        str(cache),
        "--max-batch",
        "1",
        "--max-candidates",
        str(most),
    )
    with served(model, *flags) as server:
        closed_loop(server.port, bodies, 1, seconds / 2)
        before = server.cpu_seconds()
        count = len(closed_loop(server.port, bodies, 1, seconds))
        return 1e3 * (server.cpu_seconds() - before) / count


def measure(
    model: Path, candidates: int, repeats: int, seconds: float, is_served: bool
) -> dict[str, Any]:
    """Return the row of an artifact and a number of candidates."""
    scorer = open_scorer(model)
    # 1 for streams of a lone candidate, and what the server would choose.
    scorer.batch_buckets = (1, _STREAMS)
    scorer.candidate_buckets = (1, 24, _SLICE)
    bodies = make_bodies(model, candidates)
    spent, off = program_times(scorer, bodies[0], repeats)
    least = {name: 1e3 * statistics.median(times) for name, times in spent.items()}
    row: dict[str, Any] = {
        "T": scorer.artifact.manifest["events"],
        "trained steps": scorer.artifact.manifest["step"],
        "candidates": candidates,
        "programs, hit, ms": least["hit"],
        "programs, miss, ms": least["miss"],
        "alone, ms": least["alone"],
        "miss / hit": paired_ratio(spent["miss"], spent["hit"]),
        "alone / miss": paired_ratio(spent["alone"], spent["miss"]),
        "largest difference": off,
    }
    if not is_served:
        return row
    for kind, cache in (("hit", 2048), ("miss", 0)):
        whole = server_ms(model, bodies, seconds, cache, candidates)
        row[f"server, {kind}, ms"] = whole
        row[f"HTTP and Python, {kind}, %"] = 100 * (1 - least[kind] / whole)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--served", type=Path, nargs="*", default=[], help="those behind a server too"
    )
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 1_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of each loop")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    rows = []
    for model in args.models:
        for candidates in args.candidates:
            is_served = model in args.served
            rows.append(
                measure(model, candidates, args.repeats, args.seconds, is_served)
            )
            print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        numbers = " ".join(map(str, args.candidates))
        write_result(
            args.out,
            rows,
            {"turns": args.repeats, "cores": len(os.sched_getaffinity(0))},
            "python -m benchmarks.serving_prefix --models SHORT LONG --served SHORT "
            f"--candidates {numbers} --repeats {args.repeats} --seconds {args.seconds:g} --out "
            f"{args.out}",
            title="What the prefix cache saves",
            packages=PACKAGES,
        )


if __name__ == "__main__":
    run_script(main)
