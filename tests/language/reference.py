"""The language models of the families gemma3, qwen3 and llama3, written as equations.

A second rendering, for tests alone, of what `Decoder` computes: one function per
equation, a Python loop over the layers, the whole attention matrix, `float32`. It reads
the names and shapes of a Hugging Face checkpoint and shares no code with tokenrec.
`test_reference.py` compares it with PyTorch.

    RMSNorm     Zhang and Sennrich, arXiv 1910.07467, 2019
    RoPE        Su et al., arXiv 2104.09864, 2021; longer texts: `linear`, Chen et al.,
                arXiv 2306.15595, 2023; `llama3`, arXiv 2407.21783 and its model code
    GQA         Ainslie et al., arXiv 2305.13245, 2023
    GLU         Shazeer, arXiv 2002.05202, 2020
    Gemma 3     arXiv 2503.19786, 2025: QK-norm, norms on both sides, local layers with
                a rope base of their own; the soft cap of the logits is Gemma 2's,
                arXiv 2408.00118, 2024
    Qwen 3      arXiv 2505.09388, 2025
    Llama 3     arXiv 2407.21783, 2024

Letters: B texts, S tokens, d width, H heads, G heads of keys and values, h head width,
V words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tensors = Mapping[str, jax.Array]
Config = Mapping[str, Any]

# Far below every score, and finite: a token of padding, which sees nothing, then has
# the mean of all values, where -inf would give NaN to it and to every gradient.
HIDDEN = -1e30


def logits(
    tensors: Tensors,
    config: Config,
    mask: jax.Array,
    *,
    tokens: jax.Array | None = None,
    embeddings: jax.Array | None = None,
) -> jax.Array:
    """Compute the scores of the next word at every token.

    Args:
      tensors: weights by their names in the checkpoint; Linear weights `[out, in]`.
      config: `config.json` of the checkpoint.
      mask: `[B, S] bool`, False at padding. The scores of padding mean nothing.
      tokens: `[B, S] int32`, words; or
      embeddings: `[B, S, d]`, what enters the first layer in their place.

    Returns:
      `[B, S, V] float32`.
    """
    if embeddings is None:
        embeddings = embed(tensors, config, tokens)
    states = hidden_states(tensors, config, embeddings, mask)
    return score(tensors, config, states)


def embed(tensors: Tensors, config: Config, tokens: jax.Array) -> jax.Array:
    """Look up the vectors `[B, S, d]` of the words `tokens: [B, S]`."""
    vectors = float32(tensors, "model.embed_tokens.weight")[tokens]
    return vectors * math.sqrt(config["hidden_size"]) if is_gemma(config) else vectors


def score(tensors: Tensors, config: Config, states: jax.Array) -> jax.Array:
    """Score all words `[B, S, V]` by the normed output `[B, S, d]` of the layers."""
    tied = config["tie_word_embeddings"]
    words = "model.embed_tokens.weight" if tied else "lm_head.weight"
    scores = states @ float32(tensors, words).T
    cap = config.get("final_logit_softcapping")
    return cap * jnp.tanh(scores / cap) if cap else scores


def hidden_states(
    tensors: Tensors, config: Config, embeddings: jax.Array, mask: jax.Array
) -> jax.Array:
    """Compute the output `[B, S, d]` of the layers, behind the last norm.

    Args:
      tensors: weights by their names in the checkpoint.
      config: `config.json` of the checkpoint.
      embeddings: `[B, S, d]`, inputs of the first layer.
      mask: `[B, S] bool`, False at padding.
    """
    x = embeddings.astype(jnp.float32)
    for index in range(config["num_hidden_layers"]):
        window = layer_window(config, index)
        layer = f"model.layers.{index}"
        branch = rms_norm(x, tensors, f"{layer}.input_layernorm", config)
        branch = attention(branch, tensors, f"{layer}.self_attn", config, mask, window)
        if is_gemma(config):
            x = x + rms_norm(
                branch, tensors, f"{layer}.post_attention_layernorm", config
            )
            branch = rms_norm(x, tensors, f"{layer}.pre_feedforward_layernorm", config)
            branch = feed_forward(branch, tensors, f"{layer}.mlp", config)
            x = x + rms_norm(
                branch, tensors, f"{layer}.post_feedforward_layernorm", config
            )
        else:
            x = x + branch
            branch = rms_norm(x, tensors, f"{layer}.post_attention_layernorm", config)
            x = x + feed_forward(branch, tensors, f"{layer}.mlp", config)
    return rms_norm(x, tensors, "model.norm", config)


def attention(
    x: jax.Array,
    tensors: Tensors,
    name: str,
    config: Config,
    mask: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attend from every token to the visible ones.

    softmax(q k / sqrt(scale)) v, where head i of the queries reads head i // (H / G)
    of keys and values.

    Args:
      x: `[B, S, d]`.
      tensors: weights by their names in the checkpoint.
      name: of the attention in the checkpoint.
      config: `config.json` of the checkpoint.
      mask: `[B, S] bool`, False at padding.
      window: sliding window in tokens; None in a full layer.

    Returns:
      `[B, S, d]`.
    """
    batch, length, _ = x.shape
    heads, width = config["num_attention_heads"], config["head_dim"]
    groups = config["num_key_value_heads"]

    def project(which: str, heads: int) -> jax.Array:
        projected = x @ float32(tensors, f"{name}.{which}_proj.weight").T
        return projected.reshape(batch, length, heads, width)

    query, key, value = project("q", heads), project("k", groups), project("v", groups)
    if config["model_type"] != "llama":
        query = rms_norm(query, tensors, f"{name}.q_norm", config)
        key = rms_norm(key, tensors, f"{name}.k_norm", config)
    frequencies = rope_frequencies(config, window)
    query, key = rotate(query, frequencies), rotate(key, frequencies)
    key, value = (jnp.repeat(part, heads // groups, axis=2) for part in (key, value))
    scale = config["query_pre_attn_scalar"] if is_gemma(config) else width
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / math.sqrt(scale)
    seen = visible(mask, window)[:, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, HIDDEN), axis=-1)
    mixed = jnp.einsum("bnqk,bknh->bqnh", shares, value)
    return mixed.reshape(batch, length, heads * width) @ (
        float32(tensors, f"{name}.o_proj.weight").T
    )


def feed_forward(
    x: jax.Array, tensors: Tensors, name: str, config: Config
) -> jax.Array:
    """Compute W_down (act(W_gate x) * W_up x) of `x: [B, S, d]`."""
    gate, up, down = (
        float32(tensors, f"{name}.{which}_proj.weight").T
        for which in ("gate", "up", "down")
    )
    activation = gelu_tanh if is_gemma(config) else jax.nn.silu
    return (activation(x @ gate) * (x @ up)) @ down


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415, 2016)."""
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: jax.Array, tensors: Tensors, name: str, config: Config) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, times w; for gemma3 times 1 + w."""
    weight = float32(tensors, f"{name}.weight")
    scale = 1 + weight if is_gemma(config) else weight
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(mean_square + config["rms_norm_eps"]) * scale


def rotate(x: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotate pair i of the token at position p by the angle p * frequencies[i].

    Elements i and i + h / 2 are a pair. Scores depend on the difference of two
    positions alone, so that padding on the left moves none.

    Args:
      x: `[B, S, heads, h]`.
      frequencies: `[h / 2]`, radians per token.

    Returns:
      `[B, S, heads, h]`.
    """
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def rope_frequencies(config: Config, window: int | None) -> np.ndarray:
    """Angles of one token in a layer with the given window, `[h / 2]` radians.

    base^(-2 i / h). `linear` divides them by `factor`. `llama3` divides those whose
    wavelength is above c / `low_freq_factor` tokens, where c is the length of the texts
    before the change, keeps those below c / `high_freq_factor`, and goes from one to
    the other between them, linearly in c over the wavelength.
    """
    options = rope_options(config, window)
    width = config["head_dim"]
    frequencies = options["rope_theta"] ** (-np.arange(0, width, 2) / width)
    if options["rope_type"] == "linear":
        return frequencies / options["factor"]
    if options["rope_type"] == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        turns = (
            options["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        )
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / options["factor"]
    assert options["rope_type"] == "default", options
    return frequencies


def rope_options(config: Config, window: int | None) -> Mapping[str, Any]:
    """Options of the rotary positions of a layer, in the older or newer `config.json`.

    The newer one, of transformers 5, has `rope_parameters`, for gemma3 one of each kind
    of layer.
    """
    local = is_gemma(config) and window is not None
    if (options := config.get("rope_parameters")) is not None:
        kind = "sliding_attention" if local else "full_attention"
        return options.get(kind, options)
    if local:
        return {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_theta": config["rope_theta"], **scaling}


def layer_window(config: Config, index: int) -> int | None:
    """Sliding window of a layer in tokens; None for a full layer."""
    if "layer_types" in config:
        local = config["layer_types"][index] == "sliding_attention"
    elif is_gemma(config):
        local = (index + 1) % config["sliding_window_pattern"] != 0
    else:
        local = (
            config.get("use_sliding_window", False)
            and index >= config["max_window_layers"]
        )
    return config["sliding_window"] if local else None


def visible(mask: jax.Array, window: int | None) -> jax.Array:
    """What each query sees: `[B, S, S] bool`, by query and key.

    Words (no padding) up to itself; with a window W the last W tokens, itself included.
    """
    length = mask.shape[1]
    age = np.arange(length)[:, None] - np.arange(length)
    seen = (age >= 0) & (age < (window or length))
    return mask[:, None, :] & seen


def is_gemma(config: Config) -> bool:
    """Whether the model is of Gemma 3."""
    return config["model_type"] == "gemma3_text"


def float32(tensors: Tensors, name: str) -> jax.Array:
    """The tensor `name` as float32."""
    return jnp.asarray(tensors[name]).astype(jnp.float32)


def relative_error(found: Any, wanted: Any) -> float:
    """Largest difference of two arrays over the largest value of the second."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
