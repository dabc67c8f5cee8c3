"""Time and memory of a mesh by formula, to rank meshes before any is compiled.

For a mesh of D devices, the formula takes

- compute: model FLOPs / D, times 4/3 if `model.remat="full"` computes blocks again,
  over the peak FLOP/s;
- network: the bytes that the mesh shape causes (`expected_collectives`), over the links
  that the pod has for them;
- memory: weights, gradients of those that are trained, tables, optimizer state and a rough size of the
  activations (`activation_bytes`), in bytes of one device.

The predicted time is the longer of compute and network. Left out: time at memory
bandwidth, table exchanges, the order of instructions, temporaries of XLA. The compiled
figures decide; the formula only chooses what to compile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, MeshConfig, ModelConfig
from tokenrec.config.backbones import head_width, is_decoder
from tokenrec.models.backbones.bfts import layer_windows
from tokenrec.models.backbones.block import ffn_width
from tokenrec.planner.collectives import Collective
from tokenrec.planner.roofline import chip, network_seconds
from tokenrec.sharding import AXES
from tokenrec.state import TrainState, in_shards
from tokenrec.tuning import is_frozen, split_frozen

# FLOPs of a step over the model's: a block that is computed again is a fourth pass
# beside three.
_STEP_OVER_MODEL = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
# Gathers of a sharded weight: forward, backward, and once more in the pass that
# computes a block again.
_GATHERS = {"none": 2, "dots": 2, "full": 3}
# Gathers of keys and values over `context`, which no pass keeps for another: forward,
# backward, and once more in the pass that computes a block again.
_CONTEXT_GATHERS = {"none": 2, "dots": 2, "full": 3}
# Sums over `tensor` of an activation: after attention and after the FFN, and the
# gradients of both inputs.
_TENSOR_SUMS = {"none": 4, "dots": 4, "full": 6}


class Prediction(NamedTuple):
    """Cost of a step on one device of a mesh, by formula.

    Attributes:
      mesh: sizes of the axes.
      compute_seconds: of the matrix products.
      network_seconds: of the collectives.
      bytes: of the state, the gradients and the activations.
      fits: whether the bytes fit into the memory of a device.
    """

    mesh: MeshConfig
    compute_seconds: float
    network_seconds: float
    bytes: int
    fits: bool

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return max(self.compute_seconds, self.network_seconds)


def predict(
    config: Config, state: TrainState, model_flops: float, tokens: int, mesh: Mesh
) -> Prediction:
    """Predict the cost of a step on a mesh.

    Args:
      config: a config; its own mesh does not matter.
      state: abstract state with shardings by axis name, on any mesh.
      model_flops: model FLOPs of the whole batch.
      tokens: tokens of the whole batch.
      mesh: mesh to predict for.
    """
    spec = chip(mesh.devices.flat[0].device_kind)
    flops = model_flops * _STEP_OVER_MODEL[config.model.remat] / mesh.size
    collectives = expected_collectives(config, state, tokens, mesh)
    network = network_seconds(collectives, list(mesh.devices.flat), spec)
    # The gradients of trained weights have the size of the weights.
    total_bytes = _device_bytes(split_frozen(config, state.params)[0], mesh)
    total_bytes += _device_bytes((state.params, state.tables, state.opt_state), mesh)
    micro_tokens = tokens // config.optim.accumulate
    total_bytes += activation_bytes(config, micro_tokens, dict(mesh.shape))
    return Prediction(
        mesh=MeshConfig(**mesh.shape),
        compute_seconds=flops / spec.flops,
        network_seconds=network,
        bytes=total_bytes,
        fits=total_bytes <= spec.hbm_bytes,
    )


def expected_collectives(
    config: Config, state: TrainState, tokens: int, mesh: Mesh
) -> list[Collective]:
    """List the collectives that a step must run on a mesh.

    `fsdp` gathers weights and scatters the sums of their gradients, `data` sums
    gradients, `context` sums gradients and exchanges keys and values, `tensor` sums
    activations.

    Args:
      config: a config.
      state: abstract state with shardings by axis name.
      tokens: tokens of the whole batch.
      mesh: mesh to predict for.
    """
    sizes = mesh.shape
    itemsize = jnp.dtype(config.model.dtype).itemsize
    # Bytes of weights that `fsdp` splits, as they are gathered in the compute type, of
    # their gradients, which `fsdp` scatters, and of gradients that `data` sums.
    gathered = scattered = reduced = 0
    for name, leaf in state.params.items():
        axes = _axes(leaf)
        numbers = leaf.size // (sizes["tensor"] if "tensor" in axes else 1)
        gradient_bytes = numbers * leaf.dtype.itemsize
        assert isinstance(leaf.sharding, jax.NamedSharding)
        if in_shards(name, leaf.sharding.spec):
            gradient_bytes = numbers * jnp.dtype(config.optim.gradient_sums).itemsize
        if is_frozen(config, name):
            gradient_bytes = 0
        if "fsdp" in axes:
            gathered += numbers * itemsize
            scattered += gradient_bytes
        reduced += gradient_bytes // (sizes["fsdp"] if "fsdp" in axes else 1)
    local_tokens = tokens // (sizes["data"] * sizes["fsdp"] * sizes["context"])
    activation = local_tokens * config.model.width * itemsize
    full, halo = _context_bytes(config, tokens, dict(sizes))
    exchanges = _CONTEXT_GATHERS[config.model.remat]
    # Weights are gathered, and gradients scattered, in every micro-batch.
    passes = config.optim.accumulate
    remat = config.model.remat
    layer_sums = _TENSOR_SUMS[remat] * config.model.layers
    expected = (
        ("all-gather", gathered, "fsdp", _GATHERS[remat] * passes),
        ("reduce-scatter", scattered, "fsdp", passes),
        ("all-reduce", reduced, "data", 1),
        ("all-reduce", reduced, "context", 1),
        ("all-gather", full, "context", exchanges),
        ("reduce-scatter", full, "context", 1),
        ("collective-permute", halo, "context", exchanges + 1),
        ("all-reduce", activation, "tensor", layer_sums),
    )
    return [
        Collective(kind, float(size), _axis_groups(mesh, axis), trips)
        for kind, size, axis, trips in expected
        if sizes[axis] > 1 and size
    ]


def _context_bytes(
    config: Config, tokens: int, sizes: dict[str, int]
) -> tuple[int, int]:
    """Bytes of keys and values that a device exchanges over `context`, in all layers.

    Returns:
      Bytes gathered in layers that need all keys, and bytes of halos in the others. The
      queries that full layers exchange are few, and left out, as are live positions.
    """
    streams = config.data.batch_size
    length, local_streams = tokens // streams, streams / (sizes["data"] * sizes["fsdp"])
    # Keys and values of one token of all local streams.
    numbers = 2 * local_streams * config.model.width / sizes["tensor"]
    each = numbers * jnp.dtype(config.model.dtype).itemsize
    full = halo = 0.0
    for window in layer_windows(config.model):
        if window is None or window > length // sizes["context"]:
            full += length * each
        else:
            halo += window * each
    return int(full), int(halo)


def activation_bytes(config: Config, tokens: int, sizes: dict[str, int]) -> int:
    """Estimate the bytes of activations of one device in the backward pass.

    They are the arrays that all blocks keep for it, by `model.remat`, and all arrays of
    one block. The arrays of a block are counted in numbers per token.

    Args:
      config: a config.
      tokens: tokens of one micro-batch, over all devices.
      sizes: size of each mesh axis.
    """
    model, tensor = config.model, sizes["tensor"]
    ffn, all_heads = ffn_width(model), _heads_width(model)
    block = 8 * model.width + (6 * all_heads + 4 * ffn) // tensor
    kept = {
        "full": model.width,
        "dots": 3 * model.width + (4 * all_heads + 2 * ffn) // tensor,
        "none": block,
    }[model.remat]
    local_tokens = tokens // (sizes["data"] * sizes["fsdp"] * sizes["context"])
    numbers = local_tokens * (model.layers * kept + block)
    return numbers * jnp.dtype(model.dtype).itemsize


def _heads_width(model: ModelConfig) -> int:
    """Width of all heads of a query together: `model.width`, but in a language model."""
    if not is_decoder(model):
        return model.width
    return model.heads * head_width(model)


def _device_bytes(tree: Any, mesh: Mesh) -> int:
    """Bytes of one device, by the leaves' shardings and the sizes of this mesh."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        parts = math.prod(mesh.shape[axis] for axis in _axes(leaf))
        total += leaf.size * leaf.dtype.itemsize // parts
    return total


def _axes(leaf: Any) -> set[str]:
    """Mesh axes that split an abstract array."""
    return {
        name
        for part in leaf.sharding.spec
        if part
        for name in ((part,) if isinstance(part, str) else part)
    }


def _axis_groups(mesh: Mesh, axis: str) -> tuple[tuple[int, ...], ...]:
    """Positions in the flattened mesh that differ along one axis only."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    places = np.moveaxis(places, AXES.index(axis), -1)
    groups = places.reshape(-1, mesh.shape[axis])
    return tuple(tuple(map(int, group)) for group in groups)
