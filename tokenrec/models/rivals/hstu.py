"""HSTU: *Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative Recommendations*
(Zhai et al., arXiv 2402.17152, 2024), section 3.2.

    U, V, Q, K = silu(X_n W)                            X_n = norm(X)
    A_ij       = silu(q_i k_j + b(i - j)) / N           for every j that i may see, and 0 elsewhere
    X'         = X + (norm(A V) * U) W_o                no softmax, no FFN

The paper divides by the length of the sequence. N is the number of rows of the config's longest stream, so that how
much a user did still shows and padding changes nothing. The bias b is the paper's relative one of positions, a scalar
per layer and distance, shared by the heads; static rows, which have no place in time, are one more distance. Its
relative bias of *times* is not here: a batch holds no times, and hour and weekday reach the model as features. Norms
are RMSNorm, as everywhere here. With `model.windows` the top layers are local: semi-local HSTU.

B streams, Q query rows, K key rows, H heads, h = d / H.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbone import AttentionLayer, layer_rows, layer_windows
from tokenrec.models.rivals.rival import Rival
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_key, weight
from tokenrec.ops.pattern import Pattern
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, take_rows


def pointwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, see: jax.Array) -> jax.Array:
    """`silu(q k^T + bias) v` over what is seen, `[B, Q, H, h]`, on every device for its own streams and heads.

    Args:
      q: `[B, Q, H, h]`; k, v: `[B, K, H, h]`; bias: `[Q, K] float32`; see: `[B, Q, K] bool`.
    """

    def local(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, see: jax.Array) -> jax.Array:
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        weights = jnp.where(see[:, None], jax.nn.silu(logits), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, bias, see)
    heads = RULES("batch", None, "heads", None)
    specs = (heads, heads, heads, RULES(None, None), RULES("batch", None, None))
    inputs = (jax.sharding.reshard(x, spec) for x, spec in zip((q, k, v, bias, see), specs, strict=True))
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)


def distances(pattern: Pattern, count: int) -> np.ndarray:
    """`[Q, K]`, how many rows a key lies before a query; `count` for static keys, 0 for later ones, which no row sees.

    >>> order, static = np.arange(4), np.array([True, False, False, False])
    >>> distances(Pattern(order[2:], order, order, static, np.full(4, -1)), 9).tolist()
    [[9, 1, 0, 0], [9, 2, 1, 0]]
    """
    back = pattern.index[pattern.query_rows][:, None] - pattern.index[pattern.key_rows][None, :]
    return np.where(pattern.static[pattern.key_rows][None, :], count, np.maximum(back, 0))


class HSTULayer(nnx.Module):
    """One layer; `rows` is N."""

    def __init__(self, config: ModelConfig, window: int | None, rows: int, *, rngs: nnx.Rngs):
        d, heads = config.width, config.heads
        h = d // heads
        self.window, self.rows, self.rate = window, rows, config.dropout
        self.norm = RMSNorm(d)
        self.query, self.key, self.value, self.gate = (
            weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d) for _ in range(4)
        )
        self.bias = constant(0.0, (rows + 1,), None)
        self.scale = constant(1.0, (heads, h), "heads", None)
        self.output = weight(rngs, (heads, h, d), "heads", None, "embed", inputs=d)

    def __call__(self, x: jax.Array, pattern: Pattern, valid: jax.Array, key: jax.Array | None) -> jax.Array:
        """`x: [B, K, d]` -> `[B, Q, d]`; `valid: [B, K] bool`."""
        normed = self.norm(x)
        k, v = _project(normed, self.key), _project(normed, self.value)
        normed, x = (take_rows(rows, pattern.query_rows, pattern.key_rows) for rows in (normed, x))
        q, u = _project(normed, self.query), _project(normed, self.gate)
        bias = self.bias[...][distances(pattern, self.rows)]
        see = jnp.asarray(pattern.visible(self.window)) & valid[:, None, :]
        seen = pointwise_attention(q, k, v, bias, see) / self.rows
        y = contract("bqhk,hkd->bqd", self._normalize(seen) * u, self.output[...], RULES("batch", None, None))
        return x + dropout(y, self.rate, key)

    def _normalize(self, x: jax.Array) -> jax.Array:
        """RMSNorm over all heads of a row together."""
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-6) * self.scale[...]).astype(x.dtype)


def _project(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    return jax.nn.silu(contract("bsd,dhk->bshk", x, kernel[...], RULES("batch", None, "heads", None)))


class HSTU(Rival):
    """HSTU layers over the rows of the layout, whatever they are."""

    def __init__(self, config: ModelConfig, longest: Layout, rngs: nnx.Rngs):
        self.config = config
        windows = layer_windows(config)
        self.blocks = nnx.List([HSTULayer(config, window, longest.rows, rngs=rngs) for window in windows])
        self.norm = RMSNorm(config.width)

    def layer_outputs(
        self, x: jax.Array, layout: Layout, events: jax.Array, candidates: jax.Array | None, key: jax.Array | None
    ) -> list[jax.Array]:
        every, valid, made = np.arange(layout.rows), layout.valid(events, candidates), []
        rows = layer_rows(self.config, layout)
        x = take_rows(x, rows[0], every)
        keys = split_key(key, len(self.blocks))
        for block, layer, one in zip(self.blocks, self.attention_layers(layout), keys, strict=True):
            x = block(x, layer.pattern, take_rows(valid, layer.pattern.key_rows, every), one)
            made.append(x)
        return [*made, self.norm(take_rows(x, layout.readout, rows[-1]))]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        rows = layer_rows(self.config, layout)
        return tuple(
            AttentionLayer(layout.pattern(queries, keys), window, "pointwise")
            for keys, queries, window in zip(rows, rows[1:], layer_windows(self.config), strict=False)
        )
