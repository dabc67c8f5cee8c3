"""Look-up and update of a table spread over a pod, compiled for it: our exchange against XLA's partitioning.

python -m benchmarks.tables_topology [--topology v5e:16x16] [--rows 1000000 100000000 1000000000]

Every device looks up 16,384 ids of a table of so many rows x 64, uniform, and updates the rows it read (row-wise
AdaGrad):

- "exchange": tokenrec/ops/tables/exchange.py;
- "xla": the table is partitioned by rows all the same, `table.at[ids].get()` and the row-wise update of its gradient
  are written as for one device, and XLA's partitioner finds the rest (automatic sharding);
- "xla, gather alone": without the update.

libtpu compiles each program as the pod would run it; nothing is run. Bytes are those into a device in a step, as
tokenrec/planner/hlo.py counts them; "fits" is XLA's word. A minute or two a row.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.report import run_script, write_result
from tokenrec.config import MeshConfig
from tokenrec.ops.tables import exchange, routing, storage
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.planner.hlo import read_program
from tokenrec.planner.roofline import chip, network_seconds
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import AXES, compiler_options

WIDTH, IDS = 64, 16_384
RATE = 0.05


def loss(rows: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows - targets))


def by_exchange(
    table: jax.Array, total: jax.Array, ids: jax.Array, targets: jax.Array
) -> Any:
    plan = routing.plan_exchange(table.shape[0], ids.size)
    route, (inverse,) = routing.route_ids(plan, [ids])
    rows = exchange.fetch_rows(plan, table, route)
    gradients = jax.grad(
        lambda rows: loss(exchange.expand_rows(rows, inverse), targets)
    )(rows)
    collected = exchange.collect_gradients(plan, route, gradients)
    options: dict[str, Any] = {
        "rate": jnp.float32(RATE),
        "decay": 0.0,
        "apply": jnp.bool_(True),
    }
    return exchange.update_owned_rows(
        plan, table, RowsState(total), route, gradients, collected, **options
    )


def by_xla(
    table: jax.Array, total: jax.Array, ids: jax.Array, targets: jax.Array
) -> Any:
    gradient = jax.grad(
        lambda table: loss(table.at[ids].get(mode="promise_in_bounds"), targets)
    )(table)
    total += jnp.mean(jnp.square(gradient), axis=1)
    return table - RATE * gradient / (jnp.sqrt(total)[:, None] + 1e-8), RowsState(total)


def gather_by_xla(
    table: jax.Array, total: jax.Array, ids: jax.Array, targets: jax.Array
) -> Any:
    return loss(table.at[ids].get(mode="promise_in_bounds"), targets)


PROGRAMS: dict[str, tuple[Callable[..., Any], AxisType]] = {
    "exchange": (by_exchange, AxisType.Explicit),
    "xla": (by_xla, AxisType.Auto),
    "xla, gather alone": (gather_by_xla, AxisType.Auto),
}


def compile_row(name: str, topology: str, rows: int) -> dict[str, Any]:
    program, kind = PROGRAMS[name]
    devices = topology_mesh(topology, MeshConfig())
    mesh = Mesh(devices.devices, AXES, axis_types=(kind,) * 3)
    of, stored = chip(mesh.devices.flat[0].device_kind), storage.stored_rows(rows)

    def shaped(shape: tuple[int, ...], kind: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, kind, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    owners, batch = AXES, AXES[:2]
    given = (
        shaped((stored, WIDTH), jnp.float32, owners, None),
        shaped((stored,), jnp.float32, owners),
        shaped((IDS * mesh.size,), jnp.int32, batch),
        shaped((IDS * mesh.size, WIDTH), jnp.float32, batch, None),
    )
    row: dict[str, Any] = {
        "topology": topology,
        "devices": mesh.size,
        "rows": rows,
        "program": name,
    }
    made = (
        None
        if kind == AxisType.Explicit or program is gather_by_xla
        else (given[0].sharding, RowsState(given[1].sharding))
    )
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        step = jax.jit(
            program,
            donate_argnums=(0, 1) if program is not gather_by_xla else (),
            out_shardings=made,
        )
        lowered = step.lower(*given)
        try:
            compiled = lowered.compile(compiler_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {
                "fits": False,
                "problem": str(error).strip().partition("\n")[0],
            }
    memory: Any = compiled.memory_analysis()
    program_ = read_program(compiled.as_text() or "", mesh.size)
    moved: dict[str, int] = {}
    for one in program_.collectives:
        moved[one.kind] = moved.get(one.kind, 0) + int(one.moved)
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
    )
    return row | {
        "fits": total - memory.alias_size_in_bytes <= of.hbm_bytes,
        "collective_bytes": sum(moved.values()),
        **{f"bytes of {kind}": count for kind, count in sorted(moved.items())},
        "network_ms": 1e3
        * network_seconds(program_.collectives, list(mesh.devices.flat), of),
        "table_bytes": math.prod(given[0].shape) * 4 // mesh.size,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--rows", nargs="+", type=int, default=[10**6, 10**8, 10**9])
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args()
    stem = flags.out or Path(__file__).parent / "results" / "tables_topology"
    rows = []
    for count in flags.rows:
        for name in PROGRAMS:
            rows.append(compile_row(name, flags.topology, count))
            print(rows[-1], file=sys.stderr)
    write_result(
        stem,
        rows,
        {"width": WIDTH, "ids_per_device": IDS},
        "python -m benchmarks.tables_topology",
        title="Tables spread over a pod: our exchange against XLA's partitioning, compiled, not run",
        packages=("tokenrec", "jax", "jaxlib", "libtpu"),
    )
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_script(main)
