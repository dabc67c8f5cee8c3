"""Rotary position embedding (RoPE): rotate queries and keys by their positions.

Su et al. 2021, "RoFormer" (arXiv 2104.09864, section 3.2). For a head of even width h,
RoPE position p and i in [0, h / 2):

    theta_i = p * base^(-2 i / h)
    (x_i, x_{i + h/2}) <- (x_i cos theta_i - x_{i + h/2} sin theta_i,
                           x_{i + h/2} cos theta_i + x_i sin theta_i)

The logit of a rotated query and a rotated key depends on the difference of their
positions only. The two elements of a pair lie h / 2 apart ("rotate half", as in
GPT-NeoX and Llama), not next to each other as in the paper; that is a permutation of
the head's width, which learned projections absorb.

The RoPE position of a token is not its position in the stream: it counts valid events,
and several tokens of one event share it (docs/methods.md section 3, "Positions").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from tokenrec.ops.attention.platform import current_platform

_EXCHANGE_PRECISION = jax.lax.Precision.HIGHEST


class Rotation(NamedTuple):
    """Cosines and sines of the angles; all layers and heads share them.

    Attributes:
      cos: `[B, S, 1, h] float32`, cos theta_i at i and at i + h / 2.
      sin: `[B, S, 1, h] float32`, -sin theta_i at i and sin theta_i at i + h / 2.
    """

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, head_width: int, base: float) -> Rotation:
    """Compute the angles `p * base^(-2 i / h)` of every token.

    Args:
      positions: `[B, S]`, RoPE position p of each token.
      head_width: h, even.
      base: base of the geometric series of frequencies, `model.rope_base`.

    Returns:
      Cosines and signed sines, `[B, S, 1, h] float32` each.
    """
    frequencies = base ** (
        -jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    )
    return rotation_by(positions, frequencies)


def rotation_by(positions: jax.Array, frequencies: jax.Array | np.ndarray) -> Rotation:
    """Compute the angles `p * frequency_i` of every token.

    Args:
      positions: `[B, S]`, RoPE position p of each token; or `[B, C, K]`.
      frequencies: `[h / 2] float32`.

    Returns:
      Cosines and signed sines, `[B, S, 1, h] float32` each; or `[B, C, K, 1, h]`.
    """
    # In float32: bfloat16 cannot tell neighbouring positions above 256 apart.
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Without the barrier XLA fuses cosines and sines into every rotation of every layer,
    # and computes them anew in each.
    return Rotation(
        *jax.lax.optimization_barrier(
            (
                jnp.concatenate([cos, cos], axis=-1),
                jnp.concatenate([-sin, sin], axis=-1),
            )
        )
    )


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate queries or keys.

    Args:
      x: `[B, S, H, h]`.
      by: the angles of the S tokens.

    Returns:
      `[B, S, H, h]` in the dtype of `x`, computed in float32.
    """
    on_tpu = current_platform() == "tpu"
    return rotate_by_product(x, by) if on_tpu else rotate_halves(x, by)


def rotate_halves(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate as `rotate` does, half by half."""
    half = x.shape[-1] // 2
    cos, sin = by.cos[..., :half], by.sin[..., half:]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)


@jax.custom_vjp
def rotate_by_product(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate as `rotate` does, with the halves exchanged by a matrix product.

    Half a head does not fill the lanes of a TPU: slices of it cost as much as the
    whole, and are moved across the lanes afterwards. The matrix unit exchanges them in
    passing. Each of its sums has one term that is not zero, so that it is exact: in
    bfloat16 in one pass, in float32 at the highest precision.

    The angles are constants: no gradient goes to them. The gradient of `x` needs nothing
    else, so that no pass keeps the exchanged halves.
    """
    width = x.shape[-1]
    exchange = np.roll(np.eye(width, dtype=np.float32), width // 2, axis=1)
    swapped = jnp.einsum(
        "...i,ij->...j",
        x,
        exchange.astype(x.dtype),
        precision=_EXCHANGE_PRECISION,
        preferred_element_type=jnp.float32,
    )
    return (x.astype(jnp.float32) * by.cos + swapped * by.sin).astype(x.dtype)


def _forward(x: jax.Array, by: Rotation) -> tuple[jax.Array, Rotation]:
    return rotate_by_product(x, by), by


def _backward(by: Rotation, gradient: jax.Array) -> tuple[jax.Array, Rotation]:
    # The transpose of a rotation turns back.
    back = Rotation(by.cos, -by.sin)
    return rotate_by_product(gradient, back), jax.tree.map(jnp.zeros_like, by)


rotate_by_product.defvjp(_forward, _backward)


def is_exchange(primitive: Primitive, params: Mapping[str, Any]) -> bool:
    """Whether an equation of a traced model is the product of `rotate_by_product`.

    It moves numbers: its FLOPs are none of the model's. No other product of a model has
    its precision.
    """
    precision = params.get("precision")
    return primitive.name == "dot_general" and precision == (_EXCHANGE_PRECISION,) * 2
