"""SASRec: *Self-Attentive Sequential Recommendation* (Kang and McAuley, arXiv 1808.09781, 2018).

    X^0 = e_t + p_t                             events alone, p_t learned, t counts the events of the stream
    X   = X + A(norm(X));  X' = X + relu(norm(X) W_1 + b_1) W_2 + b_2      A causal, without rotary positions
    h   = norm(X_t)

Retrieval reads h, which the head multiplies with the vectors of items, as the paper does. Ranking reads `h * v`, of the
newest event before the target v: the head then takes a weighted dot product for each task. A user without an event has
a learned h. The paper's events are items alone, ours have their actions too; its inner width is d, ours
`model.ffn_width`; its positions count from the newest event, ours from the oldest; its attention has no W_o; its norm
is LayerNorm, ours RMSNorm. In UC every state is a target.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import Attention, Stream, ffn_width
from tokenrec.models.backbones.fields import fields_of
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.attention.rotary import Rotation, rotation
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_key, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, StreamPart, lay_out, select_positions


def event_layout(layout: Layout) -> Layout:
    """A stream of the events alone, one row each."""
    history = StreamPart.history("event", np.arange(layout.events))
    return lay_out([history], [], events=layout.events, candidates=0, read="last")


class SASRecBlock(nnx.Module):
    """Attention and a ReLU FFN, norms before each."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        self.rate = config.dropout
        self.attention_norm, self.ffn_norm = RMSNorm(d), RMSNorm(d)
        self.attention = Attention(config, None, rngs=rngs)
        self.inner = weight(rngs, (d, inner), "embed", "ffn", inputs=d)
        self.inner_bias = constant(0.0, (inner,), "ffn")
        self.output = weight(rngs, (inner, d), "ffn", "embed", inputs=inner)
        self.output_bias = constant(0.0, (d,), None)

    def __call__(
        self, x: jax.Array, queries: np.ndarray, stream: Stream, key: jax.Array | None
    ) -> jax.Array:
        """`[B, T, d]` -> `[B, queries, d]`."""
        of_attention, of_ffn = split_key(key, 2)
        normed = self.attention_norm(x)
        shown = self.attention.keys_values(normed, stream.rows, stream)
        normed, x = (
            select_positions(rows, queries, stream.rows) for rows in (normed, x)
        )
        x = x + dropout(
            self.attention(normed, queries, shown, stream.rows, stream),
            self.rate,
            of_attention,
        )
        inner = contract(
            "bsd,df->bsf",
            self.ffn_norm(x),
            self.inner[...],
            RULES("batch", None, "ffn"),
        )
        active = jax.nn.relu(inner + self.inner_bias[...].astype(x.dtype))
        made = contract(
            "bsf,fd->bsd", active, self.output[...], RULES("batch", None, None)
        )
        return x + dropout(
            made + self.output_bias[...].astype(x.dtype), self.rate, of_ffn
        )


class SASRec(Backbone):
    """A causal transformer over events."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        self.positions = weight(
            rngs, (longest.events, config.width), None, None, inputs=config.width
        )
        self.start = weight(rngs, (config.width,), None, inputs=1)
        self.blocks = nnx.List(
            [SASRecBlock(config, rngs=rngs) for _ in range(config.layers)]
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
        fields, only = fields_of(x, layout), event_layout(layout)
        every, number = (
            np.arange(layout.events),
            jnp.maximum(only.positions(events) - 1, 0),
        )
        stream = Stream(
            only, every, self._no_rotation(number), only.valid(events, None)
        )
        x = fields.events + expand_rows(self.positions[...], number).astype(x.dtype)
        made, rows = [], self._rows(layout)
        for block, queries, one in zip(
            self.blocks, rows, split_key(key, len(self.blocks)), strict=True
        ):
            x = block(x, queries, stream, one)
            made.append(x)
        ranks = bool(np.isin(layout.readout, layout.rows_of("state", "target")).all())
        read, known = self.norm(x), select_positions(events, rows[-1], every)
        if ranks and not layout.candidates:
            # At a state, the newest event is the one before it.
            read = jnp.pad(read[:, :-1], ((0, 0), (1, 0), (0, 0)))
            known = jnp.pad(known[:, :-1], ((0, 0), (1, 0)))
        h = jnp.where(known[..., None], read, self.start[...].astype(x.dtype))
        return [*made, h * fields.targets if ranks else h]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        only, every = event_layout(layout), np.arange(layout.events)
        return tuple(
            AttentionLayer(only.pattern(queries, every))
            for queries in self._rows(layout)
        )

    def _rows(self, layout: Layout) -> list[np.ndarray]:
        """Rows out of each layer; only the newest event is read above the last, unless every event is."""
        every = np.arange(layout.events)
        read_all = len(layout.readout) == layout.events and not layout.candidates
        return [every] * (len(self.blocks) - 1) + [every if read_all else every[-1:]]

    def _no_rotation(self, positions: jax.Array) -> Rotation:
        return rotation(
            jnp.zeros_like(positions),
            self.config.width // self.config.heads,
            self.config.rope_base,
        )
