"""A table on sparse cores, compiled for TPUs that need not be there: memory and operations of look-up and update.

python -m benchmarks.sparsecore_topology

libtpu compiles each program; nothing is run, and no time is known: XLA's costs hold nothing of what sparse cores do.
Every chip reads the same number of places, distinct or not, of a table that is stored over all chips. Columns:

- `program`: `look-up`; or `update`, row-wise AdaGrad: the sums of the gradients, their norm, and the step.
- `layout`: of the table between steps. `rows` is that of sparse cores. With `default`, XLA's, a step copies the table.
- `limit`: places that one core may ask of one owner: a mean and six deviations of distinct ones.
- `table`, `lists`: bytes of table and sums, and of ids, elements and ends for all its cores, on a device.
- `temporaries`: what the program needs beside its arguments. That of an update holds a second table, 8 columns wider,
  for the sums of the gradients.
- `in_place`: bytes of arguments that the results take the place of.
- `operations`: custom calls of the program, by times written; the look-up and the sum on rows are made of them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from benchmarks.report import run_script, write_result
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops import sparsecore
from tokenrec.ops.sparsecore import Cores
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.planner.compile import described_mesh
from tokenrec.planner.roofline import chip
from tokenrec.sharding import AXES, RULES, compiler_options

PROGRAMS = ("look-up", "update")


def topology_row(
    topology: str, program: str, layout: str, rows: int, width: int, places_per_chip: int, tensor: int
) -> dict[str, Any]:
    """One row; a program that the compiler refuses has its words in `problem`.

    Raises:
      InputError: an unknown topology or one without sparse cores, or the package is missing.
    """
    mesh = described_mesh(topology, MeshConfig(tensor=tensor))
    kind = mesh.devices.flat[0].device_kind
    with jax.set_mesh(mesh):
        cores = sparsecore.cores_per_device(kind)
        multiple = sparsecore.GRANULE * cores * mesh.size
        stored = -(-rows // multiple) * multiple
        plan = sparsecore.plan_cores(stored, places_per_chip * tensor, width, cores)
        case = {
            "topology": topology,
            "devices": mesh.size,
            "cores": plan.owners,
            "program": program,
            "layout": layout,
            "limit": plan.limit,
            "table": plan.own * plan.cores * (width + 1) * 4,
            "lists": plan.cores * (2 * plan.buffer + max(plan.owners, sparsecore.GRANULE)) * 4,
        }
        try:
            compiled = _lowered(plan, mesh, program, layout, width).compile(compiler_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            return case | {"problem": str(error).partition("\n")[0]}
    memory: Any = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return case | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "in_place": memory.alias_size_in_bytes,
        "total": total,
        "headroom": 1 - total / chip(kind).hbm_bytes,
        "operations": _operations(compiled.as_text() or ""),
    }


def _lowered(plan: Cores, mesh: Mesh, program: str, layout: str, width: int) -> jax.stages.Lowered:
    def look_up(table: jax.Array, places: jax.Array) -> jax.Array:
        return sparsecore.fetch(plan, table, sparsecore.partition(plan, places))

    def update(
        table: jax.Array, state: RowsState, places: jax.Array, gradients: jax.Array, rate: jax.Array
    ) -> tuple[jax.Array, RowsState]:
        at = sparsecore.partition(plan, places)
        summed = sparsecore.collect(plan, at, gradients)
        apply = jnp.isfinite(summed.squares)
        return sparsecore.update(plan, table, state, at, summed, rate=rate, decay=0.0, apply=apply)

    def place(dimensions: int) -> Any:
        if layout == "rows":
            return sparsecore.table_format(mesh, dimensions)
        return jax.NamedSharding(mesh, PartitionSpec(AXES, *[None] * (dimensions - 1)))

    def batch(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        spec = RULES("batch", *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    table = jax.ShapeDtypeStruct((plan.rows, width), jnp.float32, sharding=place(2))
    sums = jax.ShapeDtypeStruct((plan.rows,), jnp.float32, sharding=place(1))
    all_places = plan.shards * plan.places
    places = batch(all_places, dtype=jnp.int32)
    if program == "look-up":
        return jax.jit(look_up).lower(table, places)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.NamedSharding(mesh, PartitionSpec()))
    jitted: Callable[..., Any] = jax.jit(update, donate_argnums=(0, 1), out_shardings=(place(2), RowsState(place(1))))
    return jitted.lower(table, RowsState(sums), places, batch(all_places, width), rate)  # type: ignore[attr-defined]


def _operations(hlo: str) -> str:
    counts = Counter(re.findall(r'custom_call_target="(\w+)"', hlo))
    return ", ".join(f"{name} {times}" for name, times in sorted(counts.items()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["v6e:4x4", "v5p:2x2x4", "tpu7x:2x2x4", "v5p:8x8x8"])
    parser.add_argument("--rows", type=int, default=400_000_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--places-per-chip", type=int, default=65_536)
    parser.add_argument("--tensor", type=int, default=1, help="devices that share a part of the batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sparsecore_topology")
    flags = parser.parse_args(arguments)
    if min(flags.rows, flags.width, flags.places_per_chip, flags.tensor) < 1:
        raise InputError("--rows, --width, --places-per-chip and --tensor must be at least 1")
    settings = {name: getattr(flags, name) for name in ("rows", "width", "places_per_chip", "tensor")}
    rows = []
    for topology in flags.topology:
        for program, layout in (("look-up", "rows"), ("update", "rows"), ("update", "default")):
            rows.append(topology_row(topology, program, layout, **settings))
            print(rows[-1], file=sys.stderr)
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    command = f"python -m benchmarks.sparsecore_topology --topology {' '.join(flags.topology)} {given}"
    packages = ("tokenrec", "jax", "jaxlib", "libtpu", "jax-tpu-embedding")
    title = "A table on sparse cores, compiled: nothing was run"
    write_result(flags.out, rows, settings, command, title=title, packages=packages)
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
