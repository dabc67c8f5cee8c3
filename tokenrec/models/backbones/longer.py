"""LONGER: long histories by merging neighbouring events and querying with few of them.

*LONGER: Scaling Up Long Sequence Modeling in Industrial Recommenders* (Chai et al.,
arXiv 2505.04421, 2025):

    m_i      = InnerTrans(g neighbouring events)     token merge, n = ceil(T / g) tokens
    layer 1  queries: newest n/2 merged tokens and the global tokens
             keys:    all merged tokens and the global tokens     cross causal attention
    layer l  the outputs of layer 1 among each other               self causal attention
    output   = RMSNorm(X_L)[last token of each target]

How it differs from the paper: global tokens are the tokens of user and target (paper:
target, user and learned ones). A merged token has width d, by a learned query over the
inner Transformer layer (`AttentionPooling`); the paper concatenates, which makes it g d
wide. RoPE gives the order; the paper adds the age of each event and a learned position.
Layers are this project's block without gate (block.py). Also ours: half of the merged
tokens of the config's longest stream are queries; user tokens do not see the target, so
that the candidates of a request share them; the top layer computes the read-outs alone.
g is `model.merge`.

Letters: B batch, S stream length, T events, g events of a merged token, n merged
tokens, C candidates, d model width."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import Block
from tokenrec.models.backbones.ctr_inputs import split_stream
from tokenrec.models.backbones.history_first import (
    history_first_layout,
    user_and_candidate_positions,
)
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.rope_attention import Stream
from tokenrec.ops.attention.rotary import rotation
from tokenrec.ops.layers import RMSNorm, split_keys
from tokenrec.tokens.history_compression import AttentionPooling
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import StreamSegment


class LONGER(Backbone):
    """Token merge, a cross attention layer, then self attention layers."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        self.group = config.merge
        # Merged tokens among the queries of layer 1: half of those of the longest
        # stream, rounded down.
        self.queries = -(-longest.events // self.group) // 2
        self.pool = AttentionPooling(config.width, config.heads, self.group, rngs=rngs)
        without_gate = dataclasses.replace(config, gate=False)
        self.blocks = nnx.List(
            [Block(without_gate, None, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = RMSNorm(config.width)

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Compute the output of each layer and the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.

        Returns:
          `[B, n_l, d]` of each layer, then the read-outs `[B, C, d]`.
        """
        # 1. Merge the events; the stream is [merged, user, candidates].
        merged = self.pool(split_stream(x, layout).events, events)
        merged_layout = self._merged_layout(layout)
        # Separators are dropped.
        global_tokens = x[:, user_and_candidate_positions(layout)]
        x = jnp.concatenate([merged, global_tokens], axis=1)
        head_width = self.config.width // self.config.heads
        turn = rotation(
            merged_layout.rope_positions(events), head_width, self.config.rope_base
        )
        stream = Stream(
            merged_layout,
            np.arange(merged_layout.length),
            turn,
            merged_layout.valid(events, candidates),
        )
        # 2. The layers.
        layer_outputs = []
        layer_keys = split_keys(key, len(self.blocks))
        for block, layer, layer_key in zip(
            self.blocks, self.attention_layers(layout), layer_keys, strict=True
        ):
            pattern = layer.pattern
            x = block(
                x, pattern.query_positions, pattern.key_positions, stream, layer_key
            )
            layer_outputs.append(x)
        return [*layer_outputs, self.norm(x)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attention of each layer, bottom first."""
        stream = self._merged_layout(layout)
        merged = int(np.sum(stream.event >= 0))
        stream_positions = np.arange(stream.length)
        # The newest merged tokens and all global ones.
        queries = np.arange(max(merged - self.queries, 0), stream.length)
        # Inputs of each layer, then the output of the last.
        positions = [
            stream_positions,
            *[queries] * (len(self.blocks) - 1),
            stream.readout,
        ]
        return tuple(
            AttentionLayer(stream.pattern(outputs, inputs))
            for inputs, outputs in itertools.pairwise(positions)
        )

    def _merged_layout(self, layout: Layout) -> Layout:
        """Lay out the merged tokens, the user and the candidates.

        Groups end at the newest event. A merged token has the RoPE position of the
        newest event of its group."""
        newest = np.arange(layout.events - 1, -1, -self.group)[::-1]
        return history_first_layout(layout, StreamSegment.history("event", newest))
