"""Meshes over described TPU pods, for compiling only.

libtpu describes the devices of a topology, such as "v5p:4x4x4", without any TPU: their
kind, their coordinates in the torus and the slice of each.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from tokenrec.config import MeshConfig
from tokenrec.config.train_config import mesh_fields
from tokenrec.errors import InputError, suggest
from tokenrec.sharding import AXES, make_mesh, mesh_shape

# Dimensions of each kind of pod, and sizes that can be rented. libtpu accepts more; a
# name that it refuses is compared with these.
DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_SIZES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        "1x1x1",
        "2x2x1",
        "2x2x2",
        "2x2x4",
        "2x4x4",
        "4x4x4",
        "4x4x8",
        "4x8x8",
        "8x8x8",
        "8x8x16",
        "8x16x16",
    ),
}
TOPOLOGIES = tuple(
    f"{kind}:{size}"
    for kind, dimensions in DIMENSIONS.items()
    for size in _SIZES[dimensions]
)


def topology_mesh(topology: str, mesh: MeshConfig, slices: int = 1) -> Mesh:
    """Make the mesh `(data, fsdp, context, tensor)` over the devices of a described pod.

    Args:
      topology: of each slice, as "v5p:4x4x4".
      mesh: as in a config; `data` goes across the slices first, then on inside each.
      slices: number of slices, joined by the data-centre network.

    Raises:
      InputError: an unknown topology, sizes that do not fit it, or no libtpu.
    """
    if (
        importlib.util.find_spec("libtpu") is None
        and "TPU_LIBRARY_PATH" not in os.environ
    ):
        raise InputError(
            f"topology='{topology}': compiling for a TPU needs libtpu; run "
            '`pip install ".[tpu]"` in the clone of tokenrec'
        )
    kind, _, size = topology.partition(":")
    if kind not in DIMENSIONS or not re.fullmatch(
        r"[1-9]\d*" + r"x[1-9]\d*" * (DIMENSIONS[kind] - 1), size
    ):
        raise InputError(
            f"topology='{topology}' is not known{suggest(topology, TOPOLOGIES)}"
        )
    _set_libtpu_variables()
    try:
        options = _description_options(size, slices)
        devices = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"topology='{topology}', refused by libtpu: {error}"
            f"{suggest(topology, TOPOLOGIES)}"
        ) from error
    if slices > 1:
        return _hybrid_mesh(mesh, devices, slices)
    try:
        return make_mesh(mesh, devices)
    # JAX lays an axis over whole axes of the torus only, by default.
    except NotImplementedError:
        return Mesh(
            _split_devices(mesh_shape(mesh, len(devices)), devices),
            AXES,
            axis_types=(AxisType.Explicit,) * len(AXES),
        )


def _description_options(size: str, slices: int) -> dict[str, int | list[int]]:
    """Options of libtpu that describe a topology of this size."""
    options: dict[str, int | list[int]] = {"num_slices": slices} if slices > 1 else {}
    sides = [int(side) for side in size.split("x")[:2]]
    if 1 in sides:
        # libtpu 0.0.48, that of JAX 0.11.2, supposes hosts of 2x2 chips for these pods
        # too, and refuses them; later ones do not. This can go with JAX 0.11.
        options["chips_per_host_bounds"] = [*(min(side, 2) for side in sides), 1]
    return options


def _set_libtpu_variables() -> None:
    """Set the variables that libtpu reads when it is first used."""
    # It would else ask a cloud for this machine's metadata, and lock out every other
    # process, as on a machine with a TPU it should.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without these it complains of a machine that is no TPU; what it compiles does not
    # depend on them.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _split_devices(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Lay devices out with axes that may be part of an axis of the torus."""
    try:
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    # Two devices a chip, which JAX takes for an axis of its own.
    except NotImplementedError:
        return np.array(devices).reshape(shape)


def _hybrid_mesh(mesh: MeshConfig, devices: list[jax.Device], slices: int) -> Mesh:
    """Mesh over several slices: `data` goes across them first."""
    data, *others = mesh_shape(mesh, len(devices))
    if data % slices or data * math.prod(others) != len(devices):
        inside_slice = len(devices) // slices
        raise InputError(
            f"{mesh_fields(mesh)} do not lie over {slices} slices of {inside_slice} "
            f"devices: data must be a multiple of {slices}, and fsdp x context x tensor "
            f"divide {inside_slice}; mesh.data=-1 takes what is left"
        )
    inside = (data // slices, *others)
    parts = []
    for number in range(slices):
        slice_devices = [d for d in devices if d.slice_index == number]
        parts.append(_split_devices(inside, slice_devices))
    axis_types = (AxisType.Explicit,) * len(AXES)
    return Mesh(np.concatenate(parts), AXES, axis_types=axis_types)
