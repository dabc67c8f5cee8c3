"""Attention of candidates to a cached prefix and to themselves, each beside the others.

The equations are in folded_extend.py. C is an axis of its own, which a program may leave
open. Projections of single tokens take C and K as one axis (`fold`).

Letters: B requests, C candidates, n and m tokens of one at the input and the output of a
layer, P cached tokens of the prefix, H heads of queries, G of keys and values, h width of
a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tokenrec.models.backbones.rope_attention import KeysValues
from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.attention.grouped import head_axis
from tokenrec.sharding import RULES, on_mesh, reshard
from tokenrec.tokens.layout import Layout, select_positions


class Masks(NamedTuple):
    """Which keys the tokens of candidates see in a layer.

    Attributes:
      past: `[B, m, P] bool`, keys of the prefix.
      own: keys of their candidate, `[m, n] bool`, or `[B, C, m, n] bool` where candidates
        differ. Every token sees itself.
    """

    past: jax.Array
    own: jax.Array | np.ndarray


def make_masks(
    layout: Layout,
    outputs: np.ndarray,
    inputs: np.ndarray,
    kept: np.ndarray,
    window: int | None,
    valid: jax.Array,
    own_valid: jax.Array | None = None,
) -> Masks:
    """Make the masks of a layer.

    Args:
      layout: layout of a stream with one candidate, S positions.
      outputs: `[m]`, stream positions of the queries.
      inputs: `[n]`, stream positions of the candidate's keys.
      kept: `[P]`, stream positions of the cached keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
      valid: `[B, S'] bool`, positions that are not padding, those of the prefix at least.
      own_valid: `[B, C, n] bool`, those of `inputs`; None: all.
    """
    pattern = layout.pattern(outputs, np.concatenate([kept, inputs]))
    visible, diagonal = pattern.visible(window), pattern.diagonal()
    valid = select_positions(valid, kept, np.arange(valid.shape[1]))
    past = jnp.asarray(visible[:, : len(kept)]) & valid[:, None, :]
    seen, itself = visible[:, len(kept) :], diagonal[:, len(kept) :]
    if own_valid is None:
        return Masks(past, seen | itself)
    return Masks(
        past, (jnp.asarray(seen) & own_valid[:, :, None]) | jnp.asarray(itself)
    )


def attend(q: jax.Array, past: KeysValues, own: KeysValues, masks: Masks) -> jax.Array:
    """Compute attention, `[B, C, m, H, h]`, without a product between candidates.

    Args:
      q: `[B, C, m, H, h]`.
      past: keys and values `[B, P, G, h]`.
      own: keys and values `[B, C, n, G, h]`.
      masks: which keys the queries see.
    """
    heads, groups = q.shape[3], own.keys.shape[3]
    # The queries of the heads that share a key are further queries of one head.
    shared = heads // groups
    if shared > 1:
        q = _heads_to_queries(q, groups)
        masks = Masks(*(jnp.repeat(mask, shared, axis=-2) for mask in masks))
    q, k, v = (_by_head(x) for x in (q * q.shape[-1] ** -0.5, *own))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # 1. Logits: of the prefix for the tokens of all candidates in one product per head.
    past_logits = einsum("bgcmd,bpgd->bgcmp", q, past.keys)
    past_logits = jnp.where(masks.past[:, None, None], past_logits, MASKED)
    own_mask = masks.own[:, None] if masks.own.ndim == 4 else masks.own
    own_logits = jnp.where(own_mask, _pair_products(q, k), MASKED)
    # 2. One softmax over both parts, which are never concatenated.
    largest = jnp.maximum(
        jnp.max(past_logits, axis=-1, keepdims=True),
        jnp.max(own_logits, axis=-1, keepdims=True),
    )
    past_weights = jnp.exp(past_logits - largest)
    own_weights = jnp.exp(own_logits - largest)
    total = jnp.sum(past_weights, axis=-1, keepdims=True) + jnp.sum(
        own_weights, axis=-1, keepdims=True
    )
    # 3. Weighted sums of the values.
    dtype = v.dtype
    sums = einsum("bgcmp,bpgd->bgcmd", past_weights.astype(dtype), past.values)
    if k.shape[-2] == 1:
        sums += own_weights * v
    else:
        sums += einsum("bgcmn,bgcnd->bgcmd", own_weights.astype(dtype), v)
    attended = jnp.moveaxis((sums / total).astype(dtype), 1, 3)
    return _queries_to_heads(attended, heads) if shared > 1 else attended


def _heads_to_queries(q: jax.Array, groups: int) -> jax.Array:
    """`[B, C, m, H, h]` -> `[B, C, m r, G, h]`, where H = G r."""
    batch, candidates, tokens, heads, width = q.shape
    axis = head_axis(groups)
    q = reshard(q, RULES("batch", None, None, axis, None))
    q = _reshape(
        q, (batch, candidates, tokens, groups, heads // groups, width), 3, axis
    )
    shape = (batch, candidates, tokens * (heads // groups), groups, width)
    return _reshape(jnp.swapaxes(q, 3, 4), shape, 3, axis)


def _queries_to_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, C, m r, G, h]` -> `[B, C, m, H, h]`, the inverse of `_heads_to_queries`."""
    batch, candidates, queries, groups, width = x.shape
    axis, shared = head_axis(groups), heads // groups
    shape = (batch, candidates, queries // shared, shared, groups, width)
    x = jnp.swapaxes(_reshape(x, shape, 4, axis), 3, 4)
    x = _reshape(x, (*shape[:3], heads, width), 3, axis)
    return reshard(x, RULES("batch", None, None, "heads", None))


def _reshape(
    x: jax.Array, shape: tuple[int, ...], heads: int, axis: str | None
) -> jax.Array:
    """Reshape to a shape whose axis number `heads` is the logical axis `axis`."""
    spec = RULES("batch", *(axis if n == heads else None for n in range(1, len(shape))))
    return jnp.reshape(x, shape, out_sharding=on_mesh(spec))


def _by_head(x: jax.Array) -> jax.Array:
    """`[B, C, n, H, h]` -> `[B, H, C, n, h]`."""
    return jnp.moveaxis(x, 3, 1)


def _pair_products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiply the tokens of each candidate, `[..., m, h]` by `[..., n, h]`, float32."""
    if k.shape[-2] == 1:
        # XLA on CPU has no fast product of so many matrices of one row.
        products = (q * k).astype(jnp.float32)
        return jnp.sum(products, axis=-1, keepdims=True)
    return jnp.einsum("...md,...nd->...mn", q, k, preferred_element_type=jnp.float32)


def select_tokens(x: jax.Array, positions: np.ndarray, among: np.ndarray) -> jax.Array:
    """Select tokens of each candidate, `[B, C, n, ...]` to `[B, C, m, ...]`.

    Args:
      x: the tokens of the stream positions `among`.
      positions: `[m]`, the stream positions to select, ascending.
      among: `[n]`, ascending.
    """
    entries = np.searchsorted(among, positions)
    if len(entries) == x.shape[2]:
        return x
    if len(entries) == 1:
        return x[:, :, int(entries[0]) : int(entries[0]) + 1]
    return x[:, :, entries]


def fold(x: jax.Array) -> jax.Array:
    """`[B, C, n, d]` -> `[B, C n, d]`, likewise with heads, `[.., H, h]`."""
    shape = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    return jnp.reshape(x, shape, out_sharding=on_mesh(_split(shape, heads=2)))


def unfold(x: jax.Array, tokens: int) -> jax.Array:
    """`[B, C n, ...]` -> `[B, C, n, ...]`, n `tokens` of each candidate."""
    shape = (x.shape[0], x.shape[1] // tokens, tokens, *x.shape[2:])
    return jnp.reshape(x, shape, out_sharding=on_mesh(_split(shape, heads=3)))


def _split(shape: tuple[int, ...], heads: int) -> PartitionSpec:
    """How an array is split whose axis number `heads` is one of heads, or its last."""
    rest = [None] * (len(shape) - heads)
    if len(rest) == 2:
        return RULES("batch", *[None] * (heads - 1), head_axis(shape[heads]), None)
    return RULES("batch", *[None] * (heads - 1), *rest)
