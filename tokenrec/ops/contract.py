"""Activation times weight: where FSDP gathers weights and scatters their gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.sharding import RULES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """`einsum(equation, x, w)`, laid over the mesh by `spec`; `w` is cast to the dtype of `x`.

    A weight in shards over `fsdp` is gathered after the cast, forward and again backward, so that only the shard is
    kept in between. Its gradient is summed in its own dtype, float32, while it is scattered: a sum over hundreds of
    devices in bfloat16 would lose what the small terms say.

    The weight's gradient is written `x^T g`, not `(g^T x)^T` as the transpose of a product is: XLA on CPU transposes
    the first operand, and fused into a wide g that copy took half of SwiGLU's backward pass (210 ms against 124 ms for
    `[256, 79, 64]` and inner width 176, two cores).
    """
    return jnp.einsum(equation, x, gathered(w.astype(x.dtype)), out_sharding=spec)


def gathered(w: jax.Array) -> jax.Array:
    """The weight whole along the dimension that lies in shards over `fsdp`: an all-gather, differentiable."""
    spec = jax.typeof(w).sharding.spec
    whole = PartitionSpec(*(None if axis == RULES.embed else axis for axis in spec))
    return w if whole == spec else jax.sharding.reshard(w, whole)


def _forward(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `contract`: a remat policy sees a product, and keeps its result, only where it stands open.
    return jnp.einsum(equation, x, gathered(w.astype(x.dtype)), out_sharding=spec), (
        x,
        w,
    )


def _backward(
    equation: str, spec: PartitionSpec, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    inputs, output = equation.split("->")
    of_x, of_w = inputs.split(",")
    whole = gathered(w.astype(x.dtype))
    by_x = jnp.einsum(
        f"{output},{of_w}->{of_x}", g, whole, out_sharding=jax.typeof(x).sharding.spec
    )
    # Laid out as the shard at once: XLA for TPU then scatters the sum, and asked for the whole first it does not.
    by_w = jnp.einsum(
        f"{of_x},{output}->{of_w}",
        x,
        g,
        out_sharding=jax.typeof(w).sharding.spec,
        preferred_element_type=w.dtype,
    )
    return by_x, by_w


contract.defvjp(_forward, _backward)
