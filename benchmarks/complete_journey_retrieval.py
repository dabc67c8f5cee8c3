"""Predict a household's next products among all of Complete Journey, over seeds.

    python -m benchmarks.complete_journey_retrieval --data DIR [--seeds 0 1 2] \\
        [--arms copy no_copy generative_copy generative] [--semantic-ids DIR]

`--data` is the output of `tokenrec prepare complete_journey`. The goals of a request
are the promoted products of a basket, ranked in the full catalogue.

- `copy` is configs/complete_journey_retrieval.py.
- `no_copy` is the same without `head.copy`.
- `generative_copy` generates semantic ids with 50 beams, and copies; `--semantic-ids`
  is the output of `tokenrec semantic-ids`.
- `generative` is the same without `head.copy`.
- Arms without copies are run with the first seed alone.
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

import jax

from benchmarks.report import run_script, spread, write_result
from tokenrec.checkpoint.run_folder import CONFIG_FILE
from tokenrec.config import Config, to_json
from tokenrec.config.load import load_config
from tokenrec.data.dataset import open_dataset
from tokenrec.errors import InputError
from tokenrec.evaluation.baseline_reports import retrieval_baselines
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.runtime.files import write_json
from tokenrec.sharding import make_mesh
from tokenrec.train_loop import train

CONFIG = "complete_journey_retrieval"
# Arm -> overrides of the config.
GENERATIVE = ("head.retrieval=semantic_id", "head.beams=50")
ARMS: dict[str, tuple[str, ...]] = {
    "copy": (),
    "no_copy": ("head.copy=False",),
    "generative_copy": GENERATIVE,
    "generative": (*GENERATIVE, "head.copy=False"),
}
OF_ALL_SEEDS = ("copy", "generative_copy")
METRICS = ("recall@1", "recall@10", "recall@50", "ndcg@10", "mrr")


def arm_config(arm: str, seed: int, data: Path, semantic_ids: Path | None) -> Config:
    """Make the config of a run.

    Raises:
      InputError: a generative arm lacks its semantic ids.
    """
    overrides = [f"seed={seed}", *ARMS[arm]]
    if arm.startswith("generative"):
        if semantic_ids is None:
            raise InputError(
                f"arm '{arm}' generates semantic ids; give --semantic-ids, the output "
                "of `tokenrec semantic-ids`"
            )
        overrides.append(f"data.semantic_ids={semantic_ids}")
    config = load_config(CONFIG, overrides)
    config.data.path = str(data)
    return config


def run_seed(
    arm: str, seed: int, data: Path, semantic_ids: Path | None, runs: Path
) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done.

    Args:
      arm: key of `ARMS`.
      seed: random seed.
      data: the prepared data set.
      semantic_ids: its semantic ids, for a generative arm.
      runs: folder of the runs.

    Returns:
      Metrics and costs, which are kept in the run's `result.json`.

    Raises:
      InputError: the run was trained with other settings.
    """
    workdir = runs / f"{arm}_seed{seed}"
    kept = workdir / "result.json"
    config = arm_config(arm, seed, data, semantic_ids)
    if kept.is_file():
        trained_with = json.loads((workdir / CONFIG_FILE).read_text())
        if trained_with != json.loads(to_json(config)):
            raise InputError(
                f"runs: '{workdir}' was trained with other settings; "
                "give another --runs, or move it away"
            )
        return json.loads(kept.read_text())
    began, fresh = cpu_seconds(), not workdir.exists()
    # A run ends with an evaluation of what is then its last checkpoint.
    report = train(config, workdir)["evaluation"]
    seconds = cpu_seconds() - began
    if report is None:
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


def baseline_rows(data: Path, runs: Path) -> list[dict[str, Any]]:
    """Evaluate what needs no model on the requests of the runs; kept in their folder."""
    kept = runs / "baselines.json"
    if not kept.is_file():
        config = load_config(CONFIG, [])
        mesh = make_mesh(config.mesh)
        dataset = open_dataset(data, config.data.exclude, config.data.semantic_ids)
        with jax.set_mesh(mesh):
            reports = retrieval_baselines(
                config, dataset, "valid", mesh, limit=config.train.eval_samples
            )
        write_json(kept, reports)
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
    parser.add_argument("--semantic-ids", type=Path, help="of the generative arms")
    parser.add_argument("--runs", type=Path, default=Path(f"runs/benchmarks/{CONFIG}"))
    parser.add_argument(
        "--out", type=Path, default=Path(f"benchmarks/results/{CONFIG}")
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    records = []
    for arm in arguments.arms:
        few = arguments.seeds[:1]
        for seed in arguments.seeds if arm in OF_ALL_SEEDS else few:
            records.append(
                run_seed(
                    arm,
                    seed,
                    arguments.data,
                    arguments.semantic_ids,
                    arguments.runs,
                )
            )
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    config = load_config(CONFIG, [])
    seeds = " ".join(map(str, arguments.seeds))
    chosen = f"--seeds {seeds} --arms {' '.join(arguments.arms)}"
    if arguments.semantic_ids is not None:
        chosen += " --semantic-ids DIR"
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
        [*table_rows(records), *baseline_rows(arguments.data, arguments.runs)],
        settings,
        command,
        title=f"{title}: mean ± deviation over seeds",
    )
    by_seed = arguments.out.with_name(arguments.out.name + "_seeds")
    write_result(by_seed, records, settings, command, title=f"{title}: every seed")


if __name__ == "__main__":
    run_script(main)
