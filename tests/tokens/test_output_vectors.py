"""Output vectors of items: rows of their own, and features that they share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.walks import ITEMS, first_batch, opened, prepare_walks, read_outs, walking
from tests.worlds import mesh_of, one_device
from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import make_retrieval_step
from tokenrec.evaluation.item_vectors import item_vectors
from tokenrec.ops.tables.lookup import Stack
from tokenrec.sharding import to_devices
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step
from tokenrec.tokens.output_vectors import (
    ITEM_ROWS,
    all_output_vectors,
    item_table_ids,
    output_vectors,
)

SHARED = {"negatives": 16, "item_features": ("item",)}
FEATURES = (
    ITEM_ROWS,
    Feature("output_maker", "categorical", "item"),
    Feature("output_tags", "multi_valued", "item", length=3),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_walks(tmp_path_factory.mktemp("data") / "walks")


def small(data, **head):
    """A config whose items share the embeddings of a feature."""
    config = walking(data, head=SHARED | head)
    config.model.layers = 1
    return config


def item_stack(model):
    """The stack of the output vectors."""
    (stack,) = (s for s in model.embedder.stacks.values() if "output_item" in s.offsets)
    return stack


def test_features_are_averaged_over_their_known_values():
    """Missing (0) and unknown (1) values add nothing, by a loop over items."""
    maker = np.array([2, 0, 1, 3])
    tags = np.array([[2, 3, 0], [0, 0, 0], [4, 0, 0], [1, 2, 4]])
    item_ids = np.concatenate([maker[:, None], tags], axis=1).astype(np.int32)
    offsets = {"catalogue_item": 0, "output_maker": 4, "output_tags": 8}
    table = np.random.default_rng(0).normal(size=(13, 5)).astype(np.float32)
    expected = table[:4].copy()
    for item in range(4):
        if maker[item] > 1:
            expected[item] += table[4 + maker[item]]
        known = [8 + tag for tag in tags[item] if tag > 1]
        if known:
            expected[item] += sum(table[row] for row in known) / len(known)
    stack = Stack("width_5", 5, 13, offsets)
    with jax.set_mesh(one_device()):
        every = all_output_vectors(jnp.asarray(table), stack, FEATURES, item_ids, 4)
        np.testing.assert_allclose(every, expected, rtol=1e-6)
        # The look-up of a batch: -1 reads the first item.
        items = jnp.array([[3, 1], [-1, 2]])
        ids = np.asarray(item_table_ids(items, item_ids))
    spans = {"catalogue_item": 0, "output_maker": 1, "output_tags": slice(2, 5)}
    of = {name: np.atleast_3d(ids[..., span]) for name, span in spans.items()}
    values = {name: jnp.asarray(table[of[name] + offsets[name]]) for name in of}
    looked_up = output_vectors(values, {name: jnp.asarray(i) for name, i in of.items()})
    np.testing.assert_allclose(looked_up, expected[[[3, 1], [0, 2]]], rtol=1e-6)


def test_ranks_and_exported_vectors_are_sums_of_rows(data):
    config = small(data, top_k=ITEMS)
    dataset, model = opened(config)
    mesh = one_device()
    with jax.set_mesh(mesh):
        state = init_state(model, 0)
        batch = to_devices(
            next(eval_batches(dataset, config.data, "valid"))[0].batch, mesh
        )
        found = jax.device_get(make_retrieval_step(model, dataset)(state, batch))
        table = item_vectors(OpenedRun(model, dataset, 0, state))
        read = jax.jit(functools.partial(read_outs, model))
        h = np.asarray(read(state, batch))[:, 0]
    stack = item_stack(model)
    rows = np.asarray(state.tables[stack.name])
    own = rows[stack.offsets["catalogue_item"] :][:ITEMS]
    # The ids of the feature "item" begin after the reserved ones, in the same order.
    ids = dataset.catalogue.ids[:, 0]
    assert sorted(ids) == list(range(2, 2 + ITEMS))
    vectors = own + rows[stack.offsets["output_item"] + ids]
    exported = np.stack(table["vector"].to_pylist())
    np.testing.assert_allclose(exported, vectors, rtol=1e-6)
    scores = np.empty_like(found.scores)
    np.put_along_axis(scores, found.items, found.scores, axis=1)
    np.testing.assert_allclose(scores, h @ vectors.T, rtol=1e-4, atol=1e-5)


def test_a_step_trains_both_tables_on_a_mesh_and_in_parts(data):
    config = small(data)
    config.optim.accumulate = 2
    dataset, model = opened(config)
    batch = first_batch(dataset, config).batch
    mesh = mesh_of(2, 1, 1)
    with jax.set_mesh(mesh):
        before = init_state(model, 0)
        tables = jax.device_get(before.tables)
        step = jax.jit(train_step, static_argnums=0)
        state, metrics = step(model, before, to_devices(batch, mesh))
        assert metrics.applied
        moved = jax.device_get(state.tables)
    stack = item_stack(model)
    changed = (tables[stack.name] != moved[stack.name]).any(axis=1)
    first = stack.offsets["output_item"]
    # The rows of missing and unknown values stay.
    assert not changed[first : first + 2].any()
    assert changed[first + 2 : first + 2 + ITEMS].all()
    assert changed[stack.offsets["catalogue_item"] :][:ITEMS].all()


def test_what_does_not_fit_is_refused(data):
    config = small(data)
    dataset, _ = opened(config)
    blind = build_model(config, dataset.schema, ())
    batch = first_batch(dataset, config).batch
    with pytest.raises(InputError, match="built without one"):
        blind.embedder.find(batch)
    config.tokens.replicate_rows = 5
    with pytest.raises(InputError, match=r"replicate_rows=5 spreads the .*; raise it"):
        opened(config)
    with pytest.raises(InputError, match=r"names 'itme', which.*did you mean 'item'\?"):
        opened(small(data, item_features=("itme",)))
