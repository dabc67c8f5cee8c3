"""HSTU: *Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations*
(Zhai et al., arXiv 2402.17152, 2024), section 3.2.

    U, V, Q, K = silu(X_n W)                            X_n = norm(X)
    A_ij       = silu(q_i k_j + b(i - j) + c(t_i - t_j)) / N      for every j that i may see, and 0 elsewhere
    X'         = X + (norm(A V) * U) W_o                no softmax, no FFN

The paper divides by the length of the sequence. N is the number of rows of the config's longest stream, so that padding
changes nothing; the norm behind it takes any such factor out again. The biases are the paper's relative ones of
positions and of times, b and c, shared by the heads: a scalar per layer and distance, and a scalar per layer and bucket
of the seconds between two rows, `floor(log(max(1, |t_i - t_j|)) / 0.301)` as in the authors' code. State and action
have the time of their event; candidates, and what else follows the history, that of the request. The authors' code, for
retrieval, takes the time of the event after i for t_i; ours is i's own. Static rows, which have no place in time, are
one more distance, and c is 0 for them. `model.time_bias=False` leaves c out.

Norms are RMSNorm, as everywhere here. With `model.windows` the top layers are local: semi-local HSTU.

B streams, Q query rows, K key rows, H heads, h = d / H.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.tokenformer import (
    layer_positions,
    layer_windows,
)
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_key, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions

# The authors' code has 128 buckets; seconds in an int32 fill the first 72 of them.
BUCKET_WIDTH = 0.301
BUCKETS = 1 + int(math.log(2**31 - 1) / BUCKET_WIDTH)


def time_buckets(asking: jax.Array, shown: jax.Array, static: np.ndarray) -> jax.Array:
    """Bucket of the time between a query and a key, `[B, Q, K] int32`; `BUCKETS` for static keys.

    `asking: [B, Q]`, `shown: [B, K]` are ages in whole seconds, `static: [K] bool`.

    >>> ages = jnp.array([[0, 1, 2, 10, 86_400]])
    >>> time_buckets(ages[:, :1], ages, np.array([True, False, False, False, False])).tolist()
    [[[72, 0, 2, 7, 37]]]
    """
    apart = jnp.maximum(jnp.abs(asking[:, :, None] - shown[:, None, :]), 1).astype(
        jnp.float32
    )
    return jnp.where(static, BUCKETS, (jnp.log(apart) / BUCKET_WIDTH).astype(jnp.int32))


def pointwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, see: jax.Array
) -> jax.Array:
    """`silu(q k^T + bias) v` over what is seen, `[B, Q, H, h]`, on every device for its own streams and heads.

    Args:
      q: `[B, Q, H, h]`; k, v: `[B, K, H, h]`; bias: `[B or 1, Q, K] float32`; see: `[B, Q, K] bool`.
    """

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, see: jax.Array
    ) -> jax.Array:
        logits = (
            jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
            + bias[:, None]
        )
        weights = jnp.where(see[:, None], jax.nn.silu(logits), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, bias, see)
    heads = RULES("batch", None, "heads", None)
    specs = (
        heads,
        heads,
        heads,
        jax.typeof(bias).sharding.spec,
        RULES("batch", None, None),
    )
    inputs = (
        jax.sharding.reshard(x, spec)
        for x, spec in zip((q, k, v, bias, see), specs, strict=True)
    )
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(
        *inputs
    )


def distances(pattern: Pattern, count: int) -> np.ndarray:
    """`[Q, K]`, how many rows a key lies before a query; `count` for static keys, 0 for later ones, which no row sees.

    >>> order, static = np.arange(4), np.array([True, False, False, False])
    >>> distances(Pattern(order[2:], order, order, static, np.full(4, -1)), 9).tolist()
    [[9, 1, 0, 0], [9, 2, 1, 0]]
    """
    back = (
        pattern.index[pattern.query_positions][:, None]
        - pattern.index[pattern.key_positions][None, :]
    )
    return np.where(
        pattern.static[pattern.key_positions][None, :], count, np.maximum(back, 0)
    )


class HSTULayer(nnx.Module):
    """One layer; `rows` is N."""

    def __init__(
        self, config: ModelConfig, window: int | None, rows: int, *, rngs: nnx.Rngs
    ):
        d, heads = config.width, config.heads
        h = d // heads
        self.window, self.rows, self.rate = window, rows, config.dropout
        self.norm = RMSNorm(d)
        self.query, self.key, self.value, self.gate = (
            weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
            for _ in range(4)
        )
        self.bias = constant(0.0, (rows + 1,), None)
        self.time_bias = constant(0.0, (BUCKETS,), None) if config.time_bias else None
        self.scale = constant(1.0, (heads, h), "heads", None)
        self.output = weight(rngs, (heads, h, d), "heads", None, "embed", inputs=d)

    def __call__(
        self,
        x: jax.Array,
        pattern: Pattern,
        valid: jax.Array,
        ages: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """`x: [B, K, d]` -> `[B, Q, d]`; `valid: [B, K] bool`, `ages: [B, K] int32` where there is a bias of times."""
        normed = self.norm(x)
        k, v = _project(normed, self.key), _project(normed, self.value)
        normed, x = (
            select_positions(rows, pattern.query_positions, pattern.key_positions)
            for rows in (normed, x)
        )
        q, u = _project(normed, self.query), _project(normed, self.gate)
        bias = self.bias[...][distances(pattern, self.rows)][None]
        if self.time_bias is not None:
            assert ages is not None, "model.time_bias, and a batch without ages"
            asking = select_positions(
                ages, pattern.query_positions, pattern.key_positions
            )
            buckets = time_buckets(asking, ages, pattern.static[pattern.key_positions])
            table = jnp.append(self.time_bias[...], 0)
            bias = bias + expand_rows(table[:, None], buckets)[..., 0]
        see = jnp.asarray(pattern.visible(self.window)) & valid[:, None, :]
        seen = pointwise_attention(q, k, v, bias, see) / self.rows
        y = contract(
            "bqhk,hkd->bqd",
            self._normalize(seen) * u,
            self.output[...],
            RULES("batch", None, None),
        )
        return x + dropout(y, self.rate, key)

    def _normalize(self, x: jax.Array) -> jax.Array:
        """RMSNorm over all heads of a row together."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-6) * self.scale[...]).astype(x.dtype)


def _project(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    return jax.nn.silu(
        contract("bsd,dhk->bshk", x, kernel[...], RULES("batch", None, "heads", None))
    )


class HSTU(Backbone):
    """HSTU layers over the rows of the layout, whatever they are."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        windows = layer_windows(config)
        self.blocks = nnx.List(
            [HSTULayer(config, window, longest.rows, rngs=rngs) for window in windows]
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
        every, valid, made = (
            np.arange(layout.rows),
            layout.valid(events, candidates),
            [],
        )
        rows = layer_positions(self.config, layout)
        x = select_positions(x, rows[0], every)
        keys = split_key(key, len(self.blocks))
        for block, layer, one in zip(
            self.blocks, self.attention_layers(layout), keys, strict=True
        ):
            shown, of_rows = layer.pattern.key_positions, None
            if ages is not None:
                of_rows = select_positions(layout.ages(ages), shown, every)
            x = block(
                x, layer.pattern, select_positions(valid, shown, every), of_rows, one
            )
            made.append(x)
        return [*made, self.norm(select_positions(x, layout.readout, rows[-1]))]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        rows = layer_positions(self.config, layout)
        return tuple(
            AttentionLayer(layout.pattern(queries, keys), window, "pointwise")
            for keys, queries, window in zip(
                rows, rows[1:], layer_windows(self.config), strict=False
            )
        )
