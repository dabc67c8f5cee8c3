"""Decoder: the backbone that is a language model, Gemma 3, Qwen 3 or Llama 3.

Its layers are those of decoder_block.py; loop, prefix cache, live positions and BFTS on
top are TokenFormer's. What a language model has been trained on decides the rest:

*Positions* count the real tokens of a stream, 0, 1, 2, .. (TokenFormer's count events).

*Padding* lies in front of all real tokens. A stream has it elsewhere: in front of the
history, and behind the words of each text. So tokens are moved to the right of their
prefix, or of their candidate, in their order; windows then count real tokens only:

    made      task text . . . history . . words .      .: padding
    computed  . . . . . . task text history words

A candidate of several tokens is moved on its own, so that in a layer with a window its
own padding counts as distance to the prefix.

*Static tokens* are seen by all later tokens, as any other: `Layout.static` is not used.

Letters: B batch, S stream length, P prefix length, C candidates, n tokens of one, d
model width, h width of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.config.tuning_config import TuningConfig
from tokenrec.errors import InputError
from tokenrec.models.backbones.bfts import layer_windows, local_layers
from tokenrec.models.backbones.decoder_block import DecoderBlock, family_norm
from tokenrec.models.backbones.rope_attention import Stream
from tokenrec.models.backbones.stacking import make_blocks
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.ops.attention.rotary import rotation_by
from tokenrec.ops.rope_scaling import global_frequencies, local_frequencies
from tokenrec.sharding import RULES, on_each_device, reshard
from tokenrec.tokens.layout import Layout


class Decoder(TokenFormer):
    """A stack of the layers of a language model.

    Args:
      config: `model` of the run's config, with its `decoder`.
      longest: not read.
      tuning: `tuning` of the run's config; None for weights that are all trained.
    """

    def __init__(
        self,
        config: ModelConfig,
        longest: Layout | None = None,
        *,
        tuning: TuningConfig | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.places = None
        windows, local = layer_windows(config), local_layers(config)
        self.blocks = make_blocks(
            config,
            lambda layer: DecoderBlock(
                config,
                tuning or TuningConfig(),
                windows[layer],
                local=local[layer],
                rngs=rngs,
            ),
        )
        self.norm = family_norm(config, config.width)

    def _as_layer(self, block: Any, layer: int) -> Any:
        """Give a block of a stack the window and the positions of its layer."""
        block.attention.window = layer_windows(self.config)[layer]
        block.attention.local = local_layers(self.config)[layer]
        return block

    def kept_of(self, stream: Stream) -> jax.Array:
        """Real tokens of the prefix, which the positions behind it continue."""
        return stream.valid[:, : len(stream.positions)]

    def prepare_inputs(
        self,
        x: jax.Array,
        layout: Layout,
        positions: np.ndarray,
        events: jax.Array,
        candidates: jax.Array | None,
        present: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, Stream]:
        """Move padding to the front, and compute positions.

        Args:
          x: `[B, n, d]`, tokens of the whole stream, of its prefix or behind it.
          layout: layout of the whole stream.
          positions: `[n]`, the stream positions of `x`, ascending.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.
          present: `[B, n] bool`, tokens that are none of those that fill a text up;
            None: all of them.
          prefix: `PrefixCache.present`, where `x` continues a cached prefix.

        Returns:
          `[B, n, d]`, the moved tokens, and the stream.

        Raises:
          InputError: the layout hides static tokens.
        """
        if layout.static.any():
            raise InputError(
                f"layout.static marks {int(layout.static.sum())} tokens, which a "
                "language model does not hide; make the layout with "
                "marks_static=False"
            )
        # Not `prefix_length`: in user-centric streams the codes of a goal continue an
        # event in the middle of the prefix, which is its `anchor` below.
        count, first = int(np.sum(layout.candidate < 0)), int(positions[0])
        real = layout.valid(events, candidates)
        here = real[:, first : first + len(positions)]
        here = here if present is None else here & present
        # 1. The prefix, or its part of `x`.
        parts, valid = [], []
        if first < count:
            tokens, own = x[:, :count], here[:, :count]
            if self._is_padded_inside(layout, count, present):
                tokens, own = move_right(tokens, own)
            parts.append(tokens)
            valid.append(own)
        else:
            assert prefix is not None
            valid.append(prefix)
        before = jnp.cumsum(valid[0], axis=1, dtype=jnp.int32)
        rope = [jnp.maximum(before - 1, 0)] if first < count else []
        # 2. The candidates, each on its own.
        behind = layout.length - count
        if first + len(positions) > count and behind:
            shape = (x.shape[0] * layout.candidates, behind // layout.candidates)
            tokens = _rows(x[:, count - min(first, count) :], shape)
            own = _rows(here[:, count - min(first, count) :], shape)
            if present is not None:
                tokens, own = move_right(tokens, own)
            anchors = np.minimum(layout.reach[count :: shape[1]], count - 1)
            start = _rows(before[:, anchors], (shape[0], 1))
            place = start + jnp.cumsum(own, axis=1, dtype=jnp.int32) - 1
            parts.append(_rows(tokens, (x.shape[0], behind)))
            valid.append(_rows(own, (x.shape[0], behind)))
            rope.append(_rows(jnp.maximum(place, 0), (x.shape[0], behind)))
        elif behind:
            valid.append(real[:, count:])
        x = jnp.concatenate(parts, axis=1)
        places = jnp.concatenate(rope, axis=1)
        stream = Stream(
            layout,
            positions,
            rotation_by(places, global_frequencies(self.config)),
            jnp.concatenate(valid, axis=1),
        )
        if any(local_layers(self.config)):
            turn = rotation_by(places, local_frequencies(self.config))
            stream = stream._replace(local_turn=turn)
        return x, stream

    def _is_padded_inside(
        self, layout: Layout, count: int, present: jax.Array | None
    ) -> bool:
        """Whether padding of a prefix may lie behind a real token, and would matter."""
        if present is not None:
            return True
        # Positions are counted; only a window would see the gap.
        has_window = any(layer_windows(self.config))
        has_history = bool((layout.event[:count] >= 0).any())
        return has_window and has_history and layout.event[0] < 0


def move_right(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Move padding to the front; real tokens keep their order.

    Args:
      x: `[B, n, d]`, tokens.
      real: `[B, n] bool`, those that are no padding.

    Returns:
      The moved tokens, and which of them are real.
    """

    def move(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        order = jnp.argsort(real, axis=1, stable=True)
        moved = jnp.take_along_axis(x, order[..., None], axis=1)
        return moved, jnp.take_along_axis(real, order, axis=1)

    if jax.sharding.get_abstract_mesh().empty:
        return move(x, real)
    specs = RULES("batch", None, None), RULES("batch", None)
    return on_each_device(move, specs, specs)(
        *(reshard(part, spec) for part, spec in zip((x, real), specs, strict=True))
    )


def _rows(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Reshape `[., ., ...]` to other rows, of which the batch is split."""
    spec = RULES("batch", *[None] * (x.ndim - 1))
    out = None if jax.sharding.get_abstract_mesh().empty else spec
    return jnp.reshape(x, (*shape, *x.shape[2:]), out_sharding=out)
