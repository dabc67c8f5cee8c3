"""A model that was loaded is written back bit for bit, its adapters merged, or nothing is."""

from __future__ import annotations

import dataclasses
import json
import resource
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.language.checkpoints import (
    FILES,
    KINDS,
    NUMPY_TYPES,
    D,
    L,
    V,
    config_of,
    random_tensors,
    same_bits,
    write_checkpoint_folder,
    write_config_json,
)
from tests.language.test_load import wanted_weights
from tokenrec.config import Config, DecoderConfig, MeshConfig, ModelConfig
from tokenrec.errors import InputError
from tokenrec.language.architecture import read_architecture, shipped_architectures
from tokenrec.language.export import write_checkpoint
from tokenrec.language.export_config import adapted_config, new_config
from tokenrec.language.load import load_weights
from tokenrec.language.tensor_files import INDEX_FILE, open_tensor_files
from tokenrec.language.weight_names import NAMINGS
from tokenrec.sharding import make_mesh


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, read by the library safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(found[name], value), name


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("scan", [0, 3])
@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_a_round_trip_is_equal_bit_for_bit(
    kind: str, dtype: str, scan: int, tmp_path: Path
) -> None:
    tensors = random_tensors(kind, dtype)
    source = write_checkpoint_folder(tmp_path / "in", kind, tensors, shards=2)
    config = config_of(kind, source, scan)
    # Float32 holds every number of the other types.
    params, _ = load_weights(source, config, wanted_weights(config))
    written = write_checkpoint(tmp_path / "out", config, params, source=source)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
    assert written.weights == sum(value.size for value in tensors.values())
    assert (written.vocabulary, written.left_out) == (V, ())
    assert written.files == ("config.json", "model.safetensors")
    # And what was written can be loaded.
    again = config_of(kind, tmp_path / "out", scan)
    assert dataclasses.replace(again.model, pretrained="") == dataclasses.replace(
        config.model, pretrained=""
    )
    loaded, report = load_weights(tmp_path / "out", again, wanted_weights(again))
    assert report.unused == ()
    for name, value in params.items():
        assert same_bits(np.asarray(loaded[name]), np.asarray(value))


def test_weights_of_bfloat16_come_back_from_a_mesh(tmp_path: Path) -> None:
    tensors = random_tensors("llama3", "BF16")
    source = write_checkpoint_folder(tmp_path / "in", "llama3", tensors)
    config = config_of("llama3", source, scan=3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    wanted = {
        name: jax.ShapeDtypeStruct(
            spec.shape,
            jnp.bfloat16,
            sharding=NamedSharding(
                mesh, PartitionSpec(*(None,) * (len(spec.shape) - 1), "fsdp")
            )
            if spec.shape[-1] % 4 == 0
            else NamedSharding(mesh, PartitionSpec()),
        )
        for name, spec in wanted_weights(config).items()
    }
    params, _ = load_weights(source, config, wanted)
    write_checkpoint(tmp_path / "out", config, params, source=source)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)


@pytest.mark.parametrize("naming", NAMINGS)
def test_any_naming_is_written_as_a_text_model(naming: Any, tmp_path: Path) -> None:
    tensors = random_tensors("gemma3", body=naming.body)
    tower = {"vision_tower.a.weight": np.ones(2, np.float32)}
    source = write_checkpoint_folder(tmp_path / "in", "gemma3", tensors | tower)
    config = config_of("gemma3", source)
    params, _ = load_weights(source, config, wanted_weights(config))
    written = write_checkpoint(tmp_path / "out", config, params, source=source)
    assert_same_tensors(read_all(tmp_path / "out"), random_tensors("gemma3"))
    assert written.left_out == ("vision_tower.a.weight",)


def test_files_are_split_by_size(tmp_path: Path) -> None:
    tensors = random_tensors("qwen3", "BF16")
    source = write_checkpoint_folder(tmp_path / "in", "qwen3", tensors)
    config = config_of("qwen3", source, scan=3)
    params, _ = load_weights(source, config, wanted_weights(config))
    out, limit = tmp_path / "out", 1000
    write_checkpoint(out, config, params, source=source, shard_bytes=limit)
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files[0].name == f"model-00001-of-{count:05}.safetensors"
    for file in files:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= limit
        with safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        # Others than the owner may read it, as they may the rest.
        assert file.stat().st_mode == (out / "config.json").stat().st_mode
        assert file.stat().st_mode & stat.S_IRGRP
    index = json.loads((out / INDEX_FILE).read_text())
    total = sum(value.nbytes for value in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert {name: (out / file) for name, file in index["weight_map"].items()} == {
        name: tensor.file for name, tensor in open_tensor_files(out).tensors.items()
    }
    assert_same_tensors(read_all(out), tensors)
    # A tensor that is larger than the limit has a file of its own.
    write_checkpoint(tmp_path / "tiny", config, params, source=source, shard_bytes=1)
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) == len(tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_may_be_another(dtype: str, tmp_path: Path) -> None:
    tensors = random_tensors("llama3", "BF16")
    source = write_checkpoint_folder(tmp_path / "in", "llama3", tensors)
    config = config_of("llama3", source)
    params, _ = load_weights(source, config, wanted_weights(config))
    write_checkpoint(tmp_path / "out", config, params, source=source, dtype=dtype)
    expected = {name: value.astype(dtype) for name, value in tensors.items()}
    assert_same_tensors(read_all(tmp_path / "out"), expected)
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    )


def adapters(
    config: Config, names: tuple[str, ...], rank: int
) -> dict[str, np.ndarray]:
    """Random adapters of projections, whose output axes follow from the name."""
    random = np.random.default_rng(3)
    out = {}
    for name, spec in wanted_weights(config).items():
        if not name.endswith(names):
            continue
        stacked = len(spec.shape) - (2 if "/ffn/" in name else 3)
        layers, rest = spec.shape[:stacked], spec.shape[stacked:]
        inputs = 2 if name.endswith("output") else 1
        down, up = (*layers, *rest[:inputs], rank), (*layers, rank, *rest[inputs:])
        out[f"{name}_adapter/down"] = random.standard_normal(down).astype(np.float32)
        out[f"{name}_adapter/up"] = random.standard_normal(up).astype(np.float32)
    return out


@pytest.mark.parametrize("scan", [0, 3])
@pytest.mark.parametrize("given", [True, False])
def test_adapters_are_merged(given: bool, scan: int, tmp_path: Path) -> None:
    tensors = random_tensors("qwen3")
    source = write_checkpoint_folder(tmp_path / "in", "qwen3", tensors)
    config = config_of("qwen3", source, scan)
    config.tuning = dataclasses.replace(config.tuning, method="lora", rank=2, alpha=6.0)
    base: dict[str, Any] = {}
    if given:
        base = load_weights(source, config, wanted_weights(config))[0]
    low_rank = adapters(config, ("query", "output", "gate", "down"), rank=2)
    write_checkpoint(tmp_path / "out", config, base | low_rank, source=source)
    merged = read_all(tmp_path / "out")
    random = np.random.default_rng(4)
    for layer in range(L):
        # The loop has all layers but the top one.
        looped = bool(scan) and layer < L - 1
        entry = (0 if looped else 1) if scan else layer
        at: Any = layer if looped else ...

        def product(  # what the layer computes with the adapter beside it
            x: np.ndarray, tensor: str, name: str, entry: int = entry, at: Any = at
        ) -> np.ndarray:
            down, up = (
                low_rank[f"backbone/blocks/{entry}/{name}_adapter/{part}"][at]
                for part in ("down", "up")
            )
            rank = down.shape[-1]
            beside = x @ down.reshape(-1, rank) @ up.reshape(rank, -1)
            return x @ tensors[tensor].T + 3.0 * beside

        for name, tensor in (
            ("attention/query", f"model.layers.{layer}.self_attn.q_proj.weight"),
            ("attention/output", f"model.layers.{layer}.self_attn.o_proj.weight"),
            ("ffn/gate", f"model.layers.{layer}.mlp.gate_proj.weight"),
            ("ffn/down", f"model.layers.{layer}.mlp.down_proj.weight"),
        ):
            x = random.standard_normal((3, tensors[tensor].shape[1]))
            x = x.astype(np.float32)
            np.testing.assert_allclose(
                x @ merged.pop(tensor).T, product(x, tensor, name), rtol=1e-4, atol=1e-3
            )
    # Projections without an adapter, norms and words are as they were.
    assert_same_tensors(merged, {name: tensors[name] for name in merged})


def test_new_words_follow_those_of_the_checkpoint(tmp_path: Path) -> None:
    tensors = random_tensors("llama3", "BF16")
    source = write_checkpoint_folder(tmp_path / "in", "llama3", tensors)
    config = config_of("llama3", source)
    wanted = wanted_weights(config)
    for name in ("words/inputs", "words/outputs"):
        wanted[name] = jax.ShapeDtypeStruct((2 * V, D), jnp.float32)
    params, _ = load_weights(source, config, wanted)
    random = np.random.default_rng(5)
    rows = {
        name: random.standard_normal((3, D)).astype(np.float32)
        for name in ("words/inputs", "words/outputs")
    }
    out = tmp_path / "out"
    written = write_checkpoint(out, config, params, source=source, extra_rows=rows)
    found = read_all(out)
    for name, tensor in (
        ("words/inputs", "model.embed_tokens.weight"),
        ("words/outputs", "lm_head.weight"),
    ):
        assert same_bits(found[tensor][:V], tensors[tensor])
        assert same_bits(found[tensor][V:], rows[name].astype(found[tensor].dtype))
    assert written.vocabulary == V + 3
    again = config_of("llama3", out)
    assert again.model.decoder.vocabulary == V + 3
    assert not load_weights(out, again, wanted_weights(again))[1].unused


@pytest.mark.parametrize(
    "rows",
    [
        {"words/inputs": (3, D)},
        {"words/inputs": (3, D), "words/outputs": (2, D)},
        {"words/inputs": (3, D + 1), "words/outputs": (3, D + 1)},
        {"words/inputs": (D,), "words/outputs": (D,)},
    ],
)
def test_extra_rows_must_fit_the_tables(
    rows: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    source = write_checkpoint_folder(
        tmp_path / "in", "llama3", random_tensors("llama3")
    )
    config = config_of("llama3", source)
    extra = {name: np.zeros(shape, np.float32) for name, shape in rows.items()}
    with pytest.raises(ValueError, match="extra rows"):
        write_checkpoint(tmp_path / "out", config, {}, source=source, extra_rows=extra)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = write_checkpoint_folder(tmp_path / "in", "qwen3", random_tensors("qwen3"))
    (source / "tokenizer.json").write_text("{}")
    (source / "merges.txt").write_text("a b")
    (source / "README.md").write_text("of the source")
    config = config_of("qwen3", source)

    def add_maker(folder: Path) -> None:
        (folder / "makers").mkdir()
        (folder / "makers" / "a.npy").write_bytes(b"1")

    written = write_checkpoint(
        tmp_path / "out", config, {}, source=source, add_files=add_maker
    )
    assert written.files == (
        "config.json",
        "makers/a.npy",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    )
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"


def test_a_model_from_random_weights_gets_a_config_of_its_own(
    kind: str, tmp_path: Path
) -> None:
    tensors = random_tensors(kind)
    folder = write_checkpoint_folder(tmp_path / "in", kind, tensors)
    config = config_of(kind, folder)
    params, _ = load_weights(folder, config, wanted_weights(config, jnp.bfloat16))
    config.model.pretrained = ""
    write_checkpoint(tmp_path / "out", config, params)
    again = config_of(kind, tmp_path / "out")
    assert again.model.decoder == config.model.decoder
    expected = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    assert_same_tensors(read_all(tmp_path / "out"), expected)


@pytest.mark.parametrize("name", shipped_architectures())
def test_sizes_survive_a_config_that_was_written(name: str, tmp_path: Path) -> None:
    kind, path = name.split("_")[0], shipped_architectures()[name]
    values = read_architecture(kind, path)
    sizes: dict[str, Any] = {}
    decoder: dict[str, Any] = {}
    for field, value in values.items():
        *sections, last = field.split(".")
        (decoder if len(sections) == 2 else sizes)[last] = value
    model = ModelConfig(kind=kind, decoder=DecoderConfig(**decoder), **sizes)
    vocabulary = model.decoder.vocabulary
    new = new_config(model, vocabulary, "bfloat16")
    assert read_architecture(kind, write_config_json(tmp_path, new)) == values
    adapted = adapted_config(json.loads(path.read_text()), model, vocabulary, "float32")
    assert read_architecture(kind, write_config_json(tmp_path, adapted)) == values
    assert adapted["torch_dtype"] == "float32"


def test_the_config_of_a_vision_model_becomes_that_of_its_text_model(
    tmp_path: Path,
) -> None:
    source = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "dtype": "bfloat16",
        "vision_config": {"hidden_size": 5},
        "text_config": FILES["gemma3"],
    }
    values = read_architecture("gemma3", write_config_json(tmp_path, source))
    adapted = adapted_config(source, ModelConfig(kind="gemma3"), V + 1, "float32")
    again = read_architecture("gemma3", write_config_json(tmp_path, adapted))
    assert again == values | {"model.decoder.vocabulary": V + 1}
    assert adapted["model_type"] == "gemma3_text"
    assert adapted["eos_token_id"] == [1, 106]
    assert adapted["dtype"] == "float32"
    assert not {"vision_config", "text_config", "torch_dtype"} & adapted.keys()


@pytest.mark.parametrize(
    ("kind", "decoder", "part"),
    [
        ("qwen3", {"windows": (3, 4, 0)}, "sizes [3, 4]"),
        ("llama3", {"windows": (3, 0, 0)}, "windows=(3, 0, 0)"),
        ("llama3", {"logit_cap": 3.0}, "logit_cap=3"),
        ("qwen3", {"query_scale": 3.0}, "query_scale=3"),
    ],
)
def test_sizes_that_no_class_has_are_refused(
    kind: str, decoder: dict[str, Any], part: str
) -> None:
    model = ModelConfig(kind=kind, layers=3, decoder=DecoderConfig(**decoder))
    with pytest.raises(InputError) as caught:
        new_config(model, V, "float32")
    assert part in str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint_folder(tmp_path / "in", "qwen3", random_tensors("qwen3"))


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "in")


def test_an_existing_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out' exists; name a new folder"):
        write_checkpoint(
            tmp_path / "out", config_of("qwen3", source), {}, source=source
        )
    assert left_behind(tmp_path) == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_an_unknown_type_is_refused(source: Path, tmp_path: Path) -> None:
    config = config_of("qwen3", source)
    with pytest.raises(InputError, match="dtype='int8' is none of float32, float16"):
        write_checkpoint(tmp_path / "out", config, {}, source=source, dtype="int8")


def test_missing_weights_are_named(source: Path, tmp_path: Path) -> None:
    config = config_of("qwen3", source)
    params, _ = load_weights(source, config, wanted_weights(config))
    del params["backbone/blocks/2/ffn/up"]
    with pytest.raises(InputError, match="backbone/blocks/2/ffn/up is missing"):
        write_checkpoint(tmp_path / "out", config, params)
    assert left_behind(tmp_path) == []


def test_weights_that_do_not_fit_are_errors_of_the_caller(
    source: Path, tmp_path: Path
) -> None:
    config = config_of("qwen3", source)
    params, _ = load_weights(source, config, wanted_weights(config))
    name = "backbone/blocks/2/ffn/up"
    wrong: dict[str, Any]
    for wrong, part in (
        ({name: params[name].T}, "must be"),
        ({"words/inputs": params["words/inputs"][:-1]}, "words/inputs is"),
        ({"backbone/blocks/9/ffn/up": params[name]}, "no part of the model"),
        ({f"{name}_adapter/up": np.zeros((2, 16))}, "one matrix of two"),
    ):
        with pytest.raises(ValueError, match=part):
            write_checkpoint(
                tmp_path / "out", config, {**params, **wrong}, source=source
            )
    # Makers and heads are no part of a checkpoint.
    more: dict[str, Any] = {
        **params,
        "tokens/user/kernel": np.zeros(3),
        "head/bias": np.zeros(1),
    }
    write_checkpoint(tmp_path / "out", config, more, source=source)
    assert_same_tensors(read_all(tmp_path / "out"), random_tensors("qwen3"))


def test_a_source_of_other_sizes_is_refused(source: Path, tmp_path: Path) -> None:
    config = config_of("qwen3", source)
    params, _ = load_weights(source, config, wanted_weights(config))
    tensors = random_tensors("qwen3")
    name = "model.layers.1.mlp.up_proj.weight"
    for value, part in (
        (tensors[name][:-1], rf"'{name}' of .* is \[15, 8\]"),
        (tensors[name].astype(np.int8), "of type I8"),
        (None, rf"'{name}' of .* is missing"),
    ):
        changed = {k: v for k, v in tensors.items() if k != name}
        changed |= {} if value is None else {name: value}
        other = write_checkpoint_folder(tmp_path / "other", "qwen3", changed)
        with pytest.raises(InputError, match=part):
            write_checkpoint(tmp_path / "out", config, params, source=other)


def test_a_failed_write_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    config = config_of("qwen3", source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Weights are longer; as on a full disk, their write fails half-way.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(tmp_path / "out", config, {}, source=source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_behind(tmp_path) == []

    def fail(_: Path) -> None:
        raise InputError("no makers")

    with pytest.raises(InputError, match="no makers"):
        write_checkpoint(tmp_path / "out", config, {}, source=source, add_files=fail)
    assert left_behind(tmp_path) == []
