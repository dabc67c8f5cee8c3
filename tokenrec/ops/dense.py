"""Reference attention: the whole Q x K matrix, masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Finite, so that a masked logit never makes `inf - inf`; far below any logit.
MASKED = -1e30


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: np.ndarray, diagonal: np.ndarray, valid: jax.Array | None
) -> jax.Array:
    """`softmax(q k^T / sqrt(h) + mask) v`; shapes as in `attention`, and `visible, diagonal: [Q, K] bool`."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32)
    if valid is None:
        see = jnp.asarray(visible | diagonal)[None, None]
    else:
        see = (jnp.asarray(visible) & valid[:, None, None, :]) | jnp.asarray(diagonal)
    weights = jax.nn.softmax(jnp.where(see, logits, MASKED), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
