"""Inject faults into real runs and check that they lose nothing.

    python benchmarks/chaos.py [--faults 20] [--seed 0] [--steps 300] [--json FILE]
                               [--kinds KIND ...] [--out STEM]

1. A small run is trained without faults, in one process and in two.
2. The same runs are trained again under faults: processes are killed, stopped and
   starved of disk space, and files of checkpoints and data sets are damaged. After each
   fault the same command is given again.
3. Both are compared: the loss of every step must be in the log once, and every bit of
   the last weights must be equal. Data sets that are prepared under faults are compared
   file by file, predictions byte by byte. A damaged data set must be refused by the name
   of its file, or make no difference.

Faults come in rounds through all kinds. The seed draws their order and moments; when a
process reaches a moment depends on the machine. FILE gets `{"faults", "survived",
"refused_clearly", "lost_samples", "differing_bits", "by_kind", "failed"}`: a fault is
"survived" if the run resumes, and "refused_clearly" if the command ends with exit code 2
and one message that names the reason. All other faults are listed under "failed" with
the last lines of the process, and the exit code is 1. A full disk needs a file system of
its own, which only root can mount; without that the kind is left out, and the output
says so. A fault takes about 15 seconds on two cores.
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
    """Draw the kinds of the faults.

    Args:
      kinds: the kinds to draw from.
      faults: number of faults.
      chance: the generator of all draws.

    Returns:
      Rounds through all kinds, each in another order.
    """
    drawn: list[str] = []
    while len(drawn) < faults:
        drawn += chance.sample(kinds, len(kinds))
    return drawn[:faults]


def summarize(
    outcomes: list[tuple[str, Outcome]], lost_samples: int, differing_bits: int
) -> dict[str, object]:
    """Count the outcomes.

    Args:
      outcomes: kind and outcome of each fault.
      lost_samples: samples whose loss is missing or differs.
      differing_bits: bits of the last states that differ.
    """
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
    chance = random.Random(flags.seed)
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(Path(folder), chance, flags.steps) as lab,
    ):
        kinds = usable_kinds(flags.kinds, lab)
        outcomes: list[tuple[str, Outcome]] = []
        for number, kind in enumerate(draw_kinds(kinds, flags.faults, chance), 1):
            fault: Fault = KINDS[kind]
            outcome = fault(lab)
            outcomes.append((kind, outcome))
            line = f"{number}/{flags.faults} {kind}: {outcome.ended}. {outcome.words}"
            print(line[:300], file=sys.stderr)
        lab.finish()
        summary = summarize(outcomes, lab.lost_samples, lab.differing_bits)
    summary["failed"] += lab.broken  # type: ignore[operator]
    if flags.json:
        write_json(flags.json, summary)
    if flags.out:
        names = ("faults", "survived", "refused_clearly", "failed")
        rows = [
            {"kind": kind} | {n: counts.get(n, 0) for n in names}
            for kind, counts in summary["by_kind"].items()
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
            | {"minutes": round((time.monotonic() - start) / 60, 1)},
            f"python benchmarks/chaos.py --faults {flags.faults} --seed {flags.seed} --out {flags.out}",
            title="Faults into real runs",
        )
    print(json.dumps(summary, indent=1))
    return 1 if summary["failed"] or lab.lost_samples or lab.differing_bits else 0


if __name__ == "__main__":
    sys.exit(main())
