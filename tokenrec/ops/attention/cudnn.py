"""Attention on NVIDIA GPUs: the fused kernels of cuDNN, through `jax.nn`.

How it works. The kernels of `jax.nn.dot_product_attention(implementation="cudnn")`
serve causal order, one window, and one length per stream that counts from its front. A
tokenrec stream has its padding before or between valid tokens. So

1. queries are put in place among the keys, since the kernels want as many of them;
2. the valid tokens of each stream are moved to its front, in order, and counted;
3. one more token fills up an odd number: JAX refuses the gradient of an odd number.
   It comes last, so that causal order hides it;
4. the kernel runs; what it leaves behind the end of a stream is set to 0;
5. the output is moved back, and the queries are taken out of it.

Step 2 changes no distance that a window counts, because padding stands before the
events of a stream. A pattern that is more than causal order and a window is refused
(`unsupported_reason`).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import Pattern

# Least queries per key. Step 1 makes a query of every key, at its cost; below this
# share the tiles of XLA do less.
MIN_QUERY_SHARE = 0.5
# Name of JAX's primitive for the forward kernel. Its outputs, the result and the sums
# of the softmax, are what the backward kernel needs. They cannot be named
# (`ATTENTION_RESULT`): they are made inside of `jax.nn`.
FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def unsupported_reason(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why the kernels cannot serve, in cuDNN's own words where it decides, or "".

    Args:
      q: `[B, Q, H, h]`; only shape and dtype are read.
      k: `[B, K, H, h]`; only shape and dtype are read.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
    """
    query = pattern.query_attributes(window)
    key = pattern.key_attributes(window)
    if (key.candidate > 0).any():
        return "several candidates share a stream; cuDNN supports causal order only"
    if (key.reach != key.index).any():
        return "the prefix is bidirectional; cuDNN supports causal order only"
    if window is not None and key.static.any():
        return (
            "the keys of a sliding layer include static tokens, which its events must "
            "not see; cuDNN supports causal order only"
        )
    if window is not None and (np.diff(key.index) != 1).any():
        return "tokens are missing between the keys of a sliding layer"
    queries, keys = len(query.position), len(key.position)
    if queries < MIN_QUERY_SHARE * keys:
        return f"{queries} queries of {keys} tokens; cuDNN computes all tokens"

    def fused(q: jax.Array, k: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, k, is_causal=True, implementation="cudnn"
        )

    # Tracing the call and its gradient is enough for JAX and cuDNN to refuse a dtype, a
    # head width, a number of tokens, a GPU or a library. Queries in the shape of the
    # keys, as `cudnn_attention` makes them.
    batch, tokens, heads, width = k.shape
    whole = jax.ShapeDtypeStruct((batch, tokens + tokens % 2, heads, width), k.dtype)
    try:
        jax.eval_shape(lambda q, k: jax.vjp(fused, q, k)[0], whole, whole)
    except (RuntimeError, NotImplementedError, ValueError) as reason:
        return str(reason)
    return ""


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
    *,
    kernels: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Compute attention by fused kernels.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      pattern: which queries may see which keys; `unsupported_reason` must be "".
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, K] bool`, keys that are not padding; None: all.
      kernels: "xla" computes the same call on any platform, for tests.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`.
    """
    # 1. Queries in place among the keys. The output of the other tokens is dropped
    #    below.
    query_places = np.searchsorted(pattern.key_positions, pattern.query_positions)
    queries = (
        jnp.zeros_like(k)
        .at[:, query_places]
        .set(q, unique_indices=True, indices_are_sorted=True)
    )
    # 2. Valid tokens first. The sort is stable, so that they stay in order.
    if valid is None:
        lengths, order = None, None
    else:
        lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
        order = jnp.argsort(~valid, axis=1, stable=True)
        queries, k, v = (
            jnp.take_along_axis(x, order[..., None, None], axis=1)
            for x in (queries, k, v)
        )
    # 3. An even number of tokens.
    tokens = k.shape[1]
    if tokens % 2:
        queries, k, v = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (queries, k, v)
        )
    # 4. A window of w keys is w - 1 keys to the left of the query and 0 to the right.
    out = jax.nn.dot_product_attention(
        queries,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=kernels,
    )[:, :tokens]
    # 5. What a kernel leaves behind the end of a stream is not defined.
    if lengths is not None and order is not None:
        out = jnp.where(
            (jnp.arange(tokens) < lengths[:, None])[..., None, None], out, 0
        )
        out = jnp.take_along_axis(
            out, jnp.argsort(order, axis=1)[..., None, None], axis=1
        )
    return out[:, query_places]
