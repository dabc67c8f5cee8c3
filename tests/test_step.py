"""The train step on random batches: accumulation, refusal of bad steps, the joint clip norm, meshes, placements."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import worlds
from tests.walks import (
    code_config,
    first_batch,
    opened,
    prepare_walks,
    save_codes,
    walking,
)
from tests.worlds import (
    FEW_FEATURES,
    TASKS,
    mesh_of,
    one_device,
    place,
    schema_of,
    tiny,
)
from tokenrec.debug.step_inspection import inspect_step
from tokenrec.ops.tables.exchange import CollectedGradients
from tokenrec.ops.tables.storage import to_storage_index
from tokenrec.optim import clip_scale, decays, global_norm, with_schedule_step
from tokenrec.state import abstract_state, build_model, init_state
from tokenrec.step import eval_step, gradients, step_inputs, train_step

STEP = jax.jit(train_step, static_argnums=0)
random_batch = functools.partial(worlds.random_batch, schema=FEW_FEATURES)

# One program for the tests of rates, which begin within the warm-up.
SLOW_START = {"warmup_steps": 8, "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def small(*, optim=None, tokens=None, model=None, **changes):
    """A config of one layer, which compiles quickly."""
    return tiny(
        tokens={"maker": "linear"} | (tokens or {}),
        model={"layers": 1, "windows": ()} | (model or {}),
        optim=optim,
        **changes,
    )


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


# tests/test_micro_batches.py compares a batch with its parts likewise, with dropout.
@pytest.mark.slow
def test_micro_batches_make_the_same_update_as_one_batch(mesh):
    """Labels are unevenly known, so that a mean of the micro-batches' means would differ."""
    whole = small(batch_size=8)
    parts = small(batch_size=8, optim={"accumulate": 4})
    batch = random_batch(whole)
    batch.labels[::4] = -1
    states = []
    for config in (whole, parts):
        model = build_model(config, FEW_FEATURES, TASKS)
        state, metrics = STEP(model, init_state(model, 0), place(batch, mesh))
        states.append((state.params, state.tables, metrics.loss, metrics.grad_norm))
    # AdamW's first step divides a gradient by itself, which magnifies rounding: measured 3e-6.
    for a, b in zip(leaves(states[0]), leaves(states[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(mesh):
    model = build_model(small(), FEW_FEATURES, TASKS)
    state = init_state(model, 0)
    batch = random_batch(small())
    batch.target.dense[0, 0, 0] = np.inf  # an embedding feature: not clipped
    new, metrics = STEP(model, state, place(batch, mesh))
    assert not metrics.applied
    assert int(new.step) == 1
    for a, b in zip(
        leaves((new.params, new.tables)),
        leaves((state.params, state.tables)),
        strict=True,
    ):
        assert np.array_equal(a, b)
    for a, b in zip(
        leaves(new.opt_state["rows"]), leaves(state.opt_state["rows"]), strict=True
    ):
        assert np.array_equal(a, b)


def test_both_learning_rates_follow_the_step_after_a_skipped_one(mesh):
    """Rates of steps 1 and 2 are 2/8 and 3/8 of the peak: the update is 3/2 as large."""
    model = build_model(small(optim=SLOW_START), FEW_FEATURES, TASKS)
    good = random_batch(small())
    bad = good._replace(target=good.target._replace(dense=good.target.dense + np.inf))
    # 1. One update, then the same batch at once, or after a skipped step.
    first, _ = STEP(model, init_state(model, 0), place(good, mesh))
    at_once, _ = STEP(model, first, place(good, mesh))
    skipped, metrics = STEP(model, first, place(bad, mesh))
    assert not metrics.applied
    later, metrics = STEP(model, skipped, place(good, mesh))
    assert metrics.applied

    # 2. Weights and table rows move by the same multiple.
    pairs = {
        "dense": (first.params, at_once.params, later.params),
        "tables": (first.tables, at_once.tables, later.tables),
    }
    for states in pairs.values():
        before, one, other = (
            np.concatenate([leaf.reshape(-1) for leaf in leaves(state)])
            for state in states
        )
        assert np.abs(one - before).max() > 1e-4
        # A difference of float32 weights near 1 is exact to 6e-8 / 2.
        np.testing.assert_allclose(other - before, 1.5 * (one - before), atol=3e-7)


def test_a_checkpoint_whose_schedule_fell_behind_continues_at_its_step(mesh):
    """Earlier versions left optax's own count behind at every skipped step."""
    model = build_model(small(optim=SLOW_START), FEW_FEATURES, TASKS)
    batch = place(random_batch(small()), mesh)
    state, _ = STEP(model, init_state(model, 0), batch)
    state = dataclasses.replace(state, step=state.step + 4)
    behind = state.opt_state["dense"]
    in_step = with_schedule_step(behind, state.step)
    counts = [int(of[-1].count) for of in (behind, in_step)]
    assert counts == [1, 5]
    # The structure is that of optax, which older checkpoints hold.
    assert jax.tree.structure(in_step) == jax.tree.structure(behind)
    assert int(in_step[0].count) == int(behind[0].count) == 1
    opt_state = state.opt_state | {"dense": in_step}
    expected, _ = STEP(model, dataclasses.replace(state, opt_state=opt_state), batch)
    found, _ = STEP(model, state, batch)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert np.array_equal(a, b)
    assert int(found.opt_state["dense"][-1].count) == int(found.step) == 6


def test_unknown_labels_and_unread_rows_carry_no_gradient(mesh):
    config = small()
    model = build_model(config, FEW_FEATURES, TASKS)
    state = init_state(model, 0)
    batch = random_batch(config)
    silent = batch._replace(labels=np.full_like(batch.labels, -1))
    _, metrics = STEP(model, state, place(silent, mesh))
    assert float(metrics.loss) == 0
    assert float(metrics.grad_norm) == 0


def test_the_loss_is_the_weighted_mean_of_the_known_labels_of_each_task(mesh):
    config = small(paradigm="uc", events=4)
    model = build_model(config, FEW_FEATURES, TASKS)
    state = init_state(model, 0)
    batch = random_batch(config, lengths=[4, 3, 0, 2, 1, 4, 4, 2])
    # Weights whose sum stays below 1, as in a batch of a few unscored events.
    random = np.random.default_rng(0)
    weight = (batch.valid * random.choice([0.0, 0.02, 0.05], batch.valid.shape)).astype(
        np.float32
    )
    batch = batch._replace(weight=weight)
    probability = np.asarray(
        jax.jit(eval_step, static_argnums=0)(model, state, place(batch, mesh))
    )
    expected = 0.0
    for task, factor in enumerate((1.0, 0.5)):
        losses, weights = [], []
        for b, n in zip(*np.nonzero(weight), strict=True):
            label = batch.labels[b, n, task]
            if label >= 0:
                p = probability[b, n, task]
                losses.append(-np.log(p if label else 1 - p) * weight[b, n])
                weights.append(weight[b, n])
        assert 0 < sum(weights) < 1
        expected += factor * sum(losses) / sum(weights)
    _, metrics = STEP(model, state, place(batch, mesh))
    assert float(metrics.loss) == pytest.approx(expected, rel=1e-5)
    assert int(metrics.examples) == np.count_nonzero(weight)


def test_dropout_depends_on_the_step_and_on_nothing_else(mesh):
    model, host = mesh_case()  # whose dropout is above 0
    state, batch = init_state(model, 0), place(host, mesh)
    first, again = (float(STEP(model, state, batch)[1].loss) for _ in range(2))
    later = jax.tree.map(lambda x: x, state)
    object.__setattr__(later, "step", state.step + 1)
    assert first == again
    assert float(STEP(model, later, batch)[1].loss) != first


def test_clip_norm_counts_dense_weights_and_unique_rows_together():
    norm = global_norm(
        {"w": jnp.array([3.0])},
        {
            "t": CollectedGradients(
                jnp.array([5]), jnp.array([[0.0, 4.0]]), jnp.float32(0)
            )
        },
    )
    assert float(norm) == pytest.approx(5.0)
    assert float(clip_scale(norm, 1.0)) == pytest.approx(0.2)
    assert float(clip_scale(norm, 0.0)) == 1.0


def test_biases_scales_and_separators_do_not_decay():
    params = init_state(build_model(tiny(), FEW_FEATURES, TASKS), 0).params
    decaying = decays(params)
    assert not decaying["backbone/blocks/0/gate/bias"]
    assert not decaying["backbone/norm/scale"]
    assert not decaying["separators"]
    assert decaying["backbone/blocks/0/attention/query"]


def test_abstract_state_says_what_a_state_is():
    model = build_model(tiny(), FEW_FEATURES, TASKS)
    described, made = abstract_state(model), init_state(model, 0)
    for a, b in zip(jax.tree.leaves(described), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype, a.sharding.spec) == (
            b.shape,
            b.dtype,
            b.sharding.spec,
        )


# Two devices along fsdp, tensor and context.
MESH = (1, 2, 2, 2)
# A table of each kind of ids, and numbers.
MIXED = schema_of("gender", "video", "tags", "picture", "code", "clicked")


@functools.cache
def mesh_case():
    config = tiny(
        # Tables video, tags and code are spread, the others are not.
        tokens={"maker": "linear", "replicate_rows": 8},
        model={
            "ffn_width": 32,
            "dropout": 0.1,
            "heads": 4,
            "layers": 1,
            "windows": (20,),
        },
        # Micro-batches on meshes: below.
        optim={"learning_rate": 1e-3},
        batch_size=16,
    )
    return (
        build_model(config, MIXED, TASKS),
        worlds.random_batch(config, 16, schema=MIXED),
    )


def stepped(sizes):
    """State and metrics after a step from sums of 1, which keep AdaGrad from magnifying rounding of tiny gradients."""
    (model, batch), mesh = mesh_case(), mesh_of(*sizes)
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        rows = jax.tree.map(lambda leaf: leaf + 1, state.opt_state["rows"])
        state = dataclasses.replace(state, opt_state=state.opt_state | {"rows": rows})
        return jax.device_get(STEP(model, state, place(batch, mesh)))


def test_a_mesh_makes_the_same_loss_gradient_and_update():
    """Gradients of retrieval, below, are compared on meshes with two along data.

    Of the 29 tokens filled up to 32, the 20 that the window needs lie on both parts.
    """
    (state, metrics), (expected, of_one) = stepped(MESH), stepped((1, 1, 1))
    np.testing.assert_allclose(metrics.loss, of_one.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, of_one.grad_norm, rtol=1e-6)
    assert (metrics.rounds, of_one.rounds) == (1, 1)
    # AdamW's first moment is a tenth of the gradient, whose largest entries are near .1.
    for a, b in zip(
        leaves((state.opt_state, state.tables)),
        leaves((expected.opt_state, expected.tables)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-7)
    # AdamW's first step magnifies rounding of tiny gradients up to the rate itself; measured 4e-5 of weights near 0.1.
    for a, b in zip(leaves(state.params), leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_spread_and_replicated_tables_learn_the_same(mesh):
    batch = random_batch(small())
    found = {}
    for replicate in (8, 100):
        model = build_model(
            small(tokens={"replicate_rows": replicate}), FEW_FEATURES, TASKS
        )
        state = init_state(model, 0)
        rows = {}
        for stack in model.embedder.stacks.values():
            for table, first in stack.offsets.items():
                numbers = first + np.arange(FEW_FEATURES.tables[table])
                at = (
                    to_storage_index(numbers, stack.stored_rows)
                    if stack.spread
                    else numbers
                )
                rows[table] = (stack.name, at)
        tables = {
            name: np.array(leaf).reshape(-1, 8) for name, leaf in state.tables.items()
        }
        random = np.random.default_rng(0)
        for _, (name, at) in sorted(rows.items()):
            tables[name][at] = random.normal(size=(len(at), 8)) * 0.1
        placed = {
            name: jax.device_put(
                leaf.reshape(state.tables[name].shape), state.tables[name].sharding
            )
            for name, leaf in tables.items()
        }
        state = dataclasses.replace(state, tables=placed)
        new, metrics = STEP(model, state, place(batch, mesh))
        found[replicate] = [
            np.asarray(new.tables[name]).reshape(-1, 8)[at]
            for _, (name, at) in sorted(rows.items())
        ]
        found[replicate] += [metrics.loss, metrics.grad_norm, *leaves(new.params)]
        assert any(stack.spread for stack in model.embedder.stacks.values()) == (
            replicate == 8
        )
    for a, b in zip(found[8], found[100], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_bad_step_leaves_spread_tables_as_they_were():
    model, batch = mesh_case()
    dense = batch.target.dense.copy()
    dense[0, 0, 0] = np.inf
    batch = batch._replace(target=batch.target._replace(dense=dense))
    mesh = mesh_of(*MESH)
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        new, metrics = STEP(model, state, place(batch, mesh))
    assert not metrics.applied
    for a, b in zip(
        leaves((state.tables, state.opt_state)),
        leaves((new.tables, new.opt_state)),
        strict=True,
    ):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    codes = save_codes(folder / "codes.parquet")
    return prepare_walks(folder / "data"), codes


def retrieval_case(walks, kind, accumulate):
    """Model, state and host batch of each head of retrieval; `accumulate` alone varies."""
    data, codes = walks
    config = (
        code_config(data, codes)
        if kind == "semantic ids"
        else walking(data, head={"negatives": 32 * (kind == "sampled")})
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layers=1),
        optim=dataclasses.replace(config.optim, accumulate=accumulate),
    )
    dataset, model = opened(config)
    return model, first_batch(dataset, config).batch


@functools.cache
def loss_and_gradients(walks, kind, accumulate, sizes=(1, 1, 1)):
    """Loss of a step, the gradients of all weights and of whole tables, and negatives."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        model, batch = retrieval_case(walks, kind, accumulate)
        state = init_state(model, 0)

        @jax.jit
        def compute(state, batch):
            inputs = step_inputs(model, state, batch)
            loss, (dense, by_row) = gradients(model, state.params, inputs)
            return loss, dense, by_row, inputs.batch.negatives

        return jax.device_get(compute(state, place(batch, mesh)))


# On a mesh, below, two parts with samples as negatives, and of semantic ids. The full softmax is what the sampled one
# is, with every item for a negative.
@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 16])
@pytest.mark.parametrize("kind", ["sampled", "full", "semantic ids"])
def test_retrieval_has_the_loss_and_gradients_of_one_batch(walks, kind, accumulate):
    """Every micro-batch meets all negatives, and all splits draw the same ones."""
    whole, parts = (loss_and_gradients(walks, kind, count) for count in (1, accumulate))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    if kind == "sampled":
        assert whole[3].shape == (16, 2)
        np.testing.assert_array_equal(parts[3], whole[3])
    # The same float32 terms, summed in another order: measured 1.7e-6 of the largest
    # entry. With negatives of its own for each micro-batch it was 0.7.
    largest = max(np.abs(gradient).max() for gradient in leaves(whole[1:3]))
    for a, b in zip(leaves(parts[1:3]), leaves(whole[1:3]), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * largest)


def test_an_inspected_step_has_the_loss_of_the_step(walks, mesh):
    """Each sample's losses and features, with negatives that all micro-batches share."""
    losses = {}
    for accumulate in (1, 2):
        model, batch = retrieval_case(walks, "sampled", accumulate)
        inspect = jax.jit(inspect_step, static_argnums=0)
        samples = inspect(model, init_state(model, 0), place(batch, mesh))["samples"]
        assert {leaf.shape for leaf in jax.tree.leaves(samples)} == {(16,)}
        assert samples["features"]["negatives"]
        # Each loss stands at the place of its sample in the batch.
        losses[accumulate] = np.asarray(samples["losses"])
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)
    whole = loss_and_gradients(walks, "sampled", 1)[0]
    np.testing.assert_allclose(losses[2].sum(), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("sampled", (2, 1, 1, 4)), ("semantic ids", (2, 2, 2))],
)
def test_micro_batches_on_a_mesh_have_the_gradients_of_one_batch(walks, kind, sizes):
    """Negatives are the same in all parts; codes are summed over all devices.

    Sizes of data, fsdp, tensor and context.
    """
    expected = loss_and_gradients(walks, kind, 1)
    found = loss_and_gradients(walks, kind, 2, sizes)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    if kind == "sampled":
        assert expected[3].shape == (16, 2)
        np.testing.assert_array_equal(found[3], expected[3])
    # As above, with sums over devices: measured 2.5e-6 of the largest entry.
    largest = max(np.abs(gradient).max() for gradient in leaves(expected[1:3]))
    for a, b in zip(leaves(found[1:3]), leaves(expected[1:3]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)
