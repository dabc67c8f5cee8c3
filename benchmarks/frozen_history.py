"""Effect of a user's newest labels on AUC and GAUC: histories frozen before the test.

    python -m benchmarks.frozen_history --data DIR --runs DIR [--seeds 0 1 2]

`--runs` holds finished NIO runs of `benchmarks/kuairand_pure.py`. Each is evaluated
twice: as it is, and with the impressions of the evaluated split removed from all
histories. Nothing is trained again.

Why the two metrics may move apart: a user has 2.6 impressions in the split. A score
that follows the labels of the same days ranks users well, which AUC rewards. Inside a
user it points the wrong way, because the remaining impressions hold fewer of the label;
GAUC measures that order alone."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.report import run_script, spread, write_result
from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import EVENT, SCORED, InteractionLog
from tokenrec.evaluation.evaluate import evaluate_run

METRICS = ("auc", "gauc", "log_loss", "normalized_entropy")


def without_scored_events(load: Any) -> Any:
    """Wrap `Dataset.load` so that scored log rows enter no history."""

    def load_frozen(
        self: Dataset, split: str, start: int = 0, stop: int | None = None
    ) -> InteractionLog:
        log = load(self, split, start, stop)
        flags = np.where(
            (log.flags & SCORED) != 0, log.flags & ~np.uint8(EVENT), log.flags
        )
        return dataclasses.replace(log, flags=flags)

    return load_frozen


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
        workdir = arguments.runs / f"nio_seed{seed}"
        for history in ("up to the impression", "frozen at midnight of 3 May"):
            load = (
                Dataset.load
                if history.startswith("up")
                else without_scored_events(Dataset.load)
            )
            # The evaluation opens its data set itself, so its `load` is patched.
            with mock.patch.object(Dataset, "load", load):
                report = evaluate_run(workdir, "valid", "latest", arguments.data)
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
