"""A `config.json` gives the sizes of a model, or a refusal that names the file and the key."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.language.checkpoints import FILES, KINDS, L, config_of, write_config_json
from tokenrec.config import Config, DecoderConfig, from_json, to_json
from tokenrec.config.load import load_config
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.language.architecture import (
    ARCHITECTURE_FIELDS,
    find_config_json,
    read_architecture,
    shipped_architectures,
    with_architecture,
)
from tokenrec.language.weight_names import parameter_count

LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Read the small file of a family with keys changed, or removed by `...`."""
    values = FILES[kind] | changes
    values = {key: value for key, value in values.items() if value is not ...}
    return read_architecture(kind, write_config_json(folder, values))


def decoder(kind: str, folder: Path, **changes: Any) -> DecoderConfig:
    values = read(kind, folder, **changes)
    prefix = "model.decoder."
    return DecoderConfig(
        **{k.removeprefix(prefix): v for k, v in values.items() if prefix in k}
    )


def language_config(**model: Any) -> Config:
    config = Config()
    config.model = dataclasses.replace(config.model, windows=(), **model)
    return config


# Published sizes: Gemma 3 Technical Report, table 1; Qwen3 model cards; The Llama 3 Herd of Models, table 3, and the
# Llama 3.2 model card. Weights in all, and without the word embedding.
PUBLISHED = {
    "gemma3_1b": (1.0e9, 698e6),
    "gemma3_4b": (3.88e9, 3209e6),
    "llama3_1b": (1.24e9, 0.97e9),
    "llama3_8b": (8.03e9, 7.50e9),
    "qwen3_0.6b": (0.6e9, 0.44e9),
    "qwen3_4b": (4.02e9, 3.6e9),
}


def test_shipped_architectures_are_those_of_the_table() -> None:
    assert shipped_architectures().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_architecture_has_the_published_number_of_weights(name: str) -> None:
    config = load_config(
        None,
        [
            f"model.kind={name.split('_')[0]}",
            f"model.architecture={name}",
            "model.windows=()",
        ],
    )
    total = parameter_count(config.model)
    words = config.model.decoder.vocabulary * config.model.width
    assert total == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert total - words == pytest.approx(PUBLISHED[name][1], rel=0.01)


def test_gemma3_4b_has_five_sliding_layers_below_each_full_one() -> None:
    values = read_architecture("gemma3", shipped_architectures()["gemma3_4b"])
    windows = values["model.decoder.windows"]
    assert windows[:7] == (1024, 1024, 1024, 1024, 1024, 0, 1024)
    assert len(windows) == values["model.layers"] == 34
    assert values["model.rope_base"] == 1e6
    assert values["model.decoder.local_rope_base"] == 1e4
    assert values["model.decoder.rope_scaling"] == "linear"
    assert values["model.decoder.rope_factor"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_value_of_its_type(kind: str, tmp_path: Path) -> None:
    values = read(kind, tmp_path)
    assert set(values) == set(ARCHITECTURE_FIELDS)
    write_config_json(tmp_path, FILES[kind])
    config = language_config(kind=kind, pretrained=str(tmp_path))
    filled = validate(config)
    assert values == {name: get(filled, name) for name in ARCHITECTURE_FIELDS}


def get(config: Config, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def test_both_versions_of_transformers_are_read_alike(tmp_path: Path) -> None:
    old = read(
        "llama3", tmp_path, rope_theta=500_000, rope_scaling=LLAMA_ROPE, head_dim=...
    )
    new = read(
        "llama3",
        tmp_path,
        rope_parameters=LLAMA_ROPE | {"rope_theta": 500_000.0},
        head_dim=None,
    )
    assert old == new
    assert old["model.decoder.head_width"] == 8 // 4
    assert old["model.decoder.rope_context"] == 8192
    old = read(
        "gemma3",
        tmp_path,
        rope_theta=2e6,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    new = read(
        "gemma3",
        tmp_path,
        rope_parameters={
            "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8},
            "sliding_attention": {"rope_theta": 5e3, "rope_type": "default"},
        },
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    )
    assert old == new
    assert old["model.rope_base"] == 2e6
    assert old["model.decoder.local_rope_base"] == 5e3
    assert old["model.decoder.windows"] == (4, 0, 4, 0, 4)


def test_defaults_are_those_of_the_class(tmp_path: Path) -> None:
    gemma = read_architecture(
        "gemma3", write_config_json(tmp_path, {"model_type": "gemma3_text"})
    )
    assert gemma["model.width"] == 2304
    assert gemma["model.decoder.vocabulary"] == 262_208
    assert gemma["model.rope_base"] == 1e6
    assert gemma["model.decoder.local_rope_base"] == 1e4
    assert gemma["model.decoder.query_scale"] == 256
    assert gemma["model.decoder.tied"] is True
    for kind, model_type in (("qwen3", "qwen3"), ("llama3", "llama")):
        values = read_architecture(
            kind, write_config_json(tmp_path, {"model_type": model_type})
        )
        assert values["model.decoder.tied"] is False
        assert values["model.rope_base"] == 1e4
        assert values["model.decoder.kv_heads"] == values["model.heads"] == 32


def test_gemma_with_a_vision_tower_gives_its_text_model(tmp_path: Path) -> None:
    # As in the files of the 4B model: only what differs from the class.
    values = {
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152},
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    path = write_config_json(tmp_path, values)
    shipped = shipped_architectures()["gemma3_4b"]
    assert read_architecture("gemma3", path) == read_architecture("gemma3", shipped)
    path = write_config_json(tmp_path, values | {"tie_word_embeddings": False})
    assert read_architecture("gemma3", path)["model.decoder.tied"] is False


def test_full_layers_alone_have_one_base(tmp_path: Path) -> None:
    found = decoder("gemma3", tmp_path, layer_types=["full_attention"] * L)
    assert (found.windows, found.local_rope_base) == ((), 0.0)
    assert decoder("gemma3", tmp_path).local_rope_base == 1e4


def test_qwen_slides_only_where_it_is_asked_to(tmp_path: Path) -> None:
    sliding = {"sliding_window": 7, "max_window_layers": 3}
    assert decoder("qwen3", tmp_path, **sliding).windows == ()
    windows = decoder("qwen3", tmp_path, **sliding, use_sliding_window=True).windows
    assert windows == (0, 0, 0, 7, 7)
    types = ["full_attention"] * 4 + ["sliding_attention"]
    by_type = {"layer_types": types, "use_sliding_window": True}
    assert decoder("qwen3", tmp_path, **sliding, **by_type).windows == (0, 0, 0, 0, 7)


def test_caps_and_scales_are_read(tmp_path: Path) -> None:
    found = decoder(
        "gemma3", tmp_path, final_logit_softcapping=30, query_pre_attn_scalar=168
    )
    assert (found.logit_cap, found.query_scale) == (30.0, 168.0)
    assert decoder("gemma3", tmp_path, final_logit_softcapping=None).logit_cap == 0
    assert decoder("llama3", tmp_path, query_pre_attn_scalar=9).query_scale == 0


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
    ("gemma3", {"use_bidirectional_attention": True}, ["causal"]),
    ("llama3", {"attention_bias": True}, ["attention_bias=True", "no bias"]),
    ("llama3", {"mlp_bias": True}, ["mlp_bias=True"]),
    ("llama3", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    ("gemma3", {"hidden_activation": "silu"}, ["gelu_pytorch_tanh"]),
    ("llama3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    ("qwen3", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ("qwen3", {"model_type": "llama"}, ["model_type='llama'", "model.kind='llama3'"]),
    ("llama3", {"model_type": "mamba"}, ["model_type='mamba'", "another checkpoint"]),
    ("llama3", {"model_type": ...}, ["model_type=None"]),
    ("gemma3", {"model_type": "gemma3"}, ["text_config"]),
    ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, ["yarn"]),
    ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 2}}, ["dynamic"]),
    ("llama3", {"rope_scaling": {"rope_type": "linear"}}, ["factor=None"]),
    ("llama3", {"rope_scaling": LLAMA_ROPE | {"high_freq_factor": 1}}, ["high_freq"]),
    ("llama3", {"rope_scaling": "linear"}, ["rope_scaling", "no JSON object"]),
    (
        "llama3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        ["rope_parameters", "one object"],
    ),
    ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, ["per layer type"]),
    (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2}
            }
        },
        ["sliding_attention", "scales sliding layers"],
    ),
    (
        "qwen3",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2},
            "use_sliding_window": True,
            "max_window_layers": 0,
        },
        ["rope_type='linear' with sliding layers"],
    ),
    ("gemma3", {"sliding_window": None}, ["sliding_window=None"]),
    ("gemma3", {"layer_types": ["full_attention"]}, [f"list of {L} layers"]),
    ("gemma3", {"layer_types": ["chunked_attention"] * L}, ["chunked_attention"]),
    ("llama3", {"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ("gemma3", {"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
    ("llama3", {"hidden_size": "8"}, ["hidden_size='8'", "whole number"]),
    ("llama3", {"hidden_size": True}, ["hidden_size=True"]),
    ("llama3", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "4 heads"]),
    ("llama3", {"head_dim": 5}, ["head_dim=5", "odd"]),
    ("llama3", {"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
    ("llama3", {"rope_theta": 10**400}, ["rope_theta"]),
    ("llama3", {"rope_theta": 1}, ["rope_theta=1"]),
    ("llama3", {"tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
]


@pytest.mark.parametrize(("kind", "changes", "parts"), REFUSED)
def test_what_the_decoder_cannot_do_is_refused_by_name(
    kind: str, changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read(kind, tmp_path, **changes)
    for part in [str(tmp_path / "config.json"), *parts]:
        assert part in str(caught.value)


def test_all_unsupported_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attention_bias=True.*mlp_bias=True"):
        read("llama3", tmp_path, attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("text", ["[]", "{", "3", '"x"', "\xff"])
def test_a_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=str(path)):
        read_architecture("llama3", path)


def test_any_value_of_any_key_is_read_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    strange = [None, True, -1, 0, 1e300, 10**30, "", "x", [], [1], {}, {"a": 1}, 0.5]
    full = {
        "gemma3": FILES["gemma3"]
        | {"layer_types": ["full_attention"] * L, "rope_scaling": LLAMA_ROPE},
        "qwen3": FILES["qwen3"] | {"use_sliding_window": True, "max_window_layers": 1},
        "llama3": FILES["llama3"] | {"rope_parameters": LLAMA_ROPE},
    }
    refused = 0
    for _ in range(400):
        kind = draw.choice(KINDS)
        values = copy.deepcopy(full[kind])
        owner: Any = draw.choice([values, *filter(bool, map(as_dict, values.values()))])
        owner[draw.choice(list(owner))] = draw.choice(strange)
        try:
            read_architecture(kind, write_config_json(tmp_path, values))
        except InputError:
            refused += 1
    assert 100 < refused < 400


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def test_the_architecture_is_found_as_file_folder_or_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config_json(tmp_path / "model", FILES["qwen3"])

    def find(architecture: str) -> Path:
        return find_config_json(
            language_config(kind="qwen3", architecture=architecture).model
        )

    assert find(str(path)) == path
    assert find(str(path.parent)) == path
    shipped = shipped_architectures()["qwen3_0.6b"]
    assert find("qwen3_0.6b") == find("qwen3_0.6b.json") == shipped
    monkeypatch.chdir(tmp_path)
    assert find("model").resolve() == path
    with pytest.raises(InputError, match="did you mean 'qwen3_4b'"):
        find("qwen3_4")
    with pytest.raises(InputError, match="no such file"):
        find(str(tmp_path / "elsewhere" / "qwen3_4b"))


def test_a_filled_config_needs_its_file_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_config_json(folder, FILES["gemma3"])
    config = language_config(kind="gemma3", pretrained=str(folder))
    before = copy.deepcopy(config)
    filled = validate(config)
    assert config == before
    assert filled.model.decoder.vocabulary == FILES["gemma3"]["vocab_size"]
    shutil.rmtree(folder)
    assert validate(filled) == filled
    assert validate(from_json(to_json(filled))) == filled


def test_other_backbones_are_returned_as_they_are() -> None:
    config = Config()
    assert validate(config) is config
    assert with_architecture(config) == (config, [])


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({}, ["model.pretrained=''", "model.architecture=''", "qwen3_4b"]),
        (
            {"architecture": "llama3_1b", "pretrained": "x"},
            ["model.pretrained='x'", "both are given"],
        ),
        (
            {"pretrained": "/no/such/folder"},
            ["model.pretrained='/no/such/folder'", "config.json", "No such file"],
        ),
        ({"architecture": "llama3"}, ["model.architecture='llama3'", "llama3_"]),
        ({"architecture": "qwen3_4b"}, ["model_type='qwen3'", "model.kind='qwen3'"]),
        (
            {"architecture": "llama3_1b", "layers": 5, "width": 65},
            ["model.layers=5 differs from the 16", "model.width=65", "leave it at 64"],
        ),
        (
            {"architecture": "llama3_1b", "decoder": DecoderConfig(logit_cap=3.0)},
            ["model.decoder.logit_cap=3.0 differs from the 0.0"],
        ),
        # Fields of a wrong type: no crash, and nothing concluded from stand-ins.
        ({"architecture": "llama3_1b", "width": "wide"}, ["model.width='wide'"]),
        ({"architecture": 3}, ["model.architecture=3"]),
        ({"pretrained": None}, ["model.pretrained=None"]),
        ({"architecture": "llama3_1b", "decoder": 3}, ["model.decoder=3"]),
        (
            {"architecture": "llama3_1b", "decoder": DecoderConfig(kv_heads="x")},  # type: ignore[arg-type]
            ["model.decoder.kv_heads='x'"],
        ),
    ],
)
def test_what_keeps_the_sizes_unknown_is_reported(
    model: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        validate(language_config(kind="llama3", **model))
    for part in parts:
        assert part in str(caught.value)


def test_unknown_sizes_bring_no_problems_of_stand_ins() -> None:
    config = language_config(kind="llama3")
    config.model = dataclasses.replace(config.model, windows=(9,) * 6)
    with pytest.raises(InputError) as caught:
        validate(config)
    assert "model.layers" not in str(caught.value)


def test_a_value_that_agrees_with_the_file_may_be_given(tmp_path: Path) -> None:
    write_config_json(tmp_path, FILES["llama3"])
    config = language_config(kind="llama3", pretrained=str(tmp_path), layers=L)
    assert validate(config) == config_of("llama3", tmp_path, scan=config.model.scan)


def test_sizes_reach_a_run_through_the_command_line(tmp_path: Path) -> None:
    path = write_config_json(tmp_path, FILES["qwen3"])
    overrides = ["model.kind=qwen3", f"model.architecture={path}", "model.windows=()"]
    config = load_config(None, overrides)
    assert config.model.width == FILES["qwen3"]["hidden_size"]
    assert json.loads(to_json(config))["model"]["decoder"]["kv_heads"] == 2
