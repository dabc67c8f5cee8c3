"""Activation times weight under FSDP: gather the weight, scatter its gradient.

`contract(equation, x, w, spec)` is `einsum(equation, x, w)` with a derivative of its
own. For y = x w, with g the gradient of y:

    d(x) = g w^T,    d(w) = x^T g

A weight that lies in shards over the mesh axis `fsdp` is gathered for the forward pass
and gathered again for the backward pass, so that between them only the shard is kept
(Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054, stage 3). d(w) is summed over the
devices while it is scattered to the shards.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.sharding import RULES, on_mesh, reshard


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """Multiply activations by a weight.

    The weight is cast to the dtype of `x` before it is gathered, which halves the
    traffic in bfloat16. Its gradient is summed in the weight's own dtype: float32, or
    bfloat16 with `optim.gradient_sums`, which rounds every partial sum.

    The gradient of the weight has the narrower of its operands first: `x^T g`, or
    `(g^T x)^T` where g is narrower. XLA on CPU transposes the first operand, and fused
    into a wide one that copy took half of SwiGLU's backward pass: 210 ms against 124 ms
    for `[256, 79, 64]` and inner width 176 on two cores.

    Args:
      equation: einsum of two operands, such as `bsd,dhk->bshk`.
      x: activations, `[B, ...]`.
      w: weight, float32 or the dtype of `x`, of which one dimension may lie in shards over `fsdp`.
      spec: how the result is laid out over the mesh.

    Returns:
      The product in the dtype of `x`.
    """
    gathered = gather_over_fsdp(w.astype(x.dtype))
    return jnp.einsum(equation, x, gathered, out_sharding=on_mesh(spec))


def gather_over_fsdp(w: jax.Array) -> jax.Array:
    """Gather a weight `[...]` along the dimension that lies in shards over `fsdp`.

    A differentiable all-gather; nothing happens where no dimension lies in shards, or
    no mesh is in use.
    """
    spec = jax.typeof(w).sharding.spec
    gathered = PartitionSpec(*(None if axis == RULES.embed else axis for axis in spec))
    return w if gathered == spec else reshard(w, gathered)


def _forward(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The einsum itself and not `contract`: a remat policy recognises a product, and
    # keeps its result, only where it is not wrapped in a function with a custom
    # derivative.
    gathered = gather_over_fsdp(w.astype(x.dtype))
    return jnp.einsum(equation, x, gathered, out_sharding=on_mesh(spec)), (x, w)


def _backward(
    equation: str,
    spec: PartitionSpec,
    residuals: tuple[jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    inputs, y_axes = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    d_x = jnp.einsum(
        f"{y_axes},{w_axes}->{x_axes}",
        g,
        gather_over_fsdp(w.astype(x.dtype)),
        out_sharding=on_mesh(jax.typeof(x).sharding.spec),
    )
    # Laid out as the shard at once. XLA for TPU then scatters the sum; asked for the
    # whole gradient first, it does not.
    first, second = (x_axes, x), (y_axes, g)
    if x.size > g.size:
        first, second = second, first
    d_w = jnp.einsum(
        f"{first[0]},{second[0]}->{w_axes}",
        first[1],
        second[1],
        out_sharding=on_mesh(jax.typeof(w).sharding.spec),
        preferred_element_type=w.dtype,
    )
    return d_x, d_w


contract.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract_again(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """`contract`, whose result `model.remat="dots"` computes again and does not keep.

    For products with few inputs, which cost less than the memory of their result.
    """
    return contract(equation, x, w, spec)


def _forward_again(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The function itself: the policy does not look for products inside of it.
    return contract_again(equation, x, w, spec), (x, w)


contract_again.defvjp(_forward_again, _backward)
