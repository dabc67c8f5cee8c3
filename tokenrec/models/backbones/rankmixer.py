"""RankMixer: parameter-free token mixing and an FFN per token.

*RankMixer: Scaling Up Ranking Models in Industrial Recommenders* (Zhu et al., arXiv
2507.15551, 2025):

    e      = [user, mean of all earlier events, of the newest 10, of the newest, target]
    X_i    = e_i W_i + b_i                       e cut into H equal parts: H tokens
    S      = RMSNorm(mix(X) + X)                 mix: token h gets head h of every token
    X'_i   = RMSNorm(gelu(S_i W1_i + b1_i) W2_i + b2_i + S_i)   an FFN per token
    output = mean_i X'_i

From the paper: as many tokens as heads (`model.heads`), the mixing without parameters,
an FFN for each token, norms behind the sums. Ours: RMSNorm (paper: LayerNorm); the
three pooled histories (the paper takes what a sequence module gives); e is cut by
position (paper: features are grouped by meaning) and padded with zeros where H does not
divide it; a dense FFN of inner width `model.ffn_width`, without the mixture of experts.
In UC each state is a target of the events before it.

Letters: B batch, M user tokens, N targets, H tokens and heads, d model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.ctr_inputs import mean_pool_events, split_stream
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_keys, weight
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout

# How many of the newest events each pooled history averages; None takes all.
POOL_SIZES = (None, 10, 1)
# Logical axes of `[B, N, H, d]`.
TOKEN_AXES = ("batch", None, None, None)


class PerTokenLinear(nnx.Module):
    """A linear map for each token: `y_h = x_h W_h + b_h`.

    Args:
      tokens: H.
      inputs: width of the inputs.
      outputs: width of the outputs.
      axis: logical axis of the outputs in the weights; None if they are not split.
    """

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
        """Map `[B, N, H, inputs]` to `[B, N, H, outputs]`."""
        y = contract("bnhi,hio->bnho", x, self.kernel[...], RULES(*TOKEN_AXES))
        return y + self.bias[...].astype(x.dtype)


def mix_tokens(x: jax.Array) -> jax.Array:
    """Give token h the h-th head of every token, `[B, N, H, d]` to `[B, N, H, d]`.

    A token has H heads of width d / H: this is a transpose of tokens and heads.

    >>> mix_tokens(jnp.arange(4).reshape(1, 1, 2, 2)).tolist()
    [[[[0, 2], [1, 3]]]]
    """
    heads = x.shape[2]
    by_head = x.reshape(*x.shape[:2], heads, heads, -1)
    return jnp.swapaxes(by_head, 2, 3).reshape(x.shape)


class MixerBlock(nnx.Module):
    """One layer: token mixing, then an FFN per token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        tokens, d, inner = config.heads, config.width, ffn_width(config)
        self.rate = config.dropout
        # Post-norm: the norms are applied to the sums.
        self.mix_norm = RMSNorm(d)
        self.ffn_norm = RMSNorm(d)
        self.inner = PerTokenLinear(tokens, d, inner, None, rngs=rngs)
        self.output = PerTokenLinear(tokens, inner, d, "embed", rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map `[B, N, H, d]` to `[B, N, H, d]`; `key` of dropout or None."""
        mixed = self.mix_norm(mix_tokens(x) + x)
        ffn = self.output(jax.nn.gelu(self.inner(mixed)))
        return self.ffn_norm(dropout(ffn, self.rate, key) + mixed)


class RankMixer(Backbone):
    """Blocks of token mixing over user, pooled histories and target."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.tokens = config.heads
        d = config.width
        inputs = (len(longest.positions_of("user")) + len(POOL_SIZES) + 1) * d
        part = -(-inputs // self.tokens)
        self.tokenize = PerTokenLinear(self.tokens, part, d, "embed", rngs=rngs)
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
        """Compute the output of each block and the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: not read: each target is computed by itself.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.

        Returns:
          `[B, N H, d]` of each block, then `[B, N, d]`.
        """
        # 1. e, cut into H parts.
        inputs = split_stream(x, layout)
        pools = [mean_pool_events(inputs, events, newest) for newest in POOL_SIZES]
        flat = inputs.concat_per_target(*pools, inputs.targets)
        # Zeros at the end make the parts equal where H does not divide the width of e.
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % self.tokens)))
        shape = (*flat.shape[:2], self.tokens, -1)
        parts = jnp.reshape(flat, shape, out_sharding=on_mesh(RULES(*TOKEN_AXES)))
        # 2. The blocks.
        x = self.tokenize(parts)
        block_outputs = []
        block_keys = split_keys(key, len(self.blocks))
        for block, block_key in zip(self.blocks, block_keys, strict=True):
            x = block(x, block_key)
            block_outputs.append(x)
        return [
            # Layer outputs are `[B, n, d]`.
            *(out.reshape(out.shape[0], -1, out.shape[3]) for out in block_outputs),
            jnp.mean(x, axis=2),
        ]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: it has no attention; its other products are counted from the trace."""
        return ()
