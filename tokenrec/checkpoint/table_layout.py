"""Read table arrays that a checkpoint holds in another layout than the model.

A table of width w is stored as `[rows, w]` or in packed lines, `[rows * w / 128, 128]`
(`tokenrec.ops.tables.packed`). Both are the same sequence of numbers. Runs of earlier
versions have `[rows, w]` only; and the layout of a model depends on whether its devices
can have equal numbers of lines.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from tokenrec.ops.tables.packed import LANES
from tokenrec.state import TrainState

# Mesh axes of `_loading_sharding`.
_PARTS, _COPIES = "parts", "copies"


def with_saved_layout(abstract: TrainState, saved: Any) -> TrainState:
    """Describe a state as it is to be loaded.

    Args:
      abstract: abstract arrays of the model; a leaf that is `...` is not read.
      saved: shapes of the arrays in the checkpoint, a tree of the same names, or None.

    Returns:
      `abstract`, with the shapes of the checkpoint for tables in another layout.
    """
    tables: dict[str, Any] = dict(abstract.tables)
    saved_tables = (saved or {}).get("tables", {})
    for name, leaf in tables.items():
        shape = tuple(saved_tables[name].shape) if name in saved_tables else ()
        if leaf is not ... and _is_other_layout(shape, leaf.shape):
            sharding = _loading_sharding(leaf.sharding, shape[0])
            tables[name] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    return dataclasses.replace(abstract, tables=tables)


def to_model_layout(loaded: TrainState, abstract: TrainState) -> TrainState:
    """Bring loaded tables into the layout of the model, device by device.

    Args:
      loaded: a state, loaded as `with_saved_layout` describes it.
      abstract: abstract arrays of the model.
    """
    tables: dict[str, Any] = dict(loaded.tables)
    for name, leaf in abstract.tables.items():
        if leaf is not ... and tables[name].shape != leaf.shape:
            with jax.set_mesh(tables[name].sharding.mesh):
                array = _relayout(tables[name], leaf.shape)
            # The same parts on the same devices, under the mesh of the model.
            parts = [shard.data for shard in array.addressable_shards]
            tables[name] = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, parts
            )
    return dataclasses.replace(loaded, tables=tables)


def _is_other_layout(saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array of one shape is one of the other in the other layout."""
    return (
        len(saved) == len(wanted) == 2
        and saved != wanted
        and LANES in (saved[1], wanted[1])
        and math.prod(saved) == math.prod(wanted)
    )


def _loading_sharding(
    sharding: jax.sharding.NamedSharding, length: int
) -> jax.sharding.NamedSharding:
    """Split the first dimension of an array over as many devices as divide it.

    Devices that are left hold copies of their neighbour's part, which has their own.
    """
    devices = sharding.mesh.devices.reshape(-1)
    parts = math.gcd(length, devices.size)
    grid = np.reshape(devices, (parts, devices.size // parts))
    mesh = Mesh(grid, (_PARTS, _COPIES), axis_types=(AxisType.Explicit,) * 2)
    return jax.NamedSharding(mesh, PartitionSpec(_PARTS))


@functools.partial(jax.jit, static_argnums=1)
def _relayout(array: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Reshape an array of `_loading_sharding`; each device keeps its own part."""
    own = shape[0] // jax.sharding.get_abstract_mesh().size

    def local(array: jax.Array) -> jax.Array:
        rows = array.reshape(-1, shape[1])
        start = jax.lax.axis_index(_COPIES) * own
        return jax.lax.dynamic_slice_in_dim(rows, start, own)

    both = PartitionSpec((_PARTS, _COPIES))
    return jax.shard_map(local, in_specs=PartitionSpec(_PARTS), out_specs=both)(array)
