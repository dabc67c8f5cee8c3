"""Effect of a user's newest labels on AUC and GAUC: histories frozen before the test.

    python -m benchmarks.frozen_history --data DIR --runs DIR [--seeds 0 1 2]

`--runs` holds finished NIO runs of `benchmarks/kuairand_pure.py`. Each is evaluated
with `tokenrec evaluate --freeze-at split`: as it is, and with histories that end where
the evaluated split begins. Nothing is trained again.

Why the two metrics may move apart: a user has 2.6 impressions in the split. A score
that follows the labels of the same days ranks users well, which AUC rewards. Inside a
user it points the wrong way, because the remaining impressions hold fewer of the label;
GAUC measures that order alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.report import run_script, spread, write_result
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.evaluation.freeze import SPLIT_START

METRICS = ("auc", "gauc", "log_loss", "normalized_entropy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/kuairand_pure"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmarks/kuairand_pure")
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/frozen_history")
    )
    arguments = parser.parse_args()
    # (task, history) -> the metrics of each seed.
    metrics_by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        live = evaluate_run(
            arguments.runs / f"nio_seed{seed}",
            "valid",
            "latest",
            arguments.data,
            freeze_at=SPLIT_START,
        )
        for history, report in (
            ("up to the impression", live),
            ("frozen at midnight of 3 May", live["frozen"]),
        ):
            for task, metrics in report["tasks"].items():
                metrics_by_case.setdefault((task, history), []).append(metrics)
    rows = []
    for (task, history), records in sorted(metrics_by_case.items()):
        row: dict[str, Any] = {"task": task, "history": history, "seeds": len(records)}
        for metric in METRICS:
            row[metric] = spread([record[metric] for record in records])
        rows.append(row)
    settings = {
        "config": "kuairand_pure_nio",
        "split": "3 and 4 May",
        "checkpoint": "the last",
    }
    title = "KuaiRand-Pure, NIO: the history of the evaluated days, seen and not seen"
    write_result(
        arguments.out,
        rows,
        settings,
        "python -m benchmarks.frozen_history",
        title=title,
    )
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_script(main)
