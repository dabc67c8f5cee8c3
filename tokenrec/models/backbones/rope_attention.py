"""Multi-head attention with rotary positions, over selected positions of a stream.

For the normalised inputs Xn of the stream, head by head:

    Q_i = R(p_i) qk(Xn_i W_q)
    K_j = R(p_j) qk(Xn_j W_k)
    V_j = Xn_j W_v
    A_i = [sum_j softmax_j(Q_i . K_j / sqrt(h) + mask_ij) V_j]_heads W_o

    R(p)   RoPE: rotates entry pair (n, n + h/2) by the angle p base^(-2n/h)
    p      RoPE position (`Layout.rope_positions`)
    qk     RMSNorm with `model.qk_norm`, otherwise the identity
    mask   0 where query i sees key j (`Layout`), -inf elsewhere

RoPE: Su et al., *RoFormer*, arXiv 2104.09864, 2021. QK-norm: Henry et al., arXiv
2010.04245, 2020 (there an L2 norm with a learned scale). The equations are those of the
block in docs/methods.md section 3.

Queries and keys are given as stream positions, NumPy arrays that are static in the
compiled program: a layer computes queries only for the positions whose outputs are
needed (`tokenrec.models.backbones.bfts`).

Letters: B batch, S stream length, Q queries, K keys, H heads, h = d / H, d model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.bfts import is_split
from tokenrec.models.backbones.split_tokens import select_split
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.rotary import Rotation, rotate
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import rms_normalize, weight
from tokenrec.sharding import RULES, tokens_of
from tokenrec.tokens.layout import Layout, select_positions


class KeysValues(NamedTuple):
    """Keys and values of K positions.

    Attributes:
      keys: `[B, K, H, h]`, after QK-norm and RoPE.
      values: `[B, K, H, h]`.
    """

    keys: jax.Array
    values: jax.Array

    def concat(self, later: KeysValues) -> KeysValues:
        """Append the keys and values of later positions."""
        return KeysValues(
            *(jnp.concatenate(parts, axis=1) for parts in zip(self, later, strict=True))
        )


class Stream(NamedTuple):
    """Inputs that all layers of one forward pass share.

    Attributes:
      layout: layout of the whole stream, S positions.
      positions: `[n]`, the positions that pass through the layers: all, those of the
        prefix, or those behind it.
      turn: RoPE angles of `positions`, `[B, n, 1, h]`.
      valid: `[B, S] bool`, positions of the stream that are not padding.
      parts: devices that tokens are split over; 1: every device has all.
      local_turn: as `turn`, for the layers of a language model that have a window of
        their own; None elsewhere.
    """

    layout: Layout
    positions: np.ndarray
    turn: Rotation
    valid: jax.Array
    parts: int = 1
    local_turn: Rotation | None = None

    def select(
        self, x: jax.Array, positions: np.ndarray, among: np.ndarray
    ) -> jax.Array:
        """Select stream positions of `x: [B, n, ...]`, as `select_positions`.

        Tokens of the result are split over `mesh.context` as `is_split` says.
        """
        if self.parts == 1:
            return select_positions(x, positions, among)
        split = is_split(len(positions), self.layout.length, self.parts)
        return select_split(x, positions, among, split=split)

    def angles(self, positions: np.ndarray, *, local: bool = False) -> Rotation:
        """Select the RoPE angles of `positions: [m]`, `[B, m, 1, h]`."""
        turn = self.turn if self.local_turn is None or not local else self.local_turn
        return Rotation(
            *(select_positions(part, positions, self.positions) for part in turn)
        )

    def rotate(
        self, x: jax.Array, positions: np.ndarray, *, local: bool = False
    ) -> jax.Array:
        """Apply RoPE to `x: [B, m, H, h]`, which holds `positions: [m]`."""
        return rotate(x, self.angles(positions, local=local))


class Attention(nnx.Module):
    """Multi-head softmax attention with RoPE: `Xn -> A` of the module's equations.

    Args:
      config: `model` of the run's config.
      window: keys that a query of a sliding layer sees, itself included; None for full
        attention.
    """

    def __init__(self, config: ModelConfig, window: int | None, *, rngs: nnx.Rngs):
        d, heads = config.width, config.heads
        h = d // heads
        self.window = window
        self.qk_norm = config.qk_norm
        # None lets `tokenrec.ops.attention` choose by platform and shapes.
        self.implementation = None if config.attention == "auto" else config.attention
        self.query = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.key = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.value = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.output = weight(rngs, (heads, h, d), "heads", None, "embed", inputs=d)

    def keys_values(
        self, x: jax.Array, positions: np.ndarray, stream: Stream
    ) -> KeysValues:
        """Project normalised inputs to keys and values.

        Args:
          x: `[B, K, d]`, normalised inputs.
          positions: `[K]`, their stream positions.
          stream: the stream.

        Returns:
          Keys and values `[B, K, H, h]`.
        """
        k = self.project(x, self.key)
        v = self.project(x, self.value)
        # QK-norm has no learned scale here. It commutes with RoPE, which keeps norms.
        k = rms_normalize(k) if self.qk_norm else k
        return KeysValues(stream.rotate(k, positions), v)

    def __call__(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        keys_values: KeysValues,
        key_positions: np.ndarray,
        stream: Stream,
    ) -> jax.Array:
        """Attend from some positions of a stream to others.

        Args:
          x: `[B, Q, d]`, normalised inputs of the queries.
          query_positions: `[Q]`, their stream positions, ascending.
          keys_values: keys and values `[B, K, H, h]`, from `keys_values`.
          key_positions: `[K]`, their stream positions, ascending.
          stream: the stream.

        Returns:
          `[B, Q, d]`.
        """
        q = self.project(x, self.query)
        q = rms_normalize(q) if self.qk_norm else q
        # `valid` covers the whole stream; attention reads it for the keys.
        stream_positions = np.arange(stream.layout.length)
        attended = attention(
            stream.rotate(q, query_positions),
            *keys_values,
            window=self.window,
            implementation=self.implementation,
            pattern=stream.layout.pattern(query_positions, key_positions),
            valid=select_positions(stream.valid, key_positions, stream_positions),
        )
        # Heads are split over `mesh.tensor`; this product sums over them.
        return contract(
            "bqhk,hkd->bqd",
            attended,
            self.output[...],
            RULES("batch", tokens_of(attended), None),
        )

    def project(self, x: jax.Array, kernel: nnx.Param) -> jax.Array:
        """Project `[B, n, d]` to the heads, `[B, n, H, h]`."""
        return contract(
            "bsd,dhk->bshk",
            x,
            kernel[...],
            RULES("batch", tokens_of(x), "heads", None),
        )
