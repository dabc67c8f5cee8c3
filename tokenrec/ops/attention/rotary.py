"""Rotary position embedding (RoPE; Su et al., 2021), on halves of a head."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """`cos, sin: [B, S, 1, h / 2] float32`, shared by all layers and heads."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, head_width: int, base: float) -> Rotation:
    """Angles `p * base^(-2 i / h)` for `positions: [B, S]` and i in [0, h / 2)."""
    frequencies = base ** (
        -jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    )
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates `x: [B, S, H, h]`; the pair of element i is element i + h / 2. Keeps the dtype, computes in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1
    )
    return turned.astype(x.dtype)
