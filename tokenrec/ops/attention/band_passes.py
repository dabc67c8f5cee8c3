"""The two passes of sliding attention over a band, chunk by chunk.

A mask is a *bound*: infinite where a query sees a key and -1e30 where it does not. The
masked logit is the smaller of logit and bound. On a CPU, XLA's library of kernels then
takes logits, mask, softmax and the product with the values as one, and the logits are
not written to memory; a choice between two numbers (`where`) would cut it apart.

The backward pass forms the logits again (`tokenrec.ops.attention.softmax`).

Shape letters: B streams, H heads, G = B x H, Q queries, K keys, n tiles of the band, T
of a chunk, t queries of a tile, u keys of a span, h width of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.band_chunks import Chunk, over_chunks
from tokenrec.ops.attention.bands import BandPlan
from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.attention.pattern import is_visible
from tokenrec.ops.attention.platform import store_on_cpu
from tokenrec.ops.attention.softmax import logit_gradients


def band_mask(plan: BandPlan) -> jax.Array:
    """Compute the keys of its span that each query sees, `[n, t, u] bool`.

    Padding is not taken into account.
    """
    # The barriers keep XLA from folding a mask of the stream's length into the program,
    # and from comparing the attributes again for every stream and head.
    query, key = jax.lax.optimization_barrier(
        jax.tree.map(jnp.asarray, (plan.query, plan.key))
    )
    column = query.map(lambda field: field[:, :, None])
    line = key.map(lambda field: field[:, None, :])
    return jax.lax.optimization_barrier(is_visible(column, line, plan.window))


def _bound(seen: jax.Array) -> jax.Array:
    """The largest value of a logit: none where seen, and MASKED elsewhere; float32."""
    bound = jnp.where(seen, jnp.inf, MASKED).astype(jnp.float32)
    # Without the barrier XLA would choose again for every stream and head.
    return jax.lax.optimization_barrier(bound)


def _masked_logits(
    chunk: Chunk,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """Compute the masked logits of a chunk, `[G, T, t, u] float32`.

    A query that sees nothing, which only padding does, has equal logits and is not NaN.

    Args:
      chunk: the chunk.
      seen: `[n, t, u] bool`, of `band_mask`.
      q: `[G, T, t, h]`, scaled queries of the chunk.
      k: `[G, T, u, h]`, its keys.
      valid: `[B, K] bool`, keys that are not padding; None: all.
    """
    bounds = [_bound(chunk.seen_of(seen))]
    if valid is not None:
        of_heads = jnp.repeat(valid[:, :, None], chunk.heads, axis=2)
        bounds.append(_bound(chunk.spans_of(of_heads)[:, :, None, :]))
    logits = jnp.einsum("gnqd,gnkd->gnqk", q, k, preferred_element_type=jnp.float32)
    return functools.reduce(jnp.minimum, bounds, logits)


def _sum_over_queries(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Sum `[G, T, t, u]` times `[G, T, t, h]` over t, `[G, T, h, u]` float32."""
    x = store_on_cpu(jnp.swapaxes(x, 2, 3))
    return jnp.einsum("gndq,gnqk->gndk", x, weights, preferred_element_type=jnp.float32)


def band_forward(
    plan: BandPlan,
    seen: jax.Array,
    max_logits: int,
    keep_log_sum: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute attention over the band.

    Args:
      plan: the plan.
      seen: `[n, t, u] bool`, of `band_mask`.
      max_logits: logits in memory at a time, unless the smallest chunk holds more.
      keep_log_sum: also return what saves the backward pass a sum over the logits.
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      valid: `[B, K] bool`, keys that are not padding; None: all.

    Returns:
      The output `[B, Q, H, h]` in the dtype of `q`, and the log of the softmax's
      denominator `[B, Q, H] float32`, or None.
    """
    scale = q.shape[-1] ** -0.5

    def step(
        results: tuple[jax.Array, jax.Array | None], chunk: Chunk
    ) -> tuple[jax.Array, jax.Array | None]:
        out, log_sum = results
        k_spans, v_spans = chunk.spans_of(k), chunk.spans_of(v)
        logits = _masked_logits(chunk, seen, chunk.tiles_of(q) * scale, k_spans, valid)
        maximum = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - maximum)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weighted = jnp.einsum(
            "gnqk,gnkd->gnqd",
            weights.astype(v.dtype),
            v_spans,
            preferred_element_type=jnp.float32,
        )
        # Divided after the product: t x h quotients in place of t x u.
        out = chunk.put_tiles(out, (weighted / total).astype(out.dtype))
        if log_sum is not None:
            log_sum = chunk.put_tiles(log_sum, (maximum + jnp.log(total))[..., 0])
        return out, log_sum

    log_sum = jnp.zeros(q.shape[:3], jnp.float32) if keep_log_sum else None
    return over_chunks(plan, q, k, max_logits, step, (jnp.zeros_like(q), log_sum))


def band_backward(
    plan: BandPlan,
    seen: jax.Array,
    max_logits: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    out: jax.Array,
    log_sum: jax.Array | None,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v over the band.

    Args:
      plan: the plan.
      seen: `[n, t, u] bool`, of `band_mask`.
      max_logits: logits in memory at a time, as in `band_forward`.
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      valid: `[B, K] bool`, keys that are not padding; None: all.
      out: `[B, Q, H, h]`, from `band_forward`.
      log_sum: `[B, Q, H]`, from `band_forward`; None: form it again.
      gradient: `[B, Q, H, h]`, of the output.

    Returns:
      Gradients of q `[B, Q, H, h]`, k `[B, K, H, h]` and v `[B, K, H, h]`, float32.
    """
    scale = q.shape[-1] ** -0.5
    # Otherwise XLA might keep logits and masks of the forward pass for this one.
    seen, q, k, v = jax.lax.optimization_barrier((seen, q, k, v))

    def step(
        results: tuple[jax.Array, jax.Array, jax.Array], chunk: Chunk
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        d_q, d_k, d_v = results
        q_tiles, gradient_tiles = chunk.tiles_of(q) * scale, chunk.tiles_of(gradient)
        k_spans, v_spans = chunk.spans_of(k), chunk.spans_of(v)
        logits = _masked_logits(chunk, seen, q_tiles, k_spans, valid)
        if log_sum is None:
            # Weights that do not add up to 1, and gradients that make up for it: t x h
            # quotients in place of t x u.
            weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            gradient_tiles = (gradient_tiles / total).astype(gradient.dtype)
        else:
            weights = jnp.exp(logits - chunk.tiles_of(log_sum)[..., None])
        # D of the backward pass: one sum over h in place of one over all keys.
        output_dot_gradient = jnp.sum(
            chunk.tiles_of(out).astype(jnp.float32)
            * gradient_tiles.astype(jnp.float32),
            axis=-1,
        )
        d_logits = logit_gradients(
            weights, output_dot_gradient, v_spans, gradient_tiles
        )
        more_q = jnp.einsum(
            "gnqk,gnkd->gnqd", d_logits, k_spans, preferred_element_type=jnp.float32
        )
        more_k = _sum_over_queries(d_logits, q_tiles)
        more_v = _sum_over_queries(weights.astype(v.dtype), gradient_tiles)
        return (
            # The logits are those of scaled queries: d(q) = scale * d(scale * q).
            chunk.put_tiles(d_q, more_q * scale),
            chunk.add_spans(d_k, more_k),
            chunk.add_spans(d_v, more_v),
        )

    d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    return over_chunks(plan, q, k, max_logits, step, (d_q, d_k, d_v))
