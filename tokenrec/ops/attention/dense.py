"""Reference attention: form all Q x K logits, mask them, and normalise.

    out = softmax(q k^T / sqrt(h) + mask) v,    mask_ij = 0 if see(i, j) else -1e30

`see` is the equation of `tokenrec.ops.attention.pattern`. Memory is quadratic in the
length. The other implementations are tested against this one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.pattern import Pattern

# Finite, so that a masked logit never makes `inf - inf`; far below any logit, so that
# its exponential underflows to exactly 0.
MASKED = -1e30


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
) -> jax.Array:
    """Compute attention through the whole matrix of logits.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, K] bool`, keys that are not padding; None: all.

    Returns:
      `[B, Q, H, h]` in the dtype of `v`.
    """
    visible, diagonal = pattern.visible(window), pattern.diagonal()
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    # The diagonal is added after the padding mask: a token of padding sees itself.
    if valid is None:
        seen = jnp.asarray(visible | diagonal)[None, None]
    else:
        seen = (jnp.asarray(visible) & valid[:, None, None, :]) | jnp.asarray(diagonal)
    weights = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
