"""Faults into real runs: processes killed, stopped and starved, checkpoints and data damaged; and what is left of them.

python benchmarks/chaos.py [--faults 20] [--seed 0] [--steps 300] [--json FILE] [--kinds KIND ...] [--out STEM]

One small run is trained undisturbed, in one process and in two. The same runs are trained again under faults, started
with the same command after each, and compared with it: every step's loss once in the log, and every bit of the last
weights. Data sets that are prepared under faults are compared file by file, predictions byte for byte; a damaged data
set must be refused by the name of the file, or make no difference.

Faults come in rounds through all kinds, in an order and at moments that the seed draws; when a process reaches a
moment is up to the machine. FILE gets `{"faults", "survived", "refused_clearly", "lost_samples", "differing_bits",
"by_kind"}`: "survived", the command given again went on; "refused_clearly", it ended with exit code 2 and one message
that names what is wrong. What is neither is listed under "failed", with the process's last words, and the exit code is
1. A full disk needs a file system of its own, which root alone can mount; for others that kind is left out, in words.
Some 15 s a fault on two cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from chaos_faults import KINDS, Fault, Outcome, usable_kinds
from chaos_lab import Lab
from report import write_result

from tokenrec.runtime.files import write_json


def draw_kinds(kinds: list[str], faults: int, chance: random.Random) -> list[str]:
    """`faults` kinds: rounds through all of them, each in another order."""
    drawn: list[str] = []
    while len(drawn) < faults:
        drawn += chance.sample(kinds, len(kinds))
    return drawn[:faults]


def summarize(
    outcomes: list[tuple[str, Outcome]], lost_samples: int, differing_bits: int
) -> dict[str, object]:
    by_kind: dict[str, collections.Counter[str]] = {
        kind: collections.Counter() for kind, _ in sorted(outcomes)
    }
    for kind, outcome in outcomes:
        by_kind[kind].update(["faults", outcome.ended])
    ended = collections.Counter(outcome.ended for _, outcome in outcomes)
    return {
        "faults": len(outcomes),
        "survived": ended["survived"],
        "refused_clearly": ended["refused_clearly"],
        "lost_samples": lost_samples,
        "differing_bits": differing_bits,
        "by_kind": {kind: dict(counts) for kind, counts in by_kind.items()},
        "failed": [
            f"{kind}: {outcome.words}"
            for kind, outcome in outcomes
            if outcome.ended == "failed"
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=300, help="of each run, at least 60"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS)
    )
    parser.add_argument(
        "--out", type=Path, help="stem of the result files, .json and .md"
    )
    flags = parser.parse_args()
    chance, begin = random.Random(flags.seed), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(Path(folder), chance, flags.steps) as lab,
    ):
        kinds = usable_kinds(flags.kinds, lab)
        outcomes: list[tuple[str, Outcome]] = []
        for number, kind in enumerate(draw_kinds(kinds, flags.faults, chance), 1):
            fault: Fault = KINDS[kind]
            outcomes.append((kind, fault(lab)))
            shown = outcomes[-1][1]
            print(
                f"{number}/{flags.faults} {kind}: {shown.ended}. {shown.words}"[:300],
                file=sys.stderr,
            )
        lab.finish()
        found = summarize(outcomes, lab.lost_samples, lab.differing_bits)
    found["failed"] += lab.broken  # type: ignore[operator]
    if flags.json:
        write_json(flags.json, found)
    if flags.out:
        names = ("faults", "survived", "refused_clearly", "failed")
        rows = [
            {"kind": kind} | {n: counts.get(n, 0) for n in names}
            for kind, counts in found["by_kind"].items()
        ]  # type: ignore[attr-defined]
        rows.append({"kind": "all"} | {n: sum(row[n] for row in rows) for n in names})
        write_result(
            flags.out,
            rows,
            {
                "seed": flags.seed,
                "steps of a run": flags.steps,
                "lost samples": lab.lost_samples,
                "differing bits": lab.differing_bits,
            }
            | {"minutes": round((time.monotonic() - begin) / 60, 1)},
            f"python benchmarks/chaos.py --faults {flags.faults} --seed {flags.seed} --out {flags.out}",
            title="Faults into real runs",
        )
    print(json.dumps(found, indent=1))
    return 1 if found["failed"] or lab.lost_samples or lab.differing_bits else 0


if __name__ == "__main__":
    sys.exit(main())
