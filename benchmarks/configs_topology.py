"""Compile the train step of every small config for four TPU pods; no TPU is needed.

    python -m benchmarks.configs_topology [--data FOLDER] [--configs NAME ...]

libtpu compiles each step as the pod would run it; nothing is run. The small configs are
those without a mesh of their own. A step differs from a run of its config in this:

- the batch and the sampled negatives are the config's times the number of chips, since
  the config's own are for one device;
- matrix products are in bfloat16;
- of several stream lengths, the longest is compiled;
- table sizes come from the prepared data set `FOLDER/<data.name>` if it is there
  ("prepared"), or else from a stand-in with tables like KuaiRand-Pure's ("stand-in").

Times are lower bounds, and rates and `mfu_bound` upper bounds, as in
tokenrec/planner/roofline.py. Bytes and FLOPs are those of one device. An example is a
log row that carries loss; streams are full, and continued ones do not score their
overlap again. A finished table row is written at once, and skipped when the command is
given again; delete the result files to start over. One to six minutes a table row on
two cores, an hour or more in all: no result is kept in the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import kept_rows, run_script, write_result
from benchmarks.step_cases import stream_schema
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.data.metadata import METADATA_FILE, Metadata
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.planner.compile import compile_config
from tokenrec.planner.topology import topology_mesh

TARGETS = (("v5e:4x4", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 1), ("v5e:4x4", 2))


def schema_of(config: Config, data: Path) -> tuple[Schema, str]:
    """Find the schema of a config's prepared data set, or make a stand-in.

    Args:
      config: a config.
      data: folder of prepared data sets.

    Returns:
      The schema, and "prepared" or "stand-in". A stand-in has the features and tasks
      that the config names.
    """
    folder = data / config.data.name
    if (folder / METADATA_FILE).is_file():
        return Metadata.load(folder).schema, "prepared"
    stand_in = stream_schema()
    dropped = tuple(
        Feature(name, "categorical", "user") for name in config.data.exclude
    )
    shared = tuple(
        Feature(name, "multi_valued", "item", length=8)
        for name in config.head.item_features
    )
    tasks = tuple(Task(name) for name in config.data.tasks) or stand_in.tasks
    named = dropped + shared
    tables = stand_in.tables | {feature.name: 30_000 for feature in named}
    return Schema(
        stand_in.features + named, tasks, tables, items=10_000, levels=(256,) * 4
    ), "stand-in"


def compile_row(name: str, topology: str, slices: int, data: Path) -> dict[str, Any]:
    """Compile one config for one pod.

    Args:
      name: of the config.
      topology: of each slice.
      slices: number of slices.
      data: folder of prepared data sets.

    Returns:
      A row of the table; `problem` is XLA's message for a step that does not fit.
    """
    config = load_config(str(shipped_configs()[name]))
    schema, origin = schema_of(config, data)
    chips = topology_mesh(topology, config.mesh, slices).size
    batch = {
        "batch_size": config.data.batch_size * chips,
        "eval_batch_size": config.data.eval_batch_size * chips,
    }
    # Negatives are drawn for the whole batch, and must be a multiple of it.
    negatives = config.head.negatives * chips
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **batch),
        model=dataclasses.replace(config.model, dtype="bfloat16"),
        head=dataclasses.replace(config.head, negatives=negatives),
    )
    compiled = compile_config(config, topology, slices, schema=schema)
    row: dict[str, Any] = {
        "config": name,
        "topology": topology,
        "slices": slices,
        "mesh": "x".join(str(size) for size in compiled["mesh"].values()),
        "batch": compiled["batch"],
        "schema": origin,
        "attention": _shortened(
            f"{layer['implementation']} {layer['queries']}x{layer['keys']}"
            for layer in compiled["attention"]
        ),
        "compile_seconds": round(compiled["compile_seconds"], 1),
        "bytes_per_device": compiled["bytes_per_device"]["total"],
    }
    if "problem" in compiled:
        return row | {"problem": compiled["problem"].partition("\n")[0]}
    moved = compiled["collective_bytes"]
    return row | {
        "temporaries": compiled["bytes_per_device"]["activations"],
        "headroom": compiled["headroom"],
        "flops_per_device": compiled["flops_per_device"],
        "model_flops_per_device": compiled["model_flops_per_device"],
        "collectives": ", ".join(
            f"{count} {kind}" for kind, count in compiled["collectives"].items()
        )
        or "none",
        "collective_bytes": sum(moved.values()),
        "bytes_across_slices": sum(
            n for kind, n in moved.items() if kind.endswith("slices")
        ),
        "compute_ms": 1e3 * compiled["compute_seconds"],
        "memory_ms": 1e3 * compiled["memory_seconds"],
        "network_ms": 1e3 * compiled["network_seconds"],
        "limit": compiled["bound"],
        "mfu_bound": compiled["mfu_bound"],
        "examples_per_second": compiled["examples_per_second"],
    }


def _shortened(names: Any) -> str:
    return ", ".join(
        f"{count} x {name}" if count > 1 else name
        for name, count in Counter(names).items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of prepared data sets"
    )
    small = [
        name
        for name, file in shipped_configs().items()
        if load_config(str(file)).mesh == MeshConfig()
    ]
    parser.add_argument("--configs", nargs="+", default=small, choices=small)
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args()
    stem = flags.out or Path(__file__).parent / "results" / "configs_topology"
    kept = stem.with_name(stem.name + ".json")
    rows = kept_rows(kept)
    done = {(row["config"], row["topology"], row["slices"]) for row in rows}
    for name, (topology, slices) in itertools.product(flags.configs, TARGETS):
        if (name, topology, slices) in done:
            continue
        rows.append(compile_row(name, topology, slices, flags.data))
        print(rows[-1], file=sys.stderr)
        write_result(
            stem,
            rows,
            {
                "dtype": "bfloat16",
                "batch": "the config's x chips",
                "streams": "the longest",
            },
            "python -m benchmarks.configs_topology",
            title="Train steps compiled for pods: bounds, nothing was run",
            packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax", "optax"),
        )
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
