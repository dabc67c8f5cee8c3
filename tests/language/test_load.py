"""A checkpoint's weights reach the shards of a mesh as they are, whatever it calls them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.language.checkpoints import (
    FILES,
    HEAD,
    KINDS,
    NUMPY_TYPES,
    D,
    F,
    G,
    H,
    L,
    V,
    config_of,
    random_tensors,
    same_bits,
    write_checkpoint_folder,
    write_config_json,
)
from tokenrec.config import Config, MeshConfig
from tokenrec.errors import InputError
from tokenrec.language.load import load_weights
from tokenrec.language.weight_names import (
    NAMINGS,
    Naming,
    find_naming,
    tensor_places,
    weight_layouts,
)
from tokenrec.sharding import RULES, make_mesh


def wanted_weights(
    config: Config, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(layout.shape, dtype)
        for name, layout in weight_layouts(config.model).items()
    }


# Logical axes of a weight by the end of its name, without an axis of layers.
AXES: dict[str, tuple[str | None, ...]] = {
    "words/inputs": ("heads", "embed"),
    "words/outputs": ("heads", "embed"),
    "query": ("embed", "heads", None),
    "key": ("embed", "heads", None),
    "value": ("embed", None, None),
    "output": ("heads", None, "embed"),
    "gate": ("embed", "ffn"),
    "up": ("embed", "ffn"),
    "down": ("ffn", "embed"),
}


def spread(
    wanted: dict[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The wanted weights with a sharding; what `AXES` lacks is whole on each device."""
    out = {}
    for name, spec in wanted.items():
        axes = next((AXES[end] for end in AXES if name.endswith(end)), ())
        layers = (None,) * (len(spec.shape) - len(axes)) if axes else ()
        sharding = NamedSharding(mesh, RULES(*layers, *axes))
        out[name] = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
    return out


def expected(
    tensors: dict[str, np.ndarray], kind: str, layer: int
) -> dict[str, np.ndarray]:
    """Weights of a layer by formulas of their own: what a product with them must give."""
    block = f"model.layers.{layer}."
    at = {name.removeprefix(block): value for name, value in tensors.items()}
    weights = {
        "attention_norm/scale": at["input_layernorm.weight"],
        "ffn/gate": at["mlp.gate_proj.weight"].T,
        "ffn/up": at["mlp.up_proj.weight"].T,
        "ffn/down": at["mlp.down_proj.weight"].T,
        "attention/output": np.stack(
            [
                at["self_attn.o_proj.weight"][:, n * HEAD : (n + 1) * HEAD].T
                for n in range(H)
            ]
        ),
    }
    for name, letter, count in (("query", "q", H), ("key", "k", G), ("value", "v", G)):
        rows = at[f"self_attn.{letter}_proj.weight"]
        heads = [rows[n * HEAD : (n + 1) * HEAD].T for n in range(count)]
        weights[f"attention/{name}"] = np.stack(heads, axis=1)
    if kind == "gemma3":
        weights |= {
            "attention_output_norm/scale": at["post_attention_layernorm.weight"],
            "ffn_norm/scale": at["pre_feedforward_layernorm.weight"],
            "ffn_output_norm/scale": at["post_feedforward_layernorm.weight"],
        }
    else:
        weights["ffn_norm/scale"] = at["post_attention_layernorm.weight"]
    if kind != "llama3":
        weights["attention/query_norm/scale"] = at["self_attn.q_norm.weight"]
        weights["attention/key_norm/scale"] = at["self_attn.k_norm.weight"]
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_stands_where_its_name_says(kind: str, tmp_path: Path) -> None:
    tensors = random_tensors(kind)
    folder = write_checkpoint_folder(tmp_path, kind, tensors)
    config = config_of(kind, folder)
    arrays, report = load_weights(folder, config, wanted_weights(config))
    assert (report.unused, report.missing) == ((), ())
    flat = {
        f"backbone/blocks/{layer}/{name}": value
        for layer in range(L)
        for name, value in expected(tensors, kind, layer).items()
    }
    flat |= {
        "words/inputs": tensors["model.embed_tokens.weight"],
        "backbone/norm/scale": tensors["model.norm.weight"],
    }
    if kind == "llama3":
        flat["words/outputs"] = tensors["lm_head.weight"]
    assert arrays.keys() == flat.keys()
    for name, value in flat.items():
        assert same_bits(np.asarray(arrays[name]), np.ascontiguousarray(value)), name


def test_a_projection_computes_what_it_did(tmp_path: Path) -> None:
    tensors = random_tensors("qwen3")
    folder = write_checkpoint_folder(tmp_path, "qwen3", tensors)
    config = config_of("qwen3", folder)
    arrays, _ = load_weights(folder, config, wanted_weights(config))
    block = "backbone/blocks/1/attention/"
    x = np.random.default_rng(1).standard_normal((3, D)).astype(np.float32)
    before = x @ tensors["model.layers.1.self_attn.q_proj.weight"].T
    heads = np.einsum("td,dnh->tnh", x, arrays[f"{block}query"])
    np.testing.assert_allclose(heads, before.reshape(3, H, HEAD), rtol=1e-5, atol=1e-5)
    after = before @ tensors["model.layers.1.self_attn.o_proj.weight"].T
    output = np.einsum("tnh,nhd->td", heads, arrays[f"{block}output"])
    np.testing.assert_allclose(output, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan", [0, 3])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_shards_of_a_mesh_hold_their_slices(
    kind: str, shape: tuple[int, int, int], scan: int, tmp_path: Path
) -> None:
    data, fsdp, tensor = shape
    # Heads that four devices can share.
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4} | {"head_dim": HEAD}
    tensors = random_tensors(kind)
    random = np.random.default_rng(2)
    for name in tensors:
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = random.standard_normal((4 * HEAD, D)).astype(np.float32)
    folder = write_checkpoint_folder(tmp_path, kind, tensors, shards=2)
    write_config_json(folder, FILES[kind] | sizes)
    config = config_of(kind, folder, scan)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    whole, _ = load_weights(folder, config, wanted_weights(config))
    split, report = load_weights(folder, config, spread(wanted_weights(config), mesh))
    assert report.unused == ()
    for name, value in whole.items():
        array = split[name]
        assert same_bits(np.asarray(array), np.asarray(value))
        for piece in array.addressable_shards:
            assert same_bits(np.asarray(piece.data), np.asarray(value)[piece.index])
    query = split["backbone/blocks/0/attention/query"]
    pieces = {piece.data.shape[-3:] for piece in query.addressable_shards}
    assert pieces == {(D // fsdp, 4 // tensor, HEAD)}


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_layers_are_those_of_the_loop(kind: str, tmp_path: Path) -> None:
    tensors = random_tensors(kind)
    folder = write_checkpoint_folder(tmp_path, kind, tensors)
    single = config_of(kind, folder)
    stacked = config_of(kind, folder, scan=3)
    layouts = weight_layouts(stacked.model)
    alone, _ = load_weights(folder, single, wanted_weights(single))
    arrays, report = load_weights(folder, stacked, wanted_weights(stacked))
    assert report.unused == ()
    places = tensor_places(layouts)
    assert places.keys() == tensors.keys()
    assert any(layer for _, layer in places.values())
    for tensor, (name, layer) in tensor_places(weight_layouts(single.model)).items():
        assert layer == 0
        weight, place = places[tensor]
        value = np.asarray(arrays[weight])
        value = value[place] if layouts[weight].stacked else value
        assert same_bits(np.ascontiguousarray(value), np.asarray(alone[name])), tensor


def test_a_loop_of_all_layers_but_the_top_one(tmp_path: Path) -> None:
    folder = write_checkpoint_folder(tmp_path, "qwen3", random_tensors("qwen3"))
    config = config_of("qwen3", folder, scan=3)
    shapes = {name: spec.shape for name, spec in wanted_weights(config).items()}
    assert shapes["backbone/blocks/0/ffn/gate"] == (L - 1, D, F)
    assert shapes["backbone/blocks/1/ffn/gate"] == (D, F)
    assert "backbone/blocks/2/ffn/gate" not in shapes


@pytest.mark.parametrize("naming", NAMINGS)
def test_each_naming_gives_the_same_weights(naming: Naming, tmp_path: Path) -> None:
    tensors = random_tensors("llama3", body=naming.body, head=naming.head)
    # Of a vision tower.
    tensors["vision_tower.patch_embedding.weight"] = np.ones((2, 2), np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    folder = write_checkpoint_folder(tmp_path / "named", "llama3", tensors)
    plain = write_checkpoint_folder(
        tmp_path / "plain", "llama3", random_tensors("llama3")
    )
    config = config_of("llama3", plain)
    arrays, report = load_weights(folder, config, wanted_weights(config))
    assert find_naming(tensors) == naming
    assert report.unused == (
        "model.rotary_emb.inv_freq",
        "vision_tower.patch_embedding.weight",
    )
    for name, value in load_weights(plain, config, wanted_weights(config))[0].items():
        assert same_bits(np.asarray(arrays[name]), np.asarray(value))


@pytest.mark.parametrize("stored", NUMPY_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_once(stored: str, dtype: str, tmp_path: Path) -> None:
    tensors = random_tensors("gemma3", stored)
    folder = write_checkpoint_folder(tmp_path, "gemma3", tensors)
    config = config_of("gemma3", folder)
    arrays, _ = load_weights(folder, config, wanted_weights(config, dtype))
    embedding = tensors["model.embed_tokens.weight"].astype(dtype)
    assert same_bits(np.asarray(arrays["words/inputs"]), embedding)
    gate = tensors["model.layers.2.mlp.gate_proj.weight"].astype(dtype).T
    found = np.asarray(arrays["backbone/blocks/2/ffn/gate"])
    assert same_bits(found, np.ascontiguousarray(gate))


@pytest.mark.parametrize("rows", [V, V + 1, 2 * V])
def test_words_are_filled_up_with_zeros(rows: int, tmp_path: Path) -> None:
    tensors = random_tensors("llama3")
    folder = write_checkpoint_folder(tmp_path, "llama3", tensors)
    config = config_of("llama3", folder)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    # Rows over two axes where they can be, so that some devices have zeros alone.
    spec = PartitionSpec("fsdp" if rows % 8 == 0 else None, None)
    wanted = {
        name: jax.ShapeDtypeStruct(
            (rows, D), jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for name in ("words/inputs", "words/outputs")
    }
    arrays, report = load_weights(folder, config, wanted)
    for name, tensor in (
        ("words/inputs", "model.embed_tokens.weight"),
        ("words/outputs", "lm_head.weight"),
    ):
        value = np.asarray(arrays[name])
        assert same_bits(value[:V], tensors[tensor])
        assert not value[V:].any()
    # What nobody asked for is unused.
    assert len(report.unused) == len(tensors) - 2


def test_weights_of_no_checkpoint_are_left_to_the_caller(tmp_path: Path) -> None:
    folder = write_checkpoint_folder(tmp_path, "qwen3", random_tensors("qwen3"))
    config = config_of("qwen3", folder)
    adapter = "backbone/blocks/0/attention/query_adapter/down"
    wanted = {adapter: jax.ShapeDtypeStruct((D, 2), jnp.float32)}
    arrays, report = load_weights(folder, config, wanted_weights(config) | wanted)
    assert report.missing == (adapter,)
    assert adapter not in arrays
    assert len(arrays) == len(wanted_weights(config))


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    tensors = random_tensors("llama3")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(D, np.int64)
    for layer in range(L):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        tensors[name] = tensors[name][:-1]
    folder = write_checkpoint_folder(tmp_path, "llama3", tensors)
    config = config_of("llama3", folder)
    with pytest.raises(InputError) as caught:
        load_weights(folder, config, wanted_weights(config))
    text = str(caught.value)
    assert str(folder) in text
    assert (
        "'model.layers.0.self_attn.k_proj.weight' is [11, 8], and the sizes give "
        "[12, 8] (backbone/blocks/0/attention/key)" in text
    )
    assert "'model.layers.3.mlp.up_proj.weight' is missing" in text
    # Five are listed, of seven.
    assert text.count("\n") == 6
    assert text.endswith("and 2 more")
    tensors = random_tensors("llama3")
    tensors["model.norm.weight"] = np.ones(D, np.int64)
    write_checkpoint_folder(folder, "llama3", tensors)
    with pytest.raises(InputError, match="of type I64, none of F32, F16, BF16"):
        load_weights(folder, config, wanted_weights(config))


def test_a_wanted_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint_folder(tmp_path, "qwen3", random_tensors("qwen3"))
    config = config_of("qwen3", folder)
    for name, shape in (
        ("words/inputs", (V - 1, D)),
        ("backbone/norm/scale", (D + 1,)),
    ):
        wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
        with pytest.raises(InputError, match=name):
            load_weights(folder, config, wanted)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    tensors = {"encoder.weight": np.ones(2, np.float32)}
    folder = write_checkpoint_folder(tmp_path, "qwen3", tensors)
    config = config_of("qwen3", folder)
    with pytest.raises(InputError, match="no word embedding") as caught:
        load_weights(folder, config, wanted_weights(config))
    assert str(folder) in str(caught.value)


def test_untied_words_must_be_there(tmp_path: Path) -> None:
    tensors = random_tensors("qwen3")
    folder = write_checkpoint_folder(tmp_path, "qwen3", tensors)
    config = config_of("qwen3", folder)
    model = config.model
    config.model = dataclasses.replace(
        model, decoder=dataclasses.replace(model.decoder, tied=False)
    )
    with pytest.raises(InputError, match=r"'lm_head.weight' is missing"):
        load_weights(folder, config, wanted_weights(config))


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    # Numbers at multiples of 64 bytes, whose memory JAX would use as it is.
    tensors = {
        name: value
        for name, value in random_tensors("qwen3").items()
        if value.nbytes % 64 == 0
    }
    folder = write_checkpoint_folder(tmp_path, "qwen3", tensors)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    start = -(-end // 64) * 64
    padded = content[8:end].ljust(start - 8)
    path.write_bytes((start - 8).to_bytes(8, "little") + padded + content[end:])
    config = config_of("qwen3", folder)
    name = "words/inputs"
    arrays, _ = load_weights(folder, config, {name: wanted_weights(config)[name]})
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\x55" * (len(content) - end))
    embedding = tensors["model.embed_tokens.weight"]
    assert same_bits(np.asarray(arrays[name]), embedding)
