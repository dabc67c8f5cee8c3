"""Attention compiled for a described pod: memory, work and least time, by mesh shape.

    python -m benchmarks.attention_topology --topology v5p:4x4x4

libtpu compiles each program as the pod would run it; nothing is run. The streams of a
batch take `--tokens-per-chip` tokens a chip whatever their length. Streams are split
over data and fsdp, heads over tensor, and attention exchanges nothing, so that mesh
shapes differ by layout alone. Columns are those of `benchmarks.attention`, less its
times, and

- `flops_per_device`: FLOPs of the program: XLA's count, and in splash the tiles that it
  visits. XLA counts the body of a loop once, so that at least the useful FLOPs are
  taken, 2 products forward and 5 backward over visible pairs.
- `roofline_ms`: the longest of compute, memory and network time at the chip's peak. No
  run is faster, so that `tokens_per_second`, `tflops` (of all chips) and
  `peak_fraction` are upper bounds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.attention_cases import PASSES, compile_attention, useful_flops
from benchmarks.attention_specs import AttentionSpec, causal_spec
from benchmarks.report import run_script, write_result
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.attention import IMPLEMENTATIONS
from tokenrec.planner.attention_cost import attention_bytes
from tokenrec.planner.compiled_program import program_figures
from tokenrec.planner.flops import Work, attention_work, implementation_of
from tokenrec.planner.roofline import Roofline, chip
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import batch_shards

TOKENS_PER_CHIP = 32_768
HEADS, HEAD_DIM = 8, 64
MESHES = ((64, 1, 1), (1, 64, 1), (16, 1, 4), (8, 1, 8))


def topology_rows(
    topology: str,
    mesh_shapes: Sequence[tuple[int, int, int]],
    seq_lens: Sequence[int],
    windows: Sequence[int | None],
    implementations: Sequence[str],
    dtype: str = "bfloat16",
    passes: Sequence[str] = PASSES,
    slices: int = 1,
    *,
    tokens_per_chip: int = TOKENS_PER_CHIP,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every mesh, length, window, implementation and pass.

    The order is plain causal. A row that cannot be made has `problem` and no figures:
    the implementation does not serve it, or the program does not fit. Windows as long
    as the stream are left out: they are full attention.

    Args:
      topology: name of the pod, such as "v5p:4x4x4".
      mesh_shapes: devices along (data, fsdp, tensor).
      seq_lens: S.
      windows: keys that a query sees; None: full.
      implementations: keys of `IMPLEMENTATIONS`.
      dtype: of queries, keys and values.
      passes: of `PASSES`.
      slices: slices of the topology.
      tokens_per_chip: tokens of a batch per chip.
      heads: H.
      head_dim: h.

    Raises:
      InputError: the topology or a mesh shape is wrong, or heads do not divide over it.
    """
    for shape in mesh_shapes:
        mesh = topology_mesh(topology, MeshConfig(*shape), slices)
        if heads % mesh.shape["tensor"]:
            raise InputError(
                f"heads={heads} do not divide over mesh.tensor={shape[2]}; "
                "use a multiple"
            )
        for seq_len in seq_lens:
            # At least one stream a chip, so that every mesh shape has the same batch.
            batch = mesh.size * max(tokens_per_chip // seq_len, 1)
            for window in windows:
                if window is not None and window >= seq_len:
                    continue
                spec = causal_spec(
                    seq_len,
                    seq_len,
                    window,
                    batch=batch,
                    heads=heads,
                    head_dim=head_dim,
                    dtype=dtype,
                )
                for name in implementations:
                    for pass_ in passes:
                        columns = {
                            "mesh": "x".join(map(str, shape)),
                            "seq_len": seq_len,
                            "window": window or "full",
                            "implementation": name,
                            "dtype": dtype,
                            "pass": pass_,
                            "streams per shard": batch // batch_shards(mesh),
                        }
                        yield columns | _figures(mesh, spec, name, pass_)


def _figures(
    mesh: jax.sharding.Mesh, spec: AttentionSpec, name: str, pass_: str
) -> dict[str, Any]:
    """Compile one program, and compute its columns, or `{"problem": reason}`."""
    q, k, _, _ = spec.arrays(mesh)
    try:
        with jax.set_mesh(mesh):
            implementation_of(
                q.shape, k.shape, spec.window, spec.pattern, q.dtype, name
            )
        compiled = compile_attention(spec, name, pass_, mesh)
    except InputError as error:
        return {"problem": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"problem": str(error).partition("\n")[0]}
    work = attention_work(
        name,
        spec.pattern,
        spec.window,
        batch=spec.batch,
        heads=spec.heads,
        head_dim=spec.head_dim,
        itemsize=q.dtype.itemsize,
        backward=pass_ == "forward_backward",
    )
    # Useful work counts the products of a backward pass that forms the logits again.
    work = work._replace(model_flops=useful_flops(spec, pass_))
    return _bounds(program_figures(compiled, mesh, work), mesh, work, spec, pass_)


def _bounds(
    program: dict[str, Any],
    mesh: jax.sharding.Mesh,
    work: Work,
    spec: AttentionSpec,
    pass_: str,
) -> dict[str, Any]:
    """Bound the time of a program from what its report counts.

    Args:
      program: the planner's report of the compiled program.
      mesh: the mesh.
      work: FLOPs over all devices.
      spec: the arguments.
      pass_: "forward" or "forward_backward".
    """
    chip_figures = chip(program["device_kind"])
    useful = work.model_flops / mesh.size
    itemsize = spec.arrays()[0].dtype.itemsize
    least_bytes = sum(
        attention_bytes(
            spec.queries,
            spec.keys,
            spec.heads,
            spec.head_dim,
            itemsize,
            backward=backward,
        )
        for backward in ((False, True) if pass_ == "forward_backward" else (False,))
    )
    flops = max(program["flops"], useful)
    accessed = max(program["bytes_accessed"], spec.batch * least_bytes / mesh.size)
    roofline = Roofline(
        flops / chip_figures.flops,
        accessed / chip_figures.hbm_bandwidth,
        program["roofline"].network_seconds,
    )
    return {
        "bytes_per_device": program["bytes"]["total"],
        "headroom": program["headroom"],
        "flops_per_device": flops,
        "collective_bytes": _listed(program["collective_bytes"]),
        "roofline_ms": 1e3 * roofline.bound,
        "compute_ms": 1e3 * roofline.compute_seconds,
        "memory_ms": 1e3 * roofline.memory_seconds,
        "network_ms": 1e3 * roofline.network_seconds,
        "limit": roofline.limit,
        "tokens_per_second": spec.batch * spec.queries / roofline.bound,
        "tflops": work.model_flops / roofline.bound / 1e12,
        "peak_fraction": roofline.mfu_bound(useful, chip_figures),
    }


def _listed(amounts: dict[str, int]) -> str:
    return ", ".join(f"{name} {amount:,}" for name, amount in amounts.items()) or "none"


def _parse_window(text: str) -> int | None:
    return None if text == "full" else int(text)


def _parse_mesh_shape(text: str) -> tuple[int, int, int]:
    data, fsdp, tensor = map(int, text.split("x"))
    return data, fsdp, tensor


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--topology", default="v5p:4x4x4", help="topology of each slice")
    add("--slices", type=int, default=1)
    add(
        "--meshes",
        nargs="+",
        type=_parse_mesh_shape,
        default=list(MESHES),
        help="devices along data x fsdp x tensor",
    )
    add("--seq-lens", nargs="+", type=int, default=[2048, 8192, 32768])
    add(
        "--windows",
        nargs="+",
        type=_parse_window,
        default=[256, None],
        help="keys that a query sees; full: all",
    )
    add(
        "--implementations",
        nargs="+",
        default=["splash", "dense"],
        choices=list(IMPLEMENTATIONS),
    )
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    add("--tokens-per-chip", type=int, default=TOKENS_PER_CHIP)
    add("--heads", type=int, default=HEADS)
    add("--head-dim", type=int, default=HEAD_DIM)
    add(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    return parser


def main() -> None:
    """Compile every program, and write and print the page."""
    flags = make_parser().parse_args()
    if any(math.prod(shape) != math.prod(flags.meshes[0]) for shape in flags.meshes):
        raise InputError("--meshes must all have as many devices as the topology")
    sizes = {
        name: getattr(flags, name) for name in ("tokens_per_chip", "heads", "head_dim")
    }
    rows = []
    for row in topology_rows(
        flags.topology,
        flags.meshes,
        flags.seq_lens,
        flags.windows,
        flags.implementations,
        flags.dtype,
        flags.passes,
        flags.slices,
        **sizes,
    ):
        rows.append(row)
        # Progress: a row takes seconds to minutes.
        print(row, file=sys.stderr)
    name = f"attention_{flags.topology.replace(':', '_')}"
    if flags.slices > 1:
        name += f"_{flags.slices}_slices"
    stem = flags.out or Path(__file__).parent / "results" / name
    write_result(
        stem,
        rows,
        {"topology": flags.topology, "slices": flags.slices} | sizes,
        command_line(flags),
        title=(
            f"Attention compiled for {flags.slices} x {flags.topology}: bounds, "
            "nothing was run"
        ),
        packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax"),
    )
    print(stem.with_name(stem.name + ".md").read_text())


def command_line(flags: argparse.Namespace) -> str:
    """Write the command that reproduces the run."""
    words = ["python -m benchmarks.attention_topology"]
    for name, value in vars(flags).items():
        if name != "out":
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(_as_word, values)]
    return " ".join(words)


def _as_word(value: Any) -> str:
    if value is None:
        return "full"
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    run_script(main)
