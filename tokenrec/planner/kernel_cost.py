"""Time of the splash kernels, which XLA has no estimate of.

A kernel goes over a grid of tiles. Every grid step has a fixed cost, a tile with
something visible costs its products and softmax, and the first and the last tile of a
line cost something besides. `kernel_bundles.json` holds those four in bundles of
instructions, which are cycles, as libtpu compiles the kernels for each kind of chip,
width of a head and tile; `python -m benchmarks.kernel_bundles` makes it. With n grid
steps, m visible tiles and l lines for each of B streams and H heads of a device

    seconds = B H (n step + m tile + l (first + last)) / (clock cores)

Waiting for memory is not in it. A tile that the table lacks costs its products at the
peak of the chip, which is too little.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.config.backbones import head_width
from tokenrec.data.batch import Batch
from tokenrec.device_kinds import canonical_kind
from tokenrec.models.backbones.bfts import is_split
from tokenrec.ops.attention import splash, splash_kernel
from tokenrec.ops.attention.context_plan import plan_split
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.planner.kernel_bundles import TileBundles
from tokenrec.planner.roofline import Chip, chip
from tokenrec.sharding import batch_shards
from tokenrec.state import ModelSpec, abstract_state, bind_params

# Kernels of a train step: forward pass, gradient of q, and gradients of k and v.
KERNELS = ("fwd", "dq", "dkv")
# Products of a tile: logits and output; logits, their gradient and q's; logits, their
# gradient, k's and v's.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_NAMES = {
    "fwd": "splash_mha_fwd_segmented_residuals",
    "dq": "splash_mha_dq_segmented_no_residuals",
    "dkv": "splash_mha_dkv_segmented_no_residuals",
}


def call_name(kernel: str) -> str:
    """Name of a kernel's custom call in a compiled train step.

    Args:
      kernel: one of `KERNELS`.
    """
    return _NAMES[kernel]


def tile_bundles(
    device_kind: str, head_dim: int, sides: tuple[int, int]
) -> dict[str, TileBundles] | None:
    """Look up the bundles of the kernels; None where the table has none.

    Args:
      device_kind: `jax.Device.device_kind`.
      head_dim: h, the width of a head.
      sides: queries and keys of a tile.

    Returns:
      Bundles by kernel, as in `KERNELS`.
    """
    of_chip = _table()["bundles"].get(canonical_kind(device_kind), {})
    row = of_chip.get(str(head_dim), {}).get(f"{sides[0]}x{sides[1]}")
    return row and {name: TileBundles(*row[name]) for name in KERNELS}


def peak_bundles(
    sides: tuple[int, int], head_dim: int, spec: Chip
) -> dict[str, TileBundles]:
    """Bundles of kernels that the table lacks: their products at the peak, no more.

    Args:
      sides: queries and keys of a tile.
      head_dim: h, the width of a head.
      spec: figures of the chip.
    """
    cycle_flops = spec.flops / (spec.clock * spec.cores)
    one_product = 2 * sides[0] * sides[1] * head_dim / cycle_flops
    return {
        name: TileBundles(0, 0, round(count * one_product), 0)
        for name, count in _PRODUCTS.items()
    }


@functools.cache
def _table() -> dict[str, Any]:
    folder = importlib.resources.files("tokenrec.planner")
    return json.loads(folder.joinpath("kernel_bundles.json").read_text())


def kernel_seconds(
    bundles: dict[str, TileBundles],
    tiles: np.ndarray,
    runs: int,
    spec: Chip,
) -> dict[str, float]:
    """Compute the seconds of one run of each kernel.

    Args:
      bundles: of `tile_bundles`.
      tiles: `[query blocks, key blocks] bool`, those with something visible.
      runs: B H, streams times heads of a device.
      spec: figures of the device.
    """
    seconds = {}
    for name, cost in bundles.items():
        # The gradients of k and v go over the queries of each block of keys.
        lines = tiles.T if name == "dkv" else tiles
        # A grid is as wide as the line that has most tiles.
        steps = len(lines) * int(lines.sum(axis=1).max())
        cycles = steps * cost.step + int(lines.sum()) * cost.tile
        cycles += len(lines) * (cost.first + cost.last)
        seconds[name] = runs * cycles / (spec.clock * spec.cores)
    return seconds


def step_kernel_seconds(
    model: ModelSpec, mesh: Mesh, shapes: Batch, layers: list[dict[str, Any]]
) -> dict[str, float]:
    """Compute the seconds of a run of each kernel of a train step, by custom call.

    The text of a program does not say which layer a kernel serves, so that a run costs
    the mean over the layers that the kernels serve, and all runs together the right
    sum.

    Args:
      model: static half of the run.
      mesh: mesh of the step, which may be described only.
      shapes: the batch as `jax.ShapeDtypeStruct`.
      layers: of `flops.step_work`.

    Returns:
      Seconds by name of the call. Empty where no layer is served by the kernels.
    """
    config = model.config.model
    with jax.set_mesh(mesh):
        backbone = bind_params(model, abstract_state(model).params).backbone
        patterns = list(backbone.attention_layers(model.layout(shapes.valid.shape[1])))
    served = [
        (pattern, window)
        for (pattern, window, _), layer in zip(patterns, layers, strict=True)
        if layer["implementation"] == "splash"
    ]
    # A micro-batch, and an update of an elastic step, runs the kernels on its streams.
    shares = model.config.optim.accumulate * model.updates
    streams = shapes.valid.shape[0] // shares
    return layer_kernel_seconds(
        served,
        mesh,
        streams=streams // batch_shards(mesh),
        heads=config.heads // mesh.shape["tensor"],
        head_dim=head_width(config),
    )


def layer_kernel_seconds(
    layers: Sequence[tuple[Pattern, int | None]],
    mesh: Mesh,
    *,
    streams: int,
    heads: int,
    head_dim: int,
) -> dict[str, float]:
    """Compute the mean seconds of a run of each kernel over the layers that it serves.

    Args:
      layers: pattern and window of each layer.
      mesh: mesh of the step, which may be described only.
      streams: of a device.
      heads: of a device.
      head_dim: h, the width of a head.

    Returns:
      Seconds by name of the call. Empty without layers.
    """
    kind = mesh.devices.flat[0].device_kind
    costs = []
    for pattern, window in layers:
        sides, tiles = splash_tiles(pattern, window, mesh.shape["context"])
        bundles = tile_bundles(kind, head_dim, sides)
        if bundles is None:
            bundles = peak_bundles(sides, head_dim, chip(kind))
        costs.append(kernel_seconds(bundles, tiles, streams * heads, chip(kind)))
    if not costs:
        return {}
    return {
        call_name(name): float(np.mean([cost[name] for cost in costs]))
        for name in KERNELS
    }


def splash_tiles(
    pattern: Pattern, window: int | None, parts: int = 1
) -> tuple[tuple[int, int], np.ndarray]:
    """Find the tile that the kernels choose, and those that a device computes.

    Args:
      pattern: which queries see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
      parts: devices along `mesh.context`.

    Returns:
      Queries and keys of a tile, and `[query blocks, key blocks] bool` of the part that
      computes the most.
    """
    keys = len(pattern.key_positions)
    if is_split(len(pattern.query_positions), len(pattern.index), parts):
        plan = plan_split(pattern, window, parts)
        spans, keys = plan.spans(window), plan.keys
    else:
        spans, parts = splash.visible_spans(pattern, window), 1
    if isinstance(spans, str):
        raise AssertionError(spans)
    sides = splash_kernel.block_sizes(spans, keys, parts)
    filled = splash_kernel.fill_parts(len(spans.start), parts, sides[0])
    tiles = splash_kernel.visited_tiles(spans.take(filled), keys, *sides)
    by_part = tiles.reshape(parts, -1, tiles.shape[1])
    return sides, by_part[int(by_part.sum(axis=(1, 2)).argmax())]
