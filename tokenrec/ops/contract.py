"""Activation times weight, with a gradient that CPUs and accelerators both like."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`einsum(equation, x, w)`, laid over the mesh by `spec`; `w` is cast to the dtype of `x`.

    The weight's gradient is written `x^T g`, not `(g^T x)^T` as the transpose of a product is: XLA on CPU transposes
    the first operand, and fused into a wide g that copy took half of SwiGLU's backward pass (210 ms against 124 ms for
    `[256, 79, 64]` and inner width 176, two cores).
    """
    return jnp.einsum(equation, x, w.astype(x.dtype), out_sharding=spec)


def _forward(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return contract(equation, x, w, spec), (x, w)


def _backward(
    equation: str, spec: PartitionSpec, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    inputs, output = equation.split("->")
    of_x, of_w = inputs.split(",")
    by_x = jnp.einsum(f"{output},{of_w}->{of_x}", g, w.astype(x.dtype), out_sharding=jax.typeof(x).sharding.spec)
    by_w = jnp.einsum(f"{of_x},{output}->{of_w}", x, g, out_sharding=jax.typeof(w).sharding.spec)
    return by_x, by_w.astype(w.dtype)


contract.defvjp(_forward, _backward)
