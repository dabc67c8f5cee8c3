"""Attention that computes visible tiles and skips the others, in XLA alone, anywhere.

How it works. A static plan, found at trace time from the `Pattern`, says which tiles of
logits hold a visible pair of tokens:

- a sliding layer is a *band*: every tile of queries meets one span of keys, and spans
  advance by a fixed stride (`tokenrec.ops.attention.bands`, computed in chunks by
  `band_passes`);
- any other pattern is a *list of key tiles* for every tile of queries
  (`tokenrec.ops.attention.tiles`).

Both keep the output o and the logarithm L of the softmax's denominator from the forward
pass, and form the weights `exp(s - L)` again in the backward pass, so that memory is
linear in the length (Dao et al. 2022, "FlashAttention", arXiv 2205.14135). A band on a
CPU keeps o alone. This module chooses the plan, takes groups of streams, and ties the
two passes together with a custom derivative.

Shape letters: B streams, H heads, G = B x H, Q queries, K keys, h width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tokenrec.ops.attention.band_chunks import stream_logits
from tokenrec.ops.attention.band_passes import band_backward, band_forward, band_mask
from tokenrec.ops.attention.bands import BandPlan, plan_band
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern
from tokenrec.ops.attention.platform import current_platform
from tokenrec.ops.attention.tiles import (
    TilePlan,
    plan_tiles,
    tile_backward,
    tile_forward,
)

# Up to this many logits a head, one masked product is as fast as any order of smaller
# ones, and simpler: 128 x 128 with a window, and 512 x 512 without one, where skipping
# saves half at most (benchmarks/results/attention.md).
MAX_DENSE_LOGITS_SLIDING = 128 * 128
MAX_DENSE_LOGITS_FULL = 512 * 512
# Share of the dense logits that a plan may compute; above it, skipping does not pay.
MAX_SHARE_SLIDING = 0.6
MAX_SHARE_FULL = 0.75
# Logits in memory at a time, over the streams and heads that are computed together. One
# stream and head may hold more.
GROUP_LOGITS = 1 << 20


def _make_plan(pattern: Pattern, window: int | None) -> BandPlan | TilePlan:
    """Plan a band for a sliding layer, or tiles where there is no band worth having."""
    tiles = plan_tiles(pattern, window)
    band = None if window is None else plan_band(pattern, window)
    # A band runs as one batched product, tiles as a loop. A band of twice the logits is
    # mostly empty.
    return tiles if band is None or band.logits > 2 * tiles.logits else band


def inefficient_reason(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why `dense` is the better choice for these shapes, or return "".

    Args:
      q: `[B, Q, H, h]`; only its shape is read.
      k: `[B, K, H, h]`; only its shape is read.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
    """
    queries, keys = q.shape[1], k.shape[1]
    dense_logits = queries * keys
    if window is None:
        max_dense, max_share = MAX_DENSE_LOGITS_FULL, MAX_SHARE_FULL
    else:
        max_dense, max_share = MAX_DENSE_LOGITS_SLIDING, MAX_SHARE_SLIDING
    if dense_logits <= max_dense:
        return (
            f"{queries} x {keys} tokens are {dense_logits} logits a head; "
            f"up to {max_dense}, dense is as fast"
        )
    planned = _make_plan(pattern, window).logits
    if planned > max_share * dense_logits:
        return (
            f"its tiles hold {planned} of the {dense_logits} logits of a head; "
            "too few to skip"
        )
    return ""


def _merge_heads(x: jax.Array) -> jax.Array:
    """`[B, S, H, h]` -> `[G, S, h]`."""
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])


def _split_heads(x: jax.Array, like: jax.Array) -> jax.Array:
    """`[G, S, h]` -> `[B, S, H, h]` in the dtype of `like: [B, _, H, h]`."""
    batch, _, heads, width = like.shape
    return jnp.moveaxis(x.reshape(batch, heads, -1, width), 1, 2).astype(like.dtype)


def _map_groups(
    compute: Callable[..., Any],
    logits_each: int,
    arrays: tuple[jax.Array | None, ...],
) -> Any:
    """Call `compute(*arrays)` for one group of streams and heads after another.

    A group is as large as divides G and keeps within `GROUP_LOGITS` logits.

    Args:
      compute: a function of arrays `[group, ...]`; so are its results.
      logits_each: logits that one stream and head has in memory.
      arrays: `[G, ...]` each, or None.

    Returns:
      The results, `[G, ...]`.
    """
    total = jax.tree.leaves(arrays)[0].shape[0]
    if not isinstance(total, int):
        # The symbolic batch of an exported program cannot be divided into groups.
        return compute(*arrays)
    # The largest divisor of G that fits, so that all groups have one shape.
    group = 1
    for size in range(1, total + 1):
        if total % size == 0 and size * logits_each <= GROUP_LOGITS:
            group = size
    if group == total:
        return compute(*arrays)
    groups = jax.tree.map(
        lambda x: x.reshape(total // group, group, *x.shape[1:]), arrays
    )
    results = jax.lax.map(lambda group: compute(*group), groups)
    return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), results)


def _forward(
    plan: BandPlan | TilePlan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Compute the output `[B, Q, H, h]`, and L in the plan's own shape, or None."""
    if isinstance(plan, BandPlan):
        return _map_groups(
            functools.partial(
                band_forward, plan, band_mask(plan), GROUP_LOGITS, _keeps_log_sum()
            ),
            stream_logits(plan, q.shape[2], GROUP_LOGITS),
            (q, k, v, valid),
        )
    out, log_sum = _map_groups(
        functools.partial(tile_forward, plan),
        plan.live_logits,
        _merged_inputs(q, k, v, valid),
    )
    return _split_heads(out, q), log_sum


def _backward(
    plan: BandPlan | TilePlan,
    residuals: tuple[Any, ...],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v, `[B, ., H, h]` each, in their dtypes.

    Args:
      plan: the plan.
      residuals: q, k, v, valid, output and L, from the forward pass.
      gradient: `[B, Q, H, h]`, of the output.
    """
    if isinstance(plan, BandPlan):
        d_q, d_k, d_v = _map_groups(
            functools.partial(band_backward, plan, band_mask(plan), GROUP_LOGITS),
            stream_logits(plan, gradient.shape[2], GROUP_LOGITS),
            (*residuals, gradient),
        )
    else:
        d_q, d_k, d_v = _tile_backward(plan, residuals, gradient)
    q, k, v = residuals[:3]
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _tile_backward(
    plan: TilePlan, residuals: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute what `_backward` does, over tiles."""
    q, k, v, valid, out, log_sum = residuals
    # D of the backward pass: one sum over h in place of one over all keys.
    output_dot_gradient = jnp.sum(
        _merge_heads(out).astype(jnp.float32)
        * _merge_heads(gradient).astype(jnp.float32),
        axis=-1,
    )
    inputs = (
        *_merged_inputs(q, k, v, valid),
        log_sum,
        output_dot_gradient,
        _merge_heads(gradient),
    )
    d_q, d_k, d_v = _map_groups(
        functools.partial(tile_backward, plan), plan.live_logits, inputs
    )
    # The passes saw scaled queries: d(q) = scale * d(scale * q).
    return (
        _split_heads(d_q * _scale(q), q),
        _split_heads(d_k, k),
        _split_heads(d_v, v),
    )


def _keeps_log_sum() -> bool:
    """Whether sliding layers keep L for the backward pass.

    A CPU computes the forward pass as one kernel if the output is its only result;
    forming L again costs it less than the kernels of the forward pass taken apart.
    """
    return current_platform() != "cpu"


def _scale(q: jax.Array) -> float:
    """1 / sqrt(h), the scale of the logits."""
    return q.shape[-1] ** -0.5


def _merged_inputs(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """Scale q, merge streams and heads `[G, S, h]`, and repeat `valid` `[G, K]`."""
    return (
        _merge_heads(q * _scale(q)),
        _merge_heads(k),
        _merge_heads(v),
        None if valid is None else jnp.repeat(valid, q.shape[2], axis=0),
    )


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
) -> jax.Array:
    """Compute attention over the tiles that the pattern shows.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, K] bool`, keys that are not padding; None: all.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`.
    """
    plan = _make_plan(pattern, window)

    @jax.custom_vjp
    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> jax.Array:
        return forward(q, k, v, valid)[0]

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        # Named, so that a remat policy can keep both: with them the backward pass needs
        # no second forward pass.
        out, log_sum = (
            checkpoint_name(x, ATTENTION_RESULT) for x in _forward(plan, q, k, v, valid)
        )
        return out, (q, k, v, valid, out, log_sum)

    def backward(
        residuals: Any, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        return *_backward(plan, residuals, gradient), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, valid)
