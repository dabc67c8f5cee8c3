"""OneTrans: *Unified Feature Interaction and Sequence Modeling with One Transformer in Industrial Recommender*
(Zhang et al., arXiv 2510.26104, 2025).

    stream  [S_1 .. S_n, NS_1 .. NS_m]                      the history, then the tokens of user and target
    Q, K, V = norm(X) W                                     W is one for all S, and each NS has its own
    X       = X + softmax(Q K^T / sqrt(h) + causal) V W_o
    X'      = X + gelu(norm(X) W_1 + b_1) W_2 + b_2         mixed in the same way
    pyramid: of the S rows only the newest leave a layer, fewer and fewer; all of its input is seen

The paper's pyramid goes down linearly, rounded to 32 rows, to as many S rows at the top as there are NS rows. Here
`ceil(n (1 - l / L))` S rows leave layer l of L, none the top, n being those of the config's longest stream. Ours: RoPE
on queries and keys; W_o is one for all; the top layer computes the rows that are read alone, the last token of each
target; separators are left out; tokens of the user do not see the target, so that the candidates of a request share
them.

B streams, H heads, h = d / H; M tokens of the user, C candidates of K tokens.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.sequence_first import (
    history_of,
    other_positions,
    sequence_first,
)
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.rotary import Rotation, rotate, rotation
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_key, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions

SHARED = (
    -1
)  # number of the map that all rows of the sequence meet; the others count tokens


class Mixed(nnx.Module):
    """A linear map `[B, rows, i] -> [B, rows, *outputs]`: one for rows of the sequence, one for each of `own` tokens.

    `axes`: logical axes of the weights, inputs first.
    """

    def __init__(
        self,
        inputs: int,
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        own: int,
        shared: bool,
        rngs: nnx.Rngs,
    ):
        self.axes = axes
        self.own = weight(rngs, (own, inputs, *outputs), None, *axes, inputs=inputs)
        self.shared = (
            weight(rngs, (inputs, *outputs), *axes, inputs=inputs) if shared else None
        )

    def __call__(self, x: jax.Array, maps: np.ndarray) -> jax.Array:
        """`maps: [rows]`, number of the map of each row; those of the sequence stand first."""
        letters, count = "oh"[: len(self.axes) - 1], int(np.sum(maps == SHARED))
        spec = RULES(
            "batch",
            None,
            *("heads" if axis == "heads" else None for axis in self.axes[1:]),
        )
        own = self.own[...]
        each = jnp.concatenate([own[number : number + 1] for number in maps[count:]])
        made = contract(f"bsi,si{letters}->bs{letters}", x[:, count:], each, spec)
        if self.shared is None:
            return made
        of_sequence = contract(
            f"bsi,i{letters}->bs{letters}", x[:, :count], self.shared[...], spec
        )
        return jnp.concatenate([of_sequence, made], axis=1)


class MixedBias(nnx.Module):
    """What `Mixed` maps add to their rows: `[rows, o]`."""

    def __init__(self, outputs: int, own: int, shared: bool):
        self.bias = constant(0.0, (own + shared, outputs), None, None)

    def __call__(self, x: jax.Array, maps: np.ndarray) -> jax.Array:
        """Row SHARED, which is the last, is that of the sequence."""
        return x + self.bias[...][maps].astype(x.dtype)


class OneTransBlock(nnx.Module):
    """One layer; `own` tokens have maps of their own. `top`: it computes the last token of targets alone."""

    def __init__(self, config: ModelConfig, own: int, top: bool, *, rngs: nnx.Rngs):
        d, heads, inner = config.width, config.heads, ffn_width(config)
        of_heads, in_heads = (heads, d // heads), ("embed", "heads", None)
        asked, shared = (1 if top else own), not top
        self.rate, self.top = config.dropout, top
        self.implementation = None if config.attention == "auto" else config.attention
        self.attention_norm, self.ffn_norm = RMSNorm(d), RMSNorm(d)
        self.query = Mixed(d, of_heads, in_heads, asked, shared, rngs)
        self.key = Mixed(d, of_heads, in_heads, own, True, rngs)
        self.value = Mixed(d, of_heads, in_heads, own, True, rngs)
        self.output = weight(
            rngs, (heads, d // heads, d), "heads", None, "embed", inputs=d
        )
        self.inner = Mixed(d, (inner,), (None, None), asked, shared, rngs)
        self.inner_bias = MixedBias(inner, asked, shared)
        self.outer = Mixed(inner, (d,), (None, "embed"), asked, shared, rngs)
        self.outer_bias = MixedBias(d, asked, shared)

    def __call__(
        self,
        x: jax.Array,
        pattern: Pattern,
        maps: np.ndarray,
        valid: jax.Array,
        turn: Rotation,
        key: jax.Array | None,
    ) -> jax.Array:
        """`x: [B, K, d]` -> `[B, Q, d]`; `maps: [S]`, `valid: [B, S] bool` and `turn` are of all rows of the stream."""
        queries, keys, every = (
            pattern.query_positions,
            pattern.key_positions,
            np.arange(len(maps)),
        )
        of_attention, of_ffn = split_key(key, 2)
        normed = self.attention_norm(x)
        k, v = self.key(normed, maps[keys]), self.value(normed, maps[keys])
        normed, x = (select_positions(rows, queries, keys) for rows in (normed, x))
        asked = np.zeros(len(queries), int) if self.top else maps[queries]
        q = self.query(normed, asked)
        q, k = (
            rotate(
                part,
                Rotation(*(select_positions(angles, rows, every) for angles in turn)),
            )
            for part, rows in ((q, queries), (k, keys))
        )
        shown = select_positions(valid, keys, every)
        seen = attention(
            q, k, v, implementation=self.implementation, pattern=pattern, valid=shown
        )
        branch = contract(
            "bqhk,hkd->bqd", seen, self.output[...], RULES("batch", None, None)
        )
        x = x + dropout(branch, self.rate, of_attention)
        inner = jax.nn.gelu(self.inner_bias(self.inner(self.ffn_norm(x), asked), asked))
        return x + dropout(
            self.outer_bias(self.outer(inner, asked), asked), self.rate, of_ffn
        )


class OneTrans(Backbone):
    """The pyramid of mixed layers."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        self.longest = len(history_of(longest).roles)
        self.users, self.own = (
            len(longest.rows_of("user")),
            int(np.sum(longest.candidate == 0)),
        )
        count = config.layers
        self.blocks = nnx.List(
            [
                OneTransBlock(config, self.users + self.own, top, rngs=rngs)
                for top in [False] * (count - 1) + [True]
            ]
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
        history = np.flatnonzero((layout.event >= 0) & (layout.candidate < 0))
        order, stream = (
            np.concatenate([history, other_positions(layout)]),
            sequence_first(layout, history_of(layout)),
        )
        turn = rotation(
            stream.positions(events),
            self.config.width // self.config.heads,
            self.config.rope_base,
        )
        x, maps, valid, made = (
            x[:, order],
            self._maps(stream),
            stream.valid(events, candidates),
            [],
        )
        keys = split_key(key, len(self.blocks))
        for block, layer, one in zip(
            self.blocks, self.attention_layers(layout), keys, strict=True
        ):
            x = block(x, layer.pattern, maps, valid, turn, one)
            made.append(x)
        return [*made, self.norm(x)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        stream, count = sequence_first(layout, history_of(layout)), len(self.blocks)
        others = np.arange(np.sum(stream.event >= 0), stream.rows)
        kept = [-(-self.longest * (count - layer) // count) for layer in range(count)]
        rows = [
            np.concatenate([np.arange(others[0])[-some:], others]) for some in kept
        ] + [stream.readout]
        return tuple(
            AttentionLayer(stream.pattern(queries, keys))
            for keys, queries in itertools.pairwise(rows)
        )

    def _maps(self, stream: Layout) -> np.ndarray:
        """`[S]`: which map the rows of a stream meet."""
        others = stream.event < 0
        own = np.concatenate(
            [
                np.arange(self.users),
                self.users + np.tile(np.arange(self.own), stream.candidates),
            ]
        )
        maps = np.full(stream.rows, SHARED)
        maps[others] = own
        return maps
