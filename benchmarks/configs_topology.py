"""The whole train step of every shipped config with no mesh of its own, compiled for pods that need not be there.

python -m benchmarks.configs_topology [--data FOLDER]

libtpu compiles each step as the pod would run it; nothing is run. What differs from a run of the config:

- the batch is the config's times the number of chips, since the config's own is for one device;
- matrix products are in bfloat16, as TPUs are for;
- of several stream lengths, the longest;
- vocabulary sizes come from the prepared data set `FOLDER/<data.name>` where it is there ("prepared"), or else from a
  stand-in with tables as KuaiRand-Pure's ("stand-in").

Times are lower bounds, and rates and `mfu_bound` upper bounds, as in planner/roofline.py. An example is a row that
carries loss; streams are full, and continued ones do not score their overlap again. A finished row is kept in the
JSON file at once, and skipped when the command is given again; delete the file to start over. About half a minute a
row on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import run_script, write_result
from benchmarks.step_cases import stream_schema
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.data.metadata import METADATA_FILE, Metadata
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.planner.compile import compile_config
from tokenrec.planner.topology import topology_mesh

TARGETS = (("v5e:4x4", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 1), ("v5e:4x4", 2))


def schema_of(config: Config, data: Path) -> tuple[Schema, str]:
    """The schema of the prepared data set, or of a stand-in that has the features and tasks that the config names."""
    folder = data / config.data.name
    if (folder / METADATA_FILE).is_file():
        return Metadata.load(folder).schema, "prepared"
    stand_in = stream_schema()
    dropped = tuple(
        Feature(name, "categorical", "user") for name in config.data.exclude
    )
    tasks = tuple(Task(name) for name in config.data.tasks) or stand_in.tasks
    tables = stand_in.tables | {feature.name: 30_000 for feature in dropped}
    return Schema(
        stand_in.features + dropped, tasks, tables, items=10_000, levels=(256,) * 4
    ), "stand-in"


def compile_row(name: str, topology: str, slices: int, data: Path) -> dict[str, Any]:
    """One row; a step that does not fit has XLA's words in `problem`."""
    config = load_config(str(shipped_configs()[name]))
    schema, origin = schema_of(config, data)
    chips = topology_mesh(topology, config.mesh, slices).size
    batch = {
        "batch_size": config.data.batch_size * chips,
        "eval_batch_size": config.data.eval_batch_size * chips,
    }
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **batch),
        model=dataclasses.replace(config.model, dtype="bfloat16"),
    )
    found = compile_config(config, topology, slices, schema=schema)
    row: dict[str, Any] = {
        "config": name,
        "topology": topology,
        "slices": slices,
        "mesh": "x".join(str(size) for size in found["mesh"].values()),
        "batch": found["batch"],
        "schema": origin,
        "attention": _shortened(
            f"{layer['implementation']} {layer['queries']}x{layer['keys']}"
            for layer in found["attention"]
        ),
        "compile_seconds": round(found["compile_seconds"], 1),
        "bytes_per_device": found["bytes_per_device"]["total"],
    }
    if "problem" in found:
        return row | {"problem": found["problem"].partition("\n")[0]}
    moved = found["collective_bytes"]
    return row | {
        "temporaries": found["bytes_per_device"]["activations"],
        "headroom": found["headroom"],
        "flops_per_device": found["flops_per_device"],
        "model_flops_per_device": found["model_flops_per_device"],
        "collectives": ", ".join(
            f"{count} {kind}" for kind, count in found["collectives"].items()
        )
        or "none",
        "collective_bytes": sum(moved.values()),
        "bytes_across_slices": sum(
            n for kind, n in moved.items() if kind.endswith("slices")
        ),
        "compute_ms": 1e3 * found["compute_seconds"],
        "memory_ms": 1e3 * found["memory_seconds"],
        "network_ms": 1e3 * found["network_seconds"],
        "limit": found["bound"],
        "mfu_bound": found["mfu_bound"],
        "examples_per_second": found["examples_per_second"],
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
    rows = json.loads(kept.read_text())["rows"] if kept.is_file() else []
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
