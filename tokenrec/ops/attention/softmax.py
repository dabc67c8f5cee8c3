"""The backward pass of softmax attention from its logits, for any tiling."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pull_back(
    logits: jax.Array,
    log_sum: jax.Array,
    inner: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v by the keys of a tile, float32 (FlashAttention, Dao et al. 2022, algorithm 4).

    Args:
      logits: `[..., q, k] float32`, masked; log_sum: `[..., q]`, log of the softmax's denominator over all keys.
      inner: `[..., q]`, sum of output x gradient; q, gradient: `[..., q, d]`; k, v: `[..., k, d]`.
    """
    weights = jnp.exp(logits - log_sum[..., None])
    by_weight = jnp.einsum(
        "...qd,...kd->...qk", gradient, v, preferred_element_type=jnp.float32
    )
    by_logit = (weights * (by_weight - inner[..., None])).astype(q.dtype)
    by_v = jnp.einsum(
        "...qk,...qd->...kd",
        weights.astype(q.dtype),
        gradient,
        preferred_element_type=jnp.float32,
    )
    by_k = jnp.einsum(
        "...qk,...qd->...kd", by_logit, q, preferred_element_type=jnp.float32
    )
    by_q = jnp.einsum(
        "...qk,...kd->...qd", by_logit, k, preferred_element_type=jnp.float32
    )
    return by_q, by_k, by_v
