"""A loop over stacked weights equals the layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, place, random_batch, tiny
from tokenrec.models.backbones.bfts import layer_windows, stack_sizes
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.stream_layout import candidate_mask
from tokenrec.ops.layers import sample_keys
from tokenrec.sharding import to_devices
from tokenrec.state import bind_params, build_model, init_state


def config_of(scan, **model):
    return tiny(
        paradigm="uc", model={"layers": 5, "windows": (4,), "scan": scan} | model
    )


def loss_and_gradient(config, mesh):
    """A loss of the backbone on random tokens, and its gradient by layer."""
    random, layout = (
        np.random.default_rng(0),
        build_model(config, SCHEMA, TASKS).layout(12),
    )
    x = random.normal(size=(8, layout.length, config.model.width)).astype(np.float32)
    events = np.arange(12) >= random.integers(0, 12, (8, 1))

    def loss(weights, x, events, key):
        return jnp.sum(jnp.sin(nnx.merge(graph, weights)(x, layout, events, None, key)))

    with jax.set_mesh(mesh):
        graph, weights = nnx.split(TokenFormer(config.model, rngs=nnx.Rngs(0)))
        value, found = jax.jit(jax.value_and_grad(loss))(
            weights, *to_devices((x, events), mesh), sample_keys(jax.random.key(1), 8)
        )
    sizes = stack_sizes(config.model)
    first, by_layer = np.cumsum((0, *sizes)), {}
    for (*path, last), leaf in nnx.to_flat_state(found):
        if path[0] != "blocks":
            by_layer["/".join([*path, last])] = np.asarray(leaf[...])
            continue
        layers = (
            np.asarray(leaf[...]) if sizes[path[1]] > 1 else [np.asarray(leaf[...])]
        )
        for number, layer in enumerate(layers, first[path[1]]):
            by_layer["/".join(map(str, ["blocks", number, *path[2:], last]))] = layer
    return float(value), by_layer


@pytest.mark.parametrize(
    ("shape", "model", "unroll"),
    [
        ((2, 2, 2), {"remat": "dots", "dropout": 0.2}, 2),
        pytest.param((1, 1, 1), {"remat": "full"}, 1, marks=pytest.mark.slow),
    ],
)
def test_values_gradients_and_dropout_are_those_of_single_layers(shape, model, unroll):
    mesh = mesh_of(*shape)
    value, wanted = loss_and_gradient(config_of(0, **model), mesh)
    looped, found = loss_and_gradient(config_of(3, scan_unroll=unroll, **model), mesh)
    assert len(wanted) == 5 * 11 + 1
    # A loop is compiled apart from single layers. Measured: equal, gradients too.
    assert looped == pytest.approx(value, rel=1e-6)
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = np.abs(wanted[name]).max()
        np.testing.assert_allclose(
            found[name], wanted[name], rtol=0, atol=1e-5 * scale + 1e-9, err_msg=name
        )


def traced(config):
    """The text of the traced forward pass of a config's backbone on one device."""
    layout = build_model(config, SCHEMA, TASKS).layout(12)
    x = jnp.zeros((8, layout.length, config.model.width))
    with jax.set_mesh(one_device()):
        backbone = nnx.eval_shape(lambda: TokenFormer(config.model, rngs=nnx.Rngs(0)))
        graph, weights = nnx.split(backbone)
        events = jnp.ones((8, 12), bool)
        run = jax.make_jaxpr(
            lambda w: nnx.merge(graph, w)(x, layout, events, None, None)
        )
        return str(run(weights))


def test_a_program_with_more_layers_is_no_longer():
    short, long = (traced(config_of(3, layers=n, windows=())) for n in (3, 6))
    assert short.count("dot_general") == long.count("dot_general")


@pytest.mark.parametrize(("unroll", "merges"), [(1, True), (2, False)])
def test_turns_of_several_layers_keep_what_remat_computes_again_apart(unroll, merges):
    config = config_of(3, layers=4, windows=(), remat="full", scan_unroll=unroll)
    # XLA may merge a second computation with the first where nothing stands between.
    assert ("prevent_cse=False" in traced(config)) == merges


def test_the_prefix_cache_serves_layers_with_stacked_weights():
    config = tiny(
        candidates=3, fused=True, model={"layers": 3, "windows": (), "scan": 3}
    )
    mesh = one_device()
    with jax.set_mesh(mesh):
        model = build_model(config, SCHEMA, TASKS)
        state, batch = init_state(model, 0), place(random_batch(config), mesh)

        @jax.jit
        def both(state, batch):
            entities, module = (
                model.embedder.look_up(state.tables, batch),
                bind_params(model, state.params),
            )
            x, layout = module.make_stream(entities, batch)
            candidates = candidate_mask(batch)
            cache, _ = module.backbone.prefill(
                module.prefix_tokens(entities, batch), layout, batch.valid
            )
            (own,) = module.candidate_tokens(entities, batch)
            cached = module.backbone.extend(cache, own, layout, batch.valid, candidates)
            return module.backbone(x, layout, batch.valid, candidates, None), cached

        whole, cached = both(state, batch)
    # As in test_prefix_cache. Measured: 1.9e-6.
    np.testing.assert_allclose(cached, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scan", "sizes"),
    [(0, (1,) * 7), (3, (3, 1, 2, 1)), (4, (3, 1, 1, 1, 1)), (5, (1,) * 7)],
)
def test_the_top_layer_of_each_run_stands_alone(scan, sizes):
    config = config_of(scan, layers=7, windows=(4, 4, 4)).model
    assert stack_sizes(config) == sizes
    assert sum(sizes) == len(layer_windows(config))
