"""Compile a train step on streams of 32,768 events for v5e:16x16, by `mesh.context`.

    python -m benchmarks.context_topology [--context N ...]

No TPU is needed, and nothing is run. The model is `lrm_1b` with two of its 24 layers, a
full one and one with a window of 2,048 tokens. An event is two tokens, so that a stream
has 65,552, and every event is read out. `mesh.fsdp` is 16, `mesh.context` as given and
`mesh.data` the rest; each batch shard (`data` x `fsdp`) has one stream, so that the
batch is smaller the larger `context` is. Figures are those of `tokenrec compile` for
one chip; times are lower bounds.

A finished table row is written at once, and skipped when the command is given again;
delete the result files to start over. Some minutes a table row on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import kept_rows, run_script, write_result
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.planner.compile import compile_config

TOPOLOGY, CHIPS, FSDP = "v5e:16x16", 256, 16
EVENTS, LAYERS, WINDOWS = 32_768, 2, (2048,)
CONTEXTS = (16,)


def long_config(context: int) -> Config:
    """`lrm_1b` with few layers, long streams and one of them on each batch shard."""
    config = load_config(str(shipped_configs()["lrm_1b"]))
    streams = CHIPS // context
    data = dataclasses.replace(
        config.data,
        events=EVENTS,
        batch_size=streams,
        eval_batch_size=streams,
        schema="kuairand_27k.json",
    )
    model = dataclasses.replace(config.model, layers=LAYERS, windows=WINDOWS)
    mesh = MeshConfig(data=streams // FSDP, fsdp=FSDP, context=context)
    return dataclasses.replace(config, data=data, model=model, mesh=mesh)


def context_row(context: int) -> dict[str, Any]:
    """Compile the step on a mesh of this `context`."""
    config = long_config(context)
    compiled = compile_config(config, TOPOLOGY)
    by_part = compiled["bytes_per_device"]
    row = {
        "context": context,
        "data": config.mesh.data,
        "fsdp": config.mesh.fsdp,
        "streams": config.data.batch_size,
        "stream_tokens": compiled["stream_tokens"],
        "compile_seconds": round(compiled["compile_seconds"], 1),
        "fits": compiled["fits"],
        **{
            f"{part}_mib": by_part[part] and by_part[part] / 2**20
            for part in ("weights", "optimizer", "activations", "total")
        },
    }
    if "problem" in compiled:
        return row | {"problem": compiled["problem"].partition("\n")[0]}
    return row | {
        "tflop": compiled["flops_per_device"] / 1e12,
        "model_tflop": compiled["model_flops_per_device"] / 1e12,
        **{
            f"{axes.replace('+', '_')}_mib": sum(kinds.values()) / 2**20
            for axes, kinds in compiled["collective_bytes_by_axis"].items()
        },
        "compute_ms": 1e3 * compiled["compute_seconds"],
        "memory_ms": 1e3 * compiled["memory_seconds"],
        "network_ms": 1e3 * compiled["network_seconds"],
        "schedule_ms": _milliseconds(compiled.get("schedule_seconds")),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "context_topology",
        help="stem of the result files",
    )
    flags = parser.parse_args()
    file = flags.out.with_name(flags.out.name + ".json")
    rows = kept_rows(file)
    for context in flags.context:
        if context in [row["context"] for row in rows]:
            continue
        rows.append(context_row(context))
        print(rows[-1], file=sys.stderr)
        rows.sort(key=lambda row: row["context"])
        write_result(
            flags.out,
            rows,
            {"topology": TOPOLOGY, "events": EVENTS, "layers": LAYERS},
            "python -m benchmarks.context_topology",
            title="Streams of 32,768 events on v5e:16x16, compiled; nothing was run",
            packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax", "optax"),
        )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
