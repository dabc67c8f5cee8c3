"""Attention throughput by mesh shape, length, window, implementation, dtype and pass.

    python -m benchmarks.attention                       # this machine, one device
    python -m benchmarks.attention --meshes 1x1x1 2x1x2  # and a mesh of four devices
    python -m benchmarks.attention --out attention_new \\
        --against benchmarks/results/attention.json
    python -m benchmarks.attention --topology v5p:4x4x4 --meshes 64x1x1 16x1x4
    python -m benchmarks.attention --block --topology v5p:4x4x4

A mesh is data x fsdp x tensor. With `--topology`, programs are compiled for a described
pod and not run. `--block` is `python -m benchmarks.attention_block`: the whole block
around the attention, on every mesh of the pod.

All variants take turns within one run, so that their ratios hold. Columns:

- `milliseconds`: median over the turns; `least_milliseconds`: the least.
- `tflops`: useful work alone, 4 x head_dim x heads x batch for every pair of a query
  and a key that it may see (two products), and 3.5 times that with the backward pass
  (seven products: it forms the logits again and has four more). Logits that an
  implementation computes and masks lower it.
- `peak_fraction`: `tflops` over the speed of the fastest matrix product of this run, on
  all devices of the mesh at once and in the same dtype.
- `temporary_mib`: memory for temporaries that XLA plans, per device.

`python -m benchmarks.peers.attention` measures PyTorch beside it, and
`python -m benchmarks.plot` draws a result again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
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
    compile_attention,
    local_mesh,
    logits_gib,
    parse_mesh,
    unsupported_reason,
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
    """Choose the cases that can be timed.

    Args:
      flags: the command line.
      sizes: sizes of the run.
      meshes: mesh by its text.

    Returns:
      The cases, and a line per reason why others are left out.
    """
    cases: list[Case] = []
    left_out: dict[str, list[str]] = {}
    for mesh, dtype, seq_len, window, name in itertools.product(
        flags.meshes, flags.dtypes, flags.seq_lens, flags.windows, flags.implementations
    ):
        case = Case(mesh, seq_len, window, name, dtype, flags.passes[0])
        reason = _reason_to_skip(case, flags, sizes, meshes[mesh])
        if reason:
            lengths = left_out.setdefault(f"{name}, {dtype}, mesh {mesh}: {reason}", [])
            lengths.append(f"{seq_len}, {window or 'full'}")
        else:
            cases += [case._replace(pass_=pass_) for pass_ in flags.passes]
    return cases, [
        f"{reason} (seq_len, window: {'; '.join(lengths)})"
        for reason, lengths in left_out.items()
    ]


def _reason_to_skip(
    case: Case, flags: argparse.Namespace, sizes: Sizes, mesh: jax.sharding.Mesh
) -> str:
    """Say why a case is not timed, or return ""."""
    if case.window is not None and case.window >= case.seq_len:
        return "the window holds the whole stream, which is full attention"
    if case.window is None and case.seq_len > flags.full_to:
        return f"full attention is timed up to --full-to {flags.full_to}"
    spec = case.spec(sizes)
    logits = logits_gib(spec)
    if case.implementation == "dense" and logits > flags.logits_gib:
        return (
            f"the logits of all queries and keys take {logits:.3g} GiB, "
            f"--logits-gib is {flags.logits_gib:g}"
        )
    return unsupported_reason(spec, case.implementation, mesh)


def matmul_run(mesh: jax.sharding.Mesh, dtype: str, size: int) -> tuple[Run, float]:
    """Compile a product of two `[size, size]` matrices on every device of a mesh.

    Args:
      mesh: the mesh.
      dtype: of the matrices.
      size: side of the matrices.

    Returns:
      The run, on all devices at once, and its FLOPs.
    """
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    a, b = (
        jax.device_put(
            jax.random.normal(
                jax.random.key(seed), (mesh.size, size, size), jnp.dtype(dtype)
            ),
            sharding,
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
    """Time all cases in turns.

    Args:
      cases: the cases.
      sizes: sizes of the run.
      meshes: mesh by its text.
      repeats: turns of each case.
      matmul: side of the matrices that measure the peak.

    Returns:
      A row for every case, and its seconds turn by turn.
    """
    # 1. The matrix product that measures the peak, per mesh and dtype.
    products = {
        (mesh, dtype): matmul_run(meshes[mesh], dtype, matmul)
        for mesh, dtype in dict.fromkeys((case.mesh, case.dtype) for case in cases)
    }
    # 2. Inputs, shared by all cases of one mesh, length and dtype; and programs.
    inputs = {}
    programs = {}
    for case in cases:
        spec, mesh = case.spec(sizes), meshes[case.mesh]
        shape = (case.mesh, case.seq_len, case.dtype)
        if shape not in inputs:
            inputs[shape] = spec.random_inputs(mesh)
        programs[case] = compile_attention(spec, case.implementation, case.pass_, mesh)
    # 3. All of them in turns.
    runs: dict[tuple[Any, ...], Run] = {key: run for key, (run, _) in products.items()}
    for case, program in programs.items():
        arrays = inputs[(case.mesh, case.seq_len, case.dtype)]
        count = 3 if case.pass_ == "forward" else 4
        runs[case] = functools.partial(program, *arrays[:count])
    seconds = take_turns(runs, repeats)
    # 4. A row for each case.
    rows = []
    for case, program in programs.items():
        median = statistics.median(seconds[case])
        _, product_flops = products[case.mesh, case.dtype]
        peak = product_flops / min(seconds[case.mesh, case.dtype])
        speed = useful_flops(case.spec(sizes), case.pass_) / median
        memory = program.memory_analysis()
        rows.append(
            case.row()
            | {
                "milliseconds": 1e3 * median,
                "least_milliseconds": 1e3 * min(seconds[case]),
                "tokens_per_second": sizes.batch * case.seq_len / median,
                "tflops": speed / 1e12,
                "peak_fraction": speed / peak,
                "temporary_mib": memory and memory.temp_size_in_bytes / 2**20,
            }
        )
    return rows, {case: seconds[case] for case in cases}


def speedups(seconds: Seconds) -> Table:
    """Time of dense attention over that of each other implementation.

    Medians of the ratios inside a turn.
    """
    rows = []
    for case, times in seconds.items():
        dense = seconds.get(case._replace(implementation="dense"))
        if dense and case.implementation != "dense":
            rows.append(case.row() | {"dense / this": paired_ratio(dense, times)})
    return rows


def growth(seconds: Seconds) -> Table:
    """Time at four times the length over time at the length.

    4 is linear, 16 quadratic.
    """
    rows = []
    for case, times in seconds.items():
        longer = seconds.get(case._replace(seq_len=4 * case.seq_len))
        if longer:
            ratio = paired_ratio(longer, times)
            rows.append(case.row() | {"4 x seq_len / seq_len": ratio})
    return rows


def compare(
    before: Mapping[str, Any], params: Mapping[str, Any], rows: Table
) -> tuple[Table, list[str]]:
    """Compare with an earlier run.

    Args:
      before: JSON of the earlier run.
      params: settings of this run.
      rows: rows of this run.

    Returns:
      Old milliseconds over new, for rows with equal keys; and lines that name settings
      that differ and rows without a partner.
    """
    names = tuple(rows[0])[: len(Case._fields)]
    old, new = (
        {tuple(row[name] for name in names): row["milliseconds"] for row in run}
        for run in (before["rows"], rows)
    )
    table = [
        dict(zip(names, key, strict=True))
        | {"old, ms": old[key], "new, ms": time, "old / new": old[key] / time}
        for key, time in new.items()
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
    """Append sections to the Markdown page of a result; empty ones are left out.

    Args:
      stem: path of the result without its extension.
      tables: heading -> rows of a table.
      lists: heading -> entries of a list.
    """
    page: list[str] = []
    for title, rows in tables.items():
        if rows:
            page += ["", f"## {title}", "", markdown_table(rows)]
    for title, entries in lists.items():
        if entries:
            page += ["", f"## {title}", "", *(f"- {entry}" for entry in entries)]
    with _with_extension(stem, ".md").open("a") as file:
        file.writelines(f"{line}\n" for line in page)


def _with_extension(stem: Path, extension: str) -> Path:
    # Not `with_suffix`: the stem may hold a dot.
    return stem.with_name(stem.name + extension)


def bench_local(flags: argparse.Namespace, stem: Path, command: str) -> None:
    """Time on local devices; write the rows, their ratios and the picture.

    Args:
      flags: the command line.
      stem: path of the result without its extension.
      command: command that reproduces the run.
    """
    # 1. Everything that can fail, before the measurement.
    sizes = Sizes(flags.batch, flags.heads, flags.head_dim)
    meshes = {text: local_mesh(text, sizes) for text in flags.meshes}
    before = json.loads(flags.against.read_text()) if flags.against else None
    if not flags.no_png:
        require_matplotlib()
    cases, left_out = select(flags, sizes, meshes)
    if not cases:
        raise InputError("no case can be timed: " + "; ".join(left_out))
    # 2. Measure.
    rows, seconds = measure(
        cases, sizes, meshes, repeats=flags.repeats, matmul=flags.matmul
    )
    # 3. Rows and settings. Two environment variables change times of a CPU.
    params = sizes._asdict() | {
        "turns": flags.repeats,
        "statistic": "median",
        "matmul": flags.matmul,
        "device": jax.devices()[0].device_kind,
    }
    params |= {
        name: os.environ[name]
        for name in ("GLIBC_TUNABLES", "XLA_FLAGS")
        if name in os.environ
    }
    write_result(stem, rows, params, command, title="Attention throughput")
    # 4. Ratios, which need the seconds of every turn.
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
        plot_throughput(rows, _with_extension(stem, ".png"))


def bench_topology(flags: argparse.Namespace, stem: Path, command: str) -> None:
    """Compile for a described pod, and write what each program takes.

    Args:
      flags: the command line.
      stem: path of the result without its extension.
      command: command that reproduces the run.
    """
    from benchmarks.attention_topology import topology_rows  # loads the TPU compiler

    if flags.against:
        raise InputError(
            "--against compares milliseconds, which --topology does not measure; "
            "leave one of them out"
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
    write_result(
        stem,
        rows,
        {"topology": flags.topology, "slices": flags.slices},
        command,
        title=f"Attention compiled for {flags.slices} x {flags.topology}",
    )


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--meshes",
        nargs="+",
        default=["1x1x1"],
        help="devices along data x fsdp x tensor",
    )
    add("--seq-lens", nargs="+", type=int, default=[512, 2048, 8192, 32768])
    add(
        "--windows",
        nargs="+",
        type=parse_window,
        default=[64, 256, None],
        help="keys that a query sees; full or 0: all",
    )
    add(
        "--implementations",
        nargs="+",
        default=list(IMPLEMENTATIONS),
        help=", ".join(IMPLEMENTATIONS),
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    add("--batch", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--head-dim", type=int, default=32)
    add("--repeats", type=int, default=10, help="turns of each variant")
    add(
        "--matmul",
        type=int,
        default=2048,
        help="side of the matrices that measure the peak",
    )
    add(
        "--logits-gib",
        type=float,
        default=2.0,
        help="dense is left out where its logits take more",
    )
    add("--full-to", type=int, default=8192, help="longest seq_len of full attention")
    add(
        "--topology",
        help="compile for this pod, such as v5p:4x4x4, instead of timing; batch, heads "
        "and head_dim are those of benchmarks.attention_topology",
    )
    add("--slices", type=int, default=1, help="slices of the topology")
    add(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    add("--against", type=Path, help="JSON of an earlier run to compare with")
    add("--no-png", action="store_true", help="no picture, which needs matplotlib")
    return parser


def parse_window(text: str) -> int | None:
    """Read a window; "full" or "0" is None."""
    return None if text in ("full", "0") else int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
      InputError: an implementation that is not known, or a number below one.
    """
    flags = make_parser().parse_args(argv)
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
        numbers = value if isinstance(value, list) else [value]
        if any(number is not None and number < 1 for number in numbers):
            raise InputError(
                f"--{name.replace('_', '-')} {value}: every number must be at least 1"
            )
    return flags


def command_line(flags: argparse.Namespace) -> str:
    """Write the command that reproduces the run, with every setting of its figures."""
    names = ("meshes", "seq_lens", "windows", "implementations", "dtypes", "passes")
    if flags.topology:
        names = ("topology", "slices", *names)
    else:
        shape = ("batch", "heads", "head_dim", "repeats", "matmul")
        names = (*names, *shape, "logits_gib", "full_to")
    words = ["python -m benchmarks.attention"]
    for name in names:
        value = getattr(flags, name)
        values = value if isinstance(value, list) else [value]
        words.append(f"--{name.replace('_', '-')}")
        words += ["full" if value is None else f"{value}" for value in values]
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its page."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--block" in words:
        from benchmarks import attention_block  # loads the TPU compiler

        attention_block.main([word for word in words if word != "--block"])
        return
    flags = parse(words)
    name = "attention_topology" if flags.topology else "attention"
    stem = flags.out or RESULTS / name
    bench = bench_topology if flags.topology else bench_local
    bench(flags, stem, command_line(flags))
    print(_with_extension(stem, ".md").read_text())


if __name__ == "__main__":
    run_script(main)
