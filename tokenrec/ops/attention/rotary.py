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

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosines and sines of the angles; all layers and heads share them.

    Attributes:
      cos: `[B, S, 1, h / 2] float32`.
      sin: `[B, S, 1, h / 2] float32`.
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
      Cosines and sines, `[B, S, 1, h / 2] float32` each.
    """
    # In float32: bfloat16 cannot tell neighbouring positions above 256 apart.
    frequencies = base ** (
        -jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    )
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # Without the barrier XLA fuses cosines and sines into every rotation of every layer,
    # and computes them anew in each.
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate queries or keys.

    Args:
      x: `[B, S, H, h]`.
      by: the angles of the S tokens.

    Returns:
      `[B, S, H, h]` in the dtype of `x`, computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1
    )
    return rotated.astype(x.dtype)
