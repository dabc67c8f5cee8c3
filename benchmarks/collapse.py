"""Dimensional collapse: how many directions event states fill with static fields in the stream, and without.

    python -m benchmarks.collapse --work DIR
    python -m benchmarks.collapse --workdir RUN [--split valid] [--json FILE]

The first trains three arms on a log whose static fields have few combinations of values and a weight in the labels that
is turned up (data/synthetic_profiles.py): "events only", without static fields; "naive joint", with them; both of four
full layers without gate; and "TokenFormer", two full and two sliding layers with the gate. What was clicked is hidden
in the histories of all arms, so that events alone cannot tell a user's profile. A run is a folder under `--work`: one
that was stopped goes on where it was, a finished one is only read. The second measures one run, whatever it is of.
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
    """Static fields: how many profiles there are, and what their scores weigh in the labels."""

    rank: int
    weight: float


WORLDS = (World(2, 0.0), World(2, 4.0), World(32, 4.0))


def source(world: World) -> ProfilesSource:
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
    """The config of an arm; arms differ in the static fields, the windows and the gate alone."""
    static, hidden = (
        tuple(
            f.name
            for f in ProfilesSource(1, 1, static_fields=FIELDS).schema.group(group)
        )
        for group in ("user", "action")
    )
    return Config(
        seed=seed,
        data=DataConfig(
            path=str(data),
            exclude=(static if arm == EVENTS_ONLY else ())
            + tuple(n for n in hidden if n not in SHOWN_ACTIONS),
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
            log_every=50, save_every=0, eval_split="none", keep_compiled=False
        ),
    )


def measured(config: Config, workdir: Path) -> dict[str, Any]:
    """The record of a run, trained and measured unless its record is there.

    Raises:
      InputError: the record there is of another config.
    """
    kept, text = workdir / RECORD, to_json(config)
    if kept.is_file():
        record = json.loads(kept.read_text())
        if to_json(from_json(json.dumps(record["config"]))) != text:
            raise InputError(
                f"--work: '{kept}' was measured with other settings; give another --work, or move it away"
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
    write_json(kept, record)
    return record


def information(record: dict[str, Any], layer: str) -> float:
    """Corrected nats of a layer on its labels, mean over tasks."""
    of_layer = record["report"]["layers"][layer]["information"]
    return statistics.mean(
        found[str(CLUSTERS[0])]["corrected"] for found in of_layer.values()
    )


def table_row(
    world: World, arm: str, records: Sequence[dict[str, Any]], best: float
) -> dict[str, Any]:
    """Mean and deviation over seeds of what an arm reached."""
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
    """Of how many seeds the last layer's ranks are in the expected order, and of how many each half of it holds."""
    layer = list(records[JOINT][0]["report"]["layers"])[-1]
    ranks = [
        [record["report"]["layers"][layer]["effective_rank"] for record in records[arm]]
        for arm in ARMS
    ]
    triples = list(zip(*ranks, strict=True))
    return {
        "profiles": world.rank,
        "weight": world.weight,
        "events only > naive joint": f"{sum(e > j for e, j, _ in triples)} of {len(triples)}",
        "events only > TokenFormer": f"{sum(e > t for e, _, t in triples)} of {len(triples)}",
        "TokenFormer > naive joint": f"{sum(t > j for _, j, t in triples)} of {len(triples)}",
    }


def run_row(
    world: World, arm: str, seed: int, record: dict[str, Any]
) -> dict[str, Any]:
    """What was measured of one run, in five digits."""
    layers = {
        layer: {
            "effective_rank": _short(found["effective_rank"]),
            "nats": _short(information(record, layer)),
            "spectrum": [_short(value) for value in found["spectrum"]],
        }
        for layer, found in record["report"]["layers"].items()
    }
    return {
        **world._asdict(),
        "arm": arm,
        "seed": seed,
        "auc": _short(record["auc"]),
        "layers": layers,
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def compare(work: Path, steps: int, seeds: Sequence[int], out: Path) -> None:
    """Trains what is not there yet, seed by seed, and writes the result."""
    records: dict[World, dict[str, list[dict[str, Any]]]] = {
        world: {arm: [] for arm in ARMS} for world in WORLDS
    }
    for seed in seeds:
        for world, of_world in records.items():
            folder = work / f"profiles_{world.rank}_weight_{world.weight:g}"
            if not (folder / "data").exists():
                prepare(source(world), folder / "data")
            for arm, of_arm in of_world.items():
                config = arm_config(arm, folder / "data", seed, steps)
                of_arm.append(
                    measured(config, folder / f"{arm.replace(' ', '_')}_{seed}")
                )
    rows = []
    for world, of_world in records.items():
        made = source(world)
        best = statistics.mean(made.best_auc(task.name) for task in made.schema.tasks)
        rows += [
            table_row(world, arm, of_arm, best) for arm, of_arm in of_world.items()
        ]
    orders = [order_row(world, of_world) for world, of_world in records.items()]
    params = {
        "log": f"{ROWS:,} rows, {USERS} users, {FIELDS} static fields",
        "steps": steps,
        "width": 32,
        "events": 16,
        "paradigm": "uc",
        "states": "4,096 of the valid split",
        "clusters": CLUSTERS[0],
    }
    command = f"python -m benchmarks.collapse --work DIR --steps {steps} --seeds {' '.join(map(str, seeds))}"
    write_result(
        out,
        rows,
        params,
        command,
        title="Effective rank of event states, with static fields and without",
    )
    runs = [
        run_row(world, arm, seed, record)
        for world, of_world in records.items()
        for arm, of_arm in of_world.items()
        for seed, record in zip(seeds, of_arm, strict=True)
    ]
    write_json(
        out.with_name(out.name + "_runs.json"), {"command": command, "runs": runs}
    )
    page = out.with_name(out.name + ".md")
    with page.open("a") as file:
        file.write(
            f"\nSeeds in which the ranks of the last layer are in an order:\n\n{markdown_table(orders)}\n"
        )
    print(page.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--work", type=Path, help="folder for the data sets and runs of the comparison"
    )
    what.add_argument(
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
    choice = {"checkpoint": flags.checkpoint, "data": flags.data, "rows": flags.rows}
    report = collapse_report(flags.workdir, flags.split, **choice)
    if flags.json:
        write_json(flags.json, report)
    rows = []
    for layer, found in report["layers"].items():
        row = {"layer": layer, "effective rank": found["effective_rank"]}
        for task, by_count in found["information"].items():
            row |= {
                f"{task}, nats, K={count}": one["corrected"]
                for count, one in by_count.items()
            }
        rows.append(row)
    print(
        f"{report['rows']:,} event states of split {report['split']}, step {report['step']:,}\n"
    )
    print(markdown_table(rows))


if __name__ == "__main__":
    run_script(main)
