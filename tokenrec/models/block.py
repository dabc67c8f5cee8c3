"""The BFTS / NLIR block (TokenFormer; methods.md section 3, "Block")."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.ops.attention import attention
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, rms_normalize, split_key, weight
from tokenrec.ops.rotary import Rotation, rotate
from tokenrec.sharding import RULES, gathered
from tokenrec.tokens.layout import Layout, take_rows


def ffn_width(config: ModelConfig) -> int:
    """Inner width of SwiGLU: as given, or 8/3 of the model's, rounded up to a multiple of 8."""
    return config.ffn_width or -(-8 * config.width // 3 // 8) * 8


class Attention(nnx.Module):
    """RoPE attention of the rows `queries` over the rows `keys`: `X_n -> A` of the block equation."""

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        d, heads = config.width, config.heads
        h = d // heads
        self.window, self.qk_norm = window, config.qk_norm
        self.implementation = None if config.attention == "auto" else config.attention
        self.query = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.key = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.value = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.output = weight(rngs, (heads, h, d), "heads", None, "embed", inputs=d)

    def __call__(
        self, x: jax.Array, queries: np.ndarray, keys: np.ndarray, layout: Layout, valid: jax.Array, turn: Rotation
    ) -> jax.Array:
        def project(rows: jax.Array, kernel: nnx.Param) -> jax.Array:
            whole = gathered(kernel[...], "embed", "heads", None)
            return contract("bsd,dhk->bshk", rows, whole, RULES("batch", None, "heads", None))

        every = np.arange(layout.rows)
        of_queries = Rotation(*(take_rows(part, queries, every) for part in turn))
        of_keys = Rotation(*(take_rows(part, keys, every) for part in turn))
        q = project(take_rows(x, queries, keys), self.query)
        k, v = project(x, self.key), project(x, self.value)
        if self.qk_norm:
            q, k = rms_normalize(q), rms_normalize(k)
        pattern = layout.pattern(queries, keys)
        seen = attention(
            rotate(q, of_queries),
            rotate(k, of_keys),
            v,
            window=self.window,
            implementation=self.implementation,
            pattern=pattern,
            valid=take_rows(valid, keys, every),
        )
        whole = gathered(self.output[...], "heads", None, "embed")
        return contract("bqhk,hkd->bqd", seen, whole, RULES("batch", None, None))


class SwiGLU(nnx.Module):
    """`(silu(X W_1) * (X W_2)) W_3`."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.gate = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.up = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.down = weight(rngs, (inner, width), "ffn", "embed", inputs=inner)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = RULES("batch", None, "ffn")
        gate = contract("bsd,df->bsf", x, gathered(self.gate[...], "embed", "ffn"), inner)
        up = contract("bsd,df->bsf", x, gathered(self.up[...], "embed", "ffn"), inner)
        down = gathered(self.down[...], "ffn", "embed")
        return contract("bsf,fd->bsd", jax.nn.silu(gate) * up, down, RULES("batch", None, None))


class Gate(nnx.Module):
    """NLIR: `sigmoid(X W_g + b_g)`, from the layer's input and not from the attention output."""

    def __init__(self, width: int, bias: float):
        self.kernel = constant(0.0, (width, width), None, "embed")
        self.bias = constant(bias, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = gathered(self.kernel[...], None, "embed")
        return jax.nn.sigmoid(
            contract("bsd,de->bse", x, kernel, RULES("batch", None, None)) + self.bias[...].astype(x.dtype)
        )


class Block(nnx.Module):
    """`I = X + gate(X) * A(RMSNorm(X))`, `X' = I + SwiGLU(RMSNorm(I))`.

    Takes the rows `keys` of the stream and returns the rows `queries`, which are among them.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, window, rngs=rngs)
        self.gate = Gate(config.width, config.gate_bias) if config.gate else None
        self.ffn_norm = RMSNorm(config.width)
        self.ffn = SwiGLU(config.width, ffn_width(config), rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        queries: np.ndarray,
        keys: np.ndarray,
        layout: Layout,
        valid: jax.Array,
        turn: Rotation,
        key: jax.Array | None,
    ) -> jax.Array:
        """`x: [B, keys, d]` -> `[B, queries, d]`; `valid: [B, S]`; `key` of dropout, None in evaluation."""
        key_attention, key_ffn = split_key(key, 2)
        branch = self.attention(self.attention_norm(x), queries, keys, layout, valid, turn)
        x = take_rows(x, queries, keys)
        if self.gate is not None:
            branch = self.gate(x) * branch
        x = x + dropout(branch, self.rate, key_attention)
        return x + dropout(self.ffn(self.ffn_norm(x)), self.rate, key_ffn)
