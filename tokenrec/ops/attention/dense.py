"""Reference attention: the whole Q x K matrix, masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.pattern import Pattern

# Finite, so that a masked logit never makes `inf - inf`; far below any logit.
MASKED = -1e30


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
) -> jax.Array:
    """`softmax(q k^T / sqrt(h) + mask) v`; arguments as in `attention`."""
    visible, diagonal = pattern.visible(window), pattern.diagonal()
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    if valid is None:
        see = jnp.asarray(visible | diagonal)[None, None]
    else:
        see = (jnp.asarray(visible) & valid[:, None, None, :]) | jnp.asarray(diagonal)
    weights = jax.nn.softmax(jnp.where(see, logits, MASKED), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
