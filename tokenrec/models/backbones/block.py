"""The BFTS / NLIR block (TokenFormer; methods.md section 3, "Block")."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.rotary import Rotation, rotate
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import (
    RMSNorm,
    constant,
    dropout,
    rms_normalize,
    split_key,
    weight,
)
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions


def ffn_width(config: ModelConfig) -> int:
    """Inner width of SwiGLU: as given, or 8/3 of the model's, rounded up to a multiple of 8."""
    return config.ffn_width or -(-8 * config.width // 3 // 8) * 8


def mesh_splits(config: ModelConfig) -> tuple[tuple[str, int, str], ...]:
    """What the mesh splits of a model: field, size, and the axis that must divide it."""
    return (
        ("model.width", config.width, "fsdp"),
        ("model.heads", config.heads, "tensor"),
        ("model.ffn_width", ffn_width(config), "tensor"),
    )


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises InputError where an axis of the mesh does not divide what it splits."""
    for field, size, axis in mesh_splits(config):
        if size % mesh.shape[axis]:
            raise InputError(
                f"{field}={size} does not split over mesh.{axis}={mesh.shape[axis]}; use an axis that divides it, or "
                f"another {field}"
            )


class KeysValues(NamedTuple):
    """Keys, after qk-norm and RoPE, and values of some rows: `[B, K, H, h]` each."""

    keys: jax.Array
    values: jax.Array

    def concat(self, later: KeysValues) -> KeysValues:
        """These rows and behind them `later`."""
        return KeysValues(
            *(jnp.concatenate(parts, axis=1) for parts in zip(self, later, strict=True))
        )


class Stream(NamedTuple):
    """What the blocks of one pass share.

    Attributes:
      layout: of the whole stream.
      rows: `[n]`, rows that pass through the blocks: all, the prefix, or what follows it.
      turn: RoPE of `rows`.
      valid: `[B, S] bool`, rows of the stream that are not padding.
    """

    layout: Layout
    rows: np.ndarray
    turn: Rotation
    valid: jax.Array

    def rotate(self, x: jax.Array, rows: np.ndarray) -> jax.Array:
        """RoPE of `x: [B, rows, H, h]`."""
        return rotate(
            x,
            Rotation(*(select_positions(part, rows, self.rows) for part in self.turn)),
        )


class Attention(nnx.Module):
    """RoPE attention of some rows over others: `X_n -> A` of the block equation."""

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        d, heads = config.width, config.heads
        h = d // heads
        self.window, self.qk_norm = window, config.qk_norm
        self.implementation = None if config.attention == "auto" else config.attention
        self.query = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.key = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.value = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.output = weight(rngs, (heads, h, d), "heads", None, "embed", inputs=d)

    def keys_values(self, x: jax.Array, rows: np.ndarray, stream: Stream) -> KeysValues:
        """What `x: [B, rows, d]` shows to the queries."""
        k, v = self._project(x, self.key), self._project(x, self.value)
        return KeysValues(
            stream.rotate(rms_normalize(k) if self.qk_norm else k, rows), v
        )

    def __call__(
        self,
        x: jax.Array,
        queries: np.ndarray,
        shown: KeysValues,
        keys: np.ndarray,
        stream: Stream,
    ) -> jax.Array:
        """`x: [B, queries, d]` -> `[B, queries, d]`, looking at what the rows `keys` show."""
        q = self._project(x, self.query)
        seen = attention(
            stream.rotate(rms_normalize(q) if self.qk_norm else q, queries),
            *shown,
            window=self.window,
            implementation=self.implementation,
            pattern=stream.layout.pattern(queries, keys),
            valid=select_positions(stream.valid, keys, np.arange(stream.layout.rows)),
        )
        return contract(
            "bqhk,hkd->bqd", seen, self.output[...], RULES("batch", None, None)
        )

    def _project(self, x: jax.Array, kernel: nnx.Param) -> jax.Array:
        return contract(
            "bsd,dhk->bshk", x, kernel[...], RULES("batch", None, "heads", None)
        )


class SwiGLU(nnx.Module):
    """`(silu(X W_1) * (X W_2)) W_3`."""

    def __init__(self, width: int, inner: int, *, rngs: nnx.Rngs):
        self.gate = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.up = weight(rngs, (width, inner), "embed", "ffn", inputs=width)
        self.down = weight(rngs, (inner, width), "ffn", "embed", inputs=inner)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = RULES("batch", None, "ffn")
        gate = contract("bsd,df->bsf", x, self.gate[...], inner)
        up = contract("bsd,df->bsf", x, self.up[...], inner)
        return contract(
            "bsf,fd->bsd",
            jax.nn.silu(gate) * up,
            self.down[...],
            RULES("batch", None, None),
        )


class Gate(nnx.Module):
    """NLIR: `sigmoid(X W_g + b_g)`, from the layer's input and not from the attention output."""

    def __init__(self, width: int, bias: float):
        self.kernel = constant(0.0, (width, width), None, "embed")
        self.bias = constant(bias, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        made = contract("bsd,de->bse", x, self.kernel[...], RULES("batch", None, None))
        return jax.nn.sigmoid(made + self.bias[...].astype(x.dtype))


class Block(nnx.Module):
    """`I = X + gate(X) * A(RMSNorm(X))`, `X' = I + SwiGLU(RMSNorm(I))`."""

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
        stream: Stream,
        key: jax.Array | None,
    ) -> jax.Array:
        """`x: [B, keys, d]` -> `[B, queries, d]`, rows that are among them; `key` of dropout, None in evaluation."""
        return self.forward_with_kv(x, queries, keys, stream, key)[0]

    def forward_with_kv(
        self,
        x: jax.Array,
        queries: np.ndarray,
        keys: np.ndarray,
        stream: Stream,
        key: jax.Array | None = None,
        past: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """As `__call__`, and what the rows of `x` show to queries.

        `x` holds the last rows of `keys`, among which are the queries; `past` is what the rows before them show.
        """
        key_attention, key_ffn = split_key(key, 2)
        own = keys[len(keys) - x.shape[1] :]
        normed = self.attention_norm(x)
        made = self.attention.keys_values(normed, own, stream)
        if not len(queries):  # the top of a prefix from which nothing is read
            return x[:, :0], made
        shown = made if past is None else past.concat(made)
        branch = self.attention(
            select_positions(normed, queries, own), queries, shown, keys, stream
        )
        x = select_positions(x, queries, own)
        if self.gate is not None:
            branch = self.gate(x) * branch
        x = x + dropout(branch, self.rate, key_attention)
        return x + dropout(self.ffn(self.ffn_norm(x)), self.rate, key_ffn), made
