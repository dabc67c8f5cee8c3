"""Attention compiled for a pod that need not be there: memory, work and the least time, by mesh shape.

python -m benchmarks.attention_topology --topology v5p:4x4x4

libtpu compiles each program as the pod would run it; nothing is run. The streams of a batch take `--tokens-per-chip`
tokens a chip whatever their length. Streams lie over data and fsdp, heads over tensor, and attention exchanges nothing,
so that mesh shapes differ by layout alone. Columns as in `benchmarks.attention`, less its times:

- `useful FLOPs`: 2 products forward and 5 backward over visible pairs; `tflops` and `peak_fraction` count these.
- `flops_per_device`: what the program computes, XLA's count and in splash the tiles that it visits. XLA counts a loop
  body once, so that at least the useful FLOPs are taken.
- `roofline_ms`: the longest of compute, memory and network time at the chip's peak; no run is faster. So
  `tokens_per_second`, `tflops` (all chips) and `peak_fraction` are upper bounds.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.report import run_script, write_result
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.attention import IMPLEMENTATIONS, attention
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.planner.attention_cost import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    attention_bytes,
    attention_flops,
    visible_pairs,
)
from tokenrec.planner.compiled_program import program_figures
from tokenrec.planner.flops import Work, attention_work, implementation_of
from tokenrec.planner.roofline import Roofline, chip
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import RULES, batch_shards

TOKENS_PER_CHIP = 32_768
HEADS, HEAD_DIM = 8, 64
MESHES = ((64, 1, 1), (1, 64, 1), (16, 1, 4), (8, 1, 8))
PASSES = ("forward", "forward_backward")


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
    """A row for every mesh, length, window, implementation and pass; plain causal order.

    A row that cannot be made has `problem` and no figures: an implementation that refuses, or a program that does not
    fit. Windows as long as the stream are left out: they are full attention.

    Args:
      mesh_shapes: (data, fsdp, tensor).
      windows: None is full.
      slices: of the topology.

    Raises:
      InputError: the topology or a mesh shape is wrong, or heads or batch do not divide over it.
    """
    for shape in mesh_shapes:
        mesh = topology_mesh(topology, MeshConfig(*shape), slices)
        for seq_len in seq_lens:
            # At least one stream a chip, so that every mesh shape has the same batch.
            batch = mesh.size * max(tokens_per_chip // seq_len, 1)
            if heads % mesh.shape["tensor"]:
                raise InputError(
                    f"heads={heads} do not divide over mesh.tensor={shape[2]}; take a multiple"
                )
            array = jax.ShapeDtypeStruct(
                (batch, seq_len, heads, head_dim),
                jnp.dtype(dtype),
                sharding=jax.NamedSharding(mesh, RULES("batch", None, "heads", None)),
            )
            for window in (
                window for window in windows if window is None or window < seq_len
            ):
                for name in implementations:
                    for pass_ in passes:
                        case = {
                            "mesh": "x".join(map(str, shape)),
                            "seq_len": seq_len,
                            "window": window or "full",
                            "implementation": name,
                            "dtype": dtype,
                            "pass": pass_,
                            "streams per shard": batch // batch_shards(mesh),
                        }
                        yield case | _figures(
                            mesh,
                            array,
                            window,
                            name,
                            backward=pass_ == "forward_backward",
                        )


def _figures(
    mesh: jax.sharding.Mesh,
    array: jax.ShapeDtypeStruct,
    window: int | None,
    name: str,
    *,
    backward: bool,
) -> dict[str, Any]:
    batch, seq_len, heads, head_dim = array.shape
    pattern = causal_pattern(seq_len, seq_len)
    try:
        with jax.set_mesh(mesh):
            implementation_of(
                array.shape, array.shape, window, pattern, array.dtype, name
            )
        compiled = _compile(mesh, array, window, name, backward=backward)
    except InputError as error:
        return {"problem": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"problem": str(error).partition("\n")[0]}
    sizes = {
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "itemsize": array.dtype.itemsize,
    }
    work = attention_work(name, pattern, window, **sizes, backward=backward)
    products = FORWARD_PRODUCTS + (BACKWARD_PRODUCTS if backward else 0)
    pairs = visible_pairs(pattern, window)
    work = work._replace(
        model_flops=batch * attention_flops(pairs, heads, head_dim, products)
    )
    return _bounded(
        program_figures(compiled, mesh, work), mesh, work, array, backward=backward
    )


def _compile(
    mesh: jax.sharding.Mesh,
    array: jax.ShapeDtypeStruct,
    window: int | None,
    name: str,
    *,
    backward: bool,
) -> jax.stages.Compiled:
    attend = functools.partial(attention, window=window, implementation=name)

    def forward_backward(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(gradient)

    with jax.set_mesh(mesh):
        if backward:
            return jax.jit(forward_backward).lower(*[array] * 4).compile()
        return jax.jit(attend).lower(*[array] * 3).compile()


def _bounded(
    found: dict[str, Any],
    mesh: jax.sharding.Mesh,
    work: Work,
    array: jax.ShapeDtypeStruct,
    *,
    backward: bool,
) -> dict[str, Any]:
    batch, seq_len, heads, head_dim = array.shape
    of, useful = chip(found["device_kind"]), work.model_flops / mesh.size
    least = sum(
        attention_bytes(
            seq_len, seq_len, heads, head_dim, array.dtype.itemsize, backward=part
        )
        for part in ((False, True) if backward else (False,))
    )
    flops = max(found["flops"], useful)
    accessed = max(found["bytes_accessed"], batch * least / mesh.size)
    roofline = Roofline(
        flops / of.flops, accessed / of.hbm_bandwidth, found["roofline"].network_seconds
    )
    return {
        "bytes_per_device": found["bytes"]["total"],
        "headroom": found["headroom"],
        "flops_per_device": flops,
        "collective_bytes": _listed(found["collective_bytes"]),
        "roofline_ms": 1e3 * roofline.bound,
        "compute_ms": 1e3 * roofline.compute_seconds,
        "memory_ms": 1e3 * roofline.memory_seconds,
        "network_ms": 1e3 * roofline.network_seconds,
        "limit": roofline.limit,
        "tokens_per_second": batch * seq_len / roofline.bound,
        "tflops": work.model_flops / roofline.bound / 1e12,
        "peak_fraction": roofline.mfu_bound(useful, of),
    }


def _listed(amounts: dict[str, int]) -> str:
    return ", ".join(f"{name} {amount:,}" for name, amount in amounts.items()) or "none"


def _window(text: str) -> int | None:
    return None if text == "full" else int(text)


def _mesh_shape(text: str) -> tuple[int, int, int]:
    data, fsdp, tensor = map(int, text.split("x"))
    return data, fsdp, tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5p:4x4x4", help="of each slice")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument(
        "--meshes",
        nargs="+",
        type=_mesh_shape,
        default=list(MESHES),
        help="data x fsdp x tensor",
    )
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument(
        "--windows",
        nargs="+",
        type=_window,
        default=[256, None],
        help="keys seen; full: all",
    )
    preferred = [name for name in ("splash", "dense") if name in IMPLEMENTATIONS]
    parser.add_argument(
        "--implementations", nargs="+", default=preferred, choices=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--tokens-per-chip", type=int, default=TOKENS_PER_CHIP)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args()
    sizes = {
        name: getattr(flags, name) for name in ("tokens_per_chip", "heads", "head_dim")
    }
    given = (
        flags.seq_lens,
        flags.windows,
        flags.implementations,
        flags.dtype,
        flags.passes,
        flags.slices,
    )
    if any(math.prod(shape) != math.prod(flags.meshes[0]) for shape in flags.meshes):
        raise InputError("--meshes: all must have as many devices as the topology")
    rows = []
    for row in topology_rows(flags.topology, flags.meshes, *given, **sizes):
        rows.append(row)
        print(row, file=sys.stderr)
    name = (
        "attention_"
        + flags.topology.replace(":", "_")
        + (f"_{flags.slices}_slices" if flags.slices > 1 else "")
    )
    stem = flags.out or Path(__file__).parent / "results" / name
    params = {"topology": flags.topology, "slices": flags.slices} | sizes
    title = f"Attention compiled for {flags.slices} x {flags.topology}: bounds, nothing was run"
    packages = ("tokenrec", "jax", "jaxlib", "libtpu", "flax")
    write_result(
        stem,
        rows,
        params,
        "python -m " + " ".join(_command(flags)),
        title=title,
        packages=packages,
    )
    print(stem.with_name(stem.name + ".md").read_text())


def _command(flags: argparse.Namespace) -> Iterator[str]:
    yield "benchmarks.attention_topology"
    for name, value in vars(flags).items():
        if name != "out":
            yield "--" + name.replace("_", "-")
            for one in value if isinstance(value, list) else [value]:
                yield (
                    "full"
                    if one is None
                    else "x".join(map(str, one))
                    if isinstance(one, tuple)
                    else str(one)
                )


if __name__ == "__main__":
    run_script(main)
