"""Properties of every rival: padding, candidates, causality, gradients, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.backbones.machine import Backbone, call, rival, split
from tests.worlds import SCHEMA, mesh_of, one_device, tiny
from tokenrec.config import ModelConfig
from tokenrec.config.backbones import BACKBONES
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.models.backbones.interface import Backbone as BackboneInterface
from tokenrec.models.stream_layout import stream_layout
from tokenrec.ops.layers import sample_keys
from tokenrec.optim import decays
from tokenrec.planner.describe import describe, to_text
from tokenrec.sharding import with_batch_sharding
from tokenrec.tokens.stream_segments import StreamSegment, make_layout

# One language model stands for its class: the others differ in options of their layers.
RIVALS = sorted(BACKBONES.keys() - {"tokenformer", "qwen3", "llama3"})
UC = [name for name in RIVALS if BACKBONES[name].uc]


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def lengths(batch, events):
    """Right-aligned histories of different lengths, `[B, T] bool`."""
    return (
        np.arange(events)
        >= events - np.resize([0, 1, 2, 3, 5, 9, 10, 10], batch)[:, None]
    )


def close(found, wanted):
    """Equal but for float32 sums in another order.

    The tolerance is relative to the largest value, which no norm bounds in some rivals.
    Measured: 6.8e-7 of it, with AVX2 and AVX-512.
    """
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max())
    )


@pytest.mark.parametrize("kind", RIVALS)
def test_neither_padding_nor_other_candidates_change_a_read_out(kind):
    backbone = Backbone(rival(kind, candidates=3))
    layout, short = backbone.layout(), backbone.layout(10)
    random = np.random.default_rng(0)
    x = random.normal(size=(8, layout.length, 16)).astype(np.float32)
    valid, real = lengths(8, 20), np.ones((8, 3), bool)
    read = backbone(x, valid, real, layout)
    # The target matters: two candidates differ, by far more than rounding.
    assert np.abs(read[:, 0] - read[:, 1]).max(axis=-1).min() > 1e-3

    other, some = x.copy(), real.copy()
    other[:, layout.candidate == 2] += 1
    some[::2, 2] = False
    changed = backbone(other, valid, some, layout)
    close(changed[:, :2], read[:, :2])
    # The candidate whose tokens changed does differ.
    assert np.abs(changed[:, 2] - read[:, 2]).max(axis=-1).min() > 1e-3

    padding = x.copy()
    padding[:, (layout.event >= 0) & (layout.event < 10)] = random.normal()
    close(backbone(padding, valid, real, layout), read)
    newest = (layout.event < 0) | (layout.event >= 10)
    close(backbone(x[:, newest], valid[:, 10:], real, short), read)


@pytest.mark.parametrize("kind", UC)
def test_no_event_changes_an_earlier_read_out_and_no_action_its_own(kind):
    backbone = Backbone(rival(kind, paradigm="uc", events=10))
    layout = backbone.layout()
    x = np.random.default_rng(0).normal(size=(8, layout.length, 16)).astype(np.float32)
    valid = lengths(8, 10)
    read = backbone(x, valid, None, layout)
    other = x.copy()
    other[:, layout.positions_of("state")[7:]] += 1
    other[:, layout.positions_of("action")[6:]] += 1
    changed = backbone(other, valid, None, layout)
    close(changed[:, :7][valid[:, :7]], read[:, :7][valid[:, :7]])
    # Later read-outs do differ, by more than rounding.
    assert np.abs(changed[:, 7:] - read[:, 7:]).max(axis=-1)[valid[:, 7:]].min() > 1e-4


@pytest.mark.parametrize("kind", RIVALS)
def test_gradients_reach_every_weight_and_figures_are_counted(kind):
    backbone = Backbone(rival(kind, events=12))
    layout = backbone.layout()
    x = np.random.default_rng(0).normal(size=(8, layout.length, 16)).astype(np.float32)
    batch = split(x, lengths(8, 12), np.ones((8, 1), bool))
    made = jax.jit(
        jax.grad(lambda w: jnp.sum(jnp.sin(backbone.read(w, *batch, layout))))
    )(backbone.weights)
    gradients = nnx.to_flat_state(made)
    assert all(np.isfinite(g[...]).all() for _, g in gradients)
    assert not [path for path, g in gradients if not np.any(g[...])]

    figures = describe(backbone.config, SCHEMA)
    weights = sum(w.size for w in jax.tree.leaves(backbone.weights))
    parts = figures["parameters"]["by_part"].items()
    assert sum(size for name, size in parts if name.startswith("backbone")) == weights
    # A weight is multiplied with something of a sample once at least, less what stands
    # beside a product.
    assert figures["flops_per_example"] > weights
    assert "MFLOP per sample" in to_text(figures)


@pytest.mark.parametrize("kind", [name for name in RIVALS if BACKBONES[name].retrieval])
def test_retrieval_reads_events_without_later_ones(kind):
    history = StreamSegment.history("event", np.arange(6))
    layout = make_layout(
        [StreamSegment.tokens("user", 1), StreamSegment.tokens("sep", 1), history],
        [],
        events=6,
        candidates=0,
        readout="events",
        marks_static=not BACKBONES[kind].decoder,
    )
    last = make_layout(
        [StreamSegment.tokens("user", 1), StreamSegment.tokens("sep", 1), history],
        [],
        events=6,
        candidates=0,
        readout="last",
        marks_static=not BACKBONES[kind].decoder,
    )
    backbone = BACKBONES[kind].load()(rival(kind).model, layout, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, layout.length, 16))
    events = jnp.array([[True] * 6, [False] * 2 + [True] * 4])
    read = jax.jit(
        lambda x, layout: call(backbone, x, layout, events, None), static_argnums=1
    )
    every = read(x, layout)
    assert every.shape == (2, 6, 16)
    changed = read(x.at[:, 2 + 4 :].add(1.0), layout)
    # One program, and no sum holds a changed event. Measured: equal.
    np.testing.assert_allclose(changed[:, :4], every[:, :4], atol=1e-6)
    # Read-outs from the changed event on do differ.
    assert np.abs(changed[:, 4:] - every[:, 4:]).min(axis=2).max() > 1e-4
    # Another program for the last read-out alone; values are of order 1. Measured:
    # 2.7e-7.
    np.testing.assert_allclose(read(x, last)[:, 0], every[:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", RIVALS)
def test_weights_and_gradients_split_over_every_axis_that_a_kind_can(kind):
    """The program is only traced: a wrong sharding is an error then."""
    config = rival(kind, candidates=2, events=6)
    config.model.dropout = 0.1
    shape = (2, 2, 2) if BACKBONES[kind].tensor_parallel else (4, 2, 1)
    layout = stream_layout(config, SCHEMA, 6)
    with jax.set_mesh(mesh_of(*shape)):

        def read(weights, x, valid, real):
            keys = sample_keys(jax.random.key(0), 8)
            return jnp.sum(
                call(nnx.merge(graph, weights), x, layout, valid, real, keys)
            )

        graph, weights = nnx.split(
            nnx.eval_shape(
                lambda: BACKBONES[kind].load()(config.model, layout, rngs=nnx.Rngs(0))
            )
        )
        shapes = {(8, layout.length, 16): jnp.float32, (8, 6): bool, (8, 2): bool}
        batch = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.items()]
        gradients = jax.eval_shape(
            jax.grad(read),
            weights,
            *with_batch_sharding(batch, jax.sharding.get_mesh()),
        )
    axes = {axis for g in jax.tree.leaves(gradients) for axis in g.sharding.spec}
    assert {"fsdp", "tensor"} & axes == (
        {"fsdp", "tensor"} if BACKBONES[kind].tensor_parallel else {"fsdp"}
    )


def test_values_and_gradients_on_a_mesh_are_those_of_one_device():
    """HSTU alone has a manual region (`shard_map`)."""
    backbone = Backbone(rival("hstu", paradigm="uc", events=6))
    layout, found = backbone.layout(), []
    x = np.random.default_rng(0).normal(size=(8, layout.length, 16)).astype(np.float32)

    def loss(weights, x, valid):
        return jnp.sum(jnp.sin(backbone.read(weights, x, valid, None, layout)))

    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            like = nnx.state(
                nnx.eval_shape(
                    lambda: BACKBONES["hstu"].load()(
                        backbone.config.model, layout, rngs=nnx.Rngs(0)
                    )
                )
            )
            laid = jax.tree.map(
                lambda w, to: jax.device_put(w, to.sharding.spec),
                backbone.weights,
                like,
            )
            found.append(
                jax.jit(jax.value_and_grad(loss))(laid, *split(x, lengths(8, 6)))
            )
    for one, many in zip(*(jax.tree.leaves(values) for values in found), strict=True):
        # Sums in another order through weights that no norm bounds. Measured: 8.1e-6 of
        # the largest value with AVX2 and AVX-512, 5e-5 in an earlier measurement.
        np.testing.assert_allclose(many, one, rtol=0, atol=2e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (
            "hstu",
            "model.gate",
            False,
            "model.gate=False with model.kind='hstu', which does not read it; leave it at True",
        ),
        ("hstu", "model.remat", "full", "model.remat='full'"),
        ("hstu", "model.prefix", "bidirectional", "model.prefix='bidirectional'"),
        (
            "din",
            "model.windows",
            (6,),
            "model.windows=(6,) with model.kind='din', which has no sliding layers; use ()",
        ),
        (
            "onetrans",
            "data.paradigm",
            "uc",
            "data.paradigm='uc' with model.kind='onetrans'",
        ),
        (
            "longer",
            "data.objective",
            "retrieval",
            "data.objective='retrieval' with model.kind='longer'",
        ),
        (
            "sasrec",
            "tokens.target_tokens",
            2,
            "tokens.target_tokens=2 with model.kind='sasrec'",
        ),
        (
            "dcnv2",
            "mesh.tensor",
            2,
            "mesh.tensor=2 with model.kind='dcnv2', which has no attention heads to split",
        ),
        (
            "hstu",
            "mesh.context",
            2,
            "mesh.context=2 with model.kind='hstu', whose layers read whole streams",
        ),
        (
            "rankmixer",
            "tokens.prompt",
            ("history", "||", "candidate"),
            "tokens.prompt=('history', '||', 'candidate')",
        ),
        (
            "tokenformer",
            "model.merge",
            5,
            "model.merge=5 with model.kind='tokenformer', which does not read it",
        ),
        (
            "tokenformer",
            "model.time_bias",
            False,
            "model.time_bias=False with model.kind='tokenformer', which does not read it; leave it at True",
        ),
    ],
)
def test_an_option_that_a_rival_does_not_support_is_refused(
    kind, field, value, message
):
    config = tiny() if kind == "tokenformer" else rival(kind)
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(InputError) as caught:
        validate(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "width", "heads", "message"),
    [
        ("din", 15, 2, None),
        ("dcnv2", 15, 2, None),
        ("hstu", 15, 3, None),
        ("rankmixer", 15, 3, None),
        ("hstu", 16, 3, "model.heads=3 does not divide model.width=16"),
        ("rankmixer", 16, 3, "model.heads=3 does not divide model.width=16"),
        *(
            (kind, 15, 3, "model.width / model.heads = 5 is odd")
            for kind in ("onetrans", "longer", "sasrec")
        ),
    ],
)
def test_a_width_is_asked_to_fit_the_heads_that_a_kind_has(kind, width, heads, message):
    config = rival(kind, candidates=2, events=6)
    config.model.width, config.model.heads = width, heads
    if message:
        with pytest.raises(InputError, match=message):
            validate(config)
        return
    layout = stream_layout(validate(config), SCHEMA, 6)
    backbone = BACKBONES[kind].load()(config.model, layout, rngs=nnx.Rngs(0))
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, width))
        .astype(np.float32)
    )
    batch = split(x, np.ones((2, 6), bool), np.ones((2, 2), bool))
    assert call(backbone, batch[0], layout, *batch[1:]).shape == (2, 2, width)


@pytest.mark.parametrize("kind", RIVALS)
def test_no_bias_decays(kind):
    config = rival(kind, candidates=2, events=6)
    weights = nnx.eval_shape(
        lambda: BACKBONES[kind].load()(
            config.model, stream_layout(config, SCHEMA, 6), rngs=nnx.Rngs(0)
        )
    )
    names = {
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(weights))
    }
    decaying = {name for name, wanted in decays(dict.fromkeys(names)).items() if wanted}
    assert decaying
    assert not [name for name in decaying if "bias" in name or "scale" in name]


def test_every_entry_of_the_registry_is_a_backbone_and_names_fields():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    for spec in BACKBONES.values():
        assert issubclass(spec.load(), BackboneInterface)
        assert set(spec.reads) <= fields
