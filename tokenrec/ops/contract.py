"""Activation times weight: where FSDP gathers weights and scatters their gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.sharding import RULES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec) -> jax.Array:
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
    return w if _fsdp_dimension(spec) is None else jax.sharding.reshard(w, _without_fsdp(spec))


def _fsdp_dimension(spec: PartitionSpec) -> int | None:
    """The dimension in shards over `fsdp` alone, as those of weights are; that of a batch lies over `data` too."""
    return spec.index(RULES.embed) if RULES.embed in spec else None


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == RULES.embed else axis for axis in spec))


def _forward(
    equation: str, x: jax.Array, w: jax.Array, spec: PartitionSpec
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `contract`: a remat policy sees a product, and keeps its result, only where it stands open.
    return jnp.einsum(equation, x, gathered(w.astype(x.dtype)), out_sharding=spec), (x, w)


def _backward(
    equation: str, spec: PartitionSpec, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    inputs, output = equation.split("->")
    of_x, of_w = inputs.split(",")
    whole = gathered(w.astype(x.dtype))
    by_x = jnp.einsum(f"{output},{of_w}->{of_x}", g, whole, out_sharding=jax.typeof(x).sharding.spec)
    return by_x, _weight_gradient(f"{of_x},{output}->{of_w}", x, g, w)


def _weight_gradient(equation: str, x: jax.Array, g: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum(equation, x, g)`, summed over the devices and laid out as `w`.

    With one dimension in shards over `fsdp` the sum is a reduce-scatter by name: asked for the shards of a sum, XLA
    for TPU writes an all-reduce of the whole. The axes that do not split the weight then sum the shard.
    """
    spec, mesh = jax.typeof(w).sharding.spec, jax.sharding.get_abstract_mesh()
    dimension = _fsdp_dimension(spec)
    product = functools.partial(jnp.einsum, equation, preferred_element_type=w.dtype)
    if dimension is None or mesh.shape[RULES.embed] == 1:
        return product(x, g, out_sharding=spec)
    batch = RULES("batch")
    others = tuple(axis for axis in batch[0] if axis != RULES.embed and mesh.shape[axis] > 1)

    def local(x: jax.Array, g: jax.Array) -> jax.Array:
        shard = jax.lax.psum_scatter(product(x, g), RULES.embed, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(shard, others) if others else shard

    specs = tuple(jax.typeof(one).sharding.spec for one in (x, g))
    if any(one[0] != batch[0] for one in specs):
        raise AssertionError(f"{equation}: operands {specs} do not lie in parts of the batch {batch}")
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(x, g)


contract.defvjp(_forward, _backward)
