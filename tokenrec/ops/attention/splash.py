"""Attention on TPUs: splash attention, the block-sparse Pallas kernels that JAX ships.

How it works. The kernels (`jax.experimental.pallas.ops.tpu.splash_attention`) run
FlashAttention over a grid of tiles, and visit only the tiles of logits that hold
something visible. The list of those tiles is computed at trace time from a `Mask`
object. Within a tile the kernels load no mask: they compute it from one int32 per query
and the places of the keys (`tokenrec.ops.attention.span_mask`). Three kernels serve a
train step: forward, gradient of q, and gradients of k and v.

`splash_attention` pads queries and keys to whole tiles, swaps heads and tokens, scales
the queries, which the kernels do not, and passes padding as segment ids. The kernels
are built in `tokenrec.ops.attention.splash_kernel`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.span_mask import (
    QUERY_BITS,
    QuerySpans,
    pack_spans,
    visible_spans,
)
from tokenrec.ops.attention.splash_kernel import LANES, SplashKernel, make_kernel

DTYPES = (jnp.float32, jnp.bfloat16)


def unsupported_reason(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why splash cannot serve, or return "".

    Args:
      q: `[B, Q, H, h]`; only shape and dtype are read.
      k: `[B, K, H, h]`; only shape and dtype are read.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
    """
    if q.dtype not in DTYPES:
        return f"the kernels take float32 and bfloat16, not {q.dtype}"
    spans = visible_spans(pattern, window)
    if isinstance(spans, str):
        return spans
    return unpackable_reason(spans, k.shape[1])


def unpackable_reason(spans: QuerySpans, keys: int) -> str:
    """Say why the kernels cannot hold the spans of keys of a query, or return "".

    Args:
      spans: the runs of keys that each query sees.
      keys: K.
    """
    bits = int(pack_spans(spans, keys)[1].max()).bit_length()
    if bits > QUERY_BITS:
        return (
            f"the spans of keys that a query sees take {bits} bits, and the kernels "
            f"have {QUERY_BITS}; shorten the stream"
        )
    return ""


def inefficient_reason(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why another implementation is likely to be faster, or return "".

    The grid goes through streams and heads one by one, while XLA computes such small
    products for all of them at once. Few queries over many keys are served: their tiles
    are 128 queries high, but no logits go to memory.

    Args:
      q: `[B, Q, H, h]`; only its shape is read.
      k: `[B, K, H, h]`; only its shape is read.
      pattern: not read.
      window: not read.
    """
    queries, keys = q.shape[1], k.shape[1]
    if queries <= LANES and keys <= LANES:
        return (
            f"{queries} x {keys} tokens are within one tile of {LANES} x {LANES}; "
            "there is nothing to skip"
        )
    return ""


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
    *,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention by the splash kernels.

    Padding sees padding only, so that its outputs are finite, and differ from those of
    `dense`.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      pattern: which queries may see which keys; `unsupported_reason` must be "".
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, K] bool`, keys that are not padding; None: all.
      blocks: queries and keys of a tile, multiples of 128; None: `block_sizes`.
      interpret: run the kernels step by step on any platform, slowly, for tests.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`.
    """
    spans = visible_spans(pattern, window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    kernel = make_kernel(
        spans, k.shape[1], q.shape[2], blocks=blocks, interpret=interpret
    )
    return run_kernel(kernel, q, k, v, valid)


def run_kernel(
    kernel: SplashKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """Run the kernel of one part on its arrays.

    Args:
      kernel: the kernel, of this part alone.
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      valid: `[B, K] bool`, keys that are not padding; None: all.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries = q.shape[1]
    fill_q, fill_kv = kernel.queries - queries, kernel.keys - k.shape[1]

    # 1. Arrays `[B, H, S, h]` with fill. The kernels do not scale the logits.
    def heads_first(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))

    # Splash takes one stream; `vmap` adds the batch as a dimension of the grid.
    inputs = (
        heads_first(q * q.shape[-1] ** -0.5, fill_q),
        heads_first(k, fill_kv),
        heads_first(v, fill_kv),
    )
    # 2. Padding as segments: tokens see those of their own segment, 1 if valid, else 0.
    if valid is None:
        out = jax.vmap(kernel.call)(*inputs)
    else:
        segment_ids = valid.astype(jnp.int32)
        segments = splash.SegmentIds(
            q=segment_ids[:, kernel.itself],
            kv=jnp.pad(segment_ids, ((0, 0), (0, fill_kv))),
        )
        out = jax.vmap(kernel.call)(*inputs, segments)
    return jnp.swapaxes(out[:, :, :queries], 1, 2)
