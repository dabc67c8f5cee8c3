"""Attention maps against the computations of the model, and their attention mass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_maps import plot_maps
from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, place, random_batch, tiny
from tokenrec.analysis.attention_maps import (
    batch_attention,
    block_attention,
    stack_attention,
)
from tokenrec.analysis.attention_mass import attention_mass
from tokenrec.models.backbones.rope_attention import Stream
from tokenrec.models.stream_layout import batch_layout, candidate_mask
from tokenrec.ops.attention.rotary import rotation
from tokenrec.sharding import RULES
from tokenrec.state import bind_params, build_model, init_state

# Float32 sums in another order. The values are at most 3.3, where two neighbouring
# floats lie 2.4e-7 apart: this is 40 such steps. A real error is far larger: a window
# that is wrong by one changes weights by 0.9, a RoPE base that is wrong by 10 % by
# 4e-3. Errors measured on an AMD EPYC, with AVX2 and with AVX-512: 1.1e-6 for the
# attention of a block, 1.2e-6 for the output of a layer, 1.3e-6 between meshes (1e-7 on
# another processor), 2.4e-7 for sums of weights.
REORDERED_SUMS = 1e-5

CONFIGS = {
    "sliding": lambda: tiny(candidates=3),
    "prefix": lambda: tiny(
        fused=True,
        candidates=2,
        model={"windows": (), "prefix": "bidirectional", "qk_norm": True},
    ),
    "text": lambda: tiny(
        fused=True, tokens={"text": {"history": ("code", "tab")}, "history_cap": 11}
    ),
    "uc": lambda: tiny(paradigm="uc"),
}


def world(config, mesh):
    model = build_model(config, SCHEMA, TASKS)
    batch = place(random_batch(config, lengths=[0, 1, 3, 5, 8, 11, 12, 12]), mesh)
    return model, init_state(model, 0), batch, batch_layout(config, SCHEMA, (), batch)


def tokens(model, state, batch):
    module = bind_params(model, state.params)
    return module, module.make_stream(
        model.embedder.look_up(state.tables, batch), batch
    )[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_values_weighted_by_the_map_are_the_attention_of_every_block(name):
    mesh = one_device()
    with jax.set_mesh(mesh):
        model, state, batch, layout = world(CONFIGS[name](), mesh)
        every = np.arange(layout.length)

        @jax.jit
        def both(state, batch):
            module, x = tokens(model, state, batch)
            turn = rotation(layout.rope_positions(batch.valid), 8, 1e4)
            stream = Stream(
                layout, every, turn, layout.valid(batch.valid, candidate_mask(batch))
            )
            found = []
            for block in module.backbone.blocks:
                weights, normed = (
                    block_attention(block, x, stream),
                    block.attention_norm(x),
                )
                shown = block.attention.keys_values(normed, every, stream)
                seen = block.attention(normed, every, shown, every, stream)
                found.append((weights, shown.values, block.attention.output[...], seen))
                x = block(x, every, every, stream, None)
            return found, stream.valid

        found, valid = jax.device_get(both(state, batch))
    for weights, values, output, seen in found:
        mine, theirs = (
            np.einsum("bhqk,bkhd,hde->bqe", weights, values, output)[valid],
            seen[valid],
        )
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=REORDERED_SUMS)


def test_the_map_of_the_last_layer_reads_the_stream_that_the_model_reads():
    """Outputs computed from the maps alone equal those of the backbone."""
    mesh = one_device()
    config = tiny(
        fused=True, candidates=2, model={"layers": 1, "windows": (), "gate": False}
    )
    with jax.set_mesh(mesh):
        model, state, batch, layout = world(config, mesh)

        @jax.jit
        def both(state, batch):
            module, x = tokens(model, state, batch)
            block, candidates = module.backbone.blocks[0], candidate_mask(batch)
            (weights,) = stack_attention(
                module.backbone, x, layout, batch.valid, candidates
            )
            values = jnp.einsum(
                "bsd,dhk->bshk", block.attention_norm(x), block.attention.value[...]
            )
            seen = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
            read = RULES("batch", None, None)
            inner = x + jnp.einsum(
                "bqhd,hde->bqe", seen, block.attention.output[...], out_sharding=read
            )
            made = module.backbone.norm(inner + block.ffn(block.ffn_norm(inner)))
            return made[:, layout.readout], module.backbone(
                x, layout, batch.valid, candidates, None
            )

        mine, theirs = both(state, batch)
    np.testing.assert_allclose(mine, theirs, atol=REORDERED_SUMS)


def test_maps_sum_to_one_and_show_nothing_that_is_hidden():
    mesh = one_device()
    with jax.set_mesh(mesh):
        model, state, batch, layout = world(tiny(candidates=3), mesh)
        maps, valid = jax.jit(batch_attention, static_argnums=0)(model, state, batch)
    for weights, window in zip(maps, (None, None, 6, 4), strict=True):
        weights = np.asarray(weights)
        assert weights.shape == (8, 2, layout.length, layout.length)
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=REORDERED_SUMS)
        every = np.arange(layout.length)
        pattern = layout.pattern(every, every)
        hidden = ~(
            pattern.visible(window) & np.asarray(valid)[:, None, :] | pattern.diagonal()
        )
        assert (weights.transpose(0, 2, 3, 1)[hidden] == 0).all()


def test_a_mesh_of_eight_gives_the_same_maps():
    config, found = CONFIGS["prefix"](), []
    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            model, state, batch, _ = world(config, mesh)
            found.append(
                jax.device_get(
                    jax.jit(batch_attention, static_argnums=0)(model, state, batch)[0]
                )
            )
    np.testing.assert_allclose(found[0], found[1], atol=REORDERED_SUMS)


def test_mass_falls_where_the_weights_are():
    """One user, a separator, three interleaved events, a separator, a candidate."""
    config = tiny(events=3, tokens={"user_tokens": 1})
    model = build_model(config, SCHEMA, TASKS)
    layout = model.layout(3)
    weights = np.zeros((2, 1, layout.length, layout.length))
    weights[..., 0] = 0.25  # the user
    weights[:, :, 2:8, 2] = 0.75  # all events to the state of the oldest
    weights[:, :, [0, 1, 8], 1] = 0.75
    weights[:, :, 9, [3, 7]] = (
        0.25  # the candidate to the actions of the oldest and the newest event,
    )
    weights[:, :, 9, 9] = 0.25  # and to itself
    weights[1] = 1 / layout.length
    valid = np.ones((2, layout.length), bool)
    valid[1] = False  # a request that is padding does not read
    mass = attention_mass(weights, layout, valid)
    assert set(mass) == {"user", "sep", "event", "target"}
    seen = {
        reader: {kind: found.item() for kind, found in of.items() if found.item()}
        for reader, of in mass.items()
    }
    assert seen["user"] == seen["sep"] == {"user": 0.25, "sep": 0.75}
    assert seen["event"] == {
        "user": 0.25,
        "event 0": 0.25,
        "event 1": 0.25,
        "event 2-3": 0.25,
    }
    assert seen["target"] == {
        "user": 0.25,
        "target": 0.25,
        "event 1": 0.25,
        "event 2-3": 0.25,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_mass_of_every_reader_adds_up_to_one(name):
    mesh = one_device()
    with jax.set_mesh(mesh):
        model, state, batch, layout = world(CONFIGS[name](), mesh)
        maps, valid = jax.device_get(
            jax.jit(batch_attention, static_argnums=0)(model, state, batch)
        )
    mass = attention_mass(maps[0], layout, valid)
    assert all(
        sum(of.values()) == pytest.approx(np.ones(2), abs=REORDERED_SUMS)
        for of in mass.values()
    )
    assert any(
        "later events" in of and of["later events"].max() > 0.01 for of in mass.values()
    ) == (name == "prefix")


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    draw = np.random.default_rng(0)
    maps = {
        name: [draw.dirichlet(np.ones(size), size) for _ in range(2)]
        for name, size in (("soft", 5), ("text", 9))
    }
    roles = {
        "soft": ["user", *["event"] * 3, "target"],
        "text": ["user", *["event"] * 7, "target"],
    }
    plot_maps(maps, roles, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
