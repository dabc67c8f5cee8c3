"""Linear maps, norms and dropout that carry logical axes: the parts all modules share.

    Linear      y = x W + b
    RMSNorm     y = s * x / sqrt(mean(x^2) + epsilon)       Zhang and Sennrich 2019,
                                                            arXiv 1910.07467
    dropout     y = m x / (1 - rate),  m = 0 with probability rate, else 1

Weights are float32 and are cast to the dtype of the activations where they are used.
Their logical axes (`tokenrec.sharding.Rules`) say how they lie over the mesh.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tokenrec.ops.contract import contract
from tokenrec.sharding import RULES, on_mesh


def weight(
    rngs: nnx.Rngs, shape: Sequence[int], *axes: str | None, inputs: int
) -> nnx.Param:
    """Make a float32 weight, uniform with mean 0 and variance `1 / inputs`.

    Args:
      rngs: source of random numbers; its `params` stream is read.
      shape: shape of the weight.
      *axes: logical axis of each dimension, None for one that is not split.
      inputs: number of inputs that one output sums over.
    """
    key = rngs.params()
    return nnx.Param(draw_uniform(key, tuple(shape), inputs**-0.5, RULES(*axes)))


def constant(value: float, shape: Sequence[int], *axes: str | None) -> nnx.Param:
    """Make a float32 parameter that starts as `value` everywhere.

    Args:
      value: the initial value.
      shape: shape of the parameter.
      *axes: logical axis of each dimension, None for one that is not split.
    """
    return nnx.Param(
        jnp.full(tuple(shape), value, jnp.float32, out_sharding=on_mesh(RULES(*axes)))
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw_uniform(
    key: jax.Array, shape: tuple[int, ...], deviation: float, spec: PartitionSpec
) -> jax.Array:
    """Draw uniform float32 numbers of mean 0, made in place on every device.

    Compiled on its own, once per shape: programs with random numbers compile slowly,
    and layers share shapes.

    Args:
      key: PRNG key.
      shape: shape `[...]` of the result.
      deviation: standard deviation.
      spec: how the result is laid out over the mesh.
    """
    # A uniform number in [-a, a] has variance a^2 / 3.
    limit = deviation * 3**0.5
    return jax.random.uniform(
        key, shape, jnp.float32, -limit, limit, out_sharding=on_mesh(spec)
    )


class Linear(nnx.Module):
    """A linear map `y = x W + b` of the last axis, `[..., i] -> [..., o]`.

    Args:
      inputs: i.
      outputs: o.
      axis: logical axis of o, over which W is split; None: every device holds all of W.
      bias: whether b is added.
      rngs: source of random numbers for W.
    """

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
        """Map `x: [..., i]`, of two to four dimensions."""
        lead = "bst"[: x.ndim - 1]
        y = contract(
            f"{lead}i,io->{lead}o",
            x,
            self.kernel[...],
            PartitionSpec(*spec_of(x)[:-1], None),
        )
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def rms_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Divide by the root mean square of the last axis.

    Args:
      x: `[..., d]`.
      epsilon: added to the mean square.

    Returns:
      `[..., d]` in the dtype of `x`, computed in float32.
    """
    wide = x.astype(jnp.float32)
    return (
        wide
        * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    ).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale that starts at 1.

    Args:
      width: d, size of the last axis.
    """

    def __init__(self, width: int):
        self.scale = constant(1.0, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x: [..., d]`."""
        return rms_normalize(x) * self.scale[...].astype(x.dtype)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Set random entries to zero, and scale the others to keep the mean.

    Every sample draws from a key of its own, so that a sample's draws do not depend on
    how the batch is split, over devices or into micro-batches. The rate is rounded to a
    multiple of 1/256: one random byte per entry takes a quarter of the random numbers
    that a float would.

    Args:
      x: `[B, ...]`.
      rate: probability that an entry is set to zero, in [0, 1).
      keys: `[B]`, PRNG keys; None in evaluation, which changes nothing.

    Returns:
      `[B, ...]` in the dtype of `x`.
    """
    dropped = round(rate * 256)
    if keys is None or dropped == 0:
        return x
    # Comparing bytes with an integer: P(byte < dropped) = dropped / 256.
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint8))(keys)
    return jnp.where(bits >= dropped, x * (256 / (256 - dropped)), 0).astype(x.dtype)


def flatten_tokens(x: jax.Array) -> jax.Array:
    """Join the middle axes, `[B, ..., d] -> [B, N, d]`."""
    # Not the size over the others: d is 0 for codes of one level without their last.
    shape = (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    # JAX cannot tell by itself over which axis a batch of one is split.
    return jnp.reshape(x, shape, out_sharding=on_mesh(RULES("batch", None, None)))


def spec_of(x: jax.Array) -> PartitionSpec:
    """Partition of an array `[...]` on the mesh in use."""
    return jax.typeof(x).sharding.spec


def sample_keys(key: jax.Array, samples: int) -> jax.Array:
    """Make a PRNG key for each sample of a batch, `[B]`, from the key of a step."""
    numbers = jnp.arange(samples, out_sharding=RULES("batch"))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def split_keys(keys: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Split PRNG keys `[B]`; without keys, which is evaluation, every part is None."""
    if keys is None:
        return [None] * count
    return list(jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys))
