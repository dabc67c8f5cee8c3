"""FlashAttention over runs of keys: the Pallas kernels, one program per block.

    forward            a block of queries walks over the key blocks that it sees
    gradient of q      the same walk
    gradients of k, v  a block of keys walks over the query blocks that see it

A program walks one interval of blocks per part of `KeyRuns`, so that the time of a
sliding layer is linear in its length, backwards too. Within a tile, the mask is
computed from the start and the stop of each query's run. Logits are in base 2, since
the GPU has an instruction for 2^x; `tokenrec.ops.attention.softmax` has the equations.

Arguments of the kernels (`tokenrec.ops.attention.triton_calls` has their shapes):
`runs` holds refs of `KeyRuns`, `masks` the ref of the valid keys or nothing, and the
other refs point to one head of one stream, without those dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Products (`plgpu.dot`) add up in float32. Those of float32 are in TF32 unless
# `jax_default_matmul_precision` asks for more, as everywhere in JAX on such a GPU.

# Finite, because the difference of two -inf is NaN. Any logit that is seen is above it.
LOWEST = -1e30
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    """Sizes of an attention.

    Attributes:
      queries: Q.
      keys: K.
      block_q: queries of a block.
      block_k: keys of a block.
      scale: of the logits, in base e.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    scale: float


def _in_stream(first_token: Any, count: int, tokens: int, ndim: int) -> Any:
    """Mask of the rows that are tokens of the stream; None if all blocks are whole."""
    if tokens % count == 0:
        return None
    inside = first_token + jnp.arange(count) < tokens
    return inside[:, None] if ndim == 2 else inside


def _read(ref: Any, first: Any, count: int, tokens: int) -> jax.Array:
    """Read the rows of `count` tokens, zeros beyond the tokens of the stream.

    Args:
      ref: `[tokens, h]` or `[tokens]`.
      first: first token.
      count: tokens to read.
      tokens: tokens of the stream, Q or K.
    """
    inside = _in_stream(first, count, tokens, len(ref.shape))
    rows = ref.at[pl.ds(first, count)]
    return plgpu.load(rows, mask=inside, other=None if inside is None else 0)


def _read_block(ref: Any, tokens: int) -> jax.Array:
    """Read this program's block, zeros beyond the tokens of the stream.

    Args:
      ref: `[block, h]` or `[block]`.
      tokens: tokens of the stream, Q or K.
    """
    count = ref.shape[0]
    inside = _in_stream(pl.program_id(0) * count, count, tokens, len(ref.shape))
    return plgpu.load(ref.at[:], mask=inside, other=None if inside is None else 0)


def _write_block(ref: Any, value: jax.Array, tokens: int) -> None:
    """Write this program's block, less the rows beyond the stream."""
    count = value.shape[0]
    inside = _in_stream(pl.program_id(0) * count, count, tokens, value.ndim)
    plgpu.store(ref.at[:], value.astype(ref.dtype), mask=inside)


def _seen(
    start: jax.Array,
    stop: jax.Array,
    keys: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """Mask of a tile; all arguments broadcast to it.

    Padding need not see itself: a query that sees nothing has an output of 0 here.

    Args:
      start: first key of each query's run.
      stop: end of each query's run.
      keys: places of the keys.
      valid: keys that are not padding; None: all.
    """
    seen = (keys >= start) & (keys < stop)
    return seen if valid is None else seen & valid


def _walk_keys(
    sizes: Sizes,
    runs: Any,
    masks: tuple[Any, ...],
    q: jax.Array,
    k_ref: Any,
    tile: Callable[..., Any],
    carry: Any,
) -> Any:
    """Visit the key blocks that this program's block of queries sees.

    Args:
      sizes: of the attention.
      runs: refs of `KeyRuns`.
      masks: ref of `valid`, or nothing.
      q: `[block_q, h]`.
      k_ref: `[K, h]`.
      tile: `(masked base 2 logits [block_q, block_k], k, first key, carry) -> carry`.
      carry: what the first tile is given.
    """
    block_q, block_k = sizes.block_q, sizes.block_k
    block = pl.program_id(0)
    rows = pl.ds(block * block_q, block_q)
    for part in range(runs.start.shape[0]):
        start = runs.start[part, rows][:, None]
        stop = runs.stop[part, rows][:, None]

        def visit(
            key_block: Any, carry: Any, start: Any = start, stop: Any = stop
        ) -> Any:
            first = key_block * block_k
            keys = (first + jnp.arange(block_k))[None]
            valid = None
            if masks:
                valid = _read(masks[0], first, block_k, sizes.keys)[None] != 0
            k = _read(k_ref, first, block_k, sizes.keys)
            logits = plgpu.dot(q, k, trans_b=True) * (sizes.scale * LOG2_E)
            seen = _seen(start, stop, keys, valid)
            return tile(jnp.where(seen, logits, -jnp.inf), k, first, carry)

        interval = runs.key_blocks[part, 0, block], runs.key_blocks[part, 1, block]
        carry = jax.lax.fori_loop(*interval, visit, carry)
    return carry


def forward_kernel(
    sizes: Sizes,
    runs: Any,
    masks: tuple[Any, ...],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    log_sum_ref: Any,
) -> None:
    """Compute a block of the output, and the log of its softmax's denominator."""
    block_q, block_k = sizes.block_q, sizes.block_k
    q = _read_block(q_ref, sizes.queries)

    def tile(logits: jax.Array, k: jax.Array, first: Any, carry: Any) -> Any:
        highest, total, out = carry
        v = _read(v_ref, first, block_k, sizes.keys)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new_highest[:, None])
        rescale = jnp.exp2(highest - new_highest)
        total = total * rescale + jnp.sum(weights, axis=1)
        out = out * rescale[:, None] + plgpu.dot(weights.astype(v.dtype), v)
        return new_highest, total, out

    highest, total, out = _walk_keys(
        sizes,
        runs,
        masks,
        q,
        k_ref,
        tile,
        (
            jnp.full((block_q,), LOWEST, jnp.float32),
            jnp.zeros((block_q,), jnp.float32),
            jnp.zeros((block_q, v_ref.shape[1]), jnp.float32),
        ),
    )
    # Fill sees nothing, nor does padding.
    total = jnp.where(total == 0, 1, total)
    _write_block(out_ref, out / total[:, None], sizes.queries)
    _write_block(log_sum_ref, highest + jnp.log2(total), sizes.queries)


def query_gradient_kernel(
    sizes: Sizes,
    runs: Any,
    masks: tuple[Any, ...],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gradient_ref: Any,
    log_sum_ref: Any,
    output_dot_gradient_ref: Any,
    d_q_ref: Any,
) -> None:
    """Compute a block of the gradient of q."""
    queries = sizes.queries
    q = _read_block(q_ref, queries)
    gradient = _read_block(gradient_ref, queries)
    log_sum = _read_block(log_sum_ref, queries)[:, None]
    output_dot = _read_block(output_dot_gradient_ref, queries)[:, None]

    def tile(logits: jax.Array, k: jax.Array, first: Any, d_q: jax.Array) -> jax.Array:
        v = _read(v_ref, first, sizes.block_k, sizes.keys)
        weights = jnp.exp2(logits - log_sum)
        d_logits = weights * (plgpu.dot(gradient, v, trans_b=True) - output_dot)
        return d_q + plgpu.dot(d_logits.astype(k.dtype), k)

    d_q = jnp.zeros(q.shape, jnp.float32)
    d_q = _walk_keys(sizes, runs, masks, q, k_ref, tile, d_q)
    _write_block(d_q_ref, d_q * sizes.scale, queries)


def key_value_gradient_kernel(
    sizes: Sizes,
    runs: Any,
    masks: tuple[Any, ...],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gradient_ref: Any,
    log_sum_ref: Any,
    output_dot_gradient_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
) -> None:
    """Compute a block of the gradients of k and v."""
    block_q, block_k = sizes.block_q, sizes.block_k
    block = pl.program_id(0)
    k = _read_block(k_ref, sizes.keys)
    v = _read_block(v_ref, sizes.keys)
    keys = (block * block_k + jnp.arange(block_k))[:, None]
    valid = None
    if masks:
        first_key = block * block_k
        valid = _read(masks[0], first_key, block_k, sizes.keys)[:, None] != 0

    # Tiles are transposed, [keys, queries], so that the weights need no transposition
    # between their two products.
    def visit(query_block: Any, carry: Any, part: int) -> Any:
        d_k, d_v = carry
        first = query_block * block_q
        rows = pl.ds(first, block_q)

        def read(ref: Any) -> jax.Array:
            return _read(ref, first, block_q, sizes.queries)

        q, gradient = read(q_ref), read(gradient_ref)
        seen = _seen(
            runs.start[part, rows][None],
            runs.stop[part, rows][None],
            keys,
            valid,
        )
        logits = plgpu.dot(k, q, trans_b=True) * (sizes.scale * LOG2_E)
        logits = jnp.where(seen, logits, -jnp.inf)
        weights = jnp.exp2(logits - read(log_sum_ref)[None])
        d_v += plgpu.dot(weights.astype(gradient.dtype), gradient)
        d_weights = plgpu.dot(v, gradient, trans_b=True)
        d_logits = weights * (d_weights - read(output_dot_gradient_ref)[None])
        d_k += plgpu.dot(d_logits.astype(q.dtype), q)
        return d_k, d_v

    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for part in range(runs.start.shape[0]):
        interval = runs.query_blocks[part, 0, block], runs.query_blocks[part, 1, block]
        carry = jax.lax.fori_loop(*interval, functools.partial(visit, part=part), carry)
    d_k, d_v = carry
    _write_block(d_k_ref, d_k * sizes.scale, sizes.keys)
    _write_block(d_v_ref, d_v, sizes.keys)
