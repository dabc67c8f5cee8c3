"""What a start of a server takes, with a warm cache of compiled programs.

    python -m benchmarks.serving_start --model DIR --out benchmarks/results/serving_start

Each start is a process of its own; variants take turns. `run` compiles a shape by running
it, one after another; `compile` is what `tokenrec serve` does: all shapes on all cores,
without running them. The first start of each is not counted: it fills the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES

STAGES = ("imports", "artifact", "shapes", "golden requests")


def start(variant: str, model: Path, cache: Path, batch: int) -> dict[str, Any]:
    """Start as a server does; return processor and wall seconds of the stages."""
    marks = [_now()]
    import jax

    jax.devices()
    from tokenrec.runtime.compilation_cache import persistent_compilation_cache
    from tokenrec.serving.golden import replay_golden
    from tokenrec.serving.scorer import open_scorer
    from tokenrec.serving.server.load_model import batch_sizes, candidate_sizes

    marks.append(_now())
    with persistent_compilation_cache(cache, True, every_program=True, remedy=""):
        scorer = open_scorer(model)
        marks.append(_now())
        sizes = batch_sizes(batch), candidate_sizes(512)
        if variant == "run":
            _warm_by_running(scorer, *sizes)
        else:
            scorer.warm(*sizes)
        marks.append(_now())
        compiles = scorer.compiles
        golden = scorer.artifact.golden()
        replay_golden(scorer, golden, batch, scorer.artifact.manifest["tolerance"])
        marks.append(_now())
    if scorer.compiles != compiles:
        raise RuntimeError(f"{scorer.compiles - compiles} shapes were not compiled")
    spent = np.diff(np.array(marks), axis=0)
    return {"shapes": compiles, "seconds": spent.tolist()}


def _now() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, time.perf_counter()


def _warm_by_running(
    scorer: Any, batches: Sequence[int], candidates: Sequence[int]
) -> None:
    """Run each shape once: the plain way."""
    scorer.batch_buckets, scorer.candidate_buckets = batches, candidates
    blank = scorer._encoder.blank()
    for size in batches:
        prefixes = scorer.prefill([blank] * size)
        for count in candidates:
            rows = np.zeros(count, np.int64)
            filled = dataclasses.replace(
                blank,
                target_ids=blank.target_ids[rows],
                target_dense=blank.target_dense[rows],
            )
            scorer.extend([(prefix, filled) for prefix in prefixes])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--cache", type=Path, required=True, help="compiled programs")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--once", choices=("run", "compile"), help="in this process")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    if args.once:
        print(json.dumps(start(args.once, args.model, args.cache, args.max_batch)))
        return
    command = [sys.executable, "-m", "benchmarks.serving_start", "--model"]
    command += [str(args.model), "--cache", str(args.cache)]
    command += ["--max-batch", str(args.max_batch)]
    found: dict[str, list[Any]] = {"run": [], "compile": []}
    for turn in range(args.repeats + 1):
        for variant, starts in found.items():
            done = subprocess.run(
                [*command, "--once", variant], check=True, stdout=subprocess.PIPE
            )
            if turn:
                starts.append(json.loads(done.stdout))
                print(variant, starts[-1], flush=True)
    rows = []
    for variant, starts in found.items():
        for place, what in enumerate(("processor, s", "wall, s")):
            times = [[stage[place] for stage in one["seconds"]] for one in starts]
            count = starts[0]["shapes"]
            row = {"a shape is": variant, "": what, "number of shapes": count}
            medians = map(statistics.median, zip(*times, strict=True))
            row |= dict(zip(STAGES, medians, strict=True))
            rows.append(row | {"in all": statistics.median(map(sum, times))})
    print(json.dumps(rows))
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {"starts": args.repeats},
            "python -m benchmarks.serving_start --model DIR --cache DIR --max-batch "
            f"{args.max_batch} --repeats {args.repeats} --out {args.out}",
            title="What a start of a server takes, its programs in the cache",
            packages=PACKAGES,
        )


if __name__ == "__main__":
    run_script(main)
