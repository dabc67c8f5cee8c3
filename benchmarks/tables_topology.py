"""Look-up and update of a table spread over a pod, beside XLA's own partitioning.

    python -m benchmarks.tables_topology [--topologies v5e:16x16] [--rows 1000000]

Every device looks up 16,384 uniform ids of a table of width 64, and updates the rows
that it read, by row-wise AdaGrad:

- "exchange": `tokenrec.ops.tables.exchange`, with rows packed into lines of 128 lanes
  (`tokenrec.ops.tables.packed`);
- "exchange, plain rows": the same with the table stored as `[rows, 64]`, as before;
- "xla": the table is partitioned by rows all the same. `table.at[ids].get()` and the
  row-wise update of its gradient are written as for one device, and XLA's partitioner
  finds the rest (automatic sharding);
- "xla, gather alone": without the update.

libtpu compiles each program as the pod would run it; nothing is run. Bytes are those
into a device in a step, as `tokenrec.planner.hlo` counts them; "fits" is XLA's verdict;
"temporaries / arguments" is by how much the step exceeds what a device holds anyway.
Three minutes a row of the exchange, less than one for the others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.exchange_step import exchange_step
from benchmarks.report import run_script, write_result
from tokenrec.compiler_options import compiler_options
from tokenrec.config import MeshConfig
from tokenrec.ops.tables import storage
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.ops.tables.packed import packed_shape
from tokenrec.planner.hlo import read_program
from tokenrec.planner.roofline import chip, network_seconds
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import AXES

WIDTH, IDS = 64, 16_384
RATE = 0.05


def loss(rows: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared distance of rows and targets, `[n, WIDTH]` each."""
    return jnp.sum(jnp.square(rows - targets))


def by_exchange(
    table: jax.Array, sums: jax.Array, ids: jax.Array, targets: jax.Array
) -> tuple[jax.Array, RowsState]:
    """Look up and update by the row exchange.

    Args:
      table: `[rows, WIDTH]`, or packed, over all devices.
      sums: `[rows]`, of row-wise AdaGrad.
      ids: `[n] int32`.
      targets: `[n, WIDTH]`.

    Returns:
      The new table and state.
    """
    return exchange_step(table, sums, ids, lambda rows: loss(rows, targets), RATE)[1:]


def by_xla(
    table: jax.Array, sums: jax.Array, ids: jax.Array, targets: jax.Array
) -> tuple[jax.Array, RowsState]:
    """Look up and update as for one device; arguments as in `by_exchange`."""
    gradient = jax.grad(
        lambda table: loss(table.at[ids].get(mode="promise_in_bounds"), targets)
    )(table)
    sums += jnp.mean(jnp.square(gradient), axis=1)
    return table - RATE * gradient / (jnp.sqrt(sums)[:, None] + 1e-8), RowsState(sums)


def gather_by_xla(
    table: jax.Array, sums: jax.Array, ids: jax.Array, targets: jax.Array
) -> jax.Array:
    """Look up as for one device, without an update; arguments as in `by_exchange`."""
    return loss(table.at[ids].get(mode="promise_in_bounds"), targets)


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      function: of table, sums, ids and targets.
      axis_type: of the axes of its mesh.
      updates: it returns a new table and state, in the memory of the old ones.
      packed: the table is stored in lines of 128 lanes.
    """

    function: Callable[..., Any]
    axis_type: AxisType
    updates: bool = True
    packed: bool = False


PROGRAMS = {
    "exchange": Program(by_exchange, AxisType.Explicit, packed=True),
    "exchange, plain rows": Program(by_exchange, AxisType.Explicit),
    "xla": Program(by_xla, AxisType.Auto),
    "xla, gather alone": Program(gather_by_xla, AxisType.Auto, updates=False),
}


def make_arguments(
    mesh: Mesh, rows: int, packed: bool
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of table, sums, ids and targets, laid out over the mesh."""

    def array(
        shape: tuple[int, ...], dtype: Any, *partition: Any
    ) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*partition))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    owners, batch = AXES, AXES[:2]
    stored = storage.stored_rows(rows)
    shape = packed_shape(stored, WIDTH, mesh.size) if packed else (stored, WIDTH)
    return (
        array(shape, jnp.float32, owners, None),
        array((stored,), jnp.float32, owners),
        array((IDS * mesh.size,), jnp.int32, batch),
        array((IDS * mesh.size, WIDTH), jnp.float32, batch, None),
    )


def compile_program(
    program: Program, mesh: Mesh, arguments: tuple[jax.ShapeDtypeStruct, ...]
) -> jax.stages.Compiled:
    """Compile a program for a mesh; the table and its sums are donated to an update."""
    # Automatic sharding would choose a layout of its own for the new table.
    out_shardings = None
    if program.updates and program.axis_type == AxisType.Auto:
        table, sums, _, _ = arguments
        out_shardings = table.sharding, RowsState(sums.sharding)
    with jax.set_mesh(mesh):
        step = jax.jit(
            program.function,
            donate_argnums=(0, 1) if program.updates else (),
            out_shardings=out_shardings,
        )
        return step.lower(*arguments).compile(compiler_options(mesh))


def compile_row(name: str, topology: str, rows: int) -> dict[str, Any]:
    """Compile one program, and compute its columns.

    Args:
      name: key of `PROGRAMS`.
      topology: name of the pod, such as "v5e:16x16".
      rows: rows of the table.
    """
    program = PROGRAMS[name]
    devices = topology_mesh(topology, MeshConfig()).devices
    mesh = Mesh(devices, AXES, axis_types=(program.axis_type,) * 3)
    arguments = make_arguments(mesh, rows, program.packed)
    row: dict[str, Any] = {
        "topology": topology,
        "devices": mesh.size,
        "rows": rows,
        "program": name,
    }
    begin = time.perf_counter()
    try:
        compiled = compile_program(program, mesh, arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = str(error).strip().partition("\n")[0]
        return row | {"fits": False, "problem": problem}
    memory: Any = compiled.memory_analysis()
    contents = read_program(compiled.as_text() or "", mesh.size)
    collectives = contents.collectives
    bytes_by_kind: dict[str, int] = {}
    for collective in collectives:
        moved = bytes_by_kind.get(collective.kind, 0) + int(collective.moved)
        bytes_by_kind[collective.kind] = moved
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
    )
    figures = chip(mesh.devices.flat[0].device_kind)
    seconds = network_seconds(collectives, list(mesh.devices.flat), figures)
    return row | {
        "fits": total - memory.alias_size_in_bytes <= figures.hbm_bytes,
        "collective_bytes": sum(bytes_by_kind.values()),
        **{f"bytes of {kind}": count for kind, count in sorted(bytes_by_kind.items())},
        "network_ms": 1e3 * seconds,
        "table_bytes": math.prod(arguments[0].shape) * 4 // mesh.size,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "temporaries / arguments": (
            memory.temp_size_in_bytes / memory.argument_size_in_bytes
        ),
        "memory traffic": int(contents.memory_bytes),
        "sparse-core calls": sum(contents.sparse_core_calls.values()),
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    """Compile every program, and write and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topologies", nargs="+", default=["v5e:16x16", "v5p:4x8x8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[10**9])
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args()
    stem = flags.out or Path(__file__).parent / "results" / "tables_topology"
    rows = []
    cases = itertools.product(flags.topologies, flags.rows, PROGRAMS)
    for topology, count, name in cases:
        rows.append(compile_row(name, topology, count))
        print(rows[-1], file=sys.stderr)
        # Row by row: what is interrupted keeps what it has.
        write_result(
            stem,
            rows,
            {"width": WIDTH, "ids_per_device": IDS},
            "python -m benchmarks.tables_topology",
            title=(
                "Tables spread over a pod: our exchange against XLA's partitioning, "
                "compiled, not run"
            ),
            packages=("tokenrec", "jax", "jaxlib", "libtpu"),
        )
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_script(main)
