"""Which mesh for a pod: every shape ranked by a formula, the best ones compiled.

The formula knows three things of a shape: the matrix products, split over all devices; the traffic that the shape
causes, on the links that the pod has for it; and whether state and activations fit. It ranks; what `compile` says of
a shape is what counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, MeshConfig
from tokenrec.config.backbones import reads_event_ages, supports_tensor_parallelism
from tokenrec.config.validate import validate
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.mesh_check import sharded_sizes
from tokenrec.planner.compile import compile_config
from tokenrec.planner.flops import step_work
from tokenrec.planner.hlo import Collective
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.roofline import chip, network_seconds
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import AXES
from tokenrec.state import TrainState, abstract_state, build_model

COMPILED = 5
# FLOPs of a step over the model's: a block that is computed again is a fourth pass beside three.
_STEP_OVER_MODEL = {"none": 1.0, "dots": 1.0, "full": 4 / 3}
# Gathers of a sharded weight: forward, backward, and once more in the pass that computes a block again.
_GATHERS = {"none": 2, "dots": 2, "full": 3}
# Sums over `tensor` of an activation: after attention and after the FFN, and the gradients of both inputs.
_TENSOR_SUMS = {"none": 4, "dots": 4, "full": 6}


class Prediction(NamedTuple):
    """By formula, on one device: seconds of products and of traffic, bytes held, and whether they fit."""

    mesh: MeshConfig
    compute_seconds: float
    network_seconds: float
    bytes: int
    fits: bool

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.network_seconds)


def compile_best(
    config: Config,
    topology: str,
    slices: int = 1,
    *,
    count: int = COMPILED,
    schema: Schema | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """`compile_config` of the `count` best meshes by formula, fastest first, those that do not fit last.

    The batch is the config's on every mesh; `mesh` of the config does not matter. Each result has also
    `predicted_seconds` and `predicted_bytes`. `say` gets a line before each compilation.

    Raises:
      InputError: as `compile_config`; or no mesh splits heads, FFN, width and batch.
    """
    predictions = rank(config, topology, slices, schema)
    say(
        f"{len(predictions)} meshes ranked; compiling {min(count, len(predictions))}, each takes a minute or more"
    )
    results = []
    for one in predictions[:count]:
        say(
            f"{_named(one.mesh)}: {1e3 * one.seconds:.2f} ms, {one.bytes / 2**30:.2f} GiB a device by formula"
        )
        result = compile_config(config, topology, slices, one.mesh, schema)
        results.append(
            result | {"predicted_seconds": one.seconds, "predicted_bytes": one.bytes}
        )
    return sorted(
        results,
        key=lambda result: (not result["fits"], result["roofline_seconds"] or math.inf),
    )


def rank(
    config: Config, topology: str, slices: int = 1, schema: Schema | None = None
) -> list[Prediction]:
    """Every mesh of the pod that splits the model, best first; nothing is compiled."""
    config = validate(config)
    schema = (resolve_schema(config)[0] if schema is None else schema).without(
        config.data.exclude
    )
    first = topology_mesh(topology, MeshConfig(), slices)
    model = build_model(config, schema, task_names(schema, config.data))
    shapes = list(mesh_shapes(config, first.size, slices))
    if not shapes:
        raise InputError(
            f"no mesh of {first.size} devices splits model.heads={config.model.heads}, model.width="
            f"{config.model.width}, data.batch_size={config.data.batch_size} and data.eval_batch_size="
            f"{config.data.eval_batch_size}; make the batches multiples of the devices"
        )
    over = topology_mesh(topology, shapes[0], slices)
    with jax.set_mesh(over):
        state = abstract_state(model)
    ages = reads_event_ages(config.model)
    batch = batch_shapes(
        schema, config.data, batch_size=config.data.batch_size, ages=ages
    )[config.data.events]
    flops = step_work(model, over, batch)[0].model_flops
    tokens = config.data.batch_size * model.layout(config.data.events).length
    found = [
        predict(config, state, flops, tokens, topology_mesh(topology, shape, slices))
        for shape in shapes
    ]
    return sorted(
        found, key=lambda one: (not one.fits, one.seconds, one.network_seconds)
    )


def mesh_shapes(config: Config, devices: int, slices: int = 1) -> Iterator[MeshConfig]:
    """Meshes of so many devices whose axes divide what they split: batches, width, heads and FFN.

    >>> from tokenrec.config import DataConfig, ModelConfig
    >>> small = Config(data=DataConfig(batch_size=4, eval_batch_size=4), model=ModelConfig(width=64, heads=2))
    >>> [(m.data, m.fsdp, m.tensor) for m in mesh_shapes(small, 4)]
    [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2)]
    """
    model, micro = config.model, config.data.batch_size // config.optim.accumulate
    for data in (
        n for n in range(devices, 0, -1) if devices % n == 0 and n % slices == 0
    ):
        for fsdp in (
            n for n in range(devices // data, 0, -1) if (devices // data) % n == 0
        ):
            tensor = devices // data // fsdp
            splits = (
                (micro, data * fsdp),
                (config.data.eval_batch_size, data * fsdp),
                *(
                    (size, {"fsdp": fsdp, "tensor": tensor}[axis])
                    for _, size, axis in sharded_sizes(model)
                ),
            )
            if tensor > 1 and not supports_tensor_parallelism(model):
                continue
            if all(size % parts == 0 for size, parts in splits):
                yield MeshConfig(data, fsdp, tensor)


def predict(
    config: Config, state: TrainState, model_flops: float, tokens: int, mesh: Mesh
) -> Prediction:
    """The formula. `model_flops` and `tokens` are those of the whole batch."""
    of = chip(mesh.devices.flat[0].device_kind)
    flops = model_flops * _STEP_OVER_MODEL[config.model.remat] / mesh.size
    network = network_seconds(
        expected_collectives(config, state, tokens, mesh), list(mesh.devices.flat), of
    )
    weights = _bytes(state.params, mesh)
    held = weights * 2 + _bytes(
        (state.tables, state.opt_state), mesh
    )  # twice: the gradients
    held += activation_bytes(
        config, tokens // config.optim.accumulate, dict(mesh.shape)
    )
    shape = MeshConfig(*(mesh.shape[axis] for axis in AXES))
    return Prediction(shape, flops / of.flops, network, held, held <= of.hbm_bytes)


def expected_collectives(
    config: Config, state: TrainState, tokens: int, mesh: Mesh
) -> list[Collective]:
    """What a step must send: weights over `fsdp`, gradients over `fsdp` and `data`, activations over `tensor`."""
    sizes, itemsize = mesh.shape, jnp.dtype(config.model.dtype).itemsize
    gathered = reduced = 0
    for leaf in state.params.values():
        names = _axes(leaf)
        whole = leaf.size // (sizes["tensor"] if "tensor" in names else 1)
        gathered += whole * itemsize if "fsdp" in names else 0
        reduced += (
            whole * leaf.dtype.itemsize // (sizes["fsdp"] if "fsdp" in names else 1)
        )
    activation = (
        tokens // (sizes["data"] * sizes["fsdp"]) * config.model.width * itemsize
    )
    passes, remat = config.optim.accumulate, config.model.remat
    wanted = (
        ("all-gather", gathered, "fsdp", _GATHERS[remat] * passes),
        ("reduce-scatter", gathered, "fsdp", passes),
        ("all-reduce", reduced, "data", 1),
        ("all-reduce", activation, "tensor", _TENSOR_SUMS[remat] * config.model.layers),
    )
    return [
        Collective(kind, float(size), _groups(mesh, axis), trips)
        for kind, size, axis, trips in wanted
        if sizes[axis] > 1
    ]


def activation_bytes(config: Config, tokens: int, sizes: dict[str, int]) -> int:
    """What the backward pass finds kept of all blocks, and the inside of one: counted in rows of a block's arrays."""
    model, tensor = config.model, sizes["tensor"]
    inside = 8 * model.width + (6 * model.width + 4 * ffn_width(model)) // tensor
    kept = {
        "full": model.width,
        "dots": 3 * model.width + (4 * model.width + 2 * ffn_width(model)) // tensor,
        "none": inside,
    }[model.remat]
    local = tokens // (sizes["data"] * sizes["fsdp"])
    return local * (model.layers * kept + inside) * jnp.dtype(model.dtype).itemsize


def _bytes(tree: Any, mesh: Mesh) -> int:
    """Of one device, by the axes of the leaves' shardings and the sizes of this mesh."""
    return sum(
        leaf.size
        * leaf.dtype.itemsize
        // math.prod(mesh.shape[axis] for axis in _axes(leaf))
        for leaf in jax.tree.leaves(tree)
    )


def _axes(leaf: Any) -> set[str]:
    return {
        name
        for part in leaf.sharding.spec
        if part
        for name in ((part,) if isinstance(part, str) else part)
    }


def _groups(mesh: Mesh, axis: str) -> tuple[tuple[int, ...], ...]:
    places = np.moveaxis(
        np.arange(mesh.size).reshape(mesh.devices.shape), AXES.index(axis), -1
    )
    return tuple(
        tuple(map(int, group)) for group in places.reshape(-1, mesh.shape[axis])
    )


def _named(mesh: MeshConfig) -> str:
    return ",".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items())
