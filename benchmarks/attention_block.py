"""Time of a whole attention block on every mesh of a pod, by the compiler's schedule.

    python -m benchmarks.attention --topology v5p:4x4x4 --block
    python -m benchmarks.attention_block --topology v5e:16x16 --seq-lens 8192 32768

Answers which mesh to take for a length, a width and a batch. Attention alone is the
same on every mesh of as many devices; what differs is what surrounds it: gathers of
weights over fsdp, sums over tensor, keys and values over context. So each row is
the gradient step of one TokenFormer block (norms, projections, rotation, attention,
SwiGLU) as libtpu compiles and schedules it; nothing is run. A mesh is
data x fsdp x context x tensor. All rows of a length have the same batch,
`--tokens-per-chip` tokens a chip or one stream, whichever is more.

- `schedule_ms`: tokenrec/planner/schedule.py; `matrix_ms`, `kernels_ms`, `vector_ms`,
  `network_ms` (waits only) and `hidden_ms` (links busy beside work) are parts of it;
- `mfu`: model FLOPs of the block over the peak in that time;
- `tokens_per_chip_second`, and `problem` where a mesh cannot serve.

Rows are written as they are made, and kept when the command is given again. Some
20 seconds a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Compiled

from benchmarks.block_heat_map import plot_meshes
from benchmarks.report import kept_rows, run_script, write_result
from tokenrec.compiler_options import compiler_options
from tokenrec.config import MeshConfig, ModelConfig, Remat
from tokenrec.errors import InputError
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.planner.compiled_program import program_figures
from tokenrec.planner.flops import STEP_OVER_FORWARD, Work, attention_work
from tokenrec.planner.kernel_cost import layer_kernel_seconds
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import RULES, batch_shards
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import StreamSegment, make_layout

RESULTS = Path(__file__).parent / "results"
HEAD_DIM = 128
# Inner width of the FFN over that of the model, as in `lrm_1b`.
FFN = 2.75


def causal_layout(length: int) -> Layout:
    """Lay out a stream of events alone, all of which are read."""
    history = StreamSegment.history("event", np.arange(length))
    return make_layout([history], [], events=length, candidates=0, readout="events")


def block_config(width: int, window: int | None, remat: Remat) -> ModelConfig:
    """Configure one block of the Large Recommendation Model."""
    return ModelConfig(
        width=width,
        heads=width // HEAD_DIM,
        layers=1,
        windows=() if window is None else (window,),
        gate=False,
        ffn_width=int(FFN * width),
        qk_norm=True,
        dtype="bfloat16",
        remat=remat,
        needed_rows=False,
    )


def compile_block(
    config: ModelConfig, mesh: Mesh, layout: Layout, streams: int
) -> Compiled:
    """Compile the gradient step of a block: of its weights and of its input."""
    graph, weights = nnx.split(
        nnx.eval_shape(lambda: TokenFormer(config, layout, rngs=nnx.Rngs(0)))
    )

    def loss(weights: Any, x: jax.Array, events: jax.Array) -> jax.Array:
        read = nnx.merge(graph, weights)(x, layout, events, None, None)
        return jnp.sum(jnp.square(read.astype(jnp.float32)))

    def on_mesh(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        sharding = jax.NamedSharding(mesh, RULES(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = on_mesh(
        (streams, layout.length, config.width), jnp.bfloat16, "batch", None, None
    )
    events = on_mesh((streams, layout.length), jnp.bool, "batch", None)
    step = jax.jit(jax.grad(loss, (0, 1)))
    return step.lower(weights, x, events).compile(compiler_options(mesh))


def block_row(
    mesh: Mesh, length: int, width: int, window: int | None, streams: int, remat: Remat
) -> dict[str, Any]:
    """Compile a block on a mesh, and compute the columns of its schedule."""
    config, layout = block_config(width, window, remat), causal_layout(length)
    try:
        _check(mesh, config, length, streams)
        with jax.set_mesh(mesh):
            compiled = compile_block(config, mesh, layout, streams)
            pattern = layout.pattern(np.arange(length), np.arange(length))
    except InputError as error:
        return {"problem": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"problem": "does not fit"}
    attention = attention_work(
        "splash",
        pattern,
        window,
        batch=streams,
        heads=config.heads,
        head_dim=HEAD_DIM,
        itemsize=2,
        backward=True,
    )
    weights = 4 * width * width + 3 * width * config.ffn_width
    products = STEP_OVER_FORWARD * 2.0 * streams * length * weights
    work = Work(
        products + attention.model_flops,
        attention.kernel_flops,
        attention.kernel_bytes,
    )
    kernels = layer_kernel_seconds(
        [(pattern, window)],
        mesh,
        streams=streams // batch_shards(mesh),
        heads=config.heads // mesh.shape["tensor"],
        head_dim=HEAD_DIM,
    )
    figures = program_figures(compiled, mesh, work, None, kernels)
    schedule = figures["schedule"]
    return {
        "schedule_ms": 1e3 * schedule.seconds,
        "matrix_ms": 1e3 * schedule.work["matrix"],
        "kernels_ms": 1e3 * schedule.work["kernels"],
        "vector_ms": 1e3
        * sum(schedule.work[kind] for kind in ("vector", "padding", "copies")),
        "network_ms": 1e3 * schedule.exposed["network"],
        "hidden_ms": 1e3 * schedule.network_hidden,
        "mfu": figures["mfu_by_schedule"],
        "tokens_per_chip_second": streams * length / mesh.size / schedule.seconds,
        "total_mib": figures["bytes"]["total"] / 2**20,
        "unpriced": ", ".join(schedule.unpriced) or "none",
    }


def _check(mesh: Mesh, config: ModelConfig, length: int, streams: int) -> None:
    """Refuse what the mesh does not divide."""
    for name, size, parts in (
        ("streams", streams, batch_shards(mesh)),
        ("tokens", length, mesh.shape["context"]),
        ("heads", config.heads, mesh.shape["tensor"]),
        ("width", config.width, mesh.shape["fsdp"]),
    ):
        if size % parts:
            raise InputError(f"{size} {name} do not divide over {parts} devices")


def wanted_rows(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the first columns of every row: what is compiled."""
    for width in flags.widths:
        for length in flags.seq_lens:
            for window in flags.windows:
                for shape in flags.meshes:
                    yield {
                        "mesh": "x".join(map(str, shape)),
                        "width": width,
                        "seq_len": length,
                        "window": window or "full",
                    }


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse a mesh of the command line, data x fsdp x context x tensor."""
    shape = tuple(map(int, text.split("x")))
    if len(shape) != 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no mesh data x fsdp x context x tensor; write 4x16x1x1"
        )
    return shape


def default_meshes(devices: int) -> list[tuple[int, ...]]:
    """Meshes that use one or two axes.

    >>> default_meshes(4)
    [(4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (1, 1, 1, 4)]
    """
    part = max(int(devices**0.5), 1)
    while devices % part:
        part -= 1
    shapes = [[devices if at == axis else 1 for at in range(4)] for axis in range(4)]
    for first, second in ((0, 1), (1, 2), (1, 3), (2, 3)):
        shape = [1, 1, 1, 1]
        shape[first], shape[second] = devices // part, part
        shapes.append(shape)
    many = shapes if devices > 4 else shapes[:4]
    return list(dict.fromkeys(map(tuple, many)))


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--topology", default="v5p:4x4x4")
    add("--meshes", nargs="+", type=parse_shape, help="default: by the devices")
    add("--seq-lens", nargs="+", type=int, default=[2048, 8192, 32768])
    add("--widths", nargs="+", type=int, default=[2048])
    add(
        "--windows",
        nargs="+",
        type=lambda text: None if text == "full" else int(text),
        default=[None],
        help="keys that a query sees; full: all",
    )
    add("--tokens-per-chip", type=int, default=8192)
    add("--remat", default="dots", choices=("none", "dots", "full"))
    add("--out", type=Path, help="stem of the result files")
    return parser


def command_line(flags: argparse.Namespace) -> str:
    """Write the command that makes the rows of this run."""
    words = [f"python -m benchmarks.attention_block --topology {flags.topology}"]
    words += ["--meshes", *("x".join(map(str, shape)) for shape in flags.meshes)]
    words += ["--seq-lens", *map(str, flags.seq_lens)]
    words += ["--widths", *map(str, flags.widths)]
    words += ["--windows", *(str(window or "full") for window in flags.windows)]
    words += ["--tokens-per-chip", str(flags.tokens_per_chip), "--remat", flags.remat]
    return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile every block, and write and print the page."""
    flags = make_parser().parse_args(arguments)
    devices = topology_mesh(flags.topology, MeshConfig()).size
    flags.meshes = flags.meshes or default_meshes(devices)
    name = f"attention_block_{flags.topology.replace(':', '_')}"
    stem = flags.out or RESULTS / name
    file = stem.with_name(stem.name + ".json")
    rows = kept_rows(file)
    for columns in wanted_rows(flags):
        if any(columns.items() <= row.items() for row in rows):
            continue
        data, fsdp, context, tensor = map(int, columns["mesh"].split("x"))
        mesh = topology_mesh(
            flags.topology, MeshConfig(data, fsdp, tensor, context=context)
        )
        length = columns["seq_len"]
        streams = max(mesh.size * flags.tokens_per_chip // length, 1)
        window = None if columns["window"] == "full" else columns["window"]
        found = block_row(mesh, length, columns["width"], window, streams, flags.remat)
        rows.append(columns | {"streams": streams} | found)
        print(rows[-1], file=sys.stderr)
        write_result(
            stem,
            rows,
            {
                "topology": flags.topology,
                "tokens_per_chip": flags.tokens_per_chip,
                "remat": flags.remat,
                "head_dim": HEAD_DIM,
                "ffn": FFN,
            },
            command_line(flags),
            title=(
                f"One attention block on {flags.topology}, by the compiler's schedule: "
                "nothing was run"
            ),
            packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax"),
        )
    plot_meshes(rows, stem.with_name(stem.name + ".png"))
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
