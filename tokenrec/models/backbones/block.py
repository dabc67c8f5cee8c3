"""The TokenFormer block: gated attention, then SwiGLU, each behind an RMSNorm.

One layer l maps the inputs X: [S, d] of a stream to X' (*TokenFormer: Unify the
Multi-Field and Sequential Recommendation Worlds*, arXiv 2604.13737, 2026;
docs/methods.md section 3, "Block" and "BFTS"):

    Xn  = RMSNorm(X)                                       norm before attention
    A   = softmax(RoPE(Xn W_q) RoPE(Xn W_k)^T / sqrt(h) + mask_l) (Xn W_v) W_o
    G   = sigmoid(X W_g + b_g)                             NLIR gate
    I   = X + G * A                                        gated residual
    In  = RMSNorm(I)                                       norm before the FFN
    X'  = I + (silu(In W_1) * (In W_2)) W_3                SwiGLU

    *             elementwise product
    RMSNorm(x)    s * x / sqrt(mean(x^2) + 1e-6), s: [d] learned; float32 inside
    RoPE          rotary positions of queries and keys (rope_attention.py)
    mask_l        -inf where query i does not see key j. BFTS (Bottom-Full-Top-Sliding)
                  is its schedule over the layers: causal in the lower layers, causal
                  sliding windows that shrink in the upper ones (bfts.py)
    G             NLIR (Non-Linear Interaction Representation): a one-sided gate, from
                  the layer's input X and not from A
    W_q, W_k, W_v [d, H, h]; W_o [H, h, d]; W_g [d, d]; b_g [d]
    W_1, W_2      [d, f], W_3 [f, d]; f = `model.ffn_width`, 8/3 d by default

Ours, where the paper is silent: W_g = 0 and b_g = `model.gate_bias` = 1 at the start,
so that the gate begins at sigmoid(1) = 0.73; b_g has no weight decay; dropout acts on
both branches, after the gate. Options: no gate (`model.gate`), RMSNorm on queries and
keys (`model.qk_norm`). Without gate and windows this is the pre-norm Transformer block
of LLaMA (Touvron et al., arXiv 2302.13971, 2023).

RMSNorm: Zhang and Sennrich, arXiv 1910.07467, 2019. SwiGLU: Shazeer, arXiv 2002.05202,
2020.

Letters: B batch, S stream length, Q queries, K keys, d model width, H heads, h = d / H,
f inner width of the FFN.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.rope_attention import Attention, KeysValues, Stream
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_keys, weight
from tokenrec.sharding import RULES, tokens_of


def ffn_width(config: ModelConfig) -> int:
    """Inner width f of SwiGLU: `model.ffn_width`, or about 8/3 d.

    With 8/3 d, rounded up to a multiple of 8, its three matrices have as many weights
    as the two of a 4 d wide FFN.
    """
    return config.ffn_width or -(-8 * config.width // 3 // 8) * 8


class SwiGLU(nnx.Module):
    """Gated feed-forward network: `(silu(x W_1) * (x W_2)) W_3`.

    Args:
      width: d.
      inner: f.
    """

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.gate = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.up = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.down = weight(rngs, (inner, width), "ffn", "embed", inputs=inner)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[B, S, d]` to `[B, S, d]`."""
        # f is split over `mesh.tensor`: up-projections need no communication, and the
        # down-projection sums the parts.
        tokens = tokens_of(x)
        by_ffn = RULES("batch", tokens, "ffn")
        gate = contract("bsd,df->bsf", x, self.gate[...], by_ffn)
        up = contract("bsd,df->bsf", x, self.up[...], by_ffn)
        return contract(
            "bsf,fd->bsd",
            jax.nn.silu(gate) * up,
            self.down[...],
            RULES("batch", tokens, None),
        )


class Gate(nnx.Module):
    """NLIR gate of the attention branch: `sigmoid(x W_g + b_g)`.

    W_g starts at zero: at the start the gate is the same for every token and channel.

    Args:
      width: d.
      bias: b_g at the start.
    """

    def __init__(self, width: int, bias: float):
        # `weight` would draw random numbers; the gate starts as a constant.
        self.kernel = constant(0.0, (width, width), None, "embed")
        self.bias = constant(bias, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the gate `[B, S, d]` in (0, 1) from the layer's input `[B, S, d]`."""
        logits = contract(
            "bsd,de->bse", x, self.kernel[...], RULES("batch", tokens_of(x), None)
        )
        return jax.nn.sigmoid(logits + self.bias[...].astype(x.dtype))


class Block(nnx.Module):
    """One layer: `I = X + G * A(RMSNorm(X))`, `X' = I + SwiGLU(RMSNorm(I))`.

    Args:
      config: `model` of the run's config.
      window: keys that a query of a sliding layer sees, itself included; None for full
        attention.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, window, rngs=rngs)
        # Without a gate this is the residual of a plain Transformer.
        self.gate = Gate(config.width, config.gate_bias) if config.gate else None
        self.ffn_norm = RMSNorm(config.width)
        self.ffn = SwiGLU(config.width, ffn_width(config), rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        key_positions: np.ndarray,
        stream: Stream,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Compute the layer for some positions of its input.

        Args:
          x: `[B, K, d]`, inputs of all key positions.
          query_positions: `[Q]`, stream positions whose outputs are needed, ascending.
          key_positions: `[K]`, stream positions of `x`, ascending; they include the
            queries.
          stream: the stream.
          dropout_key: `[B]`, PRNG keys; None in evaluation.

        Returns:
          `[B, Q, d]`.
        """
        return self.forward_with_kv(
            x, query_positions, key_positions, stream, dropout_key
        )[0]

    def forward_with_kv(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        key_positions: np.ndarray,
        stream: Stream,
        dropout_key: jax.Array | None = None,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """Compute the layer, and return the keys and values of its input.

        Args:
          x: `[B, K', d]`, inputs of the last K' key positions.
          query_positions: `[Q]`, stream positions whose outputs are needed, all of them
            in `x`, ascending.
          key_positions: `[K]`, stream positions of `past` and of `x`, ascending.
          stream: the stream.
          dropout_key: `[B]`, PRNG keys; None in evaluation.
          past: cached keys and values of the first K - K' key positions; None if `x`
            holds all.

        Returns:
          Outputs `[B, Q, d]`, and the keys and values of `x`.
        """
        attention_key, ffn_key = split_keys(dropout_key, 2)
        # `x` holds the last of the key positions; `past` holds those before them.
        x_positions = key_positions[len(key_positions) - x.shape[1] :]
        # 1. Keys and values of every input.
        normed = self.attention_norm(x)
        keys_values = self.attention.keys_values(normed, x_positions, stream)
        if not len(query_positions):
            # The top layer of a prefix without read-outs: the cache holds its keys and
            # values, and its outputs are not read.
            return x[:, :0], keys_values
        # Cached positions precede those of `x`, in the order of `key_positions`.
        visible = keys_values if past is None else past.concat(keys_values)
        # 2. The attention branch, at the queries only.
        branch = self.attention(
            stream.select(normed, query_positions, x_positions),
            query_positions,
            visible,
            key_positions,
            stream,
        )
        # From here on only the queries are computed: residual, gate and FFN are local
        # to a position.
        x = stream.select(x, query_positions, x_positions)
        if self.gate is not None:
            branch = self.gate(x) * branch
        x = x + dropout(branch, self.rate, attention_key)
        # 3. The FFN branch.
        ffn = self.ffn(self.ffn_norm(x))
        return x + dropout(ffn, self.rate, ffn_key), keys_values
