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
from collections.abc import Callable

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
from tokenrec.models.backbones.folded_attention import (
    attend,
    fold,
    make_masks,
    select_tokens,
    unfold,
)
from tokenrec.models.backbones.rope_attention import KeysValues, Stream
from tokenrec.models.backbones.tokenformer import PrefixCache, TokenFormer
from tokenrec.ops.attention.rotary import Rotation, rotate
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import rms_normalize
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout


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
    check_candidates(layout, x)
    count = prefix_length(layout)
    behind = np.arange(count, layout.length)
    # Additive positions, if any, are those of every candidate.
    places, stream = backbone.prepare_inputs(
        jnp.zeros_like(x[:, 0]), layout, behind, events, None
    )
    if backbone.places is not None:
        x = x + places[:, None]
    return extend_layers(
        backbone, cache, x, layout, functools.partial(_block, stream=stream)
    )


def extend_layers(
    backbone: TokenFormer,
    cache: PrefixCache,
    x: jax.Array,
    layout: Layout,
    compute: Callable[..., jax.Array],
) -> jax.Array:
    """Compute all layers at the live tokens of candidates, and read them out.

    Args:
      backbone: the backbone.
      cache: as in `extend_folded`.
      x: `[B, C, K, d]`, inputs of the first layer.
      layout: as in `extend_folded`.
      compute: a layer, as `_block` without its stream.

    Returns:
      `[B, C, R, d]`, the R read-outs of each candidate.
    """
    count = prefix_length(layout)
    # The live positions behind the prefix.
    positions = [
        live[np.searchsorted(live, count) :]
        for live in layer_positions(backbone.config, layout)
    ]
    x = select_tokens(x, positions[0], np.arange(count, layout.length))
    cached = cached_positions(backbone.config, layout)
    for block, inputs, outputs, past, kept in zip(
        backbone.layers(), positions, positions[1:], cache.layers, cached, strict=False
    ):
        x = compute(block, x, outputs, inputs, past, kept)
    readout = layout.readout[layout.readout >= count]
    return backbone.norm(select_tokens(x, readout, positions[-1]))


def check_candidates(layout: Layout, x: jax.Array) -> None:
    """Check that a layout is that of one candidate.

    Args:
      layout: the layout.
      x: `[B, C, K, d]`, tokens of candidates.

    Raises:
      InputError: it has another number of candidates than one, or of tokens than `x`.
    """
    behind = layout.length - prefix_length(layout)
    if layout.candidates != 1 or x.shape[2] != behind:
        raise InputError(
            f"x {x.shape}: the layout has {layout.candidates} candidates of together "
            f"{behind} tokens; pass the layout of one candidate of {x.shape[2]}"
        )


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
        unfold(attention.project(fold(normed), kernel), len(inputs))
        for kernel in (attention.key, attention.value)
    ]
    queries = select_tokens(normed, outputs, inputs)
    q = unfold(attention.project(fold(queries), attention.query), len(outputs))
    if attention.qk_norm:
        q, own[0] = rms_normalize(q), rms_normalize(own[0])
    q, own[0] = _rotate(q, outputs, stream), _rotate(own[0], inputs, stream)
    # 2. Attend to the prefix and to the candidate itself.
    masks = make_masks(
        stream.layout, outputs, inputs, kept, attention.window, stream.valid
    )
    attended = attend(q, past, KeysValues(*own), masks)
    branch = contract(
        "bqhk,hkd->bqd",
        fold(attended),
        attention.output[...],
        RULES("batch", None, None),
    )
    # 3. Residual, gate and FFN are local to a token.
    x = fold(select_tokens(x, outputs, inputs))
    if block.gate is not None:
        branch = block.gate(x) * branch
    x = x + branch
    return unfold(x + block.ffn(block.ffn_norm(x)), len(outputs))


def _rotate(x: jax.Array, positions: np.ndarray, stream: Stream) -> jax.Array:
    """Apply RoPE to `x: [B, C, n, H, h]`, which holds `positions: [n]`."""
    angles = (part[:, None] for part in stream.angles(positions))
    return rotate(x, Rotation(*angles))
