"""Attention on TPUs: splash attention, the block-sparse Pallas kernels that JAX ships.

How it works. The kernels (`jax.experimental.pallas.ops.tpu.splash_attention`) run
FlashAttention over a grid of tiles, and visit only the tiles of logits that hold
something visible. The list of those tiles is computed at trace time from a `Mask`
object. Within a tile the kernels load no mask: they compute it from one int32 per query
and the places of the keys (`tokenrec.ops.attention.span_mask`). Three kernels serve a
train step: forward, gradient of q, and gradients of k and v.

`splash_attention` pads queries and keys to whole tiles, swaps heads and tokens, scales
the queries, which the kernels do not, and passes padding as segment ids.

`block_sizes` picks the tile from an estimate of time, as wide tiles waste logits and
narrow ones waste steps of the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern
from tokenrec.ops.attention.span_mask import (
    QUERY_BITS,
    QuerySpans,
    SpanMask,
    pack_spans,
    visible_spans,
)

# Lanes of a vector register, the least side of a tile.
LANES = 128
# Sides of tiles to choose from. The backward pass of 512 x 512 is the largest that fits
# well into the kernel's 16 MiB of VMEM.
SIDES = (128, 256, 384, 512)
# Fixed cost of a grid step, in logits. An estimate, as no TPU was at hand: some 0.35 us
# against 2e11 logits a second.
STEP_COST = 1 << 16
DTYPES = (jnp.float32, jnp.bfloat16)


def round_up(count: int, multiple: int) -> int:
    """Round a count of tokens up to whole tiles."""
    return -(-count // multiple) * multiple


def visited_tiles(
    spans: QuerySpans, keys: int, block_q: int, block_kv: int
) -> np.ndarray:
    """Find the tiles with something visible, the only ones that the kernels compute.

    Args:
      spans: the runs of keys that each query sees.
      keys: K.
      block_q: queries of a tile.
      block_kv: keys of a tile.

    Returns:
      `[query blocks, key blocks] bool`.
    """
    queries = len(spans.start)
    block_of_query = np.arange(queries) // block_q
    shape = (
        round_up(queries, block_q) // block_q,
        round_up(keys, block_kv) // block_kv,
    )
    # A run of keys adds 1 at its first block and takes it away behind its last: the
    # running sum counts the runs that touch a block.
    change = np.zeros((shape[0], shape[1] + 1), np.int64)
    for start, stop in ((spans.start, spans.stop), (spans.own_start, spans.own_stop)):
        real = stop > start
        np.add.at(change, (block_of_query[real], start[real] // block_kv), 1)
        np.add.at(change, (block_of_query[real], (stop[real] - 1) // block_kv + 1), -1)
    return np.cumsum(change, axis=1)[:, :-1] > 0


def block_sizes(spans: QuerySpans, keys: int) -> tuple[int, int]:
    """Choose the queries and keys of a tile by the least estimated time.

    >>> from tokenrec.ops.attention.pattern import causal_pattern
    >>> spans = [visible_spans(causal_pattern(2048, 2048), w) for w in (None, 64)]
    >>> [block_sizes(each, 2048) for each in spans]
    [(512, 512), (256, 256)]
    """

    def cost(sides: tuple[int, int]) -> int:
        tiles = visited_tiles(spans, keys, *sides)
        # The grid is as wide as the query block that visits most key blocks.
        steps = len(tiles) * int(tiles.sum(axis=1).max())
        return steps * STEP_COST + int(tiles.sum()) * sides[0] * sides[1]

    return min(((q, kv) for q in SIDES for kv in SIDES), key=cost)


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
    bits = int(pack_spans(spans, k.shape[1])[1].max()).bit_length()
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


@functools.cache
def _mask_class() -> type[Any]:
    """Make the class of masks that the kernels are built from.

    In a function, because importing Pallas takes 0.2 s, which only users of a TPU
    should pay.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import Mask

    class PatternMask(Mask):
        """A `SpanMask` over queries and keys with fill.

        The kernels' builder asks every tile whether any and whether all of it is
        visible. The spans alone tell for most tiles, without evaluating the mask.
        """

        def __init__(
            self, mask: SpanMask, packed: np.ndarray, spans: QuerySpans, keys: int
        ):
            # The kernels look for these two under these names.
            self.mask_function = mask
            self.q_sequence = packed
            runs = (spans.start, spans.stop), (spans.own_start, spans.own_stop)
            self.runs = [(start, stop) for start, stop in runs if (stop > start).any()]
            self.keys = keys

        @property
        def shape(self) -> tuple[int, ...]:
            return (len(self.q_sequence), self.keys)

        def __getitem__(self, tile: Any) -> np.ndarray:
            queries, keys = tile
            visible_keys = np.zeros(queries.stop - queries.start, np.int64)
            for start, stop in self.runs:
                visible_keys += np.maximum(
                    np.minimum(stop[queries], keys.stop)
                    - np.maximum(start[queries], keys.start),
                    0,
                )
            # One element stands for the whole tile, of which the builder takes `any`
            # and `all`: there are S^2 / side^2 tiles.
            if not visible_keys.any():
                return np.zeros((1, 1), bool)
            if (visible_keys == keys.stop - keys.start).all():
                return np.ones((1, 1), bool)
            places = np.arange(keys.start, keys.stop, dtype=np.int32)
            return self.mask_function(self.q_sequence[queries, None], places[None])

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, PatternMask):
                return NotImplemented
            same = self.mask_function == other.mask_function and self.keys == other.keys
            return same and np.array_equal(self.q_sequence, other.q_sequence)

        def __hash__(self) -> int:
            return hash((self.mask_function, self.keys, self.q_sequence.tobytes()))

    return PatternMask


def _make_kernel(
    mask: Any, heads: int, block_q: int, block_kv: int, *, interpret: bool
) -> Callable[..., jax.Array]:
    """Build the kernel of one stream, `(q, k, v, segment ids) -> out: [H, S, h]`.

    Args:
      mask: the mask of every head.
      heads: H.
      block_q: queries of a tile.
      block_kv: keys of a tile.
      interpret: run the kernel step by step on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Not the fused backward kernel: it holds a gradient of all queries for every block
    # of keys, which is quadratic in length, and it visits empty tiles too.
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION_RESULT,
        interpret=interpret,
    )


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
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # 1. The mask, over whole tiles. Fill queries repeat the last query, as one that saw
    #    nothing would be NaN; nothing sees the fill keys.
    queries, keys = q.shape[1], k.shape[1]
    spans = visible_spans(pattern, window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    block_q, block_kv = block_sizes(spans, keys) if blocks is None else blocks
    fill_q = round_up(queries, block_q) - queries
    fill_kv = round_up(keys, block_kv) - keys
    span_mask, packed = pack_spans(spans, keys)
    filled = np.minimum(np.arange(queries + fill_q), queries - 1)
    spans, packed = spans.take(filled), packed[filled].astype(np.int32)
    # The same mask for all heads.
    mask = _mask_class()(span_mask, packed, spans, keys + fill_kv)
    kernel = _make_kernel(mask, q.shape[2], block_q, block_kv, interpret=interpret)

    # 2. Arrays `[B, H, S, h]` with fill. The kernels do not scale the logits.
    def heads_first(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))

    # Splash takes one stream; `vmap` adds the batch as a dimension of the grid.
    inputs = (
        heads_first(q * q.shape[-1] ** -0.5, fill_q),
        heads_first(k, fill_kv),
        heads_first(v, fill_kv),
    )
    # 3. Padding as segments: tokens see those of their own segment, 1 if valid, else 0.
    if valid is None:
        out = jax.vmap(kernel)(*inputs)
    else:
        segment_ids = valid.astype(jnp.int32)
        segments = splash.SegmentIds(
            q=segment_ids[:, spans.itself],
            kv=jnp.pad(segment_ids, ((0, 0), (0, fill_kv))),
        )
        out = jax.vmap(kernel)(*inputs, segments)
    return jnp.swapaxes(out[:, :, :queries], 1, 2)
