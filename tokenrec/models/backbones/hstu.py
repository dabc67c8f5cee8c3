"""HSTU: attention without a softmax, with relative biases of position and time.

*Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations* (Zhai et al., arXiv 2402.17152, 2024), section 3.2:

    U, V, Q, K = silu(RMSNorm(X) W)
    A_ij       = silu(Q_i . K_j + b(i - j) + c(t_i - t_j)) / N    where i sees j, else 0
    X'         = X + (RMSNorm(A V) * U) W_o                       no FFN

    b   a scalar per layer and distance of positions
    c   a scalar per layer and bucket of the seconds between two tokens:
        bucket(s) = floor(log(max(1, |s|)) / 0.301), as in the authors' code

How it differs from the paper: it divides by the length of the sequence; here N is the
length of the config's longest stream, so that padding changes nothing (the norm removes
any such factor again). Norms are RMSNorm (paper: LayerNorm). State and action have the
time of their event; candidates and all else behind the history that of the request. For
retrieval the authors' code takes the time of the event after i as t_i; ours is i's own.
Static tokens have no place in time: for them b has an entry of its own and c is 0.
`model.time_bias=False` leaves c out. With `model.windows` the top layers are local, as
in the authors' semi-local HSTU.

Letters: B batch, S stream length, Q queries, K keys, H heads, h = d / H, d model width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.bfts import layer_positions, layer_windows
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, dropout, split_keys, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions

# The authors' code has 128 buckets; seconds in an int32 reach the first 72 of them.
BUCKET_WIDTH = 0.301
BUCKETS = 1 + int(math.log(2**31 - 1) / BUCKET_WIDTH)


def time_buckets(
    query_ages: jax.Array, key_ages: jax.Array, static: np.ndarray
) -> jax.Array:
    """Bucket of the time between each query and key.

    Args:
      query_ages: `[B, Q] int32`, seconds before the request.
      key_ages: `[B, K] int32`, likewise.
      static: `[K] bool`, keys without a time.

    Returns:
      `[B, Q, K] int32` in [0, BUCKETS), and `BUCKETS` for static keys.

    >>> ages = jnp.array([[0, 1, 2, 10, 86_400]])
    >>> static = np.array([True, False, False, False, False])
    >>> time_buckets(ages[:, :1], ages, static).tolist()
    [[[72, 0, 2, 7, 37]]]
    """
    seconds = jnp.abs(query_ages[:, :, None] - key_ages[:, None, :])
    seconds = jnp.maximum(seconds, 1).astype(jnp.float32)
    buckets = (jnp.log(seconds) / BUCKET_WIDTH).astype(jnp.int32)
    return jnp.where(static, BUCKETS, buckets)


def relative_distances(pattern: Pattern, longest: int) -> np.ndarray:
    """Distance of each query to each key, for the bias b.

    Args:
      pattern: the queries and keys.
      longest: length of the longest stream, which no distance reaches.

    Returns:
      `[Q, K]`: how many indices a key lies before a query; `longest` for static keys; 0
      for later keys, which no query sees.

    >>> order, static = np.arange(4), np.array([True, False, False, False])
    >>> pattern = Pattern(order[2:], order, order, static, np.full(4, -1))
    >>> relative_distances(pattern, 9).tolist()
    [[9, 1, 0, 0], [9, 2, 1, 0]]
    """
    query_index = pattern.index[pattern.query_positions]
    key_index = pattern.index[pattern.key_positions]
    distance = np.maximum(query_index[:, None] - key_index[None, :], 0)
    return np.where(pattern.static[pattern.key_positions][None, :], longest, distance)


def pointwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, visible: jax.Array
) -> jax.Array:
    """Compute `silu(q k^T + bias) v` over the visible keys.

    Each device computes its own streams and heads (`jax.shard_map`), without
    communication.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      bias: `[B or 1, Q, K] float32`, shared by the heads.
      visible: `[B, Q, K] bool`.

    Returns:
      `[B, Q, H, h]`.
    """

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array,
        visible: jax.Array,
    ) -> jax.Array:
        """The same on the streams and heads of one device."""
        # float32 logits, as in the softmax attentions.
        products = jnp.einsum(
            "bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32
        )
        logits = products + bias[:, None]
        weights = jnp.where(visible[:, None], jax.nn.silu(logits), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)

    # Without a mesh there is nothing to split.
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, bias, visible)
    by_head = RULES("batch", None, "heads", None)
    bias_spec = jax.typeof(bias).sharding.spec
    specs = (by_head, by_head, by_head, bias_spec, RULES("batch", None, None))
    inputs = (
        jax.sharding.reshard(x, spec)
        for x, spec in zip((q, k, v, bias, visible), specs, strict=True)
    )
    return jax.shard_map(local, in_specs=specs, out_specs=by_head, check_vma=False)(
        *inputs
    )


class HSTULayer(nnx.Module):
    """One layer of HSTU.

    Args:
      config: `model` of the run's config.
      window: keys that a query of a local layer sees; None for all.
      longest: N, the length of the longest stream.
    """

    def __init__(
        self, config: ModelConfig, window: int | None, longest: int, *, rngs: nnx.Rngs
    ):
        d, heads = config.width, config.heads
        h = d // heads
        self.window = window
        self.longest = longest
        self.rate = config.dropout
        self.norm = RMSNorm(d)
        self.query = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.key = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.value = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.gate = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        # b: distances 0 to N - 1, then the entry of static keys.
        self.bias = constant(0.0, (longest + 1,), None)
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
        """Compute the layer for the queries of a pattern.

        Args:
          x: `[B, K, d]`, inputs of the keys, which include the queries.
          pattern: which queries see which keys.
          valid: `[B, K] bool`, keys that are not padding.
          ages: `[B, K] int32`, seconds before the request; None without a bias of
            times.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, Q, d]`.
        """
        query_positions, key_positions = pattern.query_positions, pattern.key_positions
        normed = self.norm(x)
        # Keys and values of all inputs; queries and gate of the outputs only.
        k, v = _silu_project(normed, self.key), _silu_project(normed, self.value)
        normed = select_positions(normed, query_positions, key_positions)
        x = select_positions(x, query_positions, key_positions)
        q, u = _silu_project(normed, self.query), _silu_project(normed, self.gate)
        bias = self.bias[...][relative_distances(pattern, self.longest)][None]
        if self.time_bias is not None:
            assert ages is not None, "model.time_bias, and a batch without ages"
            query_ages = select_positions(ages, query_positions, key_positions)
            buckets = time_buckets(query_ages, ages, pattern.static[key_positions])
            # c of static keys is 0.
            table = jnp.append(self.time_bias[...], 0)
            bias = bias + expand_rows(table[:, None], buckets)[..., 0]
        visible = jnp.asarray(pattern.visible(self.window)) & valid[:, None, :]
        # Divided by N, not by the number of visible keys: a constant that padding and
        # `data.buckets` do not change.
        attended = pointwise_attention(q, k, v, bias, visible) / self.longest
        branch = contract(
            "bqhk,hkd->bqd",
            self._normalize(attended) * u,
            self.output[...],
            RULES("batch", None, None),
        )
        return x + dropout(branch, self.rate, key)

    def _normalize(self, x: jax.Array) -> jax.Array:
        """RMSNorm of `[B, Q, H, h]` over all heads of a token together."""
        # `RMSNorm` of ops.layers works on one axis; here heads stay split over
        # `mesh.tensor`, and the mean over them is a sum across devices.
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-6) * self.scale[...]).astype(x.dtype)


def _silu_project(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """`silu(x W)`, `[B, n, d]` to `[B, n, H, h]`."""
    return jax.nn.silu(
        contract("bsd,dhk->bshk", x, kernel[...], RULES("batch", None, "heads", None))
    )


class HSTU(Backbone):
    """A stack of HSTU layers over the tokens of any layout, then RMSNorm."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = nnx.List(
            [
                HSTULayer(config, window, longest.length, rngs=rngs)
                for window in layer_windows(config)
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
        """Compute the output of each layer at its live positions, and the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: `[B, T] int32`, seconds between each event and the request; None without
            `model.time_bias`.

        Returns:
          `[B, n_l, d]` of each layer, then `[B, R, d]`.
        """
        stream_positions = np.arange(layout.length)
        valid = layout.valid(events, candidates)
        positions = layer_positions(self.config, layout)
        x = select_positions(x, positions[0], stream_positions)
        layer_outputs = []
        layer_keys = split_keys(key, len(self.blocks))
        for block, layer, layer_key in zip(
            self.blocks, self.attention_layers(layout), layer_keys, strict=True
        ):
            key_positions = layer.pattern.key_positions
            # Batches have no ages without `model.time_bias`.
            key_ages = None
            if ages is not None:
                key_ages = select_positions(
                    layout.ages(ages), key_positions, stream_positions
                )
            key_valid = select_positions(valid, key_positions, stream_positions)
            x = block(x, layer.pattern, key_valid, key_ages, layer_key)
            layer_outputs.append(x)
        read = self.norm(select_positions(x, layout.readout, positions[-1]))
        return [*layer_outputs, read]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attention of each layer, bottom first."""
        positions = layer_positions(self.config, layout)
        return tuple(
            AttentionLayer(layout.pattern(outputs, inputs), window, "pointwise")
            for inputs, outputs, window in zip(
                positions, positions[1:], layer_windows(self.config), strict=False
            )
        )
