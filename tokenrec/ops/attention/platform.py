"""The platform that attention is compiled for, and what only a CPU needs."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def current_platform() -> str:
    """Name the platform of the mesh in use, or of this process if there is no mesh.

    The mesh may be that of a described pod, on which nothing runs.

    Returns:
      "cpu", "gpu" or "tpu", or JAX's name of another platform.
    """
    # A mesh of devices that only a topology describes has a platform, and this process
    # need not have it.
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def store_on_cpu(x: jax.Array) -> jax.Array:
    """Have XLA write an array to memory, row by row, before it is used on a CPU.

    There, its operations after a transpose would otherwise read across the rows, and a
    product of a transposed operand would not run in parallel. Elsewhere, XLA decides.
    """
    if current_platform() != "cpu":
        return x
    rows = Layout(tuple(range(x.ndim)))
    return jax.lax.optimization_barrier(with_layout_constraint(x, rows))
