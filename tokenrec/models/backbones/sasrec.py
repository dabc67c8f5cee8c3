"""SASRec: a causal Transformer over the events alone.

*Self-Attentive Sequential Recommendation* (Kang and McAuley, arXiv 1808.09781, 2018),
section III:

    X    = e_t + p_t                                events, learned positions
    X    = X + A(RMSNorm(X))                        causal attention, without RoPE
    X    = X + relu(RMSNorm(X) W_1 + b_1) W_2 + b_2
    h_t  = RMSNorm(X_t)

    retrieval   output = h of the newest event; the head scores it against item vectors
    ranking     output = h * v, h of the newest event before the target v

With `h * v` the linear head of each task takes a weighted dot product. A user without
an event has a learned h.

How it differs from the paper: events hold their actions too (paper: items alone); the
inner width is `model.ffn_width` (paper: d); positions count from the oldest event of
the stream (paper: from the newest); attention has an output map W_o (paper: none);
RMSNorm (paper: LayerNorm); the ranking output is ours. In UC each state is a target.

Letters: B batch, T events, N targets, Q queries, d model width, f inner width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.ctr_inputs import split_stream
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.rope_attention import Attention, Stream
from tokenrec.ops.attention.rotary import Rotation, rotation
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_keys, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions
from tokenrec.tokens.stream_segments import StreamSegment, make_layout


def event_layout(layout: Layout) -> Layout:
    """Lay out the events of a stream alone, one token each."""
    history = StreamSegment.history("event", np.arange(layout.events))
    return make_layout(
        [history], [], events=layout.events, candidates=0, readout="last"
    )


class SASRecBlock(nnx.Module):
    """One layer: causal attention, then a ReLU FFN, each behind an RMSNorm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        self.rate = config.dropout
        self.attention_norm = RMSNorm(d)
        self.ffn_norm = RMSNorm(d)
        # All layers are full; positions are added to the events, so RoPE turns by zero.
        self.attention = Attention(config, None, rngs=rngs)
        self.inner = weight(rngs, (d, inner), "embed", "ffn", inputs=d)
        self.inner_bias = constant(0.0, (inner,), "ffn")
        self.output = weight(rngs, (inner, d), "ffn", "embed", inputs=inner)
        self.output_bias = constant(0.0, (d,), None)

    def __call__(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        stream: Stream,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Compute the layer for some events.

        Args:
          x: `[B, T, d]`, all events.
          query_positions: `[Q]`, events whose outputs are needed, ascending.
          stream: the stream of the events.
          dropout_key: `[B]`, PRNG keys; None in evaluation.

        Returns:
          `[B, Q, d]`.
        """
        attention_key, ffn_key = split_keys(dropout_key, 2)
        positions = stream.positions
        # 1. The attention branch.
        normed = self.attention_norm(x)
        keys_values = self.attention.keys_values(normed, positions, stream)
        normed = select_positions(normed, query_positions, positions)
        x = select_positions(x, query_positions, positions)
        branch = self.attention(normed, query_positions, keys_values, positions, stream)
        x = x + dropout(branch, self.rate, attention_key)
        # 2. The FFN branch.
        by_ffn = RULES("batch", None, "ffn")
        inner = contract("bsd,df->bsf", self.ffn_norm(x), self.inner[...], by_ffn)
        active = jax.nn.relu(inner + self.inner_bias[...].astype(x.dtype))
        ffn = contract(
            "bsf,fd->bsd", active, self.output[...], RULES("batch", None, None)
        )
        return x + dropout(
            ffn + self.output_bias[...].astype(x.dtype), self.rate, ffn_key
        )


class SASRec(Backbone):
    """A causal Transformer over events, for retrieval and ranking."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        d = config.width
        self.positions = weight(rngs, (longest.events, d), None, None, inputs=d)
        # h of a user without an event.
        self.start = weight(rngs, (d,), None, inputs=1)
        self.blocks = nnx.List(
            [SASRecBlock(config, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = RMSNorm(d)

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
          candidates: not read: each target is scored by itself.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.

        Returns:
          `[B, T, d]` of each layer but the last, which computes the events that are
          read alone, then the read-outs `[B, R, d]`.
        """
        # 1. The stream of the events alone; the t-th valid one has number t - 1.
        inputs = split_stream(x, layout)
        only_events = event_layout(layout)
        positions = np.arange(layout.events)
        # Padding has RoPE position 0; it reads the first vector and is masked anyway.
        number = jnp.maximum(only_events.rope_positions(events) - 1, 0)
        stream = Stream(
            only_events,
            positions,
            self._no_rotation(number),
            only_events.valid(events, None),
        )
        learned = expand_rows(self.positions[...], number)
        x = inputs.events + learned.astype(x.dtype)
        # 2. The layers.
        layer_outputs = []
        output_positions = self._output_positions(layout)
        layer_keys = split_keys(key, len(self.blocks))
        for block, queries, layer_key in zip(
            self.blocks, output_positions, layer_keys, strict=True
        ):
            x = block(x, queries, stream, layer_key)
            layer_outputs.append(x)
        # 3. h of the newest event before each read-out. Ranking reads states or
        # targets; retrieval reads events or the end of the prefix.
        target_positions = layout.positions_of("state", "target")
        ranking = bool(np.isin(layout.readout, target_positions).all())
        h = self.norm(x)
        has_event = select_positions(events, output_positions[-1], positions)
        if ranking and not layout.candidates:
            # UC: the target is the state of an event, whose predecessor is the newest
            # one before it.
            h = jnp.pad(h[:, :-1], ((0, 0), (1, 0), (0, 0)))
            has_event = jnp.pad(has_event[:, :-1], ((0, 0), (1, 0)))
        h = jnp.where(has_event[..., None], h, self.start[...].astype(x.dtype))
        return [*layer_outputs, h * inputs.targets if ranking else h]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attention of each layer, bottom first."""
        only_events, positions = event_layout(layout), np.arange(layout.events)
        return tuple(
            AttentionLayer(only_events.pattern(queries, positions))
            for queries in self._output_positions(layout)
        )

    def _output_positions(self, layout: Layout) -> list[np.ndarray]:
        """Events at the output of each layer: of the last one those that are read."""
        positions = np.arange(layout.events)
        # With one read-out for the whole history, the top layer needs the newest event
        # only.
        reads_every_event = (
            len(layout.readout) == layout.events and not layout.candidates
        )
        last = positions if reads_every_event else positions[-1:]
        return [positions] * (len(self.blocks) - 1) + [last]

    def _no_rotation(self, positions: jax.Array) -> Rotation:
        """RoPE by an angle of zero, for `positions: [B, T]`."""
        head_width = self.config.width // self.config.heads
        return rotation(jnp.zeros_like(positions), head_width, self.config.rope_base)
