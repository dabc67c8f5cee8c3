"""Inject faults into real runs and check that they lose nothing.

    python benchmarks/chaos.py [--faults 20] [--seed 0] [--steps 300] [--json FILE]
                               [--kinds KIND ...] [--out STEM] [--keep DIR]

1. A small run is trained without faults, in one process, in two and in four. It skips
   steps whose gradient is a spike, counts evaluations for `train.patience`, and writes
   files above 64 KiB.
2. The same runs are trained again under faults: signals, damaged checkpoints and
   checksums, storage that is full or fails, a second trainer in the folder, a reader of
   the log that ends. After each fault the same command is given again.
3. Both are compared: the log must have the same lines of steps and evaluations, each
   once; best step, evaluations waited and skipped steps must be equal, and every bit of
   the last and of the best weights. Data sets that are prepared under faults are compared
   file by file, predictions byte by byte. A damaged or changed data set must be refused
   by its name, or make no difference.

Faults come in rounds through all kinds. The seed draws their order and moments; when a
process reaches a moment depends on the machine. FILE gets `{"planned", "faults",
"survived", "refused_clearly", "compared_runs", "lost_samples", "differing_bits",
"differing_evaluations", "differing_progress", "by_kind", "failed"}`: a fault is
"survived" if the run goes on or resumes, and "refused_clearly" if the command ends with
exit code 2 and one message that names the reason. All other faults are listed under
"failed" with the last lines of the process, or with the error if `chaos.py` itself
failed, and the exit code is 1. The runs of a failed fault are given up, so that it
causes no others; `--keep` copies them and their output to DIR.

FILE and STEM are written after each fault, so that a run that is cut off keeps what it
has measured; "planned" then exceeds "faults". A full disk needs a file system of its
own, which only root can mount; without that these kinds are left out, and the output
says so. A fault takes about 12 seconds on two cores.

Two processes, killed and damaged again and again, 20 short runs in a row:

    for seed in $(seq 20); do python benchmarks/chaos.py --faults 4 --steps 60 \\
      --seed $seed --kinds "kill of one of two" "SIGTERM of one of two" \\
      "bit of a checkpoint of two" || break; done
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from chaos_compare import progress
from chaos_faults import KINDS, usable_kinds
from chaos_lab import Lab
from chaos_outcome import Outcome, describe, outcome_of
from report import write_result

from tokenrec.runtime.files import write_json


@dataclasses.dataclass
class Result:
    """Result of a chaos run, which grows with each fault.

    Attributes:
      flags: flags of the command line.
      start: time of its start.
      outcomes: kind and outcome of each fault so far.
      broken: what went wrong beside the faults.
      lab: the lab, once it is open.
    """

    flags: argparse.Namespace
    start: float
    outcomes: list[tuple[str, Outcome]] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    lab: Lab | None = None

    def summary(self) -> dict[str, Any]:
        """Count the outcomes."""
        by_kind: dict[str, collections.Counter[str]] = {
            kind: collections.Counter() for kind, _ in sorted(self.outcomes)
        }
        for kind, outcome in self.outcomes:
            by_kind[kind].update(["faults", outcome.ended])
        ended = collections.Counter(outcome.ended for _, outcome in self.outcomes)
        failed = [
            f"{kind}: {outcome.words}"
            for kind, outcome in self.outcomes
            if outcome.ended == "failed"
        ]
        found: dict[str, Any] = {
            "planned": self.flags.faults,
            "faults": len(self.outcomes),
            "survived": ended["survived"],
            "refused_clearly": ended["refused_clearly"],
        }
        if self.lab is not None:
            differences = self.lab.differences
            found |= {
                "compared_runs": differences.runs,
                "lost_samples": differences.lost_samples,
                "differing_bits": differences.bits,
                "differing_evaluations": differences.evaluations,
                "differing_progress": differences.progress,
            }
            failed += self.lab.broken
        by_kind_counts = {kind: dict(counts) for kind, counts in by_kind.items()}
        return found | {"by_kind": by_kind_counts, "failed": failed + self.broken}

    @property
    def is_good(self) -> bool:
        """Whether nothing failed, and no run differs."""
        differs = self.lab is not None and bool(self.lab.differences)
        return not self.summary()["failed"] and not differs

    def write(self) -> None:
        """Write the result files that the flags ask for."""
        summary = self.summary()
        if self.flags.json:
            write_json(self.flags.json, summary)
        if self.flags.out:
            self._write_table(summary)

    def _write_table(self, summary: dict[str, Any]) -> None:
        names = ("faults", "survived", "refused_clearly", "failed")
        rows: list[dict[str, Any]] = [
            {"kind": kind} | {name: counts.get(name, 0) for name in names}
            for kind, counts in summary["by_kind"].items()
        ]
        rows.append({"kind": "all"} | {n: sum(row[n] for row in rows) for n in names})
        params: dict[str, Any] = {
            "seed": self.flags.seed,
            "steps of a run": self.flags.steps,
            "planned faults": summary["planned"],
            "lost samples": summary.get("lost_samples", 0),
            "differing bits": summary.get("differing_bits", 0),
            "differing evaluations": summary.get("differing_evaluations", 0),
            "differing progress": len(summary.get("differing_progress", [])),
            "compared runs": summary.get("compared_runs", 0),
            "minutes": round((time.monotonic() - self.start) / 60, 1),
        }
        if self.lab is not None:
            for processes, lineage in self.lab.whole_runs().items():
                reached = progress(lineage.workdir)
                params[f"undisturbed run of {processes}"] = (
                    f"{reached.step} steps, {reached.skipped} skipped, "
                    f"the best at step {reached.best_step}"
                )
        if summary["failed"]:
            params["failures"] = " // ".join(summary["failed"])
        write_result(
            self.flags.out,
            rows,
            params,
            f"python benchmarks/chaos.py --faults {self.flags.faults} "
            f"--seed {self.flags.seed} --out {self.flags.out}",
            title="Faults into real runs",
        )


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
    while kinds and len(drawn) < faults:
        drawn += chance.sample(kinds, len(kinds))
    return drawn[:faults]


def inject_faults(result: Result) -> None:
    """Inject all faults, finish the runs, and compare them."""
    flags = result.flags
    chance = random.Random(flags.seed)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Lab(Path(folder), chance, flags.steps, flags.keep) as lab,
    ):
        result.lab = lab
        kinds = usable_kinds(flags.kinds, lab)
        for number, kind in enumerate(draw_kinds(kinds, flags.faults, chance), 1):
            start = time.monotonic()
            outcome = outcome_of(KINDS[kind], lab)
            # Results are kept, and the folder is not.
            words = outcome.words.replace(f"{lab.folder}/", "")
            outcome = outcome._replace(words=words)
            result.outcomes.append((kind, outcome))
            seconds = time.monotonic() - start
            line = f"{number}/{flags.faults} {kind}, {seconds:.0f} s: {outcome.ended}. "
            print((line + outcome.words)[:400], file=sys.stderr, flush=True)
            result.write()
        lab.finish()
        result.write()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=300, help="of a run of one process, at least 60"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=sorted(KINDS),
        default=sorted(KINDS),
        metavar="KIND",
        help="one or several of: " + ", ".join(sorted(KINDS)),
    )
    parser.add_argument(
        "--out", type=Path, help="stem of the result files, .json and .md"
    )
    parser.add_argument(
        "--keep", type=Path, help="folder that gets the runs of failed faults"
    )
    flags = parser.parse_args()
    # Where there is no accelerator, the search for one prints warnings.
    jax.config.update("jax_platforms", "cpu")
    # A chaos run that is stopped ends its processes and unmounts its disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    result = Result(flags, time.monotonic())
    try:
        inject_faults(result)
    except Exception as error:  # noqa: BLE001 - a result like others
        result.broken.append(describe(error))
        result.write()
    print(json.dumps(result.summary(), indent=1))
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
