"""LONGER: *LONGER: Scaling Up Long Sequence Modeling in Industrial Recommenders* (Chai et al., arXiv 2505.04421, 2025).

    m_i    = InnerTrans(g neighbouring events)                 token merge: n = ceil(T / g) tokens of T events
    first  queries [newest n / 2 of m, global tokens], keys all of m and the global tokens: cross causal attention
    then   the same rows among each other: self causal attention

The paper's global tokens are target, user and learned ones; ours are the tokens of user and target. It merges by
concatenation after a Transformer layer inside the group, which makes tokens g times as wide; ours are of width d, by a
learned query over the same layer (tokens/compress.py, AttentionPool). The paper adds to each event how long ago it was
and a learned position; here RoPE says the order, and times are not read. Its layers are this machine's block without
gate (RMSNorm, RoPE, SwiGLU). How many of the newest merged tokens ask (half, of those of the config's longest stream)
is ours, so is that the tokens of the user do not see the target, which lets the candidates of a request share them. The
top layer computes the rows that are read alone. g is `model.merge`.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import Block, Stream
from tokenrec.models.backbones.fields import fields_of
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.sequence_first import other_positions, sequence_first
from tokenrec.ops.attention.rotary import rotation
from tokenrec.ops.layers import RMSNorm, split_key
from tokenrec.tokens.compress import AttentionPool
from tokenrec.tokens.layout import Layout, StreamPart


class LONGER(Backbone):
    """Merged events below, few of them above."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config, self.group = config, config.merge
        self.asking = -(-longest.events // self.group) // 2
        self.pool = AttentionPool(config.width, config.heads, self.group, rngs=rngs)
        plain = dataclasses.replace(config, gate=False)
        self.blocks = nnx.List(
            [Block(plain, None, rngs=rngs) for _ in range(config.layers)]
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
        merged, stream = (
            self.pool(fields_of(x, layout).events, events),
            self._stream(layout),
        )
        x = jnp.concatenate([merged, x[:, other_positions(layout)]], axis=1)
        turn = rotation(
            stream.positions(events),
            self.config.width // self.config.heads,
            self.config.rope_base,
        )
        shared = Stream(
            stream, np.arange(stream.rows), turn, stream.valid(events, candidates)
        )
        made, keys = [], split_key(key, len(self.blocks))
        for block, layer, one in zip(
            self.blocks, self.attention_layers(layout), keys, strict=True
        ):
            x = block(
                x,
                layer.pattern.query_positions,
                layer.pattern.key_positions,
                shared,
                one,
            )
            made.append(x)
        return [*made, self.norm(x)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        stream = self._stream(layout)
        merged = int(np.sum(stream.event >= 0))
        some = np.arange(max(merged - self.asking, 0), stream.rows)
        rows = [
            np.arange(stream.rows),
            *[some] * (len(self.blocks) - 1),
            stream.readout,
        ]
        return tuple(
            AttentionLayer(stream.pattern(queries, keys))
            for keys, queries in itertools.pairwise(rows)
        )

    def _stream(self, layout: Layout) -> Layout:
        """Groups end at the newest event; each has its position."""
        newest = np.arange(layout.events - 1, -1, -self.group)[::-1]
        return sequence_first(layout, StreamPart.history("event", newest))
