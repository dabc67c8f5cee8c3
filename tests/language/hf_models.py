"""Small random language models in folders as Hugging Face checkpoints.

`write_model` writes `config.json` and `model.safetensors` by itself, in the older form
of `config.json` that the published checkpoints have; `save_model` lets transformers
make and save the same model, in the newer form. Both draw the same numbers for a name
and a seed. No weight has a value that hides it: norm scales are neither 0 nor 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

WORDS = 97
WIDTH = 48
WINDOW = 5

_SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # 4 heads of 16 are wider than the 48 of the model.
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "attention_bias": False,
    "pad_token_id": 0,
}
_GEMMA3 = _SIZES | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    # A full layer between two local ones.
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 24,
    # Published: 1e6 and 1e4, with which a short text turns a narrow head but little.
    "rope_theta": 1000.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "tie_word_embeddings": True,
}
_QWEN3 = _SIZES | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "tie_word_embeddings": True,
}
_LLAMA3 = _SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    # The 8 wavelengths of a head are 6 to 2650 tokens: some of each of the three kinds.
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 100,
    },
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": _GEMMA3,
    # The published models of 4 billion weights and more stretch the full layers.
    "gemma3_linear": _GEMMA3
    | {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "num_key_value_heads": 1,
    },
    # Gemma 3 has neither; its family reads both.
    "gemma3_capped_untied": _GEMMA3
    | {"final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    "gemma3_long_window": _GEMMA3 | {"sliding_window": 64},
    "qwen3": _QWEN3,
    "qwen3_untied": _QWEN3 | {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "qwen3_windows": _QWEN3
    | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    # Windows repeat after two layers: with `model.scan` a loop of two turns of two
    # layers, and two alone.
    "gemma3_deep": _GEMMA3 | {"num_hidden_layers": 6},
    # A loop of three layers, all with a window, and one alone.
    "qwen3_deep": _QWEN3
    | {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 0,
    },
    "llama3": _LLAMA3,
    "llama3_tied": _LLAMA3 | {"rope_scaling": None, "tie_word_embeddings": True},
    "llama3_linear": _LLAMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint with this `config.json`."""
    words, width = config["vocab_size"], config["hidden_size"]
    inner, head = config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    if config["model_type"] != "llama":
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    if config["model_type"] == "gemma3_text":
        layer |= {
            "pre_feedforward_layernorm": (width,),
            "post_feedforward_layernorm": (width,),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (words, width)
    for index in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    return shapes


def random_tensors(
    config: dict[str, Any], dtype: str = "float32", seed: int = 0
) -> dict[str, jax.Array]:
    """Draw the tensors of a checkpoint.

    Args:
      config: its `config.json`.
      dtype: `float32` or `bfloat16`.
      seed: random seed.

    Returns:
      Tensors by name: matrices that keep the size of what they multiply; word vectors
      such that scores of words have a spread near 1; norm scales 0.7 to 1.3, which
      gemma3 stores less 1.
    """
    draw = np.random.default_rng(seed)
    gemma = config["model_type"] == "gemma3_text"
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            values = draw.uniform(0.7, 1.3, shape) - gemma
        else:
            values = draw.normal(size=shape) / np.sqrt(shape[1])
        tensors[name] = jnp.asarray(values, dtype)
    return tensors


def write_model(
    folder: Path, name: str, dtype: str = "float32", seed: int = 0
) -> dict[str, jax.Array]:
    """Write a checkpoint without transformers.

    Args:
      folder: where to; it is created.
      name: in `CONFIGS`.
      dtype: `float32` or `bfloat16`.
      seed: random seed.

    Returns:
      The tensors.
    """
    config = CONFIGS[name]
    tensors = random_tensors(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def save_model(folder: Path, name: str, dtype: str = "float32", seed: int = 0) -> Any:
    """Make a model with transformers and save it by `save_pretrained`.

    Args:
      folder: where to.
      name: in `CONFIGS`.
      dtype: `float32` or `bfloat16`.
      seed: random seed.

    Returns:
      The PyTorch model, in evaluation mode, with plain attention.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    weights = {
        tensor: torch.tensor(np.asarray(values, "float32"))
        for tensor, values in random_tensors(CONFIGS[name], dtype, seed).items()
    }
    missing, unused = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if CONFIGS[name]["tie_word_embeddings"] else []
    assert (missing, unused) == (tied, [])
    model.save_pretrained(folder)
    return model.eval()


def random_text(
    lengths: tuple[int, ...], seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Draw texts with padding on the left.

    Args:
      lengths: words of each text; the longest is the length S of all.
      seed: random seed.

    Returns:
      Words `[B, S] int32` and `[B, S] bool`, False at padding.
    """
    length = max(lengths)
    words = np.random.default_rng(seed).integers(1, WORDS, (len(lengths), length))
    mask = np.arange(length) >= length - np.array(lengths)[:, None]
    return np.where(mask, words, 0).astype(np.int32), mask
