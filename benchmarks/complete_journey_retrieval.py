"""Predict a household's next products among all of Complete Journey, over seeds.

    python -m benchmarks.complete_journey_retrieval --data DIR [--seeds 0 1 2] \\
        [--arms copy no_copy]

`--data` is the output of `tokenrec prepare complete_journey`. The goals of a request
are the promoted products of a basket, ranked in the full catalogue.

- `copy` is configs/complete_journey_retrieval.py.
- `no_copy` is the same without `head.copy`, with the first seed alone.
- In brackets, what needs no model and counts the whole training split
  (`tokenrec evaluate --baselines`), with the histories of the config.

Every seed is a run under `--runs`: a run that was stopped resumes, a finished one is
only read. The last checkpoint is evaluated, on 2,000 requests of valid that are evenly
spread over it. The settings were chosen on them too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import run_script, spread, write_result
from tokenrec.checkpoint.run_folder import CONFIG_FILE
from tokenrec.config import to_json
from tokenrec.config.load import load_config
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.runtime.files import write_json
from tokenrec.train_loop import train

CONFIG = "complete_journey_retrieval"
# Arm -> overrides of the config.
ARMS = {"copy": (), "no_copy": ("head.copy=False",)}
METRICS = ("recall@1", "recall@10", "recall@50", "ndcg@10", "mrr")


def run_seed(arm: str, seed: int, data: Path, runs: Path) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done.

    Args:
      arm: key of `ARMS`.
      seed: random seed.
      data: the prepared data set.
      runs: folder of the runs.

    Returns:
      Metrics and costs, which are kept in the run's `result.json`.

    Raises:
      InputError: the run was trained with other settings.
    """
    workdir = runs / f"{arm}_seed{seed}"
    kept = workdir / "result.json"
    config = load_config(CONFIG, [f"seed={seed}", *ARMS[arm]])
    config.data.path = str(data)
    if kept.is_file():
        trained_with = json.loads((workdir / CONFIG_FILE).read_text())
        if trained_with != json.loads(to_json(config)):
            raise InputError(
                f"runs: '{workdir}' was trained with other settings; "
                "give another --runs, or move it away"
            )
        return json.loads(kept.read_text())
    began, fresh = cpu_seconds(), not workdir.exists()
    train(config, workdir)
    seconds = cpu_seconds() - began
    report = evaluate_run(
        workdir, "valid", "latest", None, limit=config.train.eval_samples
    )
    record = {"arm": arm, "seed": seed} | {
        metric: report["retrieval"][metric] for metric in METRICS
    }
    # The cost of a resumed run is not known: what came before its stop is missing.
    record["train_cpu_seconds"] = seconds if fresh else None
    write_json(kept, record)
    return record


def cpu_seconds() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def baseline_rows(workdir: Path) -> list[dict[str, Any]]:
    """Evaluate what needs no model on the requests of a run; kept in its folder."""
    kept = workdir / "baselines.json"
    if not kept.is_file():
        limit = load_config(CONFIG, []).train.eval_samples
        report = evaluate_run(
            workdir, "valid", "latest", None, baselines=True, limit=limit
        )
        write_json(kept, report["baselines"])
    return [
        {"arm": f"({name})", "seeds": ""}
        | {metric: spread([report["retrieval"][metric]]) for metric in METRICS}
        for name, report in json.loads(kept.read_text()).items()
    ]


def table_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a table row per arm: mean and sample deviation over seeds."""
    rows = []
    for arm in dict.fromkeys(record["arm"] for record in records):
        of_arm = [record for record in records if record["arm"] == arm]
        metrics = {
            metric: spread([record[metric] for record in of_arm]) for metric in METRICS
        }
        rows.append({"arm": arm, "seeds": len(of_arm)} | metrics)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared data set")
    parser.add_argument("--runs", type=Path, default=Path(f"runs/benchmarks/{CONFIG}"))
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{CONFIG}")
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    records = []
    for arm in arguments.arms:
        for seed in arguments.seeds if arm == "copy" else arguments.seeds[:1]:
            records.append(run_seed(arm, seed, arguments.data, arguments.runs))
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    first = arguments.runs / f"{arguments.arms[0]}_seed{arguments.seeds[0]}"
    config = load_config(CONFIG, [])
    seeds = " ".join(map(str, arguments.seeds))
    chosen = f"--seeds {seeds} --arms {' '.join(arguments.arms)}"
    command = f"python -m benchmarks.{CONFIG} --data DIR {chosen}"
    settings = {
        "events": config.data.events,
        "requests": config.optim.steps * config.data.batch_size,
        "evaluated": f"{config.train.eval_samples:,} requests of valid",
        "checkpoint": "the last",
    }
    title = "Complete Journey, next products"
    write_result(
        arguments.out,
        [*table_rows(records), *baseline_rows(first)],
        settings,
        command,
        title=f"{title}: mean ± deviation over seeds",
    )
    by_seed = arguments.out.with_name(arguments.out.name + "_seeds")
    write_result(by_seed, records, settings, command, title=f"{title}: every seed")


if __name__ == "__main__":
    run_script(main)
