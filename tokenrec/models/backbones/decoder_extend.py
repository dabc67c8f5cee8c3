"""Score candidates of a language model against a prefix cache, each beside the others.

As folded_extend.py, whose equations of attention are the same, with the layers of
decoder_block.py. Fill of a candidate's texts is moved to its front, as in decoder.py.

Letters: B requests, C candidates, K tokens of a candidate, n and m of them at the input
and the output of a layer, P cached tokens of the prefix, H heads of queries, G of keys and
values, h width of a head, d model width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.models.backbones.bfts import local_layers, prefix_length
from tokenrec.models.backbones.decoder import Decoder, move_right
from tokenrec.models.backbones.decoder_block import DecoderBlock, Rotate
from tokenrec.models.backbones.folded_attention import (
    attend,
    fold,
    make_masks,
    select_tokens,
    unfold,
)
from tokenrec.models.backbones.folded_extend import check_candidates, extend_layers
from tokenrec.models.backbones.rope_attention import KeysValues
from tokenrec.models.backbones.tokenformer import PrefixCache
from tokenrec.ops.attention.rotary import Rotation, rotate, rotation_by
from tokenrec.ops.rope_scaling import global_frequencies, local_frequencies
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout


class _Candidates(NamedTuple):
    """Positions and masks of the candidates, the same for all layers.

    Attributes:
      layout: layout of a stream with one candidate.
      positions: `[K]`, stream positions of its tokens.
      turn: their RoPE angles, `[B, C, K, 1, h]`; with 1 for C where nothing is fill, so
        that all candidates have the same.
      local_turn: those of layers that have a window in the checkpoint; None without any.
      prefix: `[B, P] bool`, real tokens of the prefix.
      valid: `[B, C, K] bool`, tokens of the candidates that are no fill; None: all.
    """

    layout: Layout
    positions: np.ndarray
    turn: Rotation
    local_turn: Rotation | None
    prefix: jax.Array
    valid: jax.Array | None

    def rotate_at(self, positions: np.ndarray, *, local: bool) -> Rotate:
        """Return a function that applies RoPE to `[B, C n, H, h]`, at `positions: [n]`."""
        turn = self.turn if self.local_turn is None or not local else self.local_turn
        turn = Rotation(
            *(select_tokens(part, positions, self.positions) for part in turn)
        )
        return lambda x: fold(rotate(unfold(x, len(positions)), turn))


def extend_decoder(
    backbone: Decoder,
    cache: PrefixCache,
    x: jax.Array,
    layout: Layout,
    present: jax.Array | None,
) -> jax.Array:
    """Compute the read-outs of candidates from the cache of their prefix.

    The result is that of `Decoder.extend` for a stream of all candidates.

    Args:
      backbone: the backbone that made the cache.
      cache: the result of `prefill` for a layout with the same prefix.
      x: `[B, C, K, d]`, tokens of the candidates.
      layout: layout of a stream with one candidate of K tokens.
      present: `[B, C, K] bool`, tokens that are none of those that fill a text up; None:
        all of them.

    Returns:
      `[B, C, R, d]`, the R read-outs of each candidate.

    Raises:
      InputError: as `extend_folded`.
    """
    check_candidates(layout, x)
    assert cache.present is not None
    x, shared = _prepare_inputs(backbone, cache.present, x, layout, present)
    return extend_layers(
        backbone, cache, x, layout, functools.partial(_layer, shared=shared)
    )


def _prepare_inputs(
    backbone: Decoder,
    prefix: jax.Array,
    x: jax.Array,
    layout: Layout,
    present: jax.Array | None,
) -> tuple[jax.Array, _Candidates]:
    """Move fill to the front of each candidate, and compute positions.

    Args:
      backbone: the backbone.
      prefix: `[B, P] bool`, real tokens of the prefix.
      x: as in `extend_decoder`.
      layout: as in `extend_decoder`.
      present: as in `extend_decoder`.
    """
    batch, candidates, tokens, width = x.shape
    valid, ordinal = None, jnp.arange(1, tokens + 1, dtype=jnp.int32)
    if present is not None:
        # Each candidate is a row.
        rows = batch * candidates
        moved, real = move_right(
            _rows(x, (rows, tokens, width)), _rows(present, (rows, tokens))
        )
        x, valid = _rows(moved, x.shape), _rows(real, present.shape)
        ordinal = jnp.cumsum(valid, axis=2, dtype=jnp.int32)
    count = prefix_length(layout)
    # Tokens are counted from the last one of the prefix that the candidate sees.
    anchor = min(int(layout.reach[count]), count - 1)
    start = jnp.sum(prefix[:, : anchor + 1], axis=1, dtype=jnp.int32)
    places = jnp.maximum(start[:, None, None] + ordinal - 1, 0)
    config = backbone.config
    turn = rotation_by(places, global_frequencies(config))
    local_turn = None
    if any(local_layers(config)):
        local_turn = rotation_by(places, local_frequencies(config))
    positions = np.arange(count, layout.length)
    return x, _Candidates(layout, positions, turn, local_turn, prefix, valid)


def _rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshape an array of which each device holds a part of the first axis."""
    spec = RULES("batch", *[None] * (len(shape) - 1))
    return jnp.reshape(x, shape, out_sharding=on_mesh(spec))


def _layer(
    block: DecoderBlock,
    x: jax.Array,
    outputs: np.ndarray,
    inputs: np.ndarray,
    past: KeysValues,
    kept: np.ndarray,
    shared: _Candidates,
) -> jax.Array:
    """Compute a layer for some tokens of each candidate, `[B, C, m, d]`.

    Args:
      block: the layer.
      x: `[B, C, n, d]`, its inputs.
      outputs: `[m]`, stream positions whose outputs are needed.
      inputs: `[n]`, stream positions of `x`.
      past: cached keys and values of the prefix, `[B, P, G, h]`.
      kept: `[P]`, their stream positions.
      shared: positions and masks of the candidates.
    """
    attention = block.attention
    normed = block.attention_norm(x)
    # 1. Project: pointwise, so that candidates and tokens may lie in one axis.
    of_inputs, of_outputs = (
        shared.rotate_at(positions, local=attention.local)
        for positions in (inputs, outputs)
    )
    own = attention.keys_values(fold(normed), of_inputs, None)
    queries = fold(select_tokens(normed, outputs, inputs))
    q = attention.queries(queries, of_outputs, None)
    # 2. Attend to the prefix and to the candidate itself.
    masks = make_masks(
        shared.layout,
        outputs,
        inputs,
        kept,
        attention.window,
        shared.prefix,
        None
        if shared.valid is None
        else select_tokens(shared.valid, inputs, shared.positions),
    )
    attended = attend(
        unfold(q, len(outputs)),
        past,
        KeysValues(*(unfold(part, len(inputs)) for part in own)),
        masks,
    )
    branch = attention.join_heads(fold(attended), None)
    # 3. Residual and FFN are local to a token.
    x = fold(select_tokens(x, outputs, inputs))
    return unfold(block.add_branches(x, branch), len(outputs))
