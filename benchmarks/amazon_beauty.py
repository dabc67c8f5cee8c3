"""Train on Amazon Beauty, leave-one-out, over seeds; report Recall@k and NDCG@k.

    python -m benchmarks.amazon_beauty --root DIR \\
        [--configs next_item next_item_refit generative] [--seeds 0 1 2]

The goal is the last item of every user, ranked in the full catalogue. `--root` is the
folder with `Beauty.txt` and its attributes. Every seed is a run under `--runs`: a run
that was stopped resumes, a finished one is only read.

- `next_item` is evaluated at the checkpoint with the best NDCG@10 on `valid`, the items
  before the last.
- `next_item_refit` trains with the same settings and steps, with `valid` in its
  training data. Nothing is chosen: the last checkpoint is evaluated.
- `generative` generates semantic ids, made by RQ-KMeans of co-occurrence in `train`.

Leave-one-out is not a split by time. It is used to compare with published tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.report import run_script, spread, write_result
from tokenrec.checkpoint.run_folder import CONFIG_FILE, load_run_config, open_run
from tokenrec.config import to_json
from tokenrec.config.load import load_config
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.semantic_id_file import SEMANTIC_IDS
from tokenrec.data.sources.amazon import AmazonSource
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import make_evaluator
from tokenrec.runtime.files import write_json
from tokenrec.semantic_ids.build import build_semantic_ids
from tokenrec.sharding import make_mesh
from tokenrec.train_loop import train

# Name of the shipped config, and how many last items of a user are not learned.
CONFIGS = {
    "next_item": ("amazon_beauty", 2),
    "next_item_refit": ("amazon_beauty", 1),
    "generative": ("amazon_beauty_generative", 2),
}
SEEN_TOO = ", seen items ranked too"
METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10")
# Full ranking, leave-one-out, as published in their papers; not run by us.
PUBLISHED = (
    {"config": "eSASRec (published)", "recall@10": ".0928", "ndcg@10": ".0523"},
    {"config": "ActionPiece (published)", "recall@10": ".0775", "ndcg@10": ".0424"},
    {
        "config": "TIGER, ids of text (published)",
        "recall@10": ".0648",
        "ndcg@10": ".0384",
    },
)


def cpu_seconds() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_seed(name: str, seed: int, data: Path, ids: Path, runs: Path) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done.

    Args:
      name: key of `CONFIGS`.
      seed: random seed.
      data: the prepared data set.
      ids: folder of the semantic ids.
      runs: folder of the runs.

    Returns:
      Metrics and costs, which are kept in the run's `result.json`.

    Raises:
      InputError: the run was trained with other settings.
    """
    workdir = runs / f"{name}_seed{seed}"
    kept = workdir / "result.json"
    file, held_out = CONFIGS[name]
    config = load_config(file, [f"seed={seed}"])
    config.data.path = str(data)
    if config.data.semantic_ids:
        config.data.semantic_ids = str(ids)
    if held_out == 1:
        # The test split is evaluated once, after the last step.
        config.train = dataclasses.replace(
            config.train, eval_split="test", eval_every=0, eval_samples=0
        )
    if kept.is_file():
        if json.loads((workdir / CONFIG_FILE).read_text()) != json.loads(
            to_json(config)
        ):
            raise InputError(
                f"runs: '{workdir}' was trained with other settings; "
                "give another --runs, or move it away"
            )
        return json.loads(kept.read_text())
    began, fresh = cpu_seconds(), not workdir.exists()
    summary = train(config, workdir)
    trained = cpu_seconds()
    record = {
        "config": name,
        "seed": seed,
        "step": summary["step"],
        "best_step": summary["best_step"],
    }
    for split in ("valid", "test")[2 - held_out :]:
        record |= {
            f"{split} {metric}": value
            for metric, value in _retrieval(workdir, split, data).items()
        }
    # The costs of a resumed run are not known: those before it was stopped are missing.
    costs = {
        "goals_per_second": summary["examples_per_second"],
        "train_cpu_seconds": trained - began,
    }
    record |= costs if fresh else dict.fromkeys(costs)
    write_json(kept, record)
    return record


def _retrieval(workdir: Path, split: str, data: Path) -> dict[str, float]:
    """Evaluate the best checkpoint of a run on a split.

    A next-item head that leaves out seen items is evaluated with them as well, which
    takes no further training; a beam search is not repeated for it.
    """
    config = load_run_config(workdir, data)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = open_run(workdir, "best", data)
        metrics = {}
        with_seen = config.head.drop_seen and config.head.retrieval == "next_item"
        for suffix in ("", SEEN_TOO) if with_seen else ("",):
            changed = dataclasses.replace(
                config, head=dataclasses.replace(config.head, drop_seen=not suffix)
            )
            evaluator = make_evaluator(
                dataclasses.replace(run.model, config=changed), run.dataset, mesh
            )
            report = evaluator(run.state, split)["retrieval"]
            metrics |= {f"{metric}{suffix}": report[metric] for metric in METRICS}
    return metrics


def table_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make table rows per config: mean and sample deviation over seeds on `test`.

    Published results follow. It is not known whether those runs ranked seen items, or
    trained on `valid` in the end.
    """
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(record["config"] for record in records):
        of_config = [record for record in records if record["config"] == name]
        for suffix in (
            ("", SEEN_TOO) if f"test {METRICS[0]}{SEEN_TOO}" in of_config[0] else ("",)
        ):
            row: dict[str, Any] = {"config": f"{name}{suffix}", "seeds": len(of_config)}
            for metric in METRICS:
                row[metric] = spread(
                    [record[f"test {metric}{suffix}"] for record in of_config]
                )
            rows.append(row)
    return [*rows, *({"seeds": "", **row} for row in PUBLISHED)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/amazon_beauty"))
    parser.add_argument("--ids", type=Path, default=Path("data/amazon_beauty_ids"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmarks/amazon_beauty")
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/amazon_beauty")
    )
    parser.add_argument(
        "--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    folders = {
        2: arguments.data,
        1: arguments.data.with_name(arguments.data.name + "_refit"),
    }
    for held_out in {CONFIGS[name][1] for name in arguments.configs}:
        if not (folders[held_out] / METADATA_FILE).is_file():
            prepare(
                AmazonSource(arguments.root, "Beauty", held_out=held_out),
                folders[held_out],
            )
    if (
        "generative" in arguments.configs
        and not (arguments.ids / SEMANTIC_IDS).is_file()
    ):
        build_semantic_ids(arguments.data, arguments.ids)
    records = []
    for name in arguments.configs:
        for seed in arguments.seeds:
            data = folders[CONFIGS[name][1]]
            records.append(run_seed(name, seed, data, arguments.ids, arguments.runs))
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    seeds_text = " ".join(map(str, arguments.seeds))
    chosen = f"--configs {' '.join(arguments.configs)} --seeds {seeds_text}"
    command = f"python -m benchmarks.amazon_beauty --root DIR {chosen}"
    settings = {
        "split": "leave-one-out",
        "ranked": "the whole catalogue",
        "checkpoint": "best NDCG@10 on valid, of a refit the last",
    }
    title = "Amazon Beauty, the last item of every user"
    write_result(
        arguments.out,
        table_rows(records),
        settings,
        command,
        title=f"{title}: mean ± deviation over seeds",
    )
    seeds = arguments.out.with_name(arguments.out.name + "_seeds")
    write_result(seeds, records, settings, command, title=f"{title}: every seed")


if __name__ == "__main__":
    run_script(main)
