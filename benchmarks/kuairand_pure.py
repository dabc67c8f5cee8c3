"""Train KuaiRand-Pure, UC and NIO, over seeds; report the metrics on 3 and 4 May.

    python -m benchmarks.kuairand_pure --root DIR [--configs uc nio] [--seeds 0 1 2]

`--root` is the folder of the official files. Every seed is a run under `--runs`: a run
that was stopped resumes, a finished one is only read. Nothing is chosen on the split
that is reported: the last checkpoint is evaluated. Beside the live metrics are those
with histories and statistics frozen at the start of 3 May (`evaluate --freeze-at`), and
the baselines on the same impressions. The tables show mean and sample deviation over
seeds, and every seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import run_script, spread, write_result
from tokenrec.config.load import load_config
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.past.shipped import add_statistics
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.kuairand import KuaiRandSource
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.runtime.files import write_json
from tokenrec.train_loop import train

METRICS = ("auc", "gauc", "log_loss", "normalized_entropy")
FROZEN = ("auc", "gauc")


def cpu_seconds() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_seed(config_name: str, seed: int, data: Path, runs: Path) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done.

    Args:
      config_name: "uc" or "nio".
      seed: random seed.
      data: the prepared data set.
      runs: folder of the runs.

    Returns:
      Metrics and costs, which are kept in the run's `result.json`.
    """
    workdir = runs / f"{config_name}_seed{seed}"
    kept = workdir / "result.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    began = cpu_seconds()
    config = load_config(f"kuairand_pure_{config_name}", [f"seed={seed}"])
    config.data.path = str(data)
    summary = train(config, workdir)
    trained = cpu_seconds()
    report = evaluate_run(
        workdir,
        "valid",
        "latest",
        data,
        freeze_at="split",
        # They need no run, and are the same for each.
        baselines=config_name == "uc" and seed == 0,
    )
    record = {
        "config": config_name,
        "seed": seed,
        "step": report["step"],
        "tasks": report["tasks"],
        "macro_auc": report["macro_auc"],
        "frozen": report["frozen"]["tasks"],
        "baselines": report.get("baselines", {}),
        "examples_per_second": summary["examples_per_second"],
        "train_cpu_seconds": trained - began,
        "evaluate_cpu_seconds": cpu_seconds() - trained,
    }
    write_json(kept, record)
    return record


def table_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a table row per config and task: mean and sample deviation over seeds."""
    rows = []
    for name in dict.fromkeys(record["config"] for record in records):
        of_config = [record for record in records if record["config"] == name]
        for task in of_config[0]["tasks"]:
            row: dict[str, Any] = {
                "config": name,
                "task": task,
                "seeds": len(of_config),
            }
            for metric in METRICS:
                row[metric] = spread(
                    [record["tasks"][task][metric] for record in of_config]
                )
            for metric in FROZEN:
                row[f"{metric}, frozen"] = spread(
                    [record["frozen"][task][metric] for record in of_config]
                )
            row["positives"] = of_config[0]["tasks"][task]["positives"]
            row["examples"] = of_config[0]["tasks"][task]["examples"]
            rows.append(row)
    for record in records:
        rows += baseline_rows(record["baselines"])
    return rows


def baseline_rows(baselines: dict[str, Any]) -> list[dict[str, Any]]:
    """Make a table row per baseline and task."""
    return [
        {"config": name, "task": task, "seeds": 1}
        | {metric: figures[metric] for metric in METRICS}
        | {
            f"{metric}, frozen": report["frozen"]["tasks"][task][metric]
            for metric in FROZEN
        }
        | {name: figures[name] for name in ("positives", "examples")}
        for name, report in baselines.items()
        for task, figures in report["tasks"].items()
    ]


def seed_row(record: dict[str, Any]) -> dict[str, Any]:
    """Make the table row of one seed."""
    flat = {
        f"{task} {metric}": record["tasks"][task][metric]
        for task in record["tasks"]
        for metric in ("auc", "gauc")
    } | {
        f"{task} {metric}, frozen": record["frozen"][task][metric]
        for task in record["tasks"]
        for metric in FROZEN
    }
    costs = ("examples_per_second", "train_cpu_seconds", "evaluate_cpu_seconds")
    return (
        {"config": record["config"], "seed": record["seed"], "step": record["step"]}
        | flat
        | {name: record[name] for name in costs}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/kuairand_pure"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmarks/kuairand_pure")
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/kuairand_pure")
    )
    parser.add_argument(
        "--configs", nargs="+", default=["uc", "nio"], choices=["uc", "nio"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if not (arguments.data / METADATA_FILE).is_file():
        source = KuaiRandSource(arguments.root, "2022-05-03", "2022-05-05")
        prepare(add_statistics(source, "kuairand", None), arguments.data)
    records = []
    for config_name in arguments.configs:
        for seed in arguments.seeds:
            records.append(run_seed(config_name, seed, arguments.data, arguments.runs))
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    command = "python -m benchmarks.kuairand_pure --root DIR"
    settings = {
        "train": "25 April to 2 May 2022",
        "valid": "3 and 4 May",
        "checkpoint": "the last",
    }
    title = "KuaiRand-Pure, 3 and 4 May"
    write_result(
        arguments.out,
        table_rows(records),
        settings,
        command,
        title=f"{title}: mean ± deviation over seeds",
    )
    seeds = arguments.out.with_name(arguments.out.name + "_seeds")
    write_result(
        seeds,
        [seed_row(record) for record in records],
        settings,
        command,
        title=f"{title}: every seed",
    )


if __name__ == "__main__":
    run_script(main)
