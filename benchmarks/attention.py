"""Attention throughput by mesh shape, length, window, implementation, dtype and pass.

python -m benchmarks.attention                                  # this machine, one device
python -m benchmarks.attention --meshes 1x1x1 2x1x2             # and a mesh data x fsdp x tensor of four devices
python -m benchmarks.attention --out attention_new --against benchmarks/results/attention.json
python -m benchmarks.attention --topology v5p:4x4x4 --meshes 64x1x1 16x1x4    # compiled for a pod, nothing is run

All variants take turns within one run, so their ratios hold. `milliseconds` is the median over the turns and
`least_milliseconds` the least. `tflops` counts useful work alone: 4 x head_dim x heads x batch for every pair of a
query and a key that it may see (two matmuls), and 3.5 times that with the backward pass (seven matmuls: it forms the
logits anew and has four more). What an implementation computes and masks away lowers it. `peak_fraction` divides by the
fastest matrix product of this run, on all devices of the mesh at once and in the same dtype. `temporary_mib` is the
memory for temporaries that XLA plans, per device. `python -m benchmarks.peers.attention` sets PyTorch beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention_cases import (
    DTYPES,
    PASSES,
    Case,
    Sizes,
    compile_case,
    local_mesh,
    logits_gib,
    parse_mesh,
    random_inputs,
    refusal,
    useful_flops,
)
from benchmarks.plot import plot_throughput, require_matplotlib
from benchmarks.report import markdown_table, run_script, write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention import IMPLEMENTATIONS

RESULTS = Path(__file__).parent / "results"

Seconds = Mapping[Case, Sequence[float]]
Table = Sequence[Mapping[str, Any]]


def select(
    flags: argparse.Namespace, sizes: Sizes, meshes: Mapping[str, jax.sharding.Mesh]
) -> tuple[list[Case], list[str]]:
    """The cases that can be timed, and for the others a line per reason."""
    cases: list[Case] = []
    left_out: dict[str, list[str]] = {}
    for mesh, dtype, seq_len, window, name in itertools.product(
        flags.meshes, flags.dtypes, flags.seq_lens, flags.windows, flags.implementations
    ):
        case = Case(mesh, seq_len, window, name, dtype, flags.passes[0])
        logits = logits_gib(case, sizes)
        if window is not None and window >= seq_len:
            reason = "the window holds the whole stream, which is full attention"
        elif window is None and seq_len > flags.full_to:
            reason = f"full attention is timed up to --full-to {flags.full_to}"
        elif name == "dense" and logits > flags.logits_gib:
            reason = f"the logits of all queries and keys take {logits:.3g} GiB, --logits-gib is {flags.logits_gib:g}"
        else:
            reason = refusal(case, sizes, meshes[mesh])
        if reason:
            where = left_out.setdefault(f"{name}, {dtype}, mesh {mesh}: {reason}", [])
            where.append(f"{seq_len}, {window or 'full'}")
        else:
            cases += [case._replace(pass_=pass_) for pass_ in flags.passes]
    return cases, [
        f"{reason} (seq_len, window: {'; '.join(where)})"
        for reason, where in left_out.items()
    ]


def matmul_run(mesh: jax.sharding.Mesh, dtype: str, size: int) -> tuple[Run, float]:
    """A product of two `[size, size]` matrices on every device of the mesh at once, and its operations."""
    place = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    a, b = (
        jax.device_put(
            jax.random.normal(
                jax.random.key(seed), (mesh.size, size, size), jnp.dtype(dtype)
            ),
            place,
        )
        for seed in range(2)
    )
    with jax.set_mesh(mesh):
        product = (
            jax.jit(lambda a, b: jnp.einsum("nij,njk->nik", a, b)).lower(a, b).compile()
        )
    return functools.partial(product, a, b), 2.0 * mesh.size * size**3


def measure(
    cases: Sequence[Case],
    sizes: Sizes,
    meshes: Mapping[str, jax.sharding.Mesh],
    *,
    repeats: int,
    matmul: int,
) -> tuple[list[dict[str, Any]], Seconds]:
    """A row for every case, and its seconds turn by turn."""
    products = {
        place: matmul_run(meshes[place[0]], place[1], matmul)
        for place in dict.fromkeys((c.mesh, c.dtype) for c in cases)
    }
    distinct = {(*case[:2], case.dtype): case for case in cases}
    inputs = {
        made: random_inputs(case, sizes, meshes[case.mesh])
        for made, case in distinct.items()
    }
    programs = {case: compile_case(case, sizes, meshes[case.mesh]) for case in cases}
    runs: dict[tuple[Any, ...], Run] = {
        place: run for place, (run, _) in products.items()
    }
    for case, program in programs.items():
        arguments = inputs[(*case[:2], case.dtype)]
        runs[case] = functools.partial(
            program, *arguments[: 3 if case.pass_ == "forward" else 4]
        )
    seconds = take_turns(runs, repeats)
    rows = []
    for case, program in programs.items():
        place, took = (case.mesh, case.dtype), statistics.median(seconds[case])
        speed, peak = (
            useful_flops(case, sizes) / took,
            products[place][1] / min(seconds[place]),
        )
        rows.append(
            case.row()
            | {
                "milliseconds": 1e3 * took,
                "least_milliseconds": 1e3 * min(seconds[case]),
                "tokens_per_second": sizes.batch * case.seq_len / took,
                "tflops": speed / 1e12,
                "peak_fraction": speed / peak,
                "temporary_mib": memory.temp_size_in_bytes / 2**20
                if (memory := program.memory_analysis())
                else None,
            }
        )
    return rows, {case: seconds[case] for case in cases}


def speedups(seconds: Seconds) -> Table:
    """How many times the time of dense attention is that of each other implementation; medians of ratios in a turn."""
    return [
        case.row() | {"dense / this": paired_ratio(dense, took)}
        for case, took in seconds.items()
        if case.implementation != "dense"
        and (dense := seconds.get(case._replace(implementation="dense")))
    ]


def growth(seconds: Seconds) -> Table:
    """Time at four times the length over time at the length: 4 is linear, 16 quadratic."""
    return [
        case.row() | {"4 x seq_len / seq_len": paired_ratio(longer, took)}
        for case, took in seconds.items()
        if (longer := seconds.get(case._replace(seq_len=4 * case.seq_len)))
    ]


def compare(
    before: Mapping[str, Any], params: Mapping[str, Any], rows: Table
) -> tuple[Table, list[str]]:
    """Old milliseconds over new for rows with equal keys, and lines that name what has no partner or was set otherwise.

    Args:
      before: what an earlier run wrote as JSON.
      params: settings of this run.
      rows: rows of this run.
    """

    names = tuple(rows[0])[: len(Case._fields)]
    old, new = (
        {tuple(row[name] for name in names): row["milliseconds"] for row in run}
        for run in (before["rows"], rows)
    )
    table = [
        dict(zip(names, key, strict=True))
        | {"old, ms": old[key], "new, ms": took, "old / new": old[key] / took}
        for key, took in new.items()
        if key in old
    ]
    notes = [
        f"{name} was {before['params'].get(name)}, now {params.get(name)}"
        for name in {**before["params"], **params}
        if before["params"].get(name) != params.get(name)
    ]
    for which, mine, other in (("the earlier", old, new), ("this", new, old)):
        notes += [
            f"only in {which} run: {', '.join(map(str, key))}"
            for key in mine
            if key not in other
        ]
    return table, notes


def append_sections(
    stem: Path, tables: Mapping[str, Table], lists: Mapping[str, Sequence[str]]
) -> None:
    """Adds tables and lists, each under its heading, to the Markdown page of a result; empty ones are left out."""
    page: list[str] = []
    for title, rows in tables.items():
        page += ["", f"## {title}", "", markdown_table(rows)] if rows else []
    for title, lines in lists.items():
        page += (
            ["", f"## {title}", "", *(f"- {line}" for line in lines)] if lines else []
        )
    with stem.with_name(stem.name + ".md").open("a") as file:
        file.writelines(f"{line}\n" for line in page)


def bench_local(flags: argparse.Namespace, stem: Path, command: str) -> None:
    """Times on local devices; writes the rows, their ratios and the picture."""
    sizes = Sizes(flags.batch, flags.heads, flags.head_dim)
    meshes = {text: local_mesh(text, sizes) for text in flags.meshes}
    before = json.loads(flags.against.read_text()) if flags.against else None
    if not flags.no_png:
        require_matplotlib()  # before the measurement, not after it
    cases, left_out = select(flags, sizes, meshes)
    if not cases:
        raise InputError("no case can be timed: " + "; ".join(left_out))
    rows, seconds = measure(
        cases, sizes, meshes, repeats=flags.repeats, matmul=flags.matmul
    )
    params = sizes._asdict() | {
        "turns": flags.repeats,
        "statistic": "median",
        "matmul": flags.matmul,
    }
    params |= {"device": jax.devices()[0].device_kind}
    params |= {
        name: os.environ[name]
        for name in ("GLIBC_TUNABLES", "XLA_FLAGS")
        if name in os.environ
    }
    write_result(stem, rows, params, command, title="Attention throughput")
    tables = {
        "Times faster than dense": speedups(seconds),
        "Time at four times the length: 4 is linear, 16 quadratic": growth(seconds),
    }
    notes: list[str] = []
    if before:
        tables["Against the earlier run"], notes = compare(before, params, rows)
    append_sections(
        stem, tables, {"Differences from the earlier run": notes, "Not timed": left_out}
    )
    if not flags.no_png:
        plot_throughput(rows, stem.with_name(stem.name + ".png"))


def bench_topology(flags: argparse.Namespace, stem: Path, command: str) -> None:
    """Compiles for a pod that need not be there and writes what each program takes."""
    from benchmarks.attention_topology import topology_rows  # loads the TPU compiler

    if flags.against:
        raise InputError(
            "--against compares milliseconds, which --topology does not measure; leave one of them out"
        )
    shapes = [parse_mesh(text) for text in flags.meshes]
    rows = [
        row
        for dtype in flags.dtypes
        for row in topology_rows(
            flags.topology,
            shapes,
            flags.seq_lens,
            flags.windows,
            flags.implementations,
            dtype,
            flags.passes,
            flags.slices,
        )
    ]
    title = f"Attention compiled for {flags.slices} x {flags.topology}"
    write_result(
        stem,
        rows,
        {"topology": flags.topology, "slices": flags.slices},
        command,
        title=title,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
      InputError: an implementation that is not known, or a number below one.
    """

    def window(text: str) -> int | None:
        return None if text in ("full", "0") else int(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--meshes",
        nargs="+",
        default=["1x1x1"],
        help="devices along data x fsdp x tensor",
    )
    parser.add_argument(
        "--seq-lens", nargs="+", type=int, default=[512, 2048, 8192, 32768]
    )
    parser.add_argument(
        "--windows",
        nargs="+",
        type=window,
        default=[64, 256, None],
        help="keys seen; full or 0: all",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=list(IMPLEMENTATIONS),
        help=", ".join(IMPLEMENTATIONS),
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10, help="turns of each variant")
    parser.add_argument(
        "--matmul",
        type=int,
        default=2048,
        help="side of the matrices that measure the peak",
    )
    parser.add_argument(
        "--logits-gib",
        type=float,
        default=2.0,
        help="dense is left out where its logits take more",
    )
    parser.add_argument(
        "--full-to", type=int, default=8192, help="longest seq_len of full attention"
    )
    parser.add_argument(
        "--topology",
        help="compile for this pod, as v5p:4x4x4, instead of timing; its own sizes",
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of the topology")
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    parser.add_argument(
        "--against", type=Path, help="JSON of an earlier run to compare with"
    )
    parser.add_argument(
        "--no-png", action="store_true", help="no picture, which needs matplotlib"
    )
    flags = parser.parse_args(argv)
    for name in flags.implementations:
        if name not in IMPLEMENTATIONS:
            raise InputError(
                f"--implementations {name} is not known{suggest(name, IMPLEMENTATIONS)}"
            )
    for name in (
        "seq_lens",
        "windows",
        "batch",
        "heads",
        "head_dim",
        "repeats",
        "matmul",
        "slices",
    ):
        value = getattr(flags, name)
        if any(
            number is not None and number < 1
            for number in (value if isinstance(value, list) else [value])
        ):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: every number is at least 1"
            )
    return flags


def command_line(flags: argparse.Namespace) -> str:
    """What reproduces the run, with every setting that its figures depend on."""
    shape = ("batch", "heads", "head_dim", "repeats", "matmul", "logits_gib", "full_to")
    names = ("meshes", "seq_lens", "windows", "implementations", "dtypes", "passes")
    words = ["python -m benchmarks.attention"]
    for name in ("topology", "slices", *names) if flags.topology else (*names, *shape):
        value = getattr(flags, name)
        values = value if isinstance(value, list) else [value]
        words += [
            f"--{name.replace('_', '-')}",
            *("full" if value is None else f"{value}" for value in values),
        ]
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(argv)
    stem = flags.out or RESULTS / (
        "attention_topology" if flags.topology else "attention"
    )
    (bench_topology if flags.topology else bench_local)(
        flags, stem, command_line(flags)
    )
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
