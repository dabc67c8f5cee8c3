"""The whole of parallelism: a mesh of three axes, and rules from logical axes to mesh axes.

`data` splits the batch; `fsdp` splits the batch and the weights, which are gathered where they are used; `tensor`
splits attention heads and the FFN. Model code names logical axes only, through `Rules`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from tokenrec.config import Config, MeshConfig
from tokenrec.errors import InputError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. A misspelt logical axis is an AttributeError.

    >>> Rules()("batch", None, "heads")
    P(('data', 'fsdp'), None, 'tensor')
    """

    batch: tuple[str, ...] | str | None = ("data", "fsdp")
    embed: tuple[str, ...] | str | None = "fsdp"
    heads: tuple[str, ...] | str | None = "tensor"
    ffn: tuple[str, ...] | str | None = "tensor"
    rows: tuple[str, ...] | str | None = AXES  # of tables that no device holds whole

    def __call__(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical axes (None: not split).

        Raises:
          AttributeError: an axis that is not a field of this class.
          ValueError: two dimensions that would lie on one mesh axis.
        """
        parts = [None if axis is None else getattr(self, axis) for axis in axes]
        flat = [
            name
            for part in parts
            if part
            for name in ((part,) if isinstance(part, str) else part)
        ]
        if len(flat) != len(set(flat)):
            raise ValueError(
                f"axes {axes} put two dimensions on one mesh axis: {parts}; leave one of them out"
            )
        return PartitionSpec(*parts)


RULES = Rules()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Explicit mesh `(data, fsdp, tensor)` over all devices, or over those given.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    fixed = config.fsdp * config.tensor
    data = count // fixed if config.data == -1 else config.data
    if data * fixed != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        wrong = f"mesh.data={config.data} mesh.fsdp={config.fsdp} mesh.tensor={config.tensor}"
        raise InputError(
            f"{wrong} do not multiply to {count} devices; use sizes from {divisors}, or mesh.data=-1"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices
    )


# libtpu 0.0.50 aborts the process ("Color count is less than local dma pipe shard count") when it writes the small
# all-reduces of a data-parallel step over 16 chips or more with this emitter, on v5e, v6e and v5p alike.
_TPU_OPTIONS: dict[str, bool | str] = {"xla_tpu_enable_pincer_short_emitter": False}


def compiler_options(mesh: Mesh) -> dict[str, bool | str] | None:
    """What `jax.jit` must tell the compiler of the mesh's platform."""
    return _TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None


def with_batch_sharding[T](shapes: T, mesh: Mesh) -> T:
    """A tree of abstract arrays whose first dimension is the batch, as it lies on the mesh."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = RULES("batch", *[None] * (len(leaf.shape) - 1))
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
        )

    return jax.tree.map(place, shapes)


def check_divides_batch(mesh: Mesh, size: int, field: str) -> None:
    """Raises InputError if the devices cannot share a batch of `size` equally; `field` names the size."""
    shards = batch_shards(mesh)
    if size % shards:
        raise InputError(
            f"{field} = {size} is not a multiple of the {shards} devices that share a batch; make it one"
        )


def check_batch_sizes(config: Config, mesh: Mesh) -> None:
    """Raises InputError where the batches of a config do not split evenly over the mesh."""
    micro = config.data.batch_size // config.optim.accumulate
    check_divides_batch(mesh, micro, "data.batch_size / optim.accumulate")
    check_divides_batch(mesh, config.data.eval_batch_size, "data.eval_batch_size")


def local_batch_indices(mesh: Mesh, size: int, field: str) -> np.ndarray:
    """Which samples of a batch of `size` lie on this process's devices, ascending; `field` names the size.

    Processes that hold the same part of the batch, a `tensor` axis reaching over them, have the same samples.

    Raises:
      InputError: the devices cannot share the batch.
    """
    check_divides_batch(mesh, size, field)
    sharding = jax.NamedSharding(mesh, RULES("batch"))
    places = sharding.addressable_devices_indices_map((size,)).values()
    parts = {place[0].indices(size) for place in places if place is not None}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def to_devices[T](batch: T, mesh: Mesh) -> T:
    """The global batch from the samples `local_batch_indices` of it, split over the devices that share the batch."""

    def place(leaf: np.ndarray) -> jax.Array:
        sharding = jax.NamedSharding(mesh, RULES("batch", *[None] * (leaf.ndim - 1)))
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(place, batch)


def to_host(tree: Any) -> Any:
    """The whole of every array of a tree, on every process: NumPy arrays."""
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        everywhere = jax.NamedSharding(leaves[0].sharding.mesh, RULES())
        tree = jax.jit(_same, out_shardings=everywhere)(tree)
    return jax.device_get(tree)


def _same[T](tree: T) -> T:
    return tree


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the batch is split into; batch sizes must be multiples of it."""
    return int(np.prod([mesh.shape[axis] for axis in ("data", "fsdp")]))
