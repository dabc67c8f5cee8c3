"""A layer of the language models Gemma 3, Qwen 3 and Llama 3.

    Xn  = norm(X)
    A   = concat_n softmax(rope(qk(Xn W_q,n)) rope(qk(Xn W_k,g))^T / sqrt(s) + mask) Xn W_v,g
    I   = X + post(A W_o)
    In  = norm(I)
    X'  = I + post((act(In W_gate) * (In W_up)) W_down)

    norm    RMSNorm(x) * w, or * (1 + w) in Gemma; float32 inside
    post    Gemma: another norm; otherwise the identity
    qk      an RMSNorm of each head in Gemma and Qwen; otherwise the identity
    g       n // (H / G): a head of keys and values serves H / G heads of queries
    act     silu; in Gemma the tanh form of GELU
    mask    causal; in Gemma's local layers a sliding window too
    s       h; another number in large Gemma models (`model.decoder.query_scale`)

Which of them a family has: `tokenrec/language/families.py`, with sources. With
`tuning.method='lora'` projections have an adapter each (`tokenrec/models/adapters.py`).

Letters: B batch, S stream length, Q queries, K keys, d model width, H heads of queries,
G heads of keys and values, h width of a head, f inner width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.config.tuning_config import TuningConfig
from tokenrec.language.families import FAMILIES, Family
from tokenrec.models.adapters import Adapter
from tokenrec.models.backbones.rope_attention import KeysValues, Stream
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.grouped import head_axis
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import constant, dropout, split_keys, weight
from tokenrec.sharding import RULES, tokens_of
from tokenrec.tokens.layout import select_positions

# Applies RoPE to queries or keys `[B, n, H, h]`.
type Rotate = Callable[[jax.Array], jax.Array]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Norm(nnx.Module):
    """RMSNorm with the learned scale of a family, `w` or `1 + w`.

    Args:
      width: size of the last axis.
      epsilon: added to the mean square.
      offset: the scale is 1 + w.
    """

    def __init__(self, width: int, epsilon: float, *, offset: bool):
        self.epsilon = epsilon
        self.offset = offset
        self.scale = constant(0.0 if offset else 1.0, (width,), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise `x: [..., width]`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(
            x.dtype
        )


def family_norm(config: ModelConfig, width: int) -> Norm:
    """Make a norm of the config's family."""
    family = FAMILIES[config.kind]
    return Norm(width, config.decoder.norm_epsilon, offset=family.offset_norm)


class DecoderAttention(nnx.Module):
    """Grouped-query attention, `Xn -> A W_o`.

    Args:
      config: `model` of the run's config.
      tuning: `tuning` of the run's config.
      window: keys that a query sees, itself included; None for all.
      local: the layer has a window in the checkpoint, and its rotary positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        tuning: TuningConfig,
        window: int | None,
        *,
        local: bool,
        rngs: nnx.Rngs,
    ):
        decoder, d = config.decoder, config.width
        heads, groups, h = config.heads, decoder.kv_heads, decoder.head_width
        self.window = window
        self.local = local
        # None lets `tokenrec.ops.attention` choose by platform and shapes.
        self.implementation = None if config.attention == "auto" else config.attention
        # `attention` divides by the root of h.
        self.query_factor = (h / (decoder.query_scale or h)) ** 0.5
        kv = head_axis(groups)
        self.query = weight(rngs, (d, heads, h), "embed", "heads", None, inputs=d)
        self.key = weight(rngs, (d, groups, h), "embed", kv, None, inputs=d)
        self.value = weight(rngs, (d, groups, h), "embed", kv, None, inputs=d)
        self.output = weight(
            rngs, (heads, h, d), "heads", None, "embed", inputs=heads * h
        )
        with_norms = FAMILIES[config.kind].qk_norm
        self.query_norm = family_norm(config, h) if with_norms else None
        self.key_norm = family_norm(config, h) if with_norms else None

        def adapter(
            name: str,
            inputs: tuple[int, ...],
            outputs: tuple[int, ...],
            axis: str | None,
        ) -> Adapter | None:
            if tuning.method != "lora" or name not in tuning.projections:
                return None
            head = (axis, None)
            axes = (("embed",), head) if len(outputs) == 2 else (head, ("embed",))
            return Adapter(tuning, inputs, axes[0], outputs, axes[1], rngs=rngs)

        self.query_adapter = adapter("query", (d,), (heads, h), "heads")
        self.key_adapter = adapter("key", (d,), (groups, h), kv)
        self.value_adapter = adapter("value", (d,), (groups, h), kv)
        self.output_adapter = adapter("output", (heads, h), (d,), "heads")

    def keys_values(
        self, x: jax.Array, rotate: Rotate, dropout_keys: jax.Array | None
    ) -> KeysValues:
        """Project normalised inputs to keys and values.

        Args:
          x: `[B, K, d]`, normalised inputs.
          rotate: applies RoPE at the positions of these inputs.
          dropout_keys: `[B]`, PRNG keys; None in evaluation.

        Returns:
          Keys and values `[B, K, G, h]`.
        """
        axis = head_axis(self.key.shape[-2])
        of_key, of_value = split_keys(dropout_keys, 2)
        k = _project(x, self.key, axis, self.key_adapter, of_key)
        v = _project(x, self.value, axis, self.value_adapter, of_value)
        k = k if self.key_norm is None else self.key_norm(k)
        return KeysValues(rotate(k), v)

    def queries(
        self, x: jax.Array, rotate: Rotate, dropout_keys: jax.Array | None
    ) -> jax.Array:
        """Project normalised inputs to queries, `[B, Q, H, h]`.

        Args:
          x: `[B, Q, d]`, normalised inputs.
          rotate: applies RoPE at the positions of these inputs.
          dropout_keys: `[B]`, PRNG keys; None in evaluation.
        """
        q = _project(x, self.query, "heads", self.query_adapter, dropout_keys)
        q = q if self.query_norm is None else self.query_norm(q)
        if self.query_factor != 1:
            q = q * self.query_factor
        return rotate(q)

    def join_heads(
        self, attended: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        """Project attended values `[B, Q, H, h]` to `[B, Q, d]`."""
        # Heads are split over `mesh.tensor`; this product sums over them.
        spec = RULES("batch", tokens_of(attended), None)
        out = contract("bqhk,hkd->bqd", attended, self.output[...], spec)
        if self.output_adapter is None:
            return out
        return self.output_adapter(attended, out, dropout_keys)

    def __call__(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        keys_values: KeysValues,
        key_positions: np.ndarray,
        stream: Stream,
        dropout_keys: jax.Array | None,
    ) -> jax.Array:
        """Attend from some positions of a stream to others.

        Args:
          x: `[B, Q, d]`, normalised inputs of the queries.
          query_positions: `[Q]`, their stream positions, ascending.
          keys_values: keys and values `[B, K, G, h]`, from `keys_values`.
          key_positions: `[K]`, their stream positions, ascending.
          stream: the stream.
          dropout_keys: `[B]`, PRNG keys; None in evaluation.

        Returns:
          `[B, Q, d]`.
        """
        of_query, of_output = split_keys(dropout_keys, 2)
        attended = attention(
            self.queries(x, self.rotate_at(stream, query_positions), of_query),
            *keys_values,
            window=self.window,
            implementation=self.implementation,
            pattern=stream.layout.pattern(query_positions, key_positions),
            valid=select_positions(
                stream.valid, key_positions, np.arange(stream.layout.length)
            ),
        )
        return self.join_heads(attended, of_output)

    def rotate_at(self, stream: Stream, positions: np.ndarray) -> Rotate:
        """Return a function that applies this layer's RoPE at positions of a stream."""
        return functools.partial(stream.rotate, positions=positions, local=self.local)


class GatedFFN(nnx.Module):
    """Feed-forward network `(act(x W_gate) * (x W_up)) W_down`.

    Args:
      config: `model` of the run's config.
      tuning: `tuning` of the run's config.
    """

    def __init__(self, config: ModelConfig, tuning: TuningConfig, *, rngs: nnx.Rngs):
        d, f = config.width, config.ffn_width
        self.activation = FAMILIES[config.kind].activation
        self.gate = weight(rngs, (d, f), "embed", "ffn", inputs=d)
        self.up = weight(rngs, (d, f), "embed", "ffn", inputs=d)
        self.down = weight(rngs, (f, d), "ffn", "embed", inputs=f)

        def adapter(name: str, *sides: tuple[int, str]) -> Adapter | None:
            if tuning.method != "lora" or name not in tuning.projections:
                return None
            (inputs, of_input), (outputs, of_output) = sides
            return Adapter(
                tuning, (inputs,), (of_input,), (outputs,), (of_output,), rngs=rngs
            )

        self.gate_adapter = adapter("gate", (d, "embed"), (f, "ffn"))
        self.up_adapter = adapter("up", (d, "embed"), (f, "ffn"))
        self.down_adapter = adapter("down", (f, "ffn"), (d, "embed"))

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        """Map `[B, S, d]` to `[B, S, d]`."""
        of_gate, of_up, of_down = split_keys(dropout_keys, 3)
        gate = _apply(x, self.gate, "ffn", self.gate_adapter, of_gate)
        up = _apply(x, self.up, "ffn", self.up_adapter, of_up)
        inner = _ACTIVATIONS[self.activation](gate) * up
        return _apply(inner, self.down, None, self.down_adapter, of_down)


class DecoderBlock(nnx.Module):
    """One layer of a language model; the equations are those of the module.

    Args:
      config: `model` of the run's config.
      tuning: `tuning` of the run's config.
      window: keys that a query sees, itself included; None for all.
      local: the layer has a window in the checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        tuning: TuningConfig,
        window: int | None,
        *,
        local: bool,
        rngs: nnx.Rngs,
    ):
        family: Family = FAMILIES[config.kind]
        self.rate = config.dropout
        self.attention_norm = family_norm(config, config.width)
        self.attention = DecoderAttention(
            config, tuning, window, local=local, rngs=rngs
        )
        sandwich = family.sandwich_norm
        self.attention_output_norm = (
            family_norm(config, config.width) if sandwich else None
        )
        self.ffn_norm = family_norm(config, config.width)
        self.ffn = GatedFFN(config, tuning, rngs=rngs)
        self.ffn_output_norm = family_norm(config, config.width) if sandwich else None

    def __call__(
        self,
        x: jax.Array,
        query_positions: np.ndarray,
        key_positions: np.ndarray,
        stream: Stream,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Compute the layer for some positions of its input; as `Block`."""
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

        Arguments and results are those of
        `tokenrec.models.backbones.block.Block.forward_with_kv`, with G heads of keys
        and values.
        """
        of_branches = split_keys(dropout_key, 5)
        # `x` holds the last of the key positions; `past` holds those before them.
        x_positions = key_positions[len(key_positions) - x.shape[1] :]
        normed = self.attention_norm(x)
        rotate = self.attention.rotate_at(stream, x_positions)
        keys_values = self.attention.keys_values(normed, rotate, of_branches[0])
        if not len(query_positions):
            return x[:, :0], keys_values
        visible = keys_values if past is None else past.concat(keys_values)
        branch = self.attention(
            stream.select(normed, query_positions, x_positions),
            query_positions,
            visible,
            key_positions,
            stream,
            of_branches[1],
        )
        x = stream.select(x, query_positions, x_positions)
        return self.add_branches(x, branch, of_branches[2:]), keys_values

    def add_branches(
        self,
        x: jax.Array,
        branch: jax.Array,
        dropout_keys: Sequence[jax.Array | None] = (None, None, None),
    ) -> jax.Array:
        """Add the branches to the inputs of the layer: `X'` of the module's equations.

        Args:
          x: `[B, Q, d]`, inputs X.
          branch: `[B, Q, d]`, A W_o.
          dropout_keys: `[B]` each, PRNG keys of the attention branch, of the FFN and of
            its branch; None in evaluation.
        """
        of_attention, of_ffn, of_ffn_branch = dropout_keys
        if self.attention_output_norm is not None:
            branch = self.attention_output_norm(branch)
        x = x + dropout(branch, self.rate, of_attention)
        ffn = self.ffn(self.ffn_norm(x), of_ffn)
        if self.ffn_output_norm is not None:
            ffn = self.ffn_output_norm(ffn)
        return x + dropout(ffn, self.rate, of_ffn_branch)


def _project(
    x: jax.Array,
    kernel: nnx.Param,
    axis: str | None,
    adapter: Adapter | None,
    dropout_keys: jax.Array | None,
) -> jax.Array:
    """Project `[B, n, d]` to heads, `[B, n, H, h]`."""
    spec = RULES("batch", tokens_of(x), axis, None)
    out = contract("bsd,dhk->bshk", x, kernel[...], spec)
    return out if adapter is None else adapter(x, out, dropout_keys)


def _apply(
    x: jax.Array,
    kernel: nnx.Param,
    axis: str | None,
    adapter: Adapter | None,
    dropout_keys: jax.Array | None,
) -> jax.Array:
    """Map `[B, S, i]` to `[B, S, o]`, o split over `axis`."""
    spec = RULES("batch", tokens_of(x), axis)
    out = contract("bsi,io->bso", x, kernel[...], spec)
    return out if adapter is None else adapter(x, out, dropout_keys)
