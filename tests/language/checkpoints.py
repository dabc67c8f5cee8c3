"""Small random checkpoints in the format of Hugging Face, written by the library safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tokenrec.config import Config
from tokenrec.language.architecture import with_architecture

KINDS = ("gemma3", "qwen3", "llama3")
NUMPY_TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
# d width, f inner width, H heads, G heads of keys and values, h width of a head, V words, L layers.
D, F, H, G, HEAD, V, L = 8, 16, 4, 2, 6, 24, 5
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": HEAD,
    "rms_norm_eps": 1e-5,
}
FILES: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 4} | SIZES,
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True} | SIZES,
    "llama3": {"model_type": "llama"} | SIZES,
}


def write_config_json(folder: Path, values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def config_of(kind: str, folder: Path, scan: int = 0) -> Config:
    """A config with the sizes of a checkpoint."""
    config = Config()
    config.model.kind, config.model.pretrained = kind, str(folder)
    config.model.windows, config.model.scan = (), scan
    filled, problems = with_architecture(config)
    assert not problems, problems
    return filled


def random_tensors(
    kind: str, dtype: str = "F32", body: str = "model.", head: str = ""
) -> dict[str, np.ndarray]:
    """Every tensor of a small checkpoint, by its name there."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{body}embed_tokens.weight": (V, D),
        f"{body}norm.weight": (D,),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(L):
        block = f"{body}layers.{layer}."
        shapes |= {f"{block}{norm}.weight": (D,) for norm in norms}
        shapes |= {
            f"{block}self_attn.q_proj.weight": (H * HEAD, D),
            f"{block}self_attn.k_proj.weight": (G * HEAD, D),
            f"{block}self_attn.v_proj.weight": (G * HEAD, D),
            f"{block}self_attn.o_proj.weight": (D, H * HEAD),
            f"{block}mlp.gate_proj.weight": (F, D),
            f"{block}mlp.up_proj.weight": (F, D),
            f"{block}mlp.down_proj.weight": (D, F),
        }
        if kind != "llama3":
            shapes[f"{block}self_attn.q_norm.weight"] = (HEAD,)
            shapes[f"{block}self_attn.k_norm.weight"] = (HEAD,)
    if kind == "llama3":
        shapes[f"{head}lm_head.weight"] = (V, D)
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape).astype(NUMPY_TYPES[dtype])
        for name, shape in shapes.items()
    }


def write_checkpoint_folder(
    folder: Path, kind: str, tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """Write a checkpoint, with an index where there are several files."""
    write_config_json(folder, FILES[kind])
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
