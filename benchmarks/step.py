"""Time of the compiled train and eval steps on generated batches.

    python -m benchmarks.step              # samples a second of streams like KuaiRand's
    python -m benchmarks.step --long       # streams of 500 events: tiles, dense masks
    python -m benchmarks.step --tables     # tables of 10 thousand to 10 million rows

All variants take turns within one run, so that load on the machine falls on each alike
and their ratios hold. Every turn trains on another batch. Ids are uniform over their
table, which is harder on the caches than any log. `--tables` needs 5 GB of memory. Two
or three minutes each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import write_result
from benchmarks.step_cases import (
    POOL,
    TABLE_WIDTH,
    long_cases,
    step_runs,
    stream_cases,
    stream_schema,
    table_case,
)
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec import micro_batches
from tokenrec.config import Config, MeshConfig
from tokenrec.ops.tables.lookup import (
    RowsState,
    expand_rows,
    unique_ids,
    update_rows,
)
from tokenrec.ops.tables.packed import gather_rows
from tokenrec.sharding import make_mesh

TABLE_ROWS = (10_000, 100_000, 1_000_000, 10_000_000)


def lookup_step(rows: int, *, dense: bool) -> Callable[..., Any]:
    """The part of a step that touches the table: look up, differentiate, update.

    Args:
      rows: rows of the table.
      dense: update by the gradient of the whole table, by the same equation; otherwise
        row-wise AdaGrad of the rows that were looked up.

    Returns:
      A jitted function of the table `[rows, w]`, its AdaGrad sums `[rows]`, ids `[n]`
      and the gradient of each looked-up row, `[n, w]`, to the new table and sums. The
      old ones are donated.
    """

    def loss(vectors: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(vectors * target)

    def update_by_row(
        table: jax.Array, sums: jax.Array, step_ids: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        unique = unique_ids(step_ids, rows)
        gradient = jax.grad(
            lambda distinct: loss(expand_rows(distinct, unique.inverse), target)
        )
        table, state = update_rows(
            table,
            RowsState(sums),
            unique.ids,
            gradient(gather_rows(table, unique.ids, table.shape[1], distinct=True)),
            rate=jnp.float32(0.05),
            decay=0.0,
            apply=jnp.bool_(True),
        )
        return table, state.sum

    def update_whole(
        table: jax.Array, sums: jax.Array, step_ids: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        gradient = jax.grad(lambda table: loss(expand_rows(table, step_ids), target))(
            table
        )
        sums = sums + jnp.mean(jnp.square(gradient), axis=-1)
        return table - 0.05 * gradient / (jnp.sqrt(sums)[:, None] + 1e-8), sums

    return jax.jit(update_whole if dense else update_by_row, donate_argnums=(0, 1))


def lookup_runs(rows: int, ids: int, *, dense: bool) -> Run:
    """`lookup_step` on a table of its own.

    Args:
      rows: rows of the table.
      ids: uniform ids that a step looks up.
      dense: as in `lookup_step`.
    """
    step = lookup_step(rows, dense=dense)
    random = np.random.default_rng(0)
    pool = itertools.cycle(
        [
            jnp.asarray(random.integers(0, rows, ids, dtype=np.int32))
            for _ in range(POOL)
        ]
    )
    target = jnp.asarray(random.normal(size=(ids, TABLE_WIDTH)).astype(np.float32))
    table = jax.random.normal(jax.random.key(0), (rows, TABLE_WIDTH))
    state = table, jnp.zeros((rows,))

    def run() -> Any:
        nonlocal state
        state = step(*state, next(pool), target)
        return state

    return run


def bench_tables(repeats: int) -> Iterator[dict[str, Any]]:
    """Time the whole step, and its table part, by rows of the table.

    The update by a dense gradient is timed at most rows.
    """
    config, _ = table_case(TABLE_ROWS[0])
    ids = config.data.batch_size * (config.data.events + config.data.candidates)
    runs: dict[str, Run] = {}
    for rows in TABLE_ROWS:
        runs[f"step {rows}"] = step_runs(*table_case(rows))[0]
        runs[f"rows {rows}"] = lookup_runs(rows, ids, dense=False)
    runs["dense"] = lookup_runs(TABLE_ROWS[-1], ids, dense=True)
    seconds = take_turns(runs, repeats)
    for rows in TABLE_ROWS:
        step, part = seconds[f"step {rows}"], seconds[f"rows {rows}"]
        dense = seconds["dense"] if rows == TABLE_ROWS[-1] else None
        yield {
            "rows": rows,
            "ids a step": ids,
            "step, ms": 1e3 * statistics.median(step),
            "least, ms": 1e3 * min(step),
            "step / step of 100k": paired_ratio(step, seconds["step 100000"]),
            "table part, ms": 1e3 * statistics.median(part),
            "its least, ms": 1e3 * min(part),
            "part / part of 100k": paired_ratio(part, seconds["rows 100000"]),
            "dense gradient, ms": dense and 1e3 * statistics.median(dense),
            "dense / table part": dense and paired_ratio(dense, part),
        }


def bench_streams(cases: dict[str, Config], repeats: int) -> Iterator[dict[str, Any]]:
    """Time train and eval steps, in tokens with a label a second.

    In NIO these are samples.

    Args:
      cases: name -> config; ratios are to the first one, which is timed as a whole
        batch, too.
      repeats: turns of each.
    """
    schema = stream_schema()
    runs: dict[str, Run] = {}
    for name, config in cases.items():
        runs[f"train {name}"], runs[f"eval {name}"] = step_runs(config, schema)
    base = next(iter(cases))
    # The same program without the split that keeps to the caches.
    whole = f"{base}, whole batch"
    with mock.patch.object(micro_batches, "CACHED_NUMBERS", sys.maxsize):
        runs[f"train {whole}"], runs[f"eval {whole}"] = step_runs(cases[base], schema)
        # Compiled here: afterwards the split is back.
        jax.block_until_ready((runs[f"train {whole}"](), runs[f"eval {whole}"]()))
    cases = {base: cases[base], whole: cases[base]} | cases
    seconds = take_turns(runs, repeats)
    for name, config in cases.items():
        user_centric = config.data.paradigm == "uc"
        labelled = config.data.events if user_centric else config.data.candidates
        count = config.data.batch_size * labelled
        # Ratios are of labels a second, so different batches are compared fairly.
        same = count / cases[base].data.batch_size
        row: dict[str, Any] = {
            "stream": name,
            "B": config.data.batch_size,
            "T": config.data.events,
        }
        for kind in ("train", "eval"):
            times, first = seconds[f"{kind} {name}"], seconds[f"{kind} {base}"]
            row[f"{kind}, labelled rows/s"] = count / statistics.median(times)
            row[f"{kind}, best"] = count / min(times)
            row[f"{kind} / first line"] = same * paired_ratio(first, times)
        yield row


class Page(NamedTuple):
    """What a kind of run writes beside its rows.

    Attributes:
      title: heading of the page.
      params: settings that all rows share.
    """

    title: str
    params: dict[str, Any]


_STREAM_MODEL = "width 64, 4 layers, windows 32 and 16"
PAGES = {
    "": Page(
        "Train and eval steps",
        {"model": _STREAM_MODEL, "user tokens": "26 in NIO, 4 in UC"},
    ),
    "long": Page(
        "Train and eval steps of long streams",
        {"model": _STREAM_MODEL, "user tokens": 30, "tokens of an event": 2},
    ),
    "tables": Page(
        "Train step by rows of the embedding table",
        {
            "table width": TABLE_WIDTH,
            "model": "width 32, 2 layers, 80 fused events",
        },
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", action="store_true", help="time over tables of growing length"
    )
    parser.add_argument("--long", action="store_true", help="streams of 500 events")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each variant")
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: benchmarks/results/step[_tables])",
    )
    return parser


def main() -> None:
    """Run one benchmark, and print its page."""
    parser = make_parser()
    flags = parser.parse_args()
    if flags.tables and flags.long:
        parser.error("--tables and --long are two benchmarks; run one at a time")
    kind = ""
    if flags.tables:
        kind = "tables"
    elif flags.long:
        kind = "long"
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        if kind == "tables":
            rows = list(bench_tables(flags.repeats))
        else:
            cases = long_cases() if kind == "long" else stream_cases()
            rows = list(bench_streams(cases, flags.repeats))
    title, params = PAGES[kind]
    shared = {
        "turns": flags.repeats,
        "statistic": "median",
        "device": jax.devices()[0].device_kind,
    }
    flag = f" --{kind}" if kind else ""
    name = f"step_{kind}" if kind else "step"
    stem = flags.out or Path(__file__).parent / "results" / name
    write_result(
        stem,
        rows,
        shared | params,
        f"python -m benchmarks.step{flag} --repeats {flags.repeats}",
        title=title,
    )
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    main()
