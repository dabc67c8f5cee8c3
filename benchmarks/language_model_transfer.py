"""What a small pretrained language model buys as the backbone of a recommender.

    python -m benchmarks.language_model_transfer --amazon DIR --work DIR

1. A language model of 5 million weights is trained on item texts and docstrings
   (language_model_transfer_texts.py, language_model_transfer_pretrain.py).
2. Amazon Beauty and Complete Journey are prepared with its tokenizer.
3. On both, runs from random weights and from the pretrained ones, with all weights or
   adapters trained, read events as soft tokens or as the words of their texts
   (language_model_transfer_arms.py).

The peak rate of an arm is the one of `RATES` with the lower training loss in the last
fifth of a run of soft tokens with seed 0, whose samples are all read for the first time;
text takes over the rate of soft tokens. The test split is read for the table alone. A
stopped run resumes, a finished one is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.language_model_transfer_arms import (
    ALIGNED,
    CONTROLS,
    ORIGINS,
    RATES,
    SEEDS,
    SIZES,
    TASKS,
    Arm,
    Size,
    arm_config,
    base_origin,
)
from benchmarks.language_model_transfer_pretrain import (
    LENGTH,
    REPORT,
    architecture,
    pretrain,
    shuffle,
)
from benchmarks.language_model_transfer_texts import (
    PROSE,
    WORDS,
    docstrings,
    item_texts,
    make_corpus,
    prepare_data,
    sources,
    train_words,
)
from benchmarks.report import markdown_table, run_script, spread, write_result
from tokenrec.config import Config, to_json
from tokenrec.data.dataset import open_dataset
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.language.architecture import CONFIG_FILE
from tokenrec.planner.describe import describe
from tokenrec.runtime.files import write_json
from tokenrec.runtime.metric_writer import METRICS_FILE
from tokenrec.train_loop import train

OUT = Path(__file__).parent / "results" / "language_model_transfer"
NOTES = (
    "- `scratch`: the architecture from random weights. `pretrained`: all of its weights are trained on. "
    "`pretrained, LoRA`: they are frozen, with adapters of rank 16 beside them; makers, tables and head are trained. "
    "`pretrained, shuffled`: as `pretrained`, with the numbers of each tensor in random order.",
    "- `events as` `soft`: one token made of all features of an event, its title among them; `text`: the words of its "
    "title alone. The rest of a prompt is the same. In Beauty's streams every event is a goal, which text does not "
    "allow: `one goal` compares the two where only the last event of a sample is one.",
    "- `aligned`: with tasks of `head.alignment` in the loss, `Which item is{title}?{sid}` of weight 0.5 and "
    "`Item{sid} is{title}` of weight 0.25. `title_to_sid nats` and `sid_to_title nats`: mean loss of an answer.",
    "- `train loss`: mean over the last fifth of the steps, of samples that are read for the first time, in nats an "
    "item for Beauty, a label for Complete Journey. The arms of a seed read the same samples in the same order.",
    "- `rate`: the better of two by that loss, seed 0, soft tokens; text, streams of one goal and aligned "
    "arms take it over.",
    "- `tokens` and `forward MFLOP`, of a sample at its full length, are counted. `step ms` is the least disturbed "
    "stretch of a run beside other work on the same cores: trust the counts.",
    "- Complete Journey is ranked without `household_purchases` and `product_sales`, which count the past and would "
    "decide most of it.",
    "- In brackets, what needs no model; it counts the whole training split.",
    f"- Prose: docstrings of the installed {', '.join(PROSE)} (BSD-3-Clause and Apache-2.0). Perplexities are of texts "
    "that were held out.",
)
RECORD, TESTED = "result.json", "test.json"


def make_language_model(
    amazon: Path, tasks: Sequence[str], work: Path
) -> dict[str, Any]:
    """Train the language model, or read what its training reported.

    Args:
      amazon: folder of Amazon's files.
      tasks: names of the tasks whose items' texts it reads.
      work: folder of the benchmark. The model goes to `model`, its architecture and
        tokenizer to `untrained`.

    Returns:
      The report of `pretrain`, with the words read of each kind of text.
    """
    model, untrained = work / "model", work / "untrained"
    if not model.is_dir():
        texts = {
            "items": [
                t for s in sources(amazon, tasks).values() for t in item_texts(s)
            ],
            "prose": docstrings(PROSE),
        }
        tokenizer = train_words(texts, untrained, WORDS)
        write_json(untrained / CONFIG_FILE, architecture(tokenizer.get_vocab_size()))
        corpus = make_corpus(tokenizer, texts, LENGTH)
        pretrain(model, untrained, corpus.train, corpus.held_out)
    report: dict[str, Any] = json.loads((model / REPORT).read_text())
    return report


def run(arm: Arm, work: Path, size: Size, rate: float, seed: int) -> dict[str, Any]:
    """Train a run, resume it, or read its record.

    Returns:
      `loss`, the mean of the last fifth of the steps; `step_ms`, that of the least
      disturbed stretch between two log lines; `config`.

    Raises:
      InputError: the record is of other settings.
    """
    config = arm_config(arm, work, size, rate, seed)
    folder = run_folder(arm, work, rate, seed)
    stored, text = folder / RECORD, to_json(config)
    if not stored.is_file():
        print(f"{folder.name} ..", flush=True)
        train(config, folder, progress=False)
        lines = _train_lines(folder)
        last = [line["train/loss"] for line in lines[-(len(lines) // 5) or -1 :]]
        # None before the first line without a compilation.
        steps = [line.get("train/step_seconds") for line in lines]
        record = {
            "config": json.loads(text),
            "loss": statistics.mean(last),
            "losses": [line["train/loss"] for line in lines],
            "step_ms": 1e3 * min(filter(None, steps), default=float("nan")),
        }
        write_json(stored, record)
    found: dict[str, Any] = json.loads(stored.read_text())
    if found["config"] != json.loads(text):
        raise InputError(
            f"work: '{stored}' was measured with other settings; give another --work, "
            "or move it away"
        )
    return found


def run_folder(arm: Arm, work: Path, rate: float, seed: int) -> Path:
    """Folder of a run."""
    words = (arm.task, arm.origin, arm.form, f"{rate:g}", str(seed))
    return work / "runs" / "_".join(words).replace(", ", "_")


def _train_lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(s) for s in (folder / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def tested(folder: Path, size: Size) -> dict[str, float]:
    """Evaluate the last checkpoint of a run on the test split, or read the result."""
    stored = folder / TESTED
    if not stored.is_file():
        report = evaluate_run(folder, "test", "latest", None, limit=size.evaluated)
        write_json(stored, quality(report))
    read: dict[str, float] = json.loads(stored.read_text())
    return read


def quality(report: dict[str, Any]) -> dict[str, float]:
    """The metrics of the table, from an evaluation report."""
    if "retrieval" in report:
        found = report["retrieval"]
        asked = report.get("alignment", {})
        return {"Recall@10": found["recall@10"], "NDCG@10": found["ndcg@10"]} | {
            f"{name} nats": task["loss"] for name, task in asked.items()
        }
    return {"AUC": report["macro_auc"], "GAUC": report["macro_gauc"]}


def best_rate(task: str, origin: str, work: Path, size: Size) -> float:
    """The rate of `RATES` with the lower loss, for soft tokens and seed 0."""
    arm = Arm(task, origin, "soft")
    losses = {rate: run(arm, work, size, rate, 0)["loss"] for rate in RATES}
    return min(losses, key=lambda rate: losses[rate])


def run_arms(
    work: Path, sizes: dict[str, Size], seeds: dict[Arm, int]
) -> dict[Arm, list[dict[str, Any]]]:
    """Run every arm, all arms with a seed before the next seed, or read what was run.

    Args:
      work: folder of the benchmark.
      sizes: size of the runs by task.
      seeds: arm -> number of its seeds.

    Returns:
      Arm -> record of each seed: that of `run`, `rate` and `metrics`.
    """
    rates = {
        (arm.task, arm.origin): best_rate(
            arm.task, base_origin(arm.origin), work, sizes[arm.task]
        )
        for arm in seeds
    }
    records: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in seeds}
    for seed in range(max(seeds.values())):
        for arm in seeds:
            if seed >= seeds[arm]:
                continue
            size, rate = sizes[arm.task], rates[arm.task, arm.origin]
            record = run(arm, work, size, rate, seed)
            metrics = tested(run_folder(arm, work, rate, seed), size)
            records[arm].append(record | {"rate": rate, "metrics": metrics})
    return records


def cost(arm: Arm, work: Path, size: Size) -> dict[str, Any]:
    """Tokens and forward FLOPs of a sample, counted and not measured."""
    config: Config = arm_config(arm, work, size, RATES[0], 0)
    data = open_dataset(Path(config.data.path), (), config.data.semantic_ids)
    found = describe(config, data.schema)
    return {
        "tokens": found["tokens"],
        "forward MFLOP": found["flops_per_example"] / 1e6,
    }


def baseline_rows(
    work: Path, size: Size, task: str, rate: float
) -> list[dict[str, Any]]:
    """What needs no model, on the samples that the arms are evaluated on."""
    folder = run_folder(Arm(task, ORIGINS[0], "soft"), work, rate, 0)
    stored = folder / "baselines.json"
    if not stored.is_file():
        report = evaluate_run(
            folder, "test", "latest", None, baselines=True, limit=size.evaluated
        )
        write_json(stored, {n: quality(r) for n, r in report["baselines"].items()})
    return [
        {"task": task, "arm": f"({name})"}
        | {metric: spread([value]) for metric, value in metrics.items()}
        for name, metrics in json.loads(stored.read_text()).items()
    ]


def table_row(arm: Arm, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of an arm, without its cost: means and deviations over seeds."""
    row = {
        "task": arm.task,
        "arm": arm.origin,
        "events as": arm.form,
        "seeds": len(records),
        "rate": records[0]["rate"],
    }
    # That of an aligned arm has other terms.
    if arm.origin not in ALIGNED:
        row["train loss"] = spread([record["loss"] for record in records])
    for metric in records[0]["metrics"]:
        row[metric] = spread([record["metrics"][metric] for record in records])
    return row


def difference_rows(records: dict[Arm, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Differences of an arm from `scratch` in the same form, seed by seed."""
    rows = []
    for arm, own in records.items():
        scratch = records[dataclasses.replace(arm, origin=ORIGINS[0])]
        scratch = scratch[: len(own)]
        if arm.origin == ORIGINS[0]:
            continue
        row = {"task": arm.task, "arm": arm.origin, "events as": arm.form}
        if arm.origin not in ALIGNED:
            row["train loss"] = spread(
                [a["loss"] - b["loss"] for a, b in zip(own, scratch, strict=True)], "+"
            )
        for metric in scratch[0]["metrics"]:
            pairs = zip(own, scratch, strict=True)
            row[metric] = spread(
                [a["metrics"][metric] - b["metrics"][metric] for a, b in pairs], "+"
            )
        rows.append(row)
    return rows


def write_page(
    flags: argparse.Namespace,
    work: Path,
    pretraining: dict[str, Any],
    records: dict[Arm, list[dict[str, Any]]],
) -> None:
    """Write the result: the arms, their differences, the rates tried, the texts."""
    rows: list[dict[str, Any]] = []
    searched = []
    for task in flags.tasks:
        size = SIZES[task]
        for arm, own in records.items():
            if arm.task == task:
                fastest = {"step ms": min(record["step_ms"] for record in own)}
                rows.append(table_row(arm, own) | cost(arm, work, size) | fastest)
        for arm in (*records, *CONTROLS):
            if (arm.task, arm.form) != (task, "soft") or arm.origin in ALIGNED:
                continue
            rates = RATES[:1] if arm in CONTROLS else RATES
            losses = {
                f"train loss at {rate:g}": spread(
                    [run(arm, work, size, rate, 0)["loss"]]
                )
                for rate in rates
            }
            searched.append({"task": task, "arm": arm.origin} | losses)
        # The baselines of ranking take longer than a run.
        if task == "beauty":
            scratch = records[Arm(task, ORIGINS[0], "soft")][0]
            rows += baseline_rows(work, size, task, scratch["rate"])
    params = {
        "weights of the language model": pretraining["weights"],
        "words read in pretraining": pretraining["words read"],
    } | {
        f"{task}": ", ".join(
            f"{n.name} {getattr(SIZES[task], n.name)}"
            for n in dataclasses.fields(SIZES[task])
        )
        for task in flags.tasks
    }
    for kind, after in pretraining["perplexity after"].items():
        before = pretraining["perplexity before"][kind]
        params[f"perplexity of {kind}"] = f"{before:,.0f} before, {after:.1f} after"
    command = "python -m benchmarks.language_model_transfer --amazon DIR --work DIR"
    title = "What a small pretrained language model buys"
    write_result(flags.out, rows, params, command, title=title)
    file = flags.out.with_name(flags.out.name + ".json")
    tables = {"differences": difference_rows(records), "searched": searched}
    file.write_text(json.dumps(json.loads(file.read_text()) | tables, indent=1) + "\n")
    page = [
        "",
        "## Against scratch, seed by seed",
        "",
        markdown_table(tables["differences"]),
        "",
        "## Rates tried and controls, soft tokens, seed 0",
        "",
        markdown_table(searched),
        "",
        "## Notes",
        "",
        *NOTES,
    ]
    with flags.out.with_name(flags.out.name + ".md").open("a") as file:
        file.writelines(f"{line}\n" for line in page)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--amazon", required=True, type=Path, help="folder of its files"
    )
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="most seeds of an arm")
    parser.add_argument("--out", type=Path, default=OUT, help="stem of the result")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(argv)
    work = flags.work.absolute()
    # Runs that differ in their seed alone share their compiled programs.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    pretraining = make_language_model(flags.amazon, flags.tasks, work)
    shuffle(work / "model", work / "shuffled")
    prepare_data(flags.amazon, flags.tasks, work, work / "untrained")
    seeds = {
        arm: min(count, flags.seeds)
        for arm, count in SEEDS.items()
        if arm.task in flags.tasks
    }
    records = run_arms(work, SIZES, seeds)
    write_page(flags, work, pretraining, records)


if __name__ == "__main__":
    run_script(main)
