"""Linear maps, norms and dropout that carry logical axes: the parts every module shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tokenrec.ops.contract import contract
from tokenrec.sharding import RULES


def weight(
    rngs: nnx.Rngs, shape: Sequence[int], *axes: str | None, inputs: int
) -> nnx.Param:
    """Float32, uniform with variance 1 / inputs, laid out over the mesh by its logical axes."""
    return nnx.Param(draw(rngs.params(), tuple(shape), inputs**-0.5, RULES(*axes)))


def constant(value: float, shape: Sequence[int], *axes: str | None) -> nnx.Param:
    """Float32 and everywhere `value` at the start."""
    return nnx.Param(
        jnp.full(tuple(shape), value, jnp.float32, out_sharding=RULES(*axes))
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(
    key: jax.Array, shape: tuple[int, ...], deviation: float, spec: PartitionSpec
) -> jax.Array:
    """Uniform numbers of mean 0, made in place on every device.

    A program of its own per shape: random numbers compile slowly, and layers share shapes.
    """
    limit = deviation * 3**0.5
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit, out_sharding=spec)


class Linear(nnx.Module):
    """`y = x W + b`, `[..., i] -> [..., o]`; every device holds all of W, unless `axis` names the logical axis of o."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axis: str | None = None,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.kernel = weight(rngs, (inputs, outputs), None, axis, inputs=inputs)
        self.bias = constant(0.0, (outputs,), None) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = "bst"[: x.ndim - 1]
        y = contract(
            f"{lead}i,io->{lead}o",
            x,
            self.kernel[...],
            PartitionSpec(*spec_of(x)[:-1], None),
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def rms_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis, in float32, back in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    return (
        wide
        * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    ).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int):
        self.scale = constant(1.0, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalize(x) * self.scale[...].astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries and scales the rest; `key=None` is evaluation. The rate is rounded to a multiple of 1/256.

    One random byte per entry costs a quarter of the random numbers that a float would.
    """
    dropped = round(rate * 256)
    if key is None or dropped == 0:
        return x
    bits = jax.random.bits(key, x.shape, jnp.uint8, out_sharding=spec_of(x))
    return jnp.where(bits >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def as_rows(x: jax.Array) -> jax.Array:
    """`[B, ..., d]` -> `[B, rows, d]`. Says where the result lies: JAX cannot tell the batch of a batch of one."""
    shape = (x.shape[0], x.size // (x.shape[0] * x.shape[-1]), x.shape[-1])
    return jnp.reshape(x, shape, out_sharding=RULES("batch", None, None))


def spec_of(x: jax.Array) -> PartitionSpec:
    return jax.typeof(x).sharding.spec


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))
