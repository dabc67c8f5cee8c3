"""Parallelism: a mesh of four axes, and rules from logical axes to mesh axes.

    axis      splits
    data      the batch
    fsdp      the batch, and the weights, which are gathered where they are used
    context   the tokens of a stream, inside the backbone
    tensor    attention heads and the inner width of the FFN

The order is that of `jax.make_mesh`, whose last axes lie closest together in a torus:
`tensor` sums activations twice a layer, `context` gathers keys and values once a layer.

Model code names logical axes only (`batch`, `tokens`, `embed`, `heads`, `ffn`,
`rows`), through `RULES`. The mesh axes are explicit (`AxisType.Explicit`), so a wrong sharding is an error
when a function is traced, on eight virtual CPU devices as on a pod.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from tokenrec.config import Config, MeshConfig
from tokenrec.config.train_config import mesh_fields
from tokenrec.elastic import StepSplit, fit_axes, full_devices, split_step
from tokenrec.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis. A misspelt logical axis is an AttributeError.

    Attributes:
      batch: samples.
      tokens: tokens of a stream, between the embedding and the read-outs.
      embed: width of the model, in weights.
      heads: attention heads.
      ffn: inner width of the FFN.
      rows: rows of tables that are spread over all devices.

    >>> Rules()("batch", None, "heads")
    P(('data', 'fsdp'), None, 'tensor')
    """

    batch: tuple[str, ...] | str | None = ("data", "fsdp")
    tokens: tuple[str, ...] | str | None = "context"
    embed: tuple[str, ...] | str | None = "fsdp"
    heads: tuple[str, ...] | str | None = "tensor"
    ffn: tuple[str, ...] | str | None = "tensor"
    rows: tuple[str, ...] | str | None = AXES

    def __call__(self, *axes: str | None) -> PartitionSpec:
        """Partition of an array whose dimensions carry these logical axes.

        Args:
          axes: a logical axis per dimension; None for a dimension that is not split.

        Raises:
          AttributeError: an axis is not a field of this class.
          ValueError: two dimensions would be split over one mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        mesh_axes: list[str] = []
        for part in parts:
            if part is not None:
                mesh_axes.extend([part] if isinstance(part, str) else part)
        if len(mesh_axes) != len(set(mesh_axes)):
            raise ValueError(
                f"axes {axes} put two dimensions on one mesh axis: {parts}; leave one "
                "of them out"
            )
        return PartitionSpec(*parts)


RULES = Rules()


def on_mesh(spec: PartitionSpec) -> PartitionSpec | None:
    """The partition; None where no mesh is in use, as in an exported program."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def tokens_of(x: jax.Array) -> str | None:
    """Logical axis of dimension 1 of `[B, S, ...]`: "tokens" if it is split, or None."""
    return None if jax.typeof(x).sharding.spec[1] is None else "tokens"


def reshard[T](x: T, spec: PartitionSpec) -> T:
    """`jax.sharding.reshard`; the array itself where no mesh is in use."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, spec)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Build the explicit mesh `(data, fsdp, context, tensor)`.

    Args:
      config: sizes of the axes; `data=-1` takes the devices that the others leave.
      devices: devices of the mesh; all by default.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = mesh_shape(config, count)
    if math.prod(shape) != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise InputError(
            f"{mesh_fields(config)} do not multiply to {count} devices; use "
            f"sizes from {divisors}, or mesh.data=-1"
        )
    axis_types = (AxisType.Explicit,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Sizes of the axes, in the order of `AXES`.

    Args:
      config: sizes of the axes; `data=-1` takes the devices that the others leave.
      devices: number of devices.
    """
    fixed = config.fsdp * config.context * config.tensor
    data = devices // fixed if config.data == -1 else config.data
    return (data, config.fsdp, config.context, config.tensor)


def make_run_mesh(config: Config) -> Mesh:
    """Build the mesh of a run over all devices; an elastic run's is fitted to them.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    return make_mesh(fit_axes(config, jax.device_count()))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a batch is split into; batch sizes are multiples of it."""
    return int(np.prod([mesh.shape[axis] for axis in ("data", "fsdp")]))


def check_divides_batch(mesh: Mesh, size: int, field: str) -> None:
    """Check that a batch splits evenly over the mesh.

    Args:
      mesh: the mesh.
      size: samples of the batch.
      field: config field of the size, for the message.

    Raises:
      InputError: the size is not a multiple of the number of parts.
    """
    shards = batch_shards(mesh)
    if size % shards:
        raise InputError(
            f"{field} = {size} is not a multiple of the {shards} devices that share a "
            "batch; make it one"
        )


def split_batch(
    config: Config, mesh: Mesh, first: int | None = None, updates: int | None = None
) -> StepSplit:
    """Split the batch of a step for a mesh.

    Args:
      config: the run's config.
      mesh: the mesh.
      first: devices of the run's first start; None if they are not known.
      updates: updates of a step, to repeat one; None decides.

    Raises:
      InputError: the devices cannot share the batch of a step.
    """
    return split_step(
        config,
        devices=mesh.size,
        shards=batch_shards(mesh),
        full=full_devices(config, mesh.size, first),
        updates=updates,
    )


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Check that training and evaluation batches split evenly over the mesh.

    Raises:
      InputError: `data.batch_size / optim.accumulate` or `data.eval_batch_size` is not a
        multiple of the devices that share a batch.
    """
    micro_batch = config.data.batch_size // config.optim.accumulate
    check_divides_batch(mesh, micro_batch, "data.batch_size / optim.accumulate")
    check_divides_batch(mesh, config.data.eval_batch_size, "data.eval_batch_size")


def batch_sharding(mesh: Mesh, ndim: int) -> jax.NamedSharding:
    """Sharding of an array of `ndim` dimensions whose first one is the batch."""
    return jax.NamedSharding(mesh, RULES("batch", *[None] * (ndim - 1)))


def with_batch_sharding[T](shapes: T, mesh: Mesh) -> T:
    """Add the sharding of a batch to a tree of abstract arrays `[B, ...]`."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = batch_sharding(mesh, len(leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def local_batch_indices(mesh: Mesh, size: int, field: str) -> np.ndarray:
    """Indices of the samples of a batch that lie on this process's devices.

    Processes that hold the same part of the batch, because a `context` or `tensor` axis
    spans them, get the same indices.

    Args:
      mesh: the mesh.
      size: samples of the batch.
      field: config field of the size, for the message.

    Returns:
      `[n] int64`, ascending.

    Raises:
      InputError: the batch does not split evenly over the mesh.
    """
    check_divides_batch(mesh, size, field)
    sharding = batch_sharding(mesh, 1)
    slices = sharding.addressable_devices_indices_map((size,)).values()
    ranges = {index[0].indices(size) for index in slices if index is not None}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(ranges)])


def to_devices[T](batch: T, mesh: Mesh) -> T:
    """Place a batch on the mesh.

    Args:
      batch: a tree of NumPy arrays `[n, ...]`, the n samples of `local_batch_indices`.
      mesh: the mesh.

    Returns:
      The tree of global arrays `[B, ...]`, split over the devices that share a batch.
    """

    def place(leaf: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, leaf.ndim)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, batch)


def to_host(tree: Any) -> Any:
    """Fetch the whole of every array of a tree, on every process, as NumPy arrays."""
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        # Parts that lie on devices of other processes are gathered first.
        replicated = jax.NamedSharding(leaves[0].sharding.mesh, RULES())
        tree = jax.jit(_identity, out_shardings=replicated)(tree)
    return jax.device_get(tree)


def _identity[T](tree: T) -> T:
    return tree


def on_each_device(
    local: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
) -> Callable[..., Any]:
    """Map a function over the devices of the mesh in use.

    Args:
      local: a function of the arrays of one device; it may use collectives. Values that
        it leaves equal along an axis are not checked to be so.
      in_specs: partitions of its arguments, each for all arrays of an argument or tree.
      out_specs: partitions of its results.
    """

    def on_all(*arguments: Any) -> Any:
        arrays, tree = jax.tree.flatten(arguments)
        specs = jax.tree.leaves(jax.tree.broadcast(in_specs, arguments))
        # Arrays without an entry are made on the device: jaxlib 0.11.2 crashes as it
        # compiles a map that joins one to others.
        own = jax.sharding.get_abstract_mesh()
        empty = {
            place: (jax.NamedSharding(own, spec).shard_shape(array.shape), array.dtype)
            for place, (array, spec) in enumerate(zip(arrays, specs, strict=True))
            if not array.size
        }

        def of_held(*held: jax.Array) -> Any:
            rest = iter(held)
            leaves = [
                jnp.zeros(*empty[place]) if place in empty else next(rest)
                for place in range(len(arrays))
            ]
            return local(*jax.tree.unflatten(tree, leaves))

        held = [place for place in range(len(arrays)) if place not in empty]
        mapped = jax.shard_map(
            of_held,
            in_specs=tuple(specs[place] for place in held),
            out_specs=out_specs,
            check_vma=False,
        )
        return mapped(*(arrays[place] for place in held))

    return on_all
