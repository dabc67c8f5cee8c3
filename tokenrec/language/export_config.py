"""The `config.json` of an exported language model, in the format of Hugging Face.

It is that of the checkpoint from which the run started, where there is one: it also has
what tokenrec does not read, such as special tokens and the longest text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES

# Class of transformers that opens the exported model.
_CLASSES = {
    "gemma3": "Gemma3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama3": "LlamaForCausalLM",
}
# What stands outside `text_config` in the file of a model with a vision tower.
_OUTSIDE = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "transformers_version",
)


def adapted_config(
    source: Mapping[str, Any], config: ModelConfig, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """The `config.json` of a checkpoint, changed to the exported weights.

    Args:
      source: the file of the checkpoint. Of one with a vision tower, which is not
        exported, the part of the text model is taken.
      config: `model` of the config.
      vocabulary: rows of the exported word vectors.
      dtype: type of the exported weights.
    """
    values = dict(source)
    if isinstance(source.get("text_config"), dict):
        outside = {key: source[key] for key in _OUTSIDE if key in source}
        values = {**outside, **source["text_config"]}
    values |= {
        "architectures": [_CLASSES[config.kind]],
        "model_type": FAMILIES[config.kind].model_types[0],
        "vocab_size": vocabulary,
    }
    # transformers 5 writes `dtype`, and reads both.
    keys = [key for key in ("torch_dtype", "dtype") if key in values]
    return values | dict.fromkeys(keys or ["torch_dtype"], dtype)


def new_config(config: ModelConfig, vocabulary: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model that started from random weights.

    Special tokens are left open: the model has no tokenizer.

    Args:
      config: `model` of the config.
      vocabulary: rows of the exported word vectors.
      dtype: type of the exported weights.

    Raises:
      InputError: a size that the classes of transformers cannot express.
    """
    kind, decoder = config.kind, config.decoder
    gemma = kind == "gemma3"
    if not gemma and decoder.query_scale not in (0, decoder.head_width):
        raise _error(kind, f"model.decoder.query_scale={decoder.query_scale:g}")
    if not gemma and decoder.logit_cap:
        raise _error(kind, f"model.decoder.logit_cap={decoder.logit_cap:g}")
    values: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": FAMILIES[kind].model_types[0],
        "vocab_size": vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_width,
        "rms_norm_eps": decoder.norm_epsilon,
        "tie_word_embeddings": decoder.tied,
        "rope_theta": config.rope_base,
        "rope_scaling": _rope_scaling(config),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    if decoder.rope_scaling == "llama3":
        values["max_position_embeddings"] = round(
            decoder.rope_context * decoder.rope_factor
        )
    values |= _layer_types(config)
    if not gemma:
        return values | {"hidden_act": "silu"}
    scale = decoder.query_scale or decoder.head_width
    return values | {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": decoder.local_rope_base or 10_000.0,
        # The class wants a whole number, where it is one.
        "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
        "final_logit_softcapping": decoder.logit_cap or None,
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    decoder = config.decoder
    if decoder.rope_scaling == "none":
        return None
    values = {"rope_type": decoder.rope_scaling, "factor": decoder.rope_factor}
    if decoder.rope_scaling == "linear":
        return values
    return values | {
        "low_freq_factor": decoder.rope_low,
        "high_freq_factor": decoder.rope_high,
        "original_max_position_embeddings": decoder.rope_context,
    }


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    """Keys of the sliding layers."""
    windows = config.decoder.windows
    if config.kind == "llama3":
        if any(windows):
            raise _error(config.kind, f"model.decoder.windows={windows}")
        return {}
    sizes = sorted(set(windows) - {0})
    if len(sizes) > 1:
        raise _error(config.kind, f"model.decoder.windows with the sizes {sizes}")
    values: dict[str, Any] = {
        "layer_types": [
            "sliding_attention" if window else "full_attention"
            for window in windows or (0,) * config.layers
        ]
    }
    if config.kind == "qwen3":
        values["use_sliding_window"] = bool(sizes)
    return values | ({"sliding_window": sizes[0]} if sizes else {})


def _error(kind: str, what: str) -> InputError:
    return InputError(
        f"{what} with model.kind='{kind}' cannot be exported: {_CLASSES[kind]} of "
        "transformers has no field for it; use the sizes of a published model"
    )
