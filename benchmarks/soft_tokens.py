"""Soft tokens against the textualised prompt: cost and quality of otherwise equal runs.

    tokenrec semantic-ids --data DIR --out IDS --levels 7 --codes 64
    python -m benchmarks.soft_tokens --task complete_journey --data DIR \\
        --semantic-ids IDS --work DIR
    python -m benchmarks.soft_tokens --task complete_journey_retrieval --data DIR \\
        --work DIR
    python -m benchmarks.soft_tokens --task kuairand_pure --data DIR \\
        --semantic-ids IDS --work DIR

The runs of a task differ in the prompt alone (the arms of
benchmarks/soft_tokens_arms.py; docs/methods.md section 2). The result is a table of
tokens, FLOPs, time, memory and metrics. Each arm and seed is a process of its own, one
after another, with a folder under `--work`. A stopped run resumes, a finished one is
read. Nothing is chosen on the split that is reported: the last checkpoint is evaluated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import markdown_table, run_script, spread, write_result
from benchmarks.soft_tokens_arms import (
    ARMS,
    BATCH,
    EVALUATED,
    TASKS,
    plan_arms,
    task_arms,
)
from tokenrec.config import Config, from_json, to_json
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.planner.compile import compile_train_step
from tokenrec.planner.describe import describe
from tokenrec.planner.flops import STEP_OVER_FORWARD
from tokenrec.runtime.files import write_json
from tokenrec.runtime.metric_writer import METRICS_FILE
from tokenrec.sharding import make_mesh
from tokenrec.state import ModelSpec, build_model
from tokenrec.train_loop import train

RESULTS = Path(__file__).parent / "results"
RECORD = "result.json"
# The longest default history with which a task takes about 40 minutes on a calm
# two-core machine.
EVENTS = {"complete_journey": 32, "complete_journey_retrieval": 32, "kuairand_pure": 32}
MIB = 2**20
TITLES = {
    "complete_journey": "Complete Journey, ranking",
    "complete_journey_retrieval": "Complete Journey, next product",
    "kuairand_pure": "KuaiRand-Pure, ranking",
}
# Columns of the record of a run that are costs, in the order of the table.
COSTS = (
    "prompt tokens",
    "MFLOP a request",
    "requests seen",
    "TFLOP in all",
    "step, ms",
    "requests / s",
    "peak, MiB",
    "step's temporaries, MiB",
)


def run_arm(config_text: str, workdir: Path) -> dict[str, Any]:
    """Train an arm or resume it, measure it, and write its record into `workdir`.

    It runs in a fresh process, whose peak memory is that of the arm.

    Args:
      config_text: the arm's config as JSON.
      workdir: folder of the run.

    Returns:
      The record: costs by the names of `COSTS`, and metrics.
    """
    config = from_json(config_text)
    summary = train(config, workdir)
    data = Path(config.data.path)
    # A run that was stopped after its last checkpoint has no report of the evaluation.
    report = summary["evaluation"] or evaluate_run(
        workdir, "valid", "latest", data, limit=config.train.eval_samples
    )
    peak = peak_bytes()
    description = describe(
        config, open_dataset(data, (), config.data.semantic_ids).schema
    )
    flops = STEP_OVER_FORWARD * description["flops_per_example"]
    seconds, temporaries = step_seconds(workdir), step_bytes(config)
    record = {
        "config": json.loads(config_text),
        "prompt tokens": prompt_tokens(config),
        "MFLOP a request": flops / 1e6,
        "requests seen": config.optim.steps * config.data.batch_size,
        "TFLOP in all": config.optim.steps * config.data.batch_size * flops / 1e12,
        "step, ms": None if seconds is None else 1e3 * seconds,
        "requests / s": None if seconds is None else config.data.batch_size / seconds,
        "peak, MiB": peak / MIB,
        "step's temporaries, MiB": None if temporaries is None else temporaries / MIB,
        "metrics": quality(report),
        "report": report,
    }
    write_json(workdir / RECORD, record)
    return record


def baseline_metrics(workdir: Path) -> dict[str, dict[str, float | None]]:
    """Evaluate the baselines that need no model, on the requests of a run's evaluation.

    Args:
      workdir: folder of the run; the result is kept there.

    Returns:
      Baseline name -> metric -> value.
    """
    stored = workdir / "baselines.json"
    if not stored.is_file():
        report = evaluate_run(
            workdir, "valid", "latest", None, baselines=True, limit=EVALUATED
        )
        metrics = {name: quality(part) for name, part in report["baselines"].items()}
        write_json(stored, metrics)
    return json.loads(stored.read_text())


def prompt_tokens(config: Config) -> int:
    """Tokens of the stream of a request with one candidate."""
    candidates = 1 if config.data.objective == "ranking" else None
    return _model(config).layout(config.data.events, candidates=candidates).length


def step_bytes(config: Config) -> int | None:
    """Temporary memory of the compiled train step, in bytes.

    It holds activations, gradients and scratch, but neither state nor batch. None where
    the platform does not report it.
    """
    model = _model(config)
    shapes = batch_shapes(model.schema, config.data, batch_size=config.data.batch_size)[
        config.data.events
    ]
    memory = compile_train_step(model, make_mesh(config.mesh), shapes).memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def _model(config: Config) -> ModelSpec:
    schema = open_dataset(
        Path(config.data.path), config.data.exclude, config.data.semantic_ids
    ).schema
    return build_model(config, schema, task_names(schema, config.data))


def peak_bytes() -> int:
    """Most memory that this process has held at once, in bytes."""
    # Linux hands a new process the `ru_maxrss` of its parent, so `VmHWM` is preferred.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_seconds(workdir: Path) -> float | None:
    """Median seconds of a step, from the times of the run's log.

    None if the log has fewer than two lines. Intervals start behind the first line, so
    that compilation is not counted; those with a checkpoint or a stop are few, and the
    median ignores them.
    """
    lines = [
        json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()
    ]
    logged = [(line["step"], line["time"]) for line in lines if "train/loss" in line]
    each = [(t - s) / (b - a) for (a, s), (b, t) in itertools.pairwise(logged)]
    return statistics.median(each) if each else None


def quality(report: dict[str, Any]) -> dict[str, float | None]:
    """The metrics of the table, from an evaluation report."""
    if "retrieval" in report:
        metrics = report["retrieval"]
        return {
            "Recall@10": metrics["recall@10"],
            "NDCG@10": metrics["ndcg@10"],
            "Recall@50": metrics["recall@50"],
        }
    return {"AUC": report["macro_auc"], "GAUC": report["macro_gauc"]}


def measured(config: Config, workdir: Path) -> dict[str, Any]:
    """Read the record of an arm, or measure the arm in a process of its own.

    Args:
      config: the arm's config.
      workdir: folder of the run.

    Returns:
      The record of `run_arm`.

    Raises:
      InputError: the stored record is of another config.
    """
    text = to_json(config)
    stored = workdir / RECORD
    if stored.is_file():
        record = json.loads(stored.read_text())
        if record["config"] != json.loads(text):
            raise InputError(
                f"work: '{stored}' was measured with other settings; give another "
                "--work, or move it away"
            )
        return record
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(run_arm, text, workdir).result()


def table_rows(
    records: dict[str, list[dict[str, Any]]],
    baselines: dict[str, dict[str, float | None]],
) -> list[dict[str, Any]]:
    """Lines of the table: one per arm, then one per baseline.

    Args:
      records: arm -> the record of each seed.
      baselines: baseline name -> metric -> value.

    Returns:
      Costs as means over seeds, metrics as mean and sample standard deviation.
    """
    rows = []
    for arm, arm_records in records.items():
        row: dict[str, Any] = {"arm": arm, "seeds": len(arm_records)}
        row |= {name: _mean([record[name] for record in arm_records]) for name in COSTS}
        for metric in arm_records[0]["metrics"]:
            row[metric] = spread([record["metrics"][metric] for record in arm_records])
        rows.append(row)
    for name, metrics in baselines.items():
        rows.append(
            {"arm": f"({name})"}
            | {metric: spread([value]) for metric, value in metrics.items()}
        )
    return rows


def ratio_rows(
    records: dict[str, list[dict[str, Any]]], to: str = "soft"
) -> list[dict[str, Any]]:
    """Lines of the table of ratios, one per arm.

    Args:
      records: arm -> the record of each seed.
      to: the arm that the others are compared with.

    Returns:
      Costs as multiples of those of `to`, metrics as differences seed by seed. Empty if
      `to` was not run.
    """
    if to not in records:
        return []
    rows = []
    for arm, arm_records in records.items():
        if arm == to:
            continue
        row: dict[str, Any] = {"arm": f"{arm} / {to}"}
        for name in COSTS:
            cost = _mean([record[name] for record in arm_records])
            reference = _mean([record[name] for record in records[to]])
            row[name] = None if cost is None or not reference else cost / reference
        for metric in arm_records[0]["metrics"]:
            pairs = [
                (a["metrics"][metric], b["metrics"][metric])
                for a, b in zip(arm_records, records[to], strict=True)
            ]
            row[f"{metric}, difference"] = spread(
                [None if None in pair else pair[0] - pair[1] for pair in pairs], "+"
            )
        rows.append(row)
    return rows


def _mean(values: Sequence[float | None]) -> float | int | None:
    if any(value is None for value in values):
        return None
    mean = float(np.mean(np.array(values, float)))
    return int(mean) if mean.is_integer() else mean


def write_page(
    stem: Path,
    flags: argparse.Namespace,
    records: dict[str, list[dict[str, Any]]],
    baselines: dict[str, dict[str, float | None]],
) -> None:
    """Write the result page: table, ratios to soft tokens, and the arms in words.

    Args:
      stem: path of the page without its suffix.
      flags: the command line.
      records: arm -> the record of each seed.
      baselines: baseline name -> metric -> value.
    """
    params = {
        "events": flags.events,
        "requests": flags.requests,
        "batch": BATCH,
        "model": "width 64, 4 layers, all full, 2 heads",
        "evaluated": f"{EVALUATED:,} requests of valid",
        "checkpoint": "the last",
    }
    words = ["python -m benchmarks.soft_tokens", f"--task {flags.task}", "--data DIR"]
    words += ["--semantic-ids IDS"] if flags.semantic_ids else []
    words += [
        f"--work DIR --seeds {' '.join(map(str, flags.seeds))}",
        f"--arms {' '.join(flags.arms)}",
    ]
    words += [f"--requests {flags.requests} --events {flags.events}"]
    title = f"{TITLES[flags.task]}: soft tokens and text"
    write_result(
        stem, table_rows(records, baselines), params, " ".join(words), title=title
    )
    ratios = ratio_rows(records)
    page = ["", "## Against soft", "", markdown_table(ratios)] if ratios else []
    page += [
        "",
        "## The arms",
        "",
        *(f"- `{arm}`: {ARMS[arm].what}." for arm in records),
        "",
        *notes(flags.task),
    ]
    with stem.with_name(stem.name + ".md").open("a") as file:
        file.writelines(f"{line}\n" for line in page)


def notes(task: str) -> list[str]:
    """Notes of the result page for a reader of its tables."""
    written = "; ".join(
        f"{entity}: {', '.join(names)}" for entity, names in TASKS[task].text.items()
    )
    lone = "- Few users of the sample have both labels, so that GAUC says little here; read the AUC."
    ablations = [
        "- The paper does not define WH_SID, NO_FEAT, NO_FEAT_STRICT and WH_SID_NO_FEAT in what we read of it; the "
        "list above is our reading."
    ]
    return [
        f"- What text writes, {written}. User and query are written whole.",
        "- Prompt tokens are those of a request with one candidate. FLOPs are of training, three times the matrix "
        "products of a forward pass at the full length, attention over visible pairs, with all candidates of a stream. "
        "An arm reads no feature that it does not use.",
        "- The time of a step is the median over the run's log. Peak memory is that of the arm's process with its "
        "data; temporaries are those of the compiled step alone.",
        "- In brackets, what needs no model and counts the whole training split (`tokenrec evaluate --baselines`).",
        *([lone] if TASKS[task].candidates == 1 else []),
        *([] if TASKS[task].positive else ablations),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      InputError: a history is too short.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--data", required=True, type=Path, help="prepared data set")
    parser.add_argument(
        "--semantic-ids",
        type=Path,
        help="output of `tokenrec semantic-ids`; not needed for retrieval",
    )
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument(
        "--arms", nargs="+", help="arms to run (default: all of the task)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--events", type=int, help="events of the longest history")
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args(argv)
    flags.arms = list(dict.fromkeys(flags.arms or task_arms(flags.task)))
    flags.events = EVENTS[flags.task] if flags.events is None else flags.events
    flags.seeds = list(dict.fromkeys(flags.seeds))
    if flags.events < 2:
        raise InputError(
            f"--events {flags.events}: a history needs at least 2, an older and a newer half"
        )
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(argv)
    records: dict[str, list[dict[str, Any]]] = {arm: [] for arm in flags.arms}
    for seed in flags.seeds:
        planned = plan_arms(
            flags.task,
            flags.arms,
            flags.data,
            flags.semantic_ids,
            requests=flags.requests,
            events=flags.events,
            seed=seed,
        )
        for arm, config in planned.items():
            print(
                f"{flags.task} {arm} seed {seed}: {config.optim.steps:,} steps",
                file=sys.stderr,
                flush=True,
            )
            records[arm].append(
                measured(config, flags.work / flags.task / f"{arm}_seed{seed}")
            )
    stem = flags.out or RESULTS / f"soft_tokens_{flags.task}"
    first = flags.work / flags.task / f"{flags.arms[0]}_seed{flags.seeds[0]}"
    write_page(stem, flags, records, baseline_metrics(first))
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
