"""Stage 5: does a step take as long with a long table as with a short one?

    python -m benchmarks.gpu.tables --out OUT [--rehearse]

A table of 1e6, 1e7 and 1e8 rows of width 64 (25.6 GB at 1e8), and as many AdaGrad sums.
A step reads and updates 20,736 uniform ids. Three programs:

- "step": the whole train step of a small model, as shipped: the table is of those whose
  rows are spread over devices, of which there is one here;
- "step, replicated": the same, the table held whole (`tokens.replicate_rows`);
- "table part": look-up, gradient and update alone, of a table held whole.

`over_first` is the time over that with 1e6 rows. `donated` is whether the new table lies
where the old one lay; `temporary_bytes` is the memory that the program plans besides its
arguments and results: a copy of the table would be in it, so that it would grow with
the table. `peak_over_state` is the most memory that the process has held so far over
that of table and sums.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.clock import launch_seconds
from benchmarks.gpu.record import FAIL, PASS, Recorder, run_stage
from benchmarks.step import lookup_step
from benchmarks.step_cases import POOL, random_batch, table_case
from tokenrec.config import MeshConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch_shapes import batch_shapes
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.planner.compile import compile_train_step
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, abstract_state, build_model
from tokenrec.state import init_state as init_small_state

WIDTH = 64
ROWS = (1_000_000, 10_000_000, 100_000_000)
REHEARSED_ROWS = (200_000, 400_000)
# Of the issue that asked for these figures.
GOAL = 1.3
# Seconds of a measurement, and what a size may take.
TARGET, SECONDS = 0.2, 6


class Table(NamedTuple):
    """A program that changes a table.

    Attributes:
      compiled: the program.
      launch: runs it once more; returns arrays to wait for.
      table: the table as it is now, `[rows, w]`.
      state_bytes: bytes of table and sums.
    """

    compiled: jax.stages.Compiled
    launch: Callable[[], Any]
    table: Callable[[], jax.Array]
    state_bytes: int


def table_model(rows: int, *, replicated: bool) -> ModelSpec:
    """The small model of `benchmarks.step --tables` with a table of so many rows."""
    config, schema = table_case(rows, WIDTH)
    tokens = config.tokens
    if replicated:
        tokens = dataclasses.replace(tokens, replicate_rows=rows)
    config = dataclasses.replace(config, tokens=tokens, mesh=MeshConfig(1, 1, 1))
    return build_model(validate(config), schema, ("click",))


def table_state(model: ModelSpec) -> TrainState:
    """A state whose tables are filled with a constant.

    Drawing billions of random numbers would take memory that the table needs.
    """
    small = init_small_state(table_model(1_000, replicated=True), 0)
    abstract = abstract_state(model)
    tables, rows = {}, {}
    for name, leaf in abstract.tables.items():
        tables[name] = jnp.full(
            leaf.shape, 0.01, leaf.dtype, out_sharding=leaf.sharding.spec
        )
        sums = abstract.opt_state["rows"][name].sum
        rows[name] = RowsState(
            jnp.zeros(sums.shape, sums.dtype, out_sharding=sums.sharding.spec)
        )
    opt_state = small.opt_state | {"rows": rows}
    return TrainState(small.step, small.params, tables, opt_state)


def whole_step(rows: int, *, replicated: bool) -> Table:
    """A train step."""
    model = table_model(rows, replicated=replicated)
    mesh, data = jax.sharding.get_mesh(), model.config.data
    shapes = batch_shapes(model.schema, data, batch_size=data.batch_size)
    compiled = compile_train_step(model, mesh, shapes[data.events])
    random = np.random.default_rng(0)
    batches = itertools.cycle(
        [
            to_devices(random_batch(model.config, model.schema, random), mesh)
            for _ in range(POOL)
        ]
    )
    state = table_state(model)
    ((name, table),) = state.tables.items()

    def launch() -> Any:
        nonlocal state
        state, metrics = compiled(state, next(batches))
        return metrics.loss, state.step

    return Table(
        compiled,
        launch,
        lambda: state.tables[name],
        table.nbytes + state.opt_state["rows"][name].sum.nbytes,
    )


def table_part(rows: int) -> Table:
    """The part of a step that touches the table."""
    data = table_case(rows)[0].data
    count = data.batch_size * (data.events + data.candidates)
    random = np.random.default_rng(0)
    draws = [random.integers(0, rows, count, dtype=np.int32) for _ in range(POOL)]
    ids = itertools.cycle([jnp.asarray(draw) for draw in draws])
    gradient = jnp.asarray(random.normal(size=(count, WIDTH)).astype(np.float32))
    state = jnp.full((rows, WIDTH), 0.01), jnp.zeros((rows,))
    state_bytes = sum(array.nbytes for array in state)
    step = lookup_step(rows, dense=False)
    compiled = step.lower(*state, next(ids), gradient).compile()

    def launch() -> Any:
        nonlocal state
        state = compiled(*state, next(ids), gradient)
        return state[1]

    return Table(compiled, launch, lambda: state[0], state_bytes)


PROGRAMS: dict[str, Callable[[int], Table]] = {
    "step": lambda rows: whole_step(rows, replicated=False),
    "table part": table_part,
    "step, replicated": lambda rows: whole_step(rows, replicated=True),
}


def measure_table(program: str, rows: int, target: float) -> dict[str, Any]:
    """Run a program on a table of so many rows."""
    made = PROGRAMS[program](rows)
    jax.block_until_ready(made.launch())
    before = made.table().unsafe_buffer_pointer()
    jax.block_until_ready(made.launch())
    # The table is of the result of this launch: it must be waited for.
    donated = jax.block_until_ready(made.table()).unsafe_buffer_pointer() == before
    seconds = launch_seconds(made.launch, target=target)
    temporary = made.compiled.memory_analysis().temp_size_in_bytes
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {
        "step_ms": 1e3 * seconds,
        "table_bytes": made.state_bytes,
        "donated": donated,
        "temporary_bytes": temporary,
        "peak_over_state": peak and peak / made.state_bytes,
    }


def updates_in_place(row: dict[str, Any], shortest: dict[str, Any]) -> bool:
    """Whether a step changes the table where it lies, and makes no copy of it.

    Args:
      row: of `measure_table`.
      shortest: that of the same program with the shortest table. The memory of other
        things is the same with both.
    """
    more = {n: row[n] - shortest[n] for n in ("temporary_bytes", "table_bytes")}
    return row["donated"] and more["temporary_bytes"] <= more["table_bytes"] / 10


def cases(sizes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Programs and rows, sizes from the shortest."""
    for program in PROGRAMS:
        for rows in sizes:
            yield program, rows


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    sizes = REHEARSED_ROWS if recorder.rehearse else ROWS
    target = 0.01 if recorder.rehearse else TARGET
    first: dict[str, dict[str, Any]] = {}
    worst = 0.0
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        for program, rows in cases(sizes):
            named = {"program": program, "rows": rows}
            if recorder.out_of_time(SECONDS, **named):
                continue
            with recorder.case(**named):
                row = measure_table(program, rows, target)
                shortest = first.setdefault(program, row)
                over_first = row["step_ms"] / shortest["step_ms"]
                if program == "step":
                    worst = max(worst, over_first)
                result = PASS if updates_in_place(row, shortest) else FAIL
                recorder.add(**named, over_first=over_first, **row, result=result)
    if worst:
        recorder.add(
            table="tables, goals",
            goal=f"whole step over that with {sizes[0]:,} rows",
            most=GOAL,
            ratio=worst,
            reached="yes" if worst <= GOAL else "NO",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("tables", __doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
