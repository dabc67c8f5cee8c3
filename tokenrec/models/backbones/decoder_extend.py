"""Score candidates of a language model against a prefix cache, each beside the others.

As folded_extend.py, whose equations of attention are the same, with the layers of
decoder_block.py. Fill of a candidate's texts is moved to its front, as in decoder.py.

Letters: B requests, C candidates, K tokens of a candidate, n and m of them at the input
and the output of a layer, P cached tokens of the prefix, H heads of queries, G of keys and
values, h width of a head, d model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.models.backbones.bfts import (
    cached_positions,
    layer_positions,
    local_layers,
    prefix_length,
)
from tokenrec.models.backbones.decoder import Decoder, move_right
from tokenrec.models.backbones.decoder_block import DecoderBlock, Rotate
from tokenrec.models.backbones.folded_attention import (
    attend,
    fold,
    select_tokens,
    sight,
    unfold,
)
from tokenrec.models.backbones.folded_extend import check_candidates
from tokenrec.models.backbones.rope_attention import KeysValues
from tokenrec.models.backbones.tokenformer import PrefixCache
from tokenrec.ops.attention.rotary import Rotation, rotate, rotation_by
from tokenrec.ops.rope_scaling import global_frequencies, local_frequencies
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout


class _Candidates(NamedTuple):
    """What the layers share.

    Attributes:
      layout: layout of a stream with one candidate.
      positions: `[K]`, stream positions of its tokens.
      turn: their RoPE angles, `[B, C, K, 1, h]`.
      local_turn: those of layers that have a window in the checkpoint; None without any.
      prefix: `[B, P] bool`, real tokens of the prefix.
      valid: `[B, C, K] bool`, real tokens of the candidates.
    """

    layout: Layout
    positions: np.ndarray
    turn: Rotation
    local_turn: Rotation | None
    prefix: jax.Array
    valid: jax.Array

    def rotation_of(self, positions: np.ndarray, *, local: bool) -> Rotate:
        """Make what applies RoPE to `[B, C n, H, h]`, tokens of `positions`."""
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
    count = prefix_length(layout)
    # The live positions behind the prefix.
    positions = [
        live[np.searchsorted(live, count) :]
        for live in layer_positions(backbone.config, layout)
    ]
    x = select_tokens(x, positions[0], shared.positions)
    cached = cached_positions(backbone.config, layout)
    for block, inputs, outputs, past, kept in zip(
        backbone.layers(), positions, positions[1:], cache.layers, cached, strict=False
    ):
        x = _layer(block, x, outputs, inputs, past, kept, shared)
    readout = layout.readout[layout.readout >= count]
    return backbone.norm(select_tokens(x, readout, positions[-1]))


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
    split = on_mesh(RULES("batch", None, None))
    valid = jnp.ones((batch, candidates, tokens), bool, out_sharding=split)
    if present is not None:
        # Each candidate is a row.
        rows = batch * candidates
        moved, real = move_right(
            _rows(x, (rows, tokens, width)), _rows(present, (rows, tokens))
        )
        x, valid = _rows(moved, x.shape), _rows(real, valid.shape)
    count = prefix_length(layout)
    # Tokens are counted from the last one of the prefix that the candidate sees.
    anchor = min(int(layout.reach[count]), count - 1)
    start = jnp.sum(prefix[:, : anchor + 1], axis=1, dtype=jnp.int32)
    places = start[:, None, None] + jnp.cumsum(valid, axis=2, dtype=jnp.int32) - 1
    places = jnp.maximum(places, 0)
    config = backbone.config
    turn = rotation_by(places, global_frequencies(config))
    local_turn = None
    if any(local_layers(config)):
        local_turn = rotation_by(places, local_frequencies(config))
    positions = np.arange(count, layout.length)
    return x, _Candidates(layout, positions, turn, local_turn, prefix, valid)


def _rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshape what is split over its first axis."""
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
      shared: what all layers share.
    """
    attention = block.attention
    normed = block.attention_norm(x)
    # 1. Project: pointwise, so that candidates and tokens may lie in one axis.
    of_inputs, of_outputs = (
        shared.rotation_of(positions, local=attention.local)
        for positions in (inputs, outputs)
    )
    own = attention.keys_values(fold(normed), of_inputs, None)
    queries = fold(select_tokens(normed, outputs, inputs))
    q = attention.queries(queries, of_outputs, None)
    # 2. Attend to the prefix and to the candidate itself.
    sees = sight(
        shared.layout,
        outputs,
        inputs,
        kept,
        attention.window,
        shared.prefix,
        select_tokens(shared.valid, inputs, shared.positions),
    )
    attended = attend(
        unfold(q, len(outputs)),
        past,
        KeysValues(*(unfold(part, len(inputs)) for part in own)),
        sees,
    )
    branch = attention.join_heads(fold(attended), None)
    # 3. Residual and FFN are local to a token.
    x = fold(select_tokens(x, outputs, inputs))
    return unfold(block.add_branches(x, branch), len(outputs))
