"""The whole train step of every shipped config, compiled for pods that need not be there.

python -m benchmarks.configs_topology [--data FOLDER]

libtpu compiles each step as the pod would run it; nothing is run. What differs from a run of the config:

- the batch is the config's times the number of chips, since the config's own is for one device;
- matrix products are in bfloat16, as TPUs are for;
- of several stream lengths, the longest;
- vocabulary sizes come from the prepared data set `FOLDER/<data.name>` where it is there ("prepared"), or else from a
  stand-in with tables as KuaiRand-Pure's ("stand-in").

Times are lower bounds, and rates and `mfu_bound` upper bounds, as in tokenrec/roofline.py. An example is a row that
carries loss. A finished row is kept in the JSON file at once, and skipped when the command is given again; delete the
file to start over. About half a minute a row on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from benchmarks.report import run_script, write_result
from benchmarks.step import stream_schema
from tokenrec.compile import compile_train_step, described_mesh, report
from tokenrec.config import Config
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.data.schema import SCHEMA_FILE, Feature, Metadata, Schema, Task
from tokenrec.flags import load_config, shipped_configs
from tokenrec.state import build_model
from tokenrec.validation import validate
from tokenrec.work import step_work

TARGETS = (("v5e:4x4", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 1), ("v5e:4x4", 2))


def schema_of(config: Config, data: Path) -> tuple[Schema, str]:
    """The schema of the prepared data set, or of a stand-in that has the features and tasks that the config names."""
    folder = data / config.data.name
    if (folder / SCHEMA_FILE).is_file():
        return Metadata.load(folder).schema, "prepared"
    stand_in = stream_schema()
    dropped = tuple(Feature(name, "categorical", "user") for name in config.data.exclude)
    tasks = tuple(Task(name) for name in config.data.tasks) or stand_in.tasks
    tables = stand_in.tables | {feature.name: 30_000 for feature in dropped}
    return Schema(stand_in.features + dropped, tasks, tables, items=10_000, levels=(256,) * 4), "stand-in"


def compile_row(name: str, topology: str, slices: int, data: Path) -> dict[str, Any]:
    """One row; a step that does not fit has XLA's words in `problem`."""
    config = load_config(str(shipped_configs()[name]))
    mesh = described_mesh(topology, config.mesh, slices)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=config.data.batch_size * mesh.size),
        model=dataclasses.replace(config.model, dtype="bfloat16"),
    )
    config = validate(config)
    schema, origin = schema_of(config, data)
    schema = schema.without(config.data.exclude)
    model = build_model(config, schema, task_names(schema, config.data))
    shapes = batch_shapes(schema, config.data, batch_size=config.data.batch_size)[config.data.events]
    row: dict[str, Any] = {
        "config": name,
        "topology": topology,
        "slices": slices,
        "mesh": "x".join(str(size) for size in mesh.shape.values()),
        "batch": config.data.batch_size,
        "schema": origin,
    }
    work, layers = step_work(model, mesh, shapes)
    row["attention"] = _shortened(f"{layer['implementation']} {layer['queries']}x{layer['keys']}" for layer in layers)
    begin = time.perf_counter()
    try:
        compiled = compile_train_step(model, mesh, shapes)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"problem": str(error).partition("\n")[0]}
    row["compile_seconds"] = round(time.perf_counter() - begin, 1)
    found = report(compiled, mesh, work)
    roofline = found["roofline"]
    return row | {
        "bytes_per_device": found["bytes"]["total"],
        "temporaries": found["bytes"]["temporaries"],
        "headroom": found["headroom"],
        "flops_per_device": found["flops"],
        "model_flops_per_device": found["model_flops"],
        "collectives": ", ".join(f"{count} {kind}" for kind, count in found["collectives"].items()) or "none",
        "collective_bytes": sum(found["collective_bytes"].values()),
        "bytes_across_slices": sum(n for kind, n in found["collective_bytes"].items() if kind.endswith("slices")),
        "compute_ms": 1e3 * roofline.compute_seconds,
        "memory_ms": 1e3 * roofline.memory_seconds,
        "network_ms": 1e3 * roofline.network_seconds,
        "limit": roofline.limit,
        "mfu_bound": found["mfu_bound"],
        "examples_per_second": math.prod(shapes.weight.shape) / roofline.bound,
    }


def _shortened(names: Any) -> str:
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of prepared data sets")
    parser.add_argument("--configs", nargs="+", default=sorted(shipped_configs()), choices=sorted(shipped_configs()))
    parser.add_argument("--out", type=Path, help="stem of the result files (default: in benchmarks/results)")
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
            {"dtype": "bfloat16", "batch": "the config's x chips", "streams": "the longest"},
            "python -m benchmarks.configs_topology",
            title="Train steps compiled for pods: bounds, nothing was run",
            packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax", "optax"),
        )
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
