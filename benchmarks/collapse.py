"""Dimensional collapse: effective rank of event states with and without static fields.

    python -m benchmarks.collapse --work DIR
    python -m benchmarks.collapse --workdir RUN [--split valid] [--json FILE]

The first command trains three arms on synthetic logs whose static fields have few
combinations of values (profiles) and a varied weight in the labels
(tokenrec/data/sources/synthetic_profiles.py):

    events only   four full layers without a gate, no static fields in the stream
    naive joint   the same with static fields
    TokenFormer   two full and two sliding layers with the gate, with static fields

The histories of all arms lack the clicks, so that events alone cannot reveal the
profile of a user. A run is a folder under `--work`; a stopped run is resumed, a
finished one is only read. The second command measures any one run.

The expected order of the ranks is events only > TokenFormer > naive joint
(docs/methods.md section 5).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import markdown_table, run_script, spread, write_result
from tokenrec.analysis.event_states import collapse_report
from tokenrec.analysis.rank import LEAST_ROWS
from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
    from_json,
    to_json,
)
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic_profiles import ProfilesSource
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.runtime.files import write_json
from tokenrec.train_loop import train

RESULT = Path(__file__).parent / "results" / "collapse"
RECORD = "collapse.json"
ROWS, USERS, ITEMS, FIELDS = 48_000, 600, 200, 12
SEEDS = (0, 1, 2)
CLUSTERS = (100,)
SHOWN_ACTIONS = ("reaction",)
EVENTS_ONLY, JOINT, TOKENFORMER = ARMS = ("events only", "naive joint", "TokenFormer")


class World(NamedTuple):
    """Static fields of a log.

    Attributes:
      rank: number of profiles.
      weight: weight of their scores in the labels.
    """

    rank: int
    weight: float


WORLDS = (World(2, 0.0), World(2, 4.0), World(32, 4.0))


def source(world: World) -> ProfilesSource:
    """Make the synthetic log of a world."""
    return ProfilesSource(
        ROWS,
        world.rank,
        static_fields=FIELDS,
        static_weight=world.weight,
        users=USERS,
        items=ITEMS,
        seed=0,
    )


def arm_config(arm: str, data: Path, seed: int, steps: int) -> Config:
    """Make the config of an arm; arms differ in static fields, windows and gate alone.

    Args:
      arm: name of the arm.
      data: folder of the data set.
      seed: seed of the run.
      steps: training steps.
    """
    schema = ProfilesSource(1, 1, static_fields=FIELDS).schema
    static = tuple(feature.name for feature in schema.group("user"))
    actions = tuple(feature.name for feature in schema.group("action"))
    hidden = tuple(name for name in actions if name not in SHOWN_ACTIONS)
    without_static = static if arm == EVENTS_ONLY else ()
    return Config(
        seed=seed,
        data=DataConfig(
            path=str(data),
            exclude=without_static + hidden,
            paradigm="uc",
            events=16,
            overlap=4,
            batch_size=64,
            eval_batch_size=128,
        ),
        tokens=TokensConfig(embedding_dim=8),
        model=ModelConfig(
            width=32,
            layers=4,
            windows=(8, 4) if arm == TOKENFORMER else (),
            gate=arm == TOKENFORMER,
        ),
        optim=OptimConfig(steps=steps, warmup_steps=steps // 10, learning_rate=3e-3),
        train=TrainConfig(
            log_every=50, save_every=0, eval_split="", keep_compiled=False
        ),
    )


def measured(config: Config, workdir: Path) -> dict[str, Any]:
    """Train and measure a run, or read its record if there is one.

    Args:
      config: config of the run.
      workdir: its folder.

    Returns:
      `{"config", "auc", "report"}`.

    Raises:
      InputError: the record belongs to another config.
    """
    path = workdir / RECORD
    text = to_json(config)
    if path.is_file():
        record = json.loads(path.read_text())
        # Both as the current version writes them, which may have new fields.
        if to_json(from_json(json.dumps(record["config"]))) != text:
            raise InputError(
                f"--work: '{path}' was measured with other settings; give another "
                "--work, or move it away"
            )
        return record
    train(config, workdir, progress=False)
    record = {
        "config": json.loads(text),
        "auc": evaluate_run(workdir, "valid", "latest", None)["macro_auc"],
        "report": collapse_report(
            workdir, "valid", checkpoint="latest", clusters=CLUSTERS
        ),
    }
    write_json(path, record)
    return record


def information(record: dict[str, Any], layer: str) -> float:
    """Bias-corrected information of a layer on the labels, mean over tasks, in nats."""
    by_task = record["report"]["layers"][layer]["information"]
    return statistics.mean(
        by_count[str(CLUSTERS[0])]["corrected"] for by_count in by_task.values()
    )


def table_row(
    world: World, arm: str, records: Sequence[dict[str, Any]], best: float
) -> dict[str, Any]:
    """Make the table row of an arm: mean and deviation over seeds.

    Args:
      world: the log.
      arm: name of the arm.
      records: records of its seeds.
      best: AUC of the true probabilities, the best that is possible.
    """
    layers = list(records[0]["report"]["layers"])
    row = {
        "profiles": world.rank,
        "weight": world.weight,
        "arm": arm,
        "seeds": len(records),
    }
    for layer in layers:
        row[f"rank, {layer}"] = spread(
            [record["report"]["layers"][layer]["effective_rank"] for record in records]
        )
    row[f"nats, {layers[-1]}"] = spread(
        [information(record, layers[-1]) for record in records]
    )
    return row | {
        "AUC": spread([record["auc"] for record in records]),
        "best AUC": best,
    }


def order_row(
    world: World, records: dict[str, Sequence[dict[str, Any]]]
) -> dict[str, Any]:
    """Count the seeds in which ranks of the last layer are in the expected order.

    Args:
      world: the log.
      records: arm -> records of its seeds.
    """
    layer = list(records[JOINT][0]["report"]["layers"])[-1]
    ranks = [
        [record["report"]["layers"][layer]["effective_rank"] for record in records[arm]]
        for arm in ARMS
    ]
    # (events only, naive joint, TokenFormer) of each seed.
    seeds = list(zip(*ranks, strict=True))
    counts = {
        "events only > naive joint": sum(events > joint for events, joint, _ in seeds),
        "events only > TokenFormer": sum(events > ours for events, _, ours in seeds),
        "TokenFormer > naive joint": sum(ours > joint for _, joint, ours in seeds),
    }
    row: dict[str, Any] = {"profiles": world.rank, "weight": world.weight}
    return row | {order: f"{count} of {len(seeds)}" for order, count in counts.items()}


def run_row(
    world: World, arm: str, seed: int, record: dict[str, Any]
) -> dict[str, Any]:
    """Make the record of one run that is kept with the results, in five digits.

    Args:
      world: the log.
      arm: name of the arm.
      seed: seed of the run.
      record: its record.
    """
    layers = {
        layer: {
            "effective_rank": _five_digits(measured["effective_rank"]),
            "nats": _five_digits(information(record, layer)),
            "spectrum": [_five_digits(value) for value in measured["spectrum"]],
        }
        for layer, measured in record["report"]["layers"].items()
    }
    return {
        **world._asdict(),
        "arm": arm,
        "seed": seed,
        "auc": _five_digits(record["auc"]),
        "layers": layers,
    }


def _five_digits(value: float) -> float:
    return float(f"{value:.5g}")


type _Records = dict[World, dict[str, list[dict[str, Any]]]]


def compare(work: Path, steps: int, seeds: Sequence[int], out: Path) -> None:
    """Train and measure what is missing, and write the result.

    Args:
      work: folder of the data sets and runs.
      steps: training steps of a run.
      seeds: seeds of every arm.
      out: path of the result without its suffix.
    """
    records = _measure_all(work, steps, seeds)
    rows = []
    for world, by_arm in records.items():
        log = source(world)
        best = statistics.mean(log.best_auc(task.name) for task in log.schema.tasks)
        rows += [table_row(world, arm, of_arm, best) for arm, of_arm in by_arm.items()]
    params = {
        "log": f"{ROWS:,} rows, {USERS} users, {FIELDS} static fields",
        "steps": steps,
        "width": 32,
        "events": 16,
        "paradigm": "uc",
        "states": "4,096 of the valid split",
        "clusters": CLUSTERS[0],
    }
    command = (
        f"python -m benchmarks.collapse --work DIR --steps {steps} "
        f"--seeds {' '.join(map(str, seeds))}"
    )
    write_result(
        out,
        rows,
        params,
        command,
        title="Effective rank of event states, with static fields and without",
    )
    runs = [
        run_row(world, arm, seed, record)
        for world, by_arm in records.items()
        for arm, of_arm in by_arm.items()
        for seed, record in zip(seeds, of_arm, strict=True)
    ]
    write_json(
        out.with_name(out.name + "_runs.json"), {"command": command, "runs": runs}
    )
    orders = [order_row(world, by_arm) for world, by_arm in records.items()]
    page = out.with_name(out.name + ".md")
    with page.open("a") as file:
        file.write(
            "\nSeeds in which the ranks of the last layer are in an order:\n\n"
            f"{markdown_table(orders)}\n"
        )
    print(page.read_text())


def _measure_all(work: Path, steps: int, seeds: Sequence[int]) -> _Records:
    """Measure all runs, seed by seed: a stopped comparison has whole seeds."""
    records: _Records = {world: {arm: [] for arm in ARMS} for world in WORLDS}
    for seed in seeds:
        for world, by_arm in records.items():
            folder = work / f"profiles_{world.rank}_weight_{world.weight:g}"
            data = folder / "data"
            if not data.exists():
                prepare(source(world), data)
            for arm, of_arm in by_arm.items():
                workdir = folder / f"{arm.replace(' ', '_')}_{seed}"
                of_arm.append(measured(arm_config(arm, data, seed, steps), workdir))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--work", type=Path, help="folder for the data sets and runs of the comparison"
    )
    target.add_argument(
        "--workdir", type=Path, help="folder of one trained run, to measure that alone"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--split", default="valid", help="of --workdir")
    parser.add_argument(
        "--checkpoint", default="best", help="of --workdir: best, latest or a step"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="of --workdir: data set, if it is not where the run reads it",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=LEAST_ROWS,
        help="of --workdir: event states to draw",
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="of --workdir: file for the whole report, spectra included",
    )
    flags = parser.parse_args(argv)
    if flags.work:
        compare(flags.work, flags.steps, flags.seeds, flags.out)
        return
    report = collapse_report(
        flags.workdir,
        flags.split,
        checkpoint=flags.checkpoint,
        data=flags.data,
        rows=flags.rows,
    )
    if flags.json:
        write_json(flags.json, report)
    print(report_text(report))


def report_text(report: dict[str, Any]) -> str:
    """Format the report of one run as a table with a row for each layer."""
    rows = []
    for layer, measured in report["layers"].items():
        row = {"layer": layer, "effective rank": measured["effective_rank"]}
        for task, by_count in measured["information"].items():
            for count, estimate in by_count.items():
                row[f"{task}, nats, K={count}"] = estimate["corrected"]
        rows.append(row)
    heading = (
        f"{report['rows']:,} event states of split {report['split']}, "
        f"step {report['step']:,}"
    )
    return f"{heading}\n\n{markdown_table(rows)}"


if __name__ == "__main__":
    run_script(main)
