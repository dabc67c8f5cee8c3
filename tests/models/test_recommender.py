"""The whole model: which token influences which score; short cuts are exact."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, place, random_batch
from tests.worlds import tiny as four_layers
from tokenrec.data.batch import Batch
from tokenrec.models.stream_layout import stream_layout
from tokenrec.sharding import RULES
from tokenrec.state import bind_params, build_model, init_state
from tokenrec.step import eval_step, forward, loss_fn
from tokenrec.tokens.embed import inverses
from tokenrec.tokens.layout import ROLES

SHAPES = {
    "nio": {},
    "nio_fused": {"fused": True},
    "requests": {"candidates": 3, "fused": True},
    "long_targets": {"candidates": 2, "tokens": {"target_tokens": 2}},
    "uc": {"paradigm": "uc"},
    "uc_soft_user": {"paradigm": "uc", "tokens": {"user_tokens": 2}},
}


def tiny(*, model=None, **changes):
    """One full and one sliding layer, which compile in half of the time of four."""
    return four_layers(model={"layers": 2, "windows": (6,)} | (model or {}), **changes)


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def noisy(params, scale=0.3):
    """Weights off their starting values: a zero gate would hide errors."""
    key = jax.random.key(1)
    return {
        n: w + scale * jax.random.normal(jax.random.fold_in(key, i), w.shape)
        for i, (n, w) in enumerate(params.items())
    }


def build(config, seed=0):
    model = build_model(config, SCHEMA, TASKS)
    state = init_state(model, seed)
    return model, state, noisy(state.params)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tables, batch):
    found = model.embedder.find(batch)
    rows = model.embedder.gather(tables, found)
    return forward(model, params, rows, inverses(found), batch, None)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(model, params, tables, batch):
    found = model.embedder.find(batch)
    rows = model.embedder.gather(tables, found)
    reads = inverses(found)
    counts = jnp.ones(2)
    return jax.value_and_grad(loss_fn, argnums=(0, 1))(
        params, rows, model, reads, batch, counts, None
    )


@pytest.mark.parametrize(
    "shape",
    # The slow ones have fewer options than one of these, or fewer tokens: those of "requests" are fused.
    [
        *("long_targets", "uc_soft_user"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("requests", "nio", "nio_fused", "uc")
        ),
    ],
)
def test_needed_rows_equal_all_rows_in_values_and_gradients(shape, mesh):
    changes = SHAPES[shape]
    tokens = {"maker": "linear"} | changes.get("tokens", {})
    # The rows that are needed shrink from layer to layer.
    config = four_layers(**changes | {"tokens": tokens})
    model, state, params = build(config)
    plain_config = copy.deepcopy(config)
    plain_config.model.needed_rows = False
    plain = build_model(plain_config, SCHEMA, TASKS)
    batch = place(random_batch(config, lengths=[0, 1, 2, 5, 8, 11, 12, 12]), mesh)
    fast, slow = (
        value_and_gradients(m, params, state.tables, batch) for m in (model, plain)
    )
    # float32 sums in another order. Measured: 2.1e-6 of the largest entry of an array,
    # with AVX2 and AVX-512.
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


def influence(model, params, batch):
    """Which tokens move which read-outs of one stream, by gradient: `[R, S] bool`."""
    layout = stream_layout(model.config, SCHEMA, model.config.data.events)
    width = model.config.model.width
    candidates = (
        None
        if batch.target is None
        else jnp.ones(
            (1, model.config.data.candidates), bool, out_sharding=RULES("batch", None)
        )
    )
    module = bind_params(model, params)

    def read(x, events, candidates):
        read_out = jnp.sum(
            module.backbone(x, layout, events, candidates, None), axis=-1
        )
        return jax.sharding.reshard(read_out, RULES(None, None))[
            0
        ]  # jacobian knows no split outputs

    x = jax.random.normal(
        jax.random.key(2),
        (1, layout.length, width),
        out_sharding=RULES("batch", None, None),
    )
    gradient = jax.jit(jax.jacobian(read))(x, batch.valid, candidates)
    return np.abs(gradient[:, 0]).sum(-1) > 0, layout


@pytest.mark.parametrize("shape", SHAPES)
def test_no_position_is_influenced_by_a_later_one_or_another_candidate(shape, mesh):
    config = tiny(**SHAPES[shape])
    model, _, params = build(config)
    seen, layout = influence(
        model, params, place(random_batch(config, 1, lengths=[12]), mesh)
    )
    for r, row in enumerate(layout.readout):
        later = layout.index > layout.index[row]
        other = (layout.candidate != -1) & (layout.candidate != layout.candidate[row])
        assert not seen[r, later | other].any()
        assert seen[r, row]


def test_sliding_layers_reach_as_far_as_their_windows_add_up():
    config = tiny(paradigm="uc", events=30, model={"layers": 2, "windows": (6, 4)})
    model, _, params = build(config)
    batch = place(random_batch(config, 1, lengths=[30]), one_device())
    seen, layout = influence(model, params, batch)
    last = seen[-1]
    rows = np.flatnonzero(last)
    row = layout.readout[-1]
    assert rows.tolist() == list(range(row - (6 - 1) - (4 - 1), row + 1))


def test_full_layers_carry_static_fields_and_the_oldest_event_to_the_target():
    config = tiny(events=30, fused=True)
    model, _, params = build(config)
    seen, layout = influence(
        model, params, place(random_batch(config, 1, lengths=[30]), one_device())
    )
    assert seen.all()
    assert ROLES[layout.roles[0]] == "user"


@pytest.mark.parametrize("discard", [True, False])
def test_static_fields_reach_a_target_through_sliding_layers_if_these_keep_them(
    discard,
):
    config = tiny(
        events=30,
        fused=True,
        model={"layers": 2, "windows": (6, 4), "discard_static": discard},
    )
    model, _, params = build(config)
    seen, layout = influence(
        model, params, place(random_batch(config, 1, lengths=[30]), one_device())
    )
    reached = seen[0, layout.static]
    assert not reached.any() if discard else reached.all()
    near = layout.index > layout.length - 1 - (6 - 1) - (4 - 1) - 1
    assert np.array_equal(seen[0, ~layout.static], near[~layout.static])


def cut(batch: Batch, events: int) -> Batch:
    """The same samples in streams of the newest `events` events."""
    return batch._replace(
        state=jax.tree.map(lambda x: x[:, -events:], batch.state),
        action=jax.tree.map(lambda x: x[:, -events:], batch.action),
        valid=batch.valid[:, -events:],
    )


@pytest.mark.parametrize(
    "options", [{}, {"fused": True, "model": {"positions": "additive"}}], ids=str
)
def test_padding_never_changes_a_score(options, mesh):
    config = tiny(events=50, **options)
    model, state, params = build(config)
    batch = random_batch(config, lengths=[0, 1, 3, 5, 7, 9, 10, 10])
    long = logits(model, params, state.tables, place(batch, mesh))
    short = logits(model, params, state.tables, place(cut(batch, 10), mesh))
    # Softmax sums of another length; logits are of order 1. Measured: 1.7e-6 with AVX2
    # and AVX-512, 2.2e-6 with SSE4.2.
    np.testing.assert_allclose(long, short, atol=1e-5)


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_request_of_candidates_scores_like_as_many_lone_candidates(tokens, mesh):
    config = tiny(candidates=4, fused=True, tokens={"target_tokens": tokens})
    alone = tiny(candidates=1, fused=True, tokens={"target_tokens": tokens})
    model, state, params = build(config)
    lone_model = build_model(alone, SCHEMA, TASKS)
    batch = random_batch(config)
    together = logits(model, params, state.tables, place(batch, mesh))
    for c in range(4):
        lone = batch._replace(
            target=jax.tree.map(lambda x, c=c: x[:, c : c + 1], batch.target),
            labels=batch.labels[:, c : c + 1],
            weight=batch.weight[:, c : c + 1],
        )
        got = logits(lone_model, params, state.tables, place(lone, mesh))
        # Attention over other shapes, so float32 sums in another order; logits are of
        # order 1. Measured: 4.8e-6 with AVX2 and AVX-512.
        np.testing.assert_allclose(together[:, c], got[:, 0], atol=2e-5)


def test_a_padded_candidate_changes_no_other_score(mesh):
    config = tiny(candidates=3, fused=True)
    model, state, params = build(config)
    batch = random_batch(config)
    weight = batch.weight.copy()
    weight[:, 2] = 0
    a = logits(model, params, state.tables, place(batch, mesh))
    b = logits(model, params, state.tables, place(batch._replace(weight=weight), mesh))
    assert np.array_equal(a[:, :2], b[:, :2])


def test_the_gate_starts_at_the_sigmoid_of_its_bias_and_can_be_left_out(mesh):
    config = tiny()
    model = build_model(config, SCHEMA, TASKS)
    state = init_state(model, 0)
    gate = bind_params(model, state.params).backbone.blocks[0].gate
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    # One sigmoid in two programs. Measured: equal.
    np.testing.assert_allclose(gate(x), jax.nn.sigmoid(1.0), rtol=1e-6)
    without = build_model(tiny(model={"gate": False}), SCHEMA, TASKS)
    assert not [name for name in init_state(without, 0).params if "gate/bias" in name]


# Options that do not exclude each other share a program: it is compiling that takes long.
OPTIONS = {
    "linear_sums": {
        "tokens": {
            "maker": "linear",
            "multi_valued": "sum",
            "semantic_id": "sum",
            "output_scale": True,
        }
    },
    "transformer_prefixes": {
        "tokens": {
            "maker": "transformer",
            "semantic_id": "prefix",
            "user_tokens": 3,
            "embedding_dims": {"video": 12},
        },
        "model": {
            "qk_norm": True,
            "positions": "additive",
            "layers": 1,
            "windows": (),
        },
    },
    "uc_bfloat16": {
        "paradigm": "uc",
        "model": {"dtype": "bfloat16", "layers": 1, "windows": ()},
    },
    "fused": {"fused": True},
}


# Of fused tokens: tests/models/test_prompts.py.
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "fused" else [])
        for name in OPTIONS
    ],
)
def test_gradients_reach_every_weight_and_every_table_under_every_option(option, mesh):
    config = tiny(**OPTIONS[option])
    model, state, params = build(config)
    loss, (dense, rows) = value_and_gradients(
        model, params, state.tables, place(random_batch(config, 16), mesh)
    )
    assert np.isfinite(loss)
    still = [name for name, g in dense.items() if not np.any(g)]
    assert not still
    for name, stack in model.embedder.stacks.items():
        touched = np.abs(rows[name]).sum(-1)
        for table, offset in stack.offsets.items():
            assert np.any(touched[offset : offset + SCHEMA.tables[table]]), table


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (1, 8, 1))),
    ],
)
@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_every_mesh_gives_the_same_scores(shape, paradigm):
    config = tiny(paradigm=paradigm, model={"ffn_width": 32})
    batch = random_batch(config)
    scores = []
    for mesh in (one_device(), mesh_of(*shape)):
        with jax.set_mesh(mesh):
            model = build_model(config, SCHEMA, TASKS)
            state = init_state(model, 0)
            scores.append(
                np.asarray(
                    jax.jit(eval_step, static_argnums=0)(
                        model, state, place(batch, mesh)
                    )
                )
            )
    # Products split over devices are sums of partial sums; logits are of order 1.
    # Measured: 1.4e-6 with AVX2 and AVX-512.
    np.testing.assert_allclose(*scores, atol=1e-5)
