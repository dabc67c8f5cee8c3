"""OneTrans: one Transformer; the history shares weights, other tokens have their own.

*OneTrans: Unified Feature Interaction and Sequence Modeling with One Transformer in
Industrial Recommender* (Zhang et al., arXiv 2510.26104, 2025):

    stream   [S_1 .. S_n, NS_1 .. NS_m]       the history, then user and target tokens
    Q, K, V  = RMSNorm(X) W                  one W for all S tokens, one per NS token
    X        = X + softmax(RoPE(Q) RoPE(K)^T / sqrt(h) + causal) V W_o
    X'       = X + gelu(RMSNorm(X) W_1 + b_1) W_2 + b_2       weights shared likewise
    pyramid  only the newest S tokens leave a layer, fewer in each; all inputs are keys

The paper's pyramid shrinks linearly, rounded to 32 tokens, to as many S tokens at the
top as there are NS tokens. Here `ceil(n (1 - l / L))` S tokens leave layer l of L, so
that the top layer has none; n is that of the config's longest stream. Also ours: RoPE
on queries and keys; one W_o for all tokens; the top layer computes only what is read,
the last token of each target; separators are dropped; user tokens do not see the
target, so that the candidates of a request share them.

    outputs of a layer (#), n = 6 history tokens, L = 3, two user tokens, one candidate

    layer 3   . . . . . .   . .   #
    layer 2   . . . . # #   # #   #
    layer 1   . . # # # #   # #   #

Letters: B batch, S stream length, Q queries, K keys, H heads, h = d / H, d model width,
M user tokens, K' tokens of a candidate, L layers.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.history_first import (
    extract_history,
    history_first_layout,
    history_positions,
    user_and_candidate_positions,
)
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.rotary import Rotation, rotate, rotation
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_keys, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions

# Weight set of a token: SHARED for history tokens, otherwise the number of the NS
# token. As the index -1 it also finds the shared bias, which is the last.
SHARED = -1


class MixedLinear(nnx.Module):
    """A linear map with one weight matrix for history tokens and one for each NS token.

    Args:
      inputs: width of the inputs.
      outputs: shape of the outputs of a token.
      axes: logical axes of the weights, inputs first.
      own: number of NS tokens.
      shared: whether there are history tokens.
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

    def __call__(self, x: jax.Array, weight_sets: np.ndarray) -> jax.Array:
        """Map `[B, n, inputs]` to `[B, n, *outputs]`.

        Args:
          x: tokens, those of the history first.
          weight_sets: `[n]`, the weight set of each token.

        Returns:
          `[B, n, *outputs]`.
        """
        # Outputs of a token are one axis, or two for heads.
        letters = "oh"[: len(self.axes) - 1]
        history = int(np.sum(weight_sets == SHARED))
        output_axes = ("heads" if axis == "heads" else None for axis in self.axes[1:])
        spec = RULES("batch", None, *output_axes)
        own = self.own[...]
        # Slices, not a gather, whose gradient would be a scatter.
        kernels = jnp.concatenate([own[n : n + 1] for n in weight_sets[history:]])
        own_outputs = contract(
            f"bsi,si{letters}->bs{letters}", x[:, history:], kernels, spec
        )
        if self.shared is None:
            return own_outputs
        history_outputs = contract(
            f"bsi,i{letters}->bs{letters}", x[:, :history], self.shared[...], spec
        )
        return jnp.concatenate([history_outputs, own_outputs], axis=1)


class MixedBias(nnx.Module):
    """The bias of a `MixedLinear`: `[own + 1, outputs]`, the shared one last."""

    def __init__(self, outputs: int, own: int, shared: bool):
        self.bias = constant(0.0, (own + shared, outputs), None, None)

    def __call__(self, x: jax.Array, weight_sets: np.ndarray) -> jax.Array:
        """Add the bias to `x: [B, n, outputs]` by `weight_sets: [n]`."""
        return x + self.bias[...][weight_sets].astype(x.dtype)


class OneTransBlock(nnx.Module):
    """One layer of OneTrans.

    Args:
      config: `model` of the run's config.
      own: number of NS tokens, M + K'.
      top: it is the top layer, which computes only the last token of each target. Its
        query and FFN weights are one set.
    """

    def __init__(self, config: ModelConfig, own: int, top: bool, *, rngs: nnx.Rngs):
        d, heads, inner = config.width, config.heads, ffn_width(config)
        by_head, head_axes = (heads, d // heads), ("embed", "heads", None)
        # Weight sets of the tokens that the layer outputs.
        outputs_own = 1 if top else own
        outputs_history = not top
        self.rate = config.dropout
        self.top = top
        self.implementation = None if config.attention == "auto" else config.attention
        self.attention_norm = RMSNorm(d)
        self.ffn_norm = RMSNorm(d)
        self.query = MixedLinear(
            d, by_head, head_axes, outputs_own, outputs_history, rngs
        )
        self.key = MixedLinear(d, by_head, head_axes, own, True, rngs)
        self.value = MixedLinear(d, by_head, head_axes, own, True, rngs)
        self.output = weight(
            rngs, (heads, d // heads, d), "heads", None, "embed", inputs=d
        )
        self.inner = MixedLinear(
            d, (inner,), (None, None), outputs_own, outputs_history, rngs
        )
        self.inner_bias = MixedBias(inner, outputs_own, outputs_history)
        self.outer = MixedLinear(
            inner, (d,), (None, "embed"), outputs_own, outputs_history, rngs
        )
        self.outer_bias = MixedBias(d, outputs_own, outputs_history)

    def __call__(
        self,
        x: jax.Array,
        pattern: Pattern,
        weight_sets: np.ndarray,
        valid: jax.Array,
        turn: Rotation,
        key: jax.Array | None,
    ) -> jax.Array:
        """Compute the layer for the queries of a pattern.

        Args:
          x: `[B, K, d]`, inputs of the keys, which include the queries.
          pattern: which queries see which keys.
          weight_sets: `[S]`, weight set of each token of the stream.
          valid: `[B, S] bool`, tokens of the stream that are not padding.
          turn: RoPE angles of the stream, `[B, S, 1, h]`.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, Q, d]`.
        """
        queries, keys = pattern.query_positions, pattern.key_positions
        stream_positions = np.arange(len(weight_sets))
        attention_key, ffn_key = split_keys(key, 2)

        def apply_rope(part: jax.Array, positions: np.ndarray) -> jax.Array:
            angles = [select_positions(a, positions, stream_positions) for a in turn]
            return rotate(part, Rotation(*angles))

        # 1. Attention: keys and values of all inputs, queries of the outputs.
        normed = self.attention_norm(x)
        k = self.key(normed, weight_sets[keys])
        v = self.value(normed, weight_sets[keys])
        normed = select_positions(normed, queries, keys)
        x = select_positions(x, queries, keys)
        # The top layer outputs the last target tokens alone, which share one weight
        # set.
        query_sets = np.zeros(len(queries), int) if self.top else weight_sets[queries]
        q = self.query(normed, query_sets)
        q = apply_rope(q, queries)
        k = apply_rope(k, keys)
        attended = attention(
            q,
            k,
            v,
            implementation=self.implementation,
            pattern=pattern,
            valid=select_positions(valid, keys, stream_positions),
        )
        branch = contract(
            "bqhk,hkd->bqd", attended, self.output[...], RULES("batch", None, None)
        )
        x = x + dropout(branch, self.rate, attention_key)
        # 2. FFN.
        inner = self.inner_bias(self.inner(self.ffn_norm(x), query_sets), query_sets)
        outer = self.outer(jax.nn.gelu(inner), query_sets)
        return x + dropout(self.outer_bias(outer, query_sets), self.rate, ffn_key)


class OneTrans(Backbone):
    """A pyramid of OneTrans layers, then RMSNorm."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        # n, M and K'.
        self.longest = len(history_positions(longest))
        self.users = len(longest.positions_of("user"))
        self.own = int(np.sum(longest.candidate == 0))
        self.blocks = nnx.List(
            [
                OneTransBlock(config, self.users + self.own, top, rngs=rngs)
                for top in [False] * (config.layers - 1) + [True]
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
        # 1. The stream with the history first.
        # Separators are not in `order`: they are dropped.
        order = np.concatenate(
            [history_positions(layout), user_and_candidate_positions(layout)]
        )
        stream = history_first_layout(layout, extract_history(layout))
        head_width = self.config.width // self.config.heads
        turn = rotation(
            stream.rope_positions(events), head_width, self.config.rope_base
        )
        x = x[:, order]
        weight_sets = self._weight_sets(stream)
        valid = stream.valid(events, candidates)
        # 2. The layers.
        layer_outputs = []
        layer_keys = split_keys(key, len(self.blocks))
        for block, layer, layer_key in zip(
            self.blocks, self.attention_layers(layout), layer_keys, strict=True
        ):
            x = block(x, layer.pattern, weight_sets, valid, turn, layer_key)
            layer_outputs.append(x)
        return [*layer_outputs, self.norm(x)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attention of each layer of the pyramid, bottom first."""
        stream = history_first_layout(layout, extract_history(layout))
        layers = len(self.blocks)
        history = np.arange(np.sum(stream.event >= 0))
        others = np.arange(len(history), stream.length)
        # Inputs of each layer, then the output of the last. How many history tokens are
        # left depends on the longest stream, not on this one: padding changes nothing.
        positions = []
        for layer in range(layers):
            newest = -(-self.longest * (layers - layer) // layers)
            positions.append(np.concatenate([history[-newest:], others]))
        positions.append(stream.readout)
        return tuple(
            AttentionLayer(stream.pattern(outputs, inputs))
            for inputs, outputs in itertools.pairwise(positions)
        )

    def _weight_sets(self, stream: Layout) -> np.ndarray:
        """Weight set of each token of a stream, `[S]`.

        The tokens of all candidates share the K' sets of one candidate.
        """
        candidate_sets = np.tile(np.arange(self.own), stream.candidates)
        weight_sets = np.full(stream.length, SHARED)
        weight_sets[stream.event < 0] = np.concatenate(
            [np.arange(self.users), self.users + candidate_sets]
        )
        return weight_sets
