"""RankMixer: *RankMixer: Scaling Up Ranking Models in Industrial Recommenders* (Zhu et al., arXiv 2507.15551, 2025).

    e    = [user, mean of all earlier events, of the newest 10, the newest one, target], cut into H equal parts
    X_i  = e_i W_i + b_i                                    H tokens of width d
    S    = norm(mix(X) + X)                                 mix: token h has head h of every token, no parameters
    X'_i = norm(gelu(S_i W1_i + b1_i) W2_i + b2_i + S_i)    an FFN of its own for each token
    h    = mean_i X'_i

As in the paper there are as many tokens as heads, `model.heads` of them, and norms stand behind the sums; theirs is
LayerNorm, ours RMSNorm. How histories enter is ours (the paper takes what a sequence module gives), so is the cut
by position, where the paper groups features by meaning; an e that H does not divide gets zeros behind it. The FFN is
dense: no mixture of experts. `model.ffn_width` is its inner width. In UC every state is a target of the events before.

B streams, N targets, H tokens, d width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.fields import fields_of, mean_events
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_key, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout

POOLS = (None, 10, 1)  # newest events of each mean; None takes all
ROWS = ("batch", None, None, None)


class PerToken(nnx.Module):
    """A linear map of its own for each token, `[B, N, H, i] -> [B, N, H, o]`."""

    def __init__(
        self,
        tokens: int,
        inputs: int,
        outputs: int,
        axis: str | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.kernel = weight(
            rngs, (tokens, inputs, outputs), None, None, axis, inputs=inputs
        )
        self.bias = constant(0.0, (tokens, outputs), None, None)

    def __call__(self, x: jax.Array) -> jax.Array:
        made = contract("bnhi,hio->bnho", x, self.kernel[...], RULES(*ROWS))
        return made + self.bias[...].astype(x.dtype)


def mix(x: jax.Array) -> jax.Array:
    """`[B, N, H, d]`: token h gets head h of every token, H heads of width d / H.

    >>> mix(jnp.arange(4).reshape(1, 1, 2, 2)).tolist()
    [[[[0, 2], [1, 3]]]]
    """
    heads = x.shape[2]
    parts = x.reshape(*x.shape[:2], heads, heads, -1)
    return jnp.swapaxes(parts, 2, 3).reshape(x.shape)


class MixerBlock(nnx.Module):
    """Token mixing, then an FFN per token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        tokens, d, inner = config.heads, config.width, ffn_width(config)
        self.rate = config.dropout
        self.mix_norm, self.ffn_norm = RMSNorm(d), RMSNorm(d)
        self.inner = PerToken(tokens, d, inner, None, rngs=rngs)
        self.output = PerToken(tokens, inner, d, "embed", rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        mixed = self.mix_norm(mix(x) + x)
        made = self.output(jax.nn.gelu(self.inner(mixed)))
        return self.ffn_norm(dropout(made, self.rate, key) + mixed)


class RankMixer(Backbone):
    """Blocks of token mixing over pooled fields."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.tokens, d = config.heads, config.width
        inputs = (len(longest.rows_of("user")) + len(POOLS) + 1) * d
        self.tokenize = PerToken(
            self.tokens, -(-inputs // self.tokens), d, "embed", rngs=rngs
        )
        self.blocks = nnx.List(
            [MixerBlock(config, rngs=rngs) for _ in range(config.layers)]
        )

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What comes out of each block, `[B, N H, d]`, and what is read."""
        fields = fields_of(x, layout)
        flat = fields.beside(
            *(mean_events(fields, events, newest) for newest in POOLS), fields.targets
        )
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % self.tokens)))
        shape, rows = (*flat.shape[:2], self.tokens, -1), RULES(*ROWS)
        x = self.tokenize(jnp.reshape(flat, shape, out_sharding=rows))
        made = []
        for block, one in zip(
            self.blocks, split_key(key, len(self.blocks)), strict=True
        ):
            x = block(x, one)
            made.append(x)
        return [
            *(part.reshape(part.shape[0], -1, part.shape[3]) for part in made),
            jnp.mean(x, axis=2),
        ]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: its products are seen where it is traced."""
        return ()
