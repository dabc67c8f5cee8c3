"""`Decoder` with the weights of a checkpoint, for tests: names, shapes and layouts.

The way from a checkpoint to weights is written here again, so that it does not share
the errors of `tokenrec/language/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.language import reference
from tests.language.hf_models import CONFIGS
from tokenrec.config.model_config import DecoderConfig, ModelConfig
from tokenrec.config.tuning_config import TuningConfig
from tokenrec.models.backbones.bfts import stack_sizes
from tokenrec.models.backbones.decoder import Decoder
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import StreamSegment, make_layout

KINDS = {"gemma3_text": "gemma3", "qwen3": "qwen3", "llama": "llama3"}


def kind_of(name: str) -> str:
    """`model.kind` of a model of `CONFIGS`."""
    return KINDS[CONFIGS[name]["model_type"]]


def model_config(config: Mapping[str, Any], **options: Any) -> ModelConfig:
    """Write a `config.json` as `model` of a run's config, without `validate`.

    Args:
      config: `config.json` of the checkpoint, in the older form.
      **options: more fields of `ModelConfig`.
    """
    layers = config["num_hidden_layers"]
    windows = tuple(reference.layer_window(config, n) or 0 for n in range(layers))
    scaling = config["rope_scaling"] or {"rope_type": "none"}
    decoder = DecoderConfig(
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        norm_epsilon=config["rms_norm_eps"],
        query_scale=config.get("query_pre_attn_scalar", 0.0),
        windows=windows if any(windows) else (),
        local_rope_base=config.get("rope_local_base_freq", 0.0),
        rope_scaling=scaling["rope_type"],
        rope_factor=scaling.get("factor", 1.0),
        rope_low=scaling.get("low_freq_factor", 1.0),
        rope_high=scaling.get("high_freq_factor", 4.0),
        rope_context=scaling.get("original_max_position_embeddings", 0),
        logit_cap=config.get("final_logit_softcapping") or 0.0,
    )
    return ModelConfig(
        **{
            "kind": KINDS[config["model_type"]],
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "layers": layers,
            "ffn_width": config["intermediate_size"],
            "rope_base": config["rope_theta"],
            "windows": (),
            "decoder": decoder,
        }
        | options
    )


def decoder_weights(
    model: ModelConfig, tensors: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Turn the tensors of a checkpoint into weights of `Decoder`, by name.

    It is linear, so that it turns their gradients as well.
    """
    layers = []
    for number in range(model.layers):
        prefix = f"model.layers.{number}."
        layers.append(
            {
                our_name: _as_ours(model, their_name, np.asarray(tensor, "float32"))
                for name, tensor in tensors.items()
                if name.startswith(prefix)
                for their_name in [name.removeprefix(prefix).removesuffix(".weight")]
                for our_name in [_our_name(model, their_name)]
            }
        )
    weights = {"norm/scale": np.asarray(tensors["model.norm.weight"], "float32")}
    rest = iter(layers)
    for entry, size in enumerate(stack_sizes(model)):
        entries = [next(rest) for _ in range(size)]
        for name in entries[0]:
            parts = [layer[name] for layer in entries]
            value = np.stack(parts) if size > 1 else parts[0]
            weights[f"blocks/{entry}/{name}"] = value
    return weights


def _our_name(model: ModelConfig, name: str) -> str:
    gemma = model.kind == "gemma3"
    return {
        "input_layernorm": "attention_norm/scale",
        "post_attention_layernorm": (
            "attention_output_norm/scale" if gemma else "ffn_norm/scale"
        ),
        "pre_feedforward_layernorm": "ffn_norm/scale",
        "post_feedforward_layernorm": "ffn_output_norm/scale",
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.o_proj": "attention/output",
        "self_attn.q_norm": "attention/query_norm/scale",
        "self_attn.k_norm": "attention/key_norm/scale",
        "mlp.gate_proj": "ffn/gate",
        "mlp.up_proj": "ffn/up",
        "mlp.down_proj": "ffn/down",
    }[name]


def _as_ours(model: ModelConfig, name: str, tensor: np.ndarray) -> np.ndarray:
    """Transpose `[out, in]` and give heads an axis of their own."""
    if tensor.ndim == 1:
        return tensor
    turned, h = tensor.T, model.decoder.head_width
    if name == "self_attn.o_proj":
        return turned.reshape(-1, h, model.width)
    if name.startswith("self_attn."):
        return turned.reshape(model.width, -1, h)
    return turned


class Machine(NamedTuple):
    """A decoder on the mesh in use.

    Attributes:
      graph: its modules.
      weights: its weights, on the mesh as it lays them out.
    """

    graph: Any
    weights: nnx.State

    def module(self, weights: nnx.State | None = None) -> Decoder:
        """The decoder with these weights, or its own."""
        return nnx.merge(self.graph, self.weights if weights is None else weights)


def make_decoder(
    model: ModelConfig,
    values: Mapping[str, Any],
    tuning: TuningConfig | None = None,
) -> Machine:
    """Make a decoder on the mesh in use.

    Args:
      model: its config.
      values: its weights by name.
      tuning: its adapters.
    """
    abstract = nnx.eval_shape(lambda: Decoder(model, tuning=tuning, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    rest, flat = dict(values), []
    for path, leaf in nnx.to_flat_state(state):
        wanted, value = leaf.get_value(), rest.pop("/".join(map(str, path)))
        assert value.shape == wanted.shape, path
        flat.append((path, nnx.Param(jax.device_put(value, wanted.sharding.spec))))
    assert not rest, sorted(rest)
    return Machine(graph, nnx.from_flat_state(flat))


def by_name(weights: nnx.State) -> dict[str, np.ndarray]:
    """Weights, or their gradients, by name."""
    return {
        "/".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(weights)
    }


def text_layout(length: int, readout: np.ndarray | None = None) -> Layout:
    """Lay out a stream that is one text.

    Args:
      length: S.
      readout: `[R]`, positions that are read; None for all.
    """
    layout = make_layout(
        [StreamSegment.tokens("text", length, ordered=True)],
        [],
        events=0,
        candidates=0,
        readout="last",
        marks_static=False,
    )
    read = np.arange(length) if readout is None else readout
    return dataclasses.replace(layout, readout=read)


def place(*arrays: Any) -> list[jax.Array]:
    """Split arrays over the mesh by their batch."""
    return [
        jax.device_put(x, RULES("batch", *[None] * (np.ndim(x) - 1))) for x in arrays
    ]


def no_events(batch: int) -> jax.Array:
    """Events of streams that have no history, `[B, 0]`."""
    return jnp.zeros((batch, 0), bool)


def run_decoder(
    machine: Machine, x: np.ndarray, mask: np.ndarray, layout: Layout
) -> np.ndarray:
    """Outputs `[B, R, d]` of a decoder for texts `x: [B, S, d]`, padded by `mask`."""

    @jax.jit
    def run(weights: nnx.State, x: jax.Array, mask: jax.Array) -> jax.Array:
        module = machine.module(weights)
        return module(x, layout, no_events(len(x)), None, None, present=mask)

    return np.asarray(run(machine.weights, *place(x, mask)))
