"""Attention on GPUs: Pallas kernels for the Triton compiler.

It serves what cuDNN refuses: sliding layers with static tokens, several candidates in a
stream, padding between valid tokens, float32. The kernels
(`tokenrec.ops.attention.triton_calls`) visit only tiles that hold something visible,
in the backward pass too, and compute the mask within a tile from the two runs of keys
that each query sees (`tokenrec.ops.attention.key_runs`).

No GPU was at hand to time them. So it serves only when it is named, and
`model.attention="auto"` does not choose it. JAX compiles these kernels with a warning:
its Triton back end is deprecated in favor of Mosaic GPU, and still part of JAX 0.12.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tokenrec.ops.attention.key_runs import KeyRuns, make_key_runs
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern
from tokenrec.ops.attention.span_mask import visible_spans

# Queries and keys of a tile. A narrow tile wastes little of a window; 64 is the least
# side at which Hopper's matrix units take all operands of a warp group.
SIDE = 64
# Least side of a product in Triton, hence the least width of a head.
LEAST_SIDE = 16
# Widest row of a tile of 64, in bytes. Wider ones have tiles of 32: a step of the
# backward pass holds four tiles and what is loaded ahead of them in 227 KiB of memory.
WIDEST_ROW = 256
# The most programs along the second and third dimension of a grid.
GRID_LIMIT = 65_535
DTYPES = (jnp.float32, jnp.bfloat16)


def unsupported_reason(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why the kernels cannot serve, or return "".

    Args:
      q: `[B, Q, H, h]`; only shape and dtype are read.
      k: `[B, K, H, h]`; only shape and dtype are read.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
    """
    if q.dtype not in DTYPES:
        return f"the kernels take float32 and bfloat16, not {q.dtype}"
    streams, _, heads, _ = q.shape
    if max(streams, heads) > GRID_LIMIT:
        return (
            f"{streams} streams of {heads} heads do not fit the kernels' grid, which "
            f"has {GRID_LIMIT} of each"
        )
    spans = visible_spans(pattern, window, packable=False)
    return spans if isinstance(spans, str) else ""


def block_sizes(queries: int, keys: int, width: int, itemsize: int) -> tuple[int, int]:
    """Choose the queries and keys of a tile.

    Args:
      queries: Q.
      keys: K.
      width: h.
      itemsize: bytes of a number.
    """
    side = SIDE if width * itemsize <= WIDEST_ROW else SIDE // 2
    block_q, block_k = (
        max(LEAST_SIDE, min(side, _power_of_two(tokens))) for tokens in (queries, keys)
    )
    return block_q, block_k


def runs_of(
    pattern: Pattern, window: int | None, block_q: int, block_k: int
) -> KeyRuns:
    """Find what each query sees, and the tiles that hold it.

    Args:
      pattern: which queries may see which keys; `unsupported_reason` must be "".
      window: keys that a query of a sliding layer sees; None in a full layer.
      block_q: queries of a tile.
      block_k: keys of a tile.
    """
    spans = visible_spans(pattern, window, packable=False)
    if isinstance(spans, str):
        raise AssertionError(spans)
    return make_key_runs(spans, len(pattern.key_positions), block_q, block_k)


def _power_of_two(count: int) -> int:
    """The least power of 2 that is not below a count."""
    return 1 << (count - 1).bit_length()


def triton_attention(
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
    """Compute attention by the Triton kernels.

    A query that is padding and sees nothing has an output of 0, where it sees itself in
    `dense`.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      pattern: which queries may see which keys; `unsupported_reason` must be "".
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, K] bool`, keys that are not padding; None: all.
      blocks: queries and keys of a tile, powers of 2 from 16 on; None: `block_sizes`.
      interpret: run the kernels step by step on any platform, slowly, for tests.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`.
    """
    # In a function, because importing Pallas takes 0.2 s, which only users of these
    # kernels should pay.
    from tokenrec.ops.attention.triton_calls import Kernels
    from tokenrec.ops.attention.triton_kernels import Sizes

    # 1. The kernels of this pattern.
    queries, keys, width = q.shape[1], k.shape[1], q.shape[3]
    # Triton wants a power of 2; columns of zeros change no product.
    wide = max(LEAST_SIDE, _power_of_two(width))
    if blocks is None:
        blocks = block_sizes(queries, keys, wide, q.dtype.itemsize)
    block_q, block_k = blocks
    kernels = Kernels(
        runs_of(pattern, window, block_q, block_k),
        Sizes(queries, keys, block_q, block_k, scale=width**-0.5),
        interpret,
    )

    # 2. The passes.
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
            checkpoint_name(x, ATTENTION_RESULT)
            for x in kernels.forward(q, k, v, valid)
        )
        return out, (q, k, v, valid, out, log_sum)

    def backward(
        residuals: Any, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        q, k, v, valid, out, log_sum = residuals
        output_dot_gradient = jnp.einsum(
            "bqhd,bqhd->bhq", out, gradient, preferred_element_type=jnp.float32
        )
        inputs = (q, k, v, valid, gradient, log_sum, output_dot_gradient)
        d_k, d_v = kernels.key_value_gradients(*inputs)
        return kernels.query_gradient(*inputs), d_k, d_v, None

    attend.defvjp(forward, backward)
    # 3. Heads of a width that Triton takes.
    if wide != width:
        fill = ((0, 0), (0, 0), (0, 0), (0, wide - width))
        q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    return attend(q, k, v, valid)[..., :width]
