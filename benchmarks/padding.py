"""Training speed against the share of padding, for more and more length buckets.

    python -m benchmarks.padding --data DIR [--config kuairand_pure_uc] [--batches 24]

The batches are those that training would read from a prepared data set. A bucket
(`data.buckets`) is a stream length that shorter histories are padded to; each one costs
a compilation, which is not timed. All settings take turns in one run, so that load on
the machine falls on each alike. Speed is in labelled log rows per second."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.config import Config
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.load import load_config
from tokenrec.config.validate import validate
from tokenrec.data.batch import HostBatch
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import task_names, train_batches
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step


def bucket_settings(config: Config) -> list[tuple[int, ...]]:
    """Buckets to compare: none, halves, quarters, eighths, and those of the config."""
    longest = config.data.events
    parts = [
        tuple(sorted({longest * i // n for i in range(1, n)} - {0})) for n in (2, 4, 8)
    ]
    return list(dict.fromkeys([(), *parts, config.data.buckets]))


def read_batches(config: Config, dataset: Dataset, count: int) -> list[HostBatch]:
    """Read the first batches of an epoch, in which lengths are shuffled.

    Args:
      config: the run's config.
      dataset: a prepared data set.
      count: number of batches.

    Returns:
      The batches, on the host.
    """
    data = train_batches(
        dataset,
        config.data,
        steps=count,
        seed=config.seed,
        ages=reads_event_ages(config.model),
    )
    try:
        return list(itertools.islice(data, count))
    finally:
        data.close()


def epoch_of_steps(
    config: Config, dataset: Dataset, batches: list[HostBatch], mesh: jax.sharding.Mesh
) -> Run:
    """Create a timed run: a train step on each batch, one after another.

    Args:
      config: the run's config.
      dataset: the data set of the batches.
      batches: batches on the host; they are moved to the devices before the run.
      mesh: the mesh.

    Returns:
      A function that trains on all batches and returns the last metrics.
    """
    model = build_model(config, dataset.schema, task_names(dataset.schema, config.data))
    step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
    on_device = [to_devices(host.batch, mesh) for host in batches]
    state = init_state(model, 0)

    def run() -> Any:
        nonlocal state
        metrics = None
        for batch in on_device:
            state, metrics = step(model, state, batch)
        return metrics

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/kuairand_pure"))
    parser.add_argument("--config", default="kuairand_pure_uc")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/padding_CONFIG"
    )
    flags = parser.parse_args()
    base = load_config(flags.config)
    dataset = open_dataset(flags.data, base.data.exclude)
    runs: dict[tuple[int, ...], Run] = {}
    rows: list[dict[str, Any]] = []
    mesh = make_mesh(base.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        for buckets in bucket_settings(base):
            config = validate(
                dataclasses.replace(
                    base, data=dataclasses.replace(base.data, buckets=buckets)
                )
            )
            batches = read_batches(config, dataset, flags.batches)
            runs[buckets] = epoch_of_steps(config, dataset, batches, mesh)
            # Padded and real events together.
            events = sum(host.batch.valid.size for host in batches)
            rows.append(
                {
                    "stream lengths": ", ".join(
                        map(str, (*buckets, config.data.events))
                    ),
                    "padding": 1
                    - sum(int(np.sum(host.batch.valid)) for host in batches) / events,
                    "labelled rows": sum(
                        int(host.batch.weight.sum()) for host in batches
                    ),
                }
            )
        seconds = take_turns(runs, flags.repeats)
    without_buckets = seconds[()]
    for row, taken in zip(rows, seconds.values(), strict=True):
        row["labelled rows/s"] = row["labelled rows"] / statistics.median(taken)
        row["best"] = row["labelled rows"] / min(taken)
        row["/ first line"] = (
            row["labelled rows"]
            / rows[0]["labelled rows"]
            * paired_ratio(without_buckets, taken)
        )
    stem = flags.out or Path(__file__).parent / "results" / f"padding_{flags.config}"
    params = {
        "config": flags.config,
        "batches": flags.batches,
        "turns": flags.repeats,
        "statistic": "median",
    }
    command = (
        f"python -m benchmarks.padding --config {flags.config} "
        f"--batches {flags.batches} --repeats {flags.repeats}"
    )
    write_result(
        stem, rows, params, command, title=f"Padding and speed: {flags.config}"
    )
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
