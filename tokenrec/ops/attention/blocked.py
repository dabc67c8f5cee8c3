"""Attention that computes the tiles a pattern shows and skips the others, in XLA alone, on any platform.

A sliding layer is a band: every tile of queries meets one span of keys, and spans advance by a fixed stride
(`bands.py`). Anything else is a list of key tiles for each query tile (`tiles.py`). Both keep only the output and the
logarithm of the softmax's denominator, and compute the weights again in the backward pass (FlashAttention, Dao et al.
2022), so that memory is linear in the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tokenrec.ops.attention.bands import (
    Band,
    band_backward,
    band_forward,
    band_mask,
    find_band,
)
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern
from tokenrec.ops.attention.tiles import Tiles, find_tiles, tile_backward, tile_forward

# Up to this many logits a head, one masked product is as fast as any order of smaller ones, and simpler: with a window
# 128 x 128, and without one, where skipping saves half at most, 512 x 512 (benchmarks/results/attention.md).
DENSE_SLIDING = 128 * 128
DENSE_FULL = 512 * 512
# Shares of the dense logits above which skipping does not pay.
WORTH_SLIDING = 0.6
WORTH_FULL = 0.75
GROUP_LOGITS = (
    1 << 20
)  # logits that are in memory at a time; one stream and head may hold more


def _plan(pattern: Pattern, window: int | None) -> Band | Tiles:
    """The band of a sliding layer, or tiles where there is none or it would be mostly empty."""
    tiles = find_tiles(pattern, window)
    band = None if window is None else find_band(pattern, window)
    return tiles if band is None or band.logits > 2 * tiles.logits else band


def unprofitable(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Why the dense implementation serves these shapes better, or ""; no pattern is beyond this one."""
    dense = q.shape[1] * k.shape[1]
    least, worth = (
        (DENSE_FULL, WORTH_FULL) if window is None else (DENSE_SLIDING, WORTH_SLIDING)
    )
    if dense <= least:
        return f"{q.shape[1]} x {k.shape[1]} rows are {dense} logits a head, and up to {least} dense is as fast"
    tiled = _plan(pattern, window).logits
    if tiled > worth * dense:
        return (
            f"its tiles hold {tiled} logits a head, of {dense} in all: too few to skip"
        )
    return ""


def _fold(x: jax.Array) -> jax.Array:
    """`[B, S, H, h]` -> `[G, S, h]`, G = B x H."""
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])


def _unfold(x: jax.Array, like: jax.Array) -> jax.Array:
    batch, _, heads, width = like.shape
    return jnp.moveaxis(x.reshape(batch, heads, -1, width), 1, 2).astype(like.dtype)


def _in_groups(
    compute: Callable[..., Any], held: int, arrays: tuple[jax.Array | None, ...]
) -> Any:
    """`compute(*arrays)` for some streams and heads after others; a stream and head holds so many logits at a time."""
    streams = jax.tree.leaves(arrays)[0].shape[0]
    group = max(
        n
        for n in range(1, streams + 1)
        if streams % n == 0 and (n == 1 or n * held <= GROUP_LOGITS)
    )
    if group == streams:
        return compute(*arrays)
    cut = jax.tree.map(
        lambda x: x.reshape(streams // group, group, *x.shape[1:]), arrays
    )
    made = jax.lax.map(lambda part: compute(*part), cut)
    return jax.tree.map(lambda x: x.reshape(streams, *x.shape[2:]), made)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
) -> jax.Array:
    """Attention in tiles; arguments as in `attention`."""
    plan = _plan(pattern, window)
    scale, heads = q.shape[-1] ** -0.5, q.shape[2]

    def fold(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array | None, ...]:
        return (
            _fold(q * scale),
            _fold(k),
            _fold(v),
            None if valid is None else jnp.repeat(valid, heads, axis=0),
        )

    def forward(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        if isinstance(plan, Band):
            compute = functools.partial(band_forward, plan, band_mask(plan))
        else:
            compute = functools.partial(tile_forward, plan)
        out, log_sum = _in_groups(compute, plan.held, fold(q, k, v, valid))
        out, log_sum = (
            checkpoint_name(x, ATTENTION_RESULT) for x in (_unfold(out, q), log_sum)
        )
        return out, (q, k, v, valid, out, log_sum)

    def backward(
        kept: Any, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        q, k, v, valid, out, log_sum = kept
        if isinstance(plan, Band):
            compute = functools.partial(band_backward, plan, band_mask(plan))
        else:
            compute = functools.partial(tile_backward, plan)
        inner = jnp.sum(
            _fold(out).astype(jnp.float32) * _fold(gradient).astype(jnp.float32),
            axis=-1,
        )
        by_q, by_k, by_v = _in_groups(
            compute, plan.held, (*fold(q, k, v, valid), log_sum, inner, _fold(gradient))
        )
        return _unfold(by_q * scale, q), _unfold(by_k, k), _unfold(by_v, v), None

    @jax.custom_vjp
    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> jax.Array:
        return forward(q, k, v, valid)[0]

    attend.defvjp(forward, backward)
    return attend(q, k, v, valid)
