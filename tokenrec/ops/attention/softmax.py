"""The backward pass of softmax attention on one tile of logits.

With scaled queries q, keys k, values v and the gradient g of the output:

    s_ij = q_i . k_j                       logits, masked
    L_i  = log sum_j exp(s_ij)             over all keys that query i sees
    p_ij = exp(s_ij - L_i)                 softmax weights
    o_i  = sum_j p_ij v_j                  output

the gradients are, writing d(x) for the gradient of x,

    d(p_ij) = g_i . v_j
    d(s_ij) = p_ij (d(p_ij) - D_i),   D_i = sum_j p_ij d(p_ij) = o_i . g_i
    d(q_i)  = sum_j d(s_ij) k_j
    d(k_j)  = sum_i d(s_ij) q_i
    d(v_j)  = sum_i p_ij g_i

Every sum runs over the keys or queries of a tile; the caller adds the tiles up. Only L
and o have to be kept from the forward pass: p is computed again from the logits, and
D_i needs the output alone (Dao et al. 2022, "FlashAttention", arXiv 2205.14135,
algorithm 4 and appendix B.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def logit_gradients(
    weights: jax.Array,
    output_dot_gradient: jax.Array,
    v: jax.Array,
    gradient: jax.Array,
) -> jax.Array:
    """Compute the gradients of the logits of one tile: d(s).

    Leading dimensions (`...`) are streams, heads and tiles; t counts the queries of a
    tile and u its keys.

    Args:
      weights: `[..., t, u] float32`: p.
      output_dot_gradient: `[..., t] float32`: D.
      v: `[..., u, h]`.
      gradient: `[..., t, h]`, of the output: g.

    Returns:
      `[..., t, u]` in the dtype of `v`, as operands of products are.
    """
    d_weights = jnp.einsum(
        "...qd,...kd->...qk", gradient, v, preferred_element_type=jnp.float32
    )
    return (weights * (d_weights - output_dot_gradient[..., None])).astype(v.dtype)


def tile_gradients(
    logits: jax.Array,
    log_sum: jax.Array,
    output_dot_gradient: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute what one tile adds to the gradients of q, k and v.

    Args:
      logits: `[..., t, u] float32`, masked: s.
      log_sum: `[..., t] float32`, log of the softmax's denominator over all keys: L.
      output_dot_gradient: `[..., t] float32`: D.
      q: `[..., t, h]`, scaled.
      k: `[..., u, h]`.
      v: `[..., u, h]`.
      gradient: `[..., t, h]`, of the output: g.

    Returns:
      d(q) `[..., t, h]`, d(k) `[..., u, h]` and d(v) `[..., u, h]`, float32.
    """
    weights = jnp.exp(logits - log_sum[..., None])
    # Products take operands in the dtype of q, as the forward pass does, and add up in
    # float32.
    d_logits = logit_gradients(weights, output_dot_gradient, v, gradient)
    d_v = jnp.einsum(
        "...qk,...qd->...kd",
        weights.astype(q.dtype),
        gradient,
        preferred_element_type=jnp.float32,
    )
    d_k = jnp.einsum(
        "...qk,...qd->...kd", d_logits, q, preferred_element_type=jnp.float32
    )
    d_q = jnp.einsum(
        "...qk,...kd->...qd", d_logits, k, preferred_element_type=jnp.float32
    )
    return d_q, d_k, d_v
