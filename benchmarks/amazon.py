"""Train on Amazon Beauty and Toys, leave-one-out; report Recall@k and NDCG@k.

    python -m benchmarks.amazon --root DIR [--data beauty toys] \\
        [--configs next_item next_item_refit generative] [--seeds 0 1 2]

The goal is the last item of every user, ranked in the full catalogue. `--root` is the
folder with `Beauty.txt`, `Toys_and_Games.txt` and their attributes. Every seed is a run
under `--runs`: a run that was stopped resumes, a finished one is only read.

- `next_item` is evaluated at the checkpoint with the best NDCG@10 on `valid`, the items
  before the last.
- `next_item_refit` trains with the same settings and steps, with `valid` in its
  training data. Nothing is chosen: the last checkpoint is evaluated.
- `generative` generates semantic ids, made by RQ-KMeans of co-occurrence in `train`.

Both data sets have the same settings, which were chosen on `valid`.

Leave-one-out is not a split by time. It is used to compare with published tables, which
follow two conventions: the trainer of S3-Rec leaves the items of the history out of the
ranking, and the evaluation of ActionPiece ranks all that its beam search finds, seen
items too. Which one the other published figures follow, and whether their models learn
the items before the last in the end, is not known. In these data sets no goal is in its
history.
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
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.semantic_id_file import SEMANTIC_IDS
from tokenrec.data.sources.amazon import AmazonSource
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import make_evaluator
from tokenrec.run_length import with_steps
from tokenrec.runtime.files import write_json
from tokenrec.semantic_ids.build import build_semantic_ids
from tokenrec.sharding import make_mesh
from tokenrec.train_loop import train

# Name of the shipped config, and how many last items of a user are not learned.
CONFIGS = {
    "next_item": ("amazon", 2),
    "next_item_refit": ("amazon", 1),
    "generative": ("amazon_generative", 2),
}
# Short name of the data set -> name of its files.
DATA = {"beauty": "Beauty", "toys": "Toys_and_Games"}
SEEN_TOO = ", seen items ranked too"
METRICS = ("recall@1", "recall@5", "recall@10", "ndcg@5", "ndcg@10")
# Full ranking, leave-one-out, as published in their papers; not run by us. Recall@10
# and NDCG@10.
PUBLISHED = {
    "beauty": {
        "eSASRec (published)": (".0928", ".0523"),
        "ActionPiece (published)": (".0775", ".0424"),
        "TIGER, ids of text (published)": (".0648", ".0384"),
    },
    "toys": {"TIGER, ids of text (published)": (".0712", ".0432")},
}


def cpu_seconds() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_seed(
    data_name: str, name: str, seed: int, prepared: Path, runs: Path
) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done.

    Args:
      data_name: key of `DATA`.
      name: key of `CONFIGS`.
      seed: random seed.
      prepared: folder of the prepared data sets and their semantic ids.
      runs: folder of the runs.

    Returns:
      Metrics and costs, which are kept in the run's `result.json`.

    Raises:
      InputError: the run was trained with other settings.
    """
    workdir = runs / f"{data_name}_{name}_seed{seed}"
    kept = workdir / "result.json"
    file, held_out = CONFIGS[name]
    data = data_folder(prepared, data_name, held_out)
    config = load_config(file, [f"seed={seed}"])
    config.data.path = str(data)
    if config.data.semantic_ids:
        config.data.semantic_ids = str(ids_folder(prepared, data_name))
    if held_out == 1:
        # The test split is evaluated once, after the last step.
        config.train = dataclasses.replace(
            config.train, eval_split="test", eval_every=0, eval_samples=0
        )
    if kept.is_file():
        if json.loads((workdir / CONFIG_FILE).read_text()) != json.loads(
            to_json(with_steps(config, open_dataset(data)))
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
        "data": data_name,
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
    """Make table rows per data set and config: mean and sample deviation on `test`.

    Published results follow those of each data set.
    """
    rows: list[dict[str, Any]] = []
    for data in dict.fromkeys(record["data"] for record in records):
        of_data = [record for record in records if record["data"] == data]
        for name in dict.fromkeys(record["config"] for record in of_data):
            rows += _config_rows([r for r in of_data if r["config"] == name])
        rows += [
            {"data": data, "config": name, "seeds": ""}
            | {"recall@10": recall, "ndcg@10": ndcg}
            for name, (recall, ndcg) in PUBLISHED[data].items()
        ]
    return rows


def _config_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the seeds of one config: without seen items, and with them."""
    with_seen = f"test {METRICS[0]}{SEEN_TOO}" in records[0]
    return [
        {
            "data": records[0]["data"],
            "config": f"{records[0]['config']}{suffix}",
            "seeds": len(records),
        }
        | {
            metric: spread([record[f"test {metric}{suffix}"] for record in records])
            for metric in METRICS
        }
        for suffix in (("", SEEN_TOO) if with_seen else ("",))
    ]


def data_folder(prepared: Path, data_name: str, held_out: int) -> Path:
    """Folder of a prepared data set, by how many last items of a user are held out."""
    return prepared / f"amazon_{data_name}{'_refit' if held_out == 1 else ''}"


def ids_folder(prepared: Path, data_name: str) -> Path:
    """Folder of the semantic ids of a data set."""
    return prepared / f"amazon_{data_name}_ids"


def prepare_data(root: Path, prepared: Path, data_name: str, names: list[str]) -> None:
    """Prepare what some configs read of a data set, unless it is there."""
    for held_out in {CONFIGS[name][1] for name in names}:
        folder = data_folder(prepared, data_name, held_out)
        if not (folder / METADATA_FILE).is_file():
            prepare(AmazonSource(root, DATA[data_name], held_out=held_out), folder)
    ids = ids_folder(prepared, data_name)
    if "generative" in names and not (ids / SEMANTIC_IDS).is_file():
        build_semantic_ids(data_folder(prepared, data_name, 2), ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/amazon"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/amazon"))
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument(
        "--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    records = []
    for data in arguments.data:
        prepare_data(arguments.root, arguments.prepared, data, arguments.configs)
        for name in arguments.configs:
            for seed in arguments.seeds:
                records.append(
                    run_seed(data, name, seed, arguments.prepared, arguments.runs)
                )
                print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    chosen = " ".join(
        f"--{name} {' '.join(map(str, getattr(arguments, name)))}"
        for name in ("data", "configs", "seeds")
    )
    command = f"python -m benchmarks.amazon --root DIR {chosen}"
    settings = {
        "split": "leave-one-out",
        "ranked": "the whole catalogue",
        "checkpoint": "best NDCG@10 on valid, of a refit the last",
    }
    title = "Amazon Beauty and Toys, the last item of every user"
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
