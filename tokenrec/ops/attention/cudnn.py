"""Attention on NVIDIA GPUs: the fused kernels of cuDNN, through `jax.nn.dot_product_attention`.

The kernels know causal order, one window and one length per stream, so a stream's valid rows are first moved to its
front, in order. That changes no distance that a window counts: padding stands before the events of a stream.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import Pattern

# Padded up to the keys, queries cost what the keys would; below this share the tiles of XLA do less.
FEWEST_QUERIES = 0.5


def refusal(q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None) -> str:
    """Why the kernels cannot serve, in cuDNN's words where it is the one that says so."""
    query, key = (
        pattern.rows(pattern.query_rows, window),
        pattern.rows(pattern.key_rows, window),
    )
    if (key.candidate > 0).any():
        return "several candidates share a stream, and cuDNN knows causal order only"
    if (key.reach != key.index).any():
        return "the prefix is bidirectional, and cuDNN knows causal order only"
    if window is not None and key.static.any():
        return "a sliding layer still holds static rows, which its events must not see"
    if window is not None and (np.diff(key.index) != 1).any():
        return "rows are missing between the keys of a sliding layer"
    if len(query.row) < FEWEST_QUERIES * len(key.row):
        return f"{len(query.row)} queries of {len(key.row)} rows, and cuDNN computes all rows"

    def fused(q: jax.Array, k: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, k, is_causal=True, implementation="cudnn"
        )

    whole = jax.ShapeDtypeStruct(k.shape, k.dtype)
    try:
        jax.eval_shape(fused, whole, whole)
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
    """Attention by fused kernels, arguments as in `attention`; `kernels="xla"` computes the same call anywhere."""
    at = np.searchsorted(pattern.key_rows, pattern.query_rows)
    queries = (
        jnp.zeros_like(k).at[:, at].set(q, unique_indices=True, indices_are_sorted=True)
    )
    if valid is None:
        lengths, order = None, None
    else:
        lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
        order = jnp.argsort(~valid, axis=1, stable=True)
        queries, k, v = (
            jnp.take_along_axis(x, order[..., None, None], axis=1)
            for x in (queries, k, v)
        )
    out = jax.nn.dot_product_attention(
        queries,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=kernels,
    )
    if lengths is not None and order is not None:
        # What a kernel leaves behind the end of a stream is not defined.
        out = jnp.where(
            (jnp.arange(k.shape[1]) < lengths[:, None])[..., None, None], out, 0
        )
        out = jnp.take_along_axis(
            out, jnp.argsort(order, axis=1)[..., None, None], axis=1
        )
    return out[:, at]
