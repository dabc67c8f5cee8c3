"""Score candidates against a prefix cache, each beside the others and not among them.

`TokenFormer.extend` puts C candidates into one stream, where each token has a logit for
every token of every candidate, all but its own masked. A candidate sees nothing but the
prefix and itself, so that here it is an axis of its own. For token i of candidate c,
with prefix p and own tokens j, in a layer:

    s_ip = q_ci . k_p / sqrt(h),    s_ij = q_ci . k_cj / sqrt(h),    masked as in bfts.py
    out  = (sum_p e^(s_ip - m) v_p + sum_j e^(s_ij - m) v_cj)
           / (sum_p e^(s_ip - m) + sum_j e^(s_ij - m)),              m the largest logit

The logits are `C K (P + K)` and not `C K (P + C K)`, and C enters no static array: a
program may leave it open, as an exported one does.

Letters: B requests, C candidates, K tokens of a candidate, n and m of them at the input
and the output of a layer, P cached tokens of the prefix, H heads of width h, d width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.models.backbones.bfts import (
    cached_positions,
    layer_positions,
    prefix_length,
)
from tokenrec.models.backbones.block import Block
from tokenrec.models.backbones.rope_attention import KeysValues, Stream
from tokenrec.models.backbones.tokenformer import PrefixCache, TokenFormer
from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.attention.rotary import Rotation, rotate
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import rms_normalize
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout, select_positions


def extend_folded(
    backbone: TokenFormer,
    cache: PrefixCache,
    x: jax.Array,
    layout: Layout,
    events: jax.Array,
) -> jax.Array:
    """Compute the read-outs of candidates from the cache of their prefix.

    The result is that of `TokenFormer.extend` for a stream of all candidates.

    Args:
      backbone: the backbone that made the cache.
      cache: the result of `prefill` for a layout with the same prefix.
      x: `[B, C, K, d]`, tokens of the candidates, of which none is padding.
      layout: layout of a stream with one candidate of K tokens.
      events: `[B, T] bool`, real events.

    Returns:
      `[B, C, R, d]`, the R read-outs of each candidate.

    Raises:
      InputError: the layout has another number of candidates than one, or of tokens
        than `x`.
    """
    count = prefix_length(layout)
    behind = np.arange(count, layout.length)
    if layout.candidates != 1 or x.shape[2] != len(behind):
        raise InputError(
            f"x {x.shape}: the layout has {layout.candidates} candidates of together "
            f"{len(behind)} tokens; pass the layout of one candidate of {x.shape[2]}"
        )
    # Additive positions, if any, are those of every candidate.
    places, stream = backbone.prepare_inputs(
        jnp.zeros_like(x[:, 0]), layout, behind, events, None
    )
    if backbone.places is not None:
        x = x + places[:, None]
    # The live positions behind the prefix.
    positions = [
        live[np.searchsorted(live, count) :]
        for live in layer_positions(backbone.config, layout)
    ]
    x = _select(x, positions[0], behind)
    cached = cached_positions(backbone.config, layout)
    for block, inputs, outputs, past, kept in zip(
        backbone.layers(), positions, positions[1:], cache.layers, cached, strict=False
    ):
        x = _block(block, x, outputs, inputs, past, kept, stream)
    readout = layout.readout[layout.readout >= count]
    return backbone.norm(_select(x, readout, positions[-1]))


def _block(
    block: Block,
    x: jax.Array,
    outputs: np.ndarray,
    inputs: np.ndarray,
    past: KeysValues,
    kept: np.ndarray,
    stream: Stream,
) -> jax.Array:
    """Compute a layer (block.py) for some tokens of each candidate.

    Args:
      block: the layer.
      x: `[B, C, n, d]`, its inputs.
      outputs: `[m]`, stream positions whose outputs are needed.
      inputs: `[n]`, stream positions of `x`.
      past: cached keys and values of the prefix.
      kept: `[P]`, their stream positions.
      stream: a stream with one candidate; its angles are those of every candidate.

    Returns:
      `[B, C, m, d]`.
    """
    attention = block.attention
    normed = block.attention_norm(x)
    # 1. Project: pointwise, so that candidates and tokens may lie in one axis.
    own = [
        _unfold(attention.project(_fold(normed), kernel), len(inputs))
        for kernel in (attention.key, attention.value)
    ]
    queries = _select(normed, outputs, inputs)
    q = _unfold(attention.project(_fold(queries), attention.query), len(outputs))
    if attention.qk_norm:
        q, own[0] = rms_normalize(q), rms_normalize(own[0])
    q, own[0] = _rotate(q, outputs, stream), _rotate(own[0], inputs, stream)
    # 2. Attend to the prefix and to the candidate itself.
    pattern = stream.layout.pattern(outputs, np.concatenate([kept, inputs]))
    visible, diagonal = pattern.visible(attention.window), pattern.diagonal()
    stream_positions = np.arange(stream.layout.length)
    valid = select_positions(stream.valid, kept, stream_positions)
    attended = _attend(
        q,
        past,
        KeysValues(*own),
        jnp.asarray(visible[:, : len(kept)]) & valid[:, None, :],
        (visible | diagonal)[:, len(kept) :],
    )
    branch = contract(
        "bqhk,hkd->bqd",
        _fold(attended),
        attention.output[...],
        RULES("batch", None, None),
    )
    # 3. Residual, gate and FFN are local to a token.
    x = _fold(_select(x, outputs, inputs))
    if block.gate is not None:
        branch = block.gate(x) * branch
    x = x + branch
    return _unfold(x + block.ffn(block.ffn_norm(x)), len(outputs))


def _rotate(x: jax.Array, positions: np.ndarray, stream: Stream) -> jax.Array:
    """Apply RoPE to `x: [B, C, n, H, h]`, which holds `positions: [n]`."""
    angles = (part[:, None] for part in stream.angles(positions))
    return rotate(x, Rotation(*angles))


def _attend(
    q: jax.Array,
    past: KeysValues,
    own: KeysValues,
    sees_past: jax.Array,
    sees_own: np.ndarray,
) -> jax.Array:
    """Compute attention, `[B, C, m, H, h]`, without a product between candidates.

    Args:
      q: `[B, C, m, H, h]`.
      past: keys and values `[B, P, H, h]`.
      own: keys and values `[B, C, n, H, h]`.
      sees_past: `[B, m, P] bool`.
      sees_own: `[m, n] bool`; every token sees at least itself.
    """
    q, k, v = (_by_head(x) for x in (q * q.shape[-1] ** -0.5, *own))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # 1. Logits: of the prefix for the tokens of all candidates in one product per head.
    past_logits = einsum("bhcmd,bphd->bhcmp", q, past.keys)
    past_logits = jnp.where(sees_past[:, None, None], past_logits, MASKED)
    own_logits = jnp.where(sees_own, _pair_products(q, k), MASKED)
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
    sums = einsum("bhcmp,bphd->bhcmd", past_weights.astype(dtype), past.values)
    if sees_own.shape == (1, 1):
        sums += own_weights * v
    else:
        sums += einsum("bhcmn,bhcnd->bhcmd", own_weights.astype(dtype), v)
    return jnp.moveaxis((sums / total).astype(dtype), 1, 3)


def _by_head(x: jax.Array) -> jax.Array:
    """`[B, C, n, H, h]` -> `[B, H, C, n, h]`."""
    return jnp.moveaxis(x, 3, 1)


def _pair_products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiply the tokens of each candidate, `[..., m, h]` by `[..., n, h]`, float32."""
    if q.shape[-2] == k.shape[-2] == 1:
        # XLA on CPU has no fast product of so many matrices of one row.
        products = (q * k).astype(jnp.float32)
        return jnp.sum(products, axis=-1, keepdims=True)
    return jnp.einsum("...md,...nd->...mn", q, k, preferred_element_type=jnp.float32)


def _select(x: jax.Array, positions: np.ndarray, among: np.ndarray) -> jax.Array:
    """Select tokens of each candidate, `[B, C, n, ...]` to `[B, C, m, ...]`."""
    entries = np.searchsorted(among, positions)
    if len(entries) == x.shape[2]:
        return x
    if len(entries) == 1:
        return x[:, :, int(entries[0]) : int(entries[0]) + 1]
    return x[:, :, entries]


def _fold(x: jax.Array) -> jax.Array:
    """`[B, C, n, ...]` -> `[B, C n, ...]`."""
    shape = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    heads = ("heads", None) if x.ndim == 5 else (None,)
    return jnp.reshape(x, shape, out_sharding=on_mesh(RULES("batch", None, *heads)))


def _unfold(x: jax.Array, tokens: int) -> jax.Array:
    """`[B, C n, ...]` -> `[B, C, n, ...]`."""
    shape = (x.shape[0], x.shape[1] // tokens, tokens, *x.shape[2:])
    heads = ("heads", None) if x.ndim == 4 else (None,)
    spec = RULES("batch", None, None, *heads)
    return jnp.reshape(x, shape, out_sharding=on_mesh(spec))
