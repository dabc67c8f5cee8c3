"""Sizes of a language model, from a `config.json` in the format of Hugging Face.

The file belongs to a checkpoint (`model.pretrained`) or stands alone
(`model.architecture`). Both forms are read: that of transformers 4 (`rope_theta`,
`rope_scaling`) and that of transformers 5 (`rope_parameters`). A key that the file lacks
has the default of its class there (`Gemma3TextConfig`, `Qwen3Config`, `LlamaConfig`).

A `sliding_window` of n in the file lets a query see n keys, itself included: the mask of
transformers is `key <= query and key > query - n` (`masking_utils.py`). That is also
what `model.decoder.windows` counts.

This module imports no JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenrec.config.backbones import is_decoder
from tokenrec.config.config import Config
from tokenrec.config.load import shipped_folder
from tokenrec.config.model_config import DecoderConfig, ModelConfig
from tokenrec.config.problems import ConfigProblem
from tokenrec.errors import InputError, suggest
from tokenrec.language.config_object import ConfigObject
from tokenrec.language.families import FAMILIES
from tokenrec.language.rope_config import rope_fields
from tokenrec.runtime.files import is_file, read_json
from tokenrec.runtime.paths import as_path

CONFIG_FILE = "config.json"
_SECTION, _DECODER = "model.", "model.decoder."
# Fields that a `config.json` sets.
ARCHITECTURE_FIELDS = (
    *(_SECTION + name for name in ("width", "heads", "layers", "ffn_width")),
    _SECTION + "rope_base",
    *(_DECODER + item.name for item in dataclasses.fields(DecoderConfig)),
)

# Defaults of the classes of transformers, for keys that a file may lack.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "qwen3": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "llama3": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
_ACTIVATIONS = {"gelu_tanh": ("gelu_pytorch_tanh",), "silu": ("silu", "swish")}
# Windows are listed by layer, so that a damaged number must not be of billions.
_MOST_LAYERS = 10_000
_LAYER_TYPES = ("full_attention", "sliding_attention")


def with_architecture(config: Config) -> tuple[Config, list[ConfigProblem]]:
    """Fill in the sizes of a language model, if it is one and they are not there yet.

    A filled config stays as it is, so that a run does not need the file again.

    Args:
      config: a config whose fields have allowed values.

    Returns:
      A filled copy, or the config itself, and what is wrong.
    """
    model = config.model
    if not is_decoder(model) or _is_filled(model.decoder):
        return config, []
    named = [name for name in ("pretrained", "architecture") if getattr(model, name)]
    if len(named) != 1:
        have = "both are given" if named else "neither is given, so sizes are unknown"
        text = (
            f"model.pretrained={model.pretrained!r} and "
            f"model.architecture={model.architecture!r} with "
            f"model.kind='{model.kind}': {have}; name the folder of a checkpoint, or an "
            f"architecture for random weights: {', '.join(shipped_architectures())}"
        )
        return config, [ConfigProblem("model.architecture", text)]
    field = _SECTION + named[0]
    try:
        path = find_config_json(model)
        values = read_architecture(model.kind, path)
    except InputError as error:
        text = f"{field}={getattr(model, named[0])!r}: {error}"
        return config, [ConfigProblem(field, text)]
    problems = list(_conflicts(model, values, path))
    return (config, problems) if problems else (_filled(config, values), [])


def find_config_json(model: ModelConfig) -> Path:
    """Path of the `config.json` that `model.pretrained` or `.architecture` names.

    Raises:
      InputError: there is no such file, folder or shipped architecture.
    """
    if model.pretrained:
        return as_path(model.pretrained) / CONFIG_FILE
    given, shipped = as_path(model.architecture), shipped_architectures()
    for path in (given / CONFIG_FILE, given):
        if is_file(path):
            return path
    # Not `stem`: a name may have a point, as in `qwen3_0.6b`.
    name = given.name.removesuffix(".json")
    if given.name == model.architecture and name in shipped:
        return shipped[name]
    raise InputError(
        "there is no such file, no such folder with a config.json, and no shipped "
        f"architecture of that name{suggest(name, shipped)}"
    )


def shipped_architectures() -> dict[str, Path]:
    """Name -> file of the architectures that come with tokenrec."""
    folder = shipped_folder() / "architectures"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def read_architecture(kind: str, path: Path) -> dict[str, Any]:
    """Read a `config.json` into config fields.

    Args:
      kind: `model.kind`, a family of `FAMILIES`.
      path: the file.

    Returns:
      Value of each of `ARCHITECTURE_FIELDS`.

    Raises:
      InputError: the file cannot be read, is of another family, has a value that is not
        allowed, or an option that the decoder does not have.
      StorageError: the storage is at fault, again and again.
    """
    remedy = "give the config.json of a checkpoint in the format of Hugging Face"
    file = ConfigObject(read_json(path, "model config", remedy), f"'{path}'")
    outer, text = file, _text_part(kind, file)
    if unsupported := list(_unsupported(kind, outer, text)):
        raise InputError(
            f"{file.where}: {'; '.join(unsupported)}; use a checkpoint without that"
        )
    width = text.integer("hidden_size")
    heads = text.integer("num_attention_heads")
    layers = text.integer("num_hidden_layers", at_most=_MOST_LAYERS)
    kv_heads = text.optional_integer("num_key_value_heads") or heads
    head_width = text.optional_integer("head_dim") or width // heads
    if heads % kv_heads:
        raise text.error("num_key_value_heads", f"does not divide {heads} heads")
    if head_width % 2:
        raise text.error("head_dim", f"makes heads of {head_width}, which is odd")
    windows = _windows(kind, text, layers)
    capped = kind == "gemma3" and text.get("final_logit_softcapping") is not None
    decoder = {
        "vocabulary": text.integer("vocab_size"),
        "tied": text.flag("tie_word_embeddings"),
        "kv_heads": kv_heads,
        "head_width": head_width,
        "norm_epsilon": text.number("rms_norm_eps"),
        "query_scale": (
            text.number("query_pre_attn_scalar") if kind == "gemma3" else 0.0
        ),
        "windows": windows,
        "logit_cap": text.number("final_logit_softcapping") if capped else 0.0,
    }
    base, rope = rope_fields(kind, text, sliding=bool(windows))
    return {
        _SECTION + "width": width,
        _SECTION + "heads": heads,
        _SECTION + "layers": layers,
        _SECTION + "ffn_width": text.integer("intermediate_size"),
        _SECTION + "rope_base": base,
        **{_DECODER + name: value for name, value in (decoder | rope).items()},
    }


def _text_part(kind: str, file: ConfigObject) -> ConfigObject:
    """The object with the sizes of the text model, with the defaults of its class."""
    named = file.get("model_type")
    if named not in FAMILIES[kind].model_types:
        fits = [
            name for name, family in FAMILIES.items() if named in family.model_types
        ]
        remedy = f"use model.kind='{fits[0]}'" if fits else "choose another checkpoint"
        raise InputError(
            f"{file.where} has model_type={named!r}, and model.kind='{kind}' reads "
            f"{' and '.join(map(repr, FAMILIES[kind].model_types))}; {remedy}"
        )
    defaults = _DEFAULTS[kind]
    if named != "gemma3":
        return file.with_defaults(defaults)
    # With a vision tower: the text model has an object of its own. What both parts
    # share stands outside in files of transformers 5.
    text = file.object("text_config")
    if text is None:
        raise file.error("text_config", "is missing, so there are no sizes")
    tied = file.values.get("tie_word_embeddings", defaults["tie_word_embeddings"])
    return text.with_defaults({**defaults, "tie_word_embeddings": tied})


def _unsupported(kind: str, outer: ConfigObject, text: ConfigObject) -> Iterator[str]:
    """Yield each option of the file that the decoder does not have."""
    if text.get("attn_logit_softcapping") is not None:
        yield f"{text.shown('attn_logit_softcapping')}: scores are not capped here"
    for key in ("attention_bias", "mlp_bias"):
        if text.get(key):
            yield f"{text.shown(key)}: projections have no bias here"
    if text.get("use_bidirectional_attention"):
        yield f"{text.shown('use_bidirectional_attention')}: attention is causal here"
    if text.get("partial_rotary_factor") not in (None, 1):
        yield f"{text.shown('partial_rotary_factor')}: whole heads are rotated here"
    if outer.get("quantization_config") or text.get("quantization_config"):
        yield "quantization_config is set: weights must be float32, float16 or bfloat16"
    key = "hidden_activation" if kind == "gemma3" else "hidden_act"
    activations = _ACTIVATIONS[FAMILIES[kind].activation]
    if text.get(key) not in activations:
        yield f"{text.shown(key)}: model.kind='{kind}' computes '{activations[0]}'"


def _windows(kind: str, text: ConfigObject, layers: int) -> tuple[int, ...]:
    """Window of each layer in tokens, 0 for a full layer; () if all are full."""
    if kind == "llama3":
        return ()
    window = text.optional_integer("sliding_window")
    if kind == "qwen3" and not text.flag("use_sliding_window"):
        window = None
    types = text.get("layer_types")
    if types is None and kind == "gemma3":
        # One full layer above so many less one sliding layers.
        every = text.integer("sliding_window_pattern")
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    elif types is None:
        first = text.integer("max_window_layers", at_least=0)
        slides = [window is not None and layer >= first for layer in range(layers)]
    else:
        if not isinstance(types, list) or len(types) != layers:
            raise text.error("layer_types", f"is not a list of {layers} layers")
        if strange := [each for each in types if each not in _LAYER_TYPES]:
            raise text.error(
                "layer_types", f"{strange[0]!r} is none of {', '.join(_LAYER_TYPES)}"
            )
        slides = [each == "sliding_attention" for each in types]
    if not any(slides):
        return ()
    if window is None:
        raise text.error("sliding_window", "is not set, and there are sliding layers")
    return tuple(window if sliding else 0 for sliding in slides)


def _is_filled(decoder: DecoderConfig) -> bool:
    return all((decoder.vocabulary, decoder.kv_heads, decoder.head_width))


def _conflicts(
    model: ModelConfig, values: dict[str, Any], path: Path
) -> Iterator[ConfigProblem]:
    """Yield the fields that the user set to other values than those of the file."""
    defaults = ModelConfig()
    for field, value in values.items():
        given, default = _value_of(model, field), _value_of(defaults, field)
        if given not in (default, value):
            yield ConfigProblem(
                field,
                f"{field}={given!r} differs from the {value!r} of '{path}', from which "
                f"it is read; leave it at {default!r}",
            )


def _value_of(model: ModelConfig, field: str) -> Any:
    if field.startswith(_DECODER):
        return getattr(model.decoder, field.removeprefix(_DECODER))
    return getattr(model, field.removeprefix(_SECTION))


def _filled(config: Config, values: dict[str, Any]) -> Config:
    """Copy a config with the values of `read_architecture`."""
    decoder, sizes = {}, {}
    for field, value in values.items():
        if field.startswith(_DECODER):
            decoder[field.removeprefix(_DECODER)] = value
        else:
            sizes[field.removeprefix(_SECTION)] = value
    model = dataclasses.replace(config.model, decoder=DecoderConfig(**decoder), **sizes)
    return dataclasses.replace(config, model=model)
