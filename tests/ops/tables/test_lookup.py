"""Distinct rows and row-wise AdaGrad, against the gradient of the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import one_device
from tokenrec.ops.tables.lookup import (
    RowsState,
    build_stacks,
    expand_rows,
    unique_ids,
    update_rows,
)
from tokenrec.ops.tables.packed import gather_rows


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def dense_adagrad(table, total, ids, gradients, rate, decay):
    """Row-wise AdaGrad on the gradient of the whole table: the plain reference.

    Args:
      table: `[rows, w]`.
      total: `[rows]`, sums of the rows.
      ids: `[n]`, rows that are read.
      gradients: `[n, w]`, of what was read.
      rate: learning rate.
      decay: pull towards zero of rows with a gradient.

    Returns:
      The new table and sums.
    """
    full = np.zeros_like(table)
    np.add.at(full, ids, gradients)
    mean_squares = (full**2).mean(1)
    total = total + mean_squares
    step = full / (np.sqrt(total)[:, None] + 1e-8)
    step += np.where((mean_squares > 0)[:, None], decay * table, 0)
    return table - rate * step, total


# Fewer and more rows than ids: touched whole, and sorted.
@pytest.mark.parametrize("rows", [7, 500])
def test_row_updates_equal_the_dense_gradient(rows):
    random = np.random.default_rng(0)
    ids = random.integers(0, rows, 40).astype(np.int32)
    table = random.normal(size=(rows, 4)).astype(np.float32)
    total = random.random(rows).astype(np.float32)
    target = random.normal(size=(40, 4)).astype(np.float32)
    unique = unique_ids(jnp.asarray(ids), rows)

    def loss(distinct):
        return jnp.sum(expand_rows(distinct, unique.inverse) * target)

    rows = gather_rows(jnp.asarray(table), unique.ids, 4, distinct=True)
    gradients = jax.grad(loss)(rows)
    new, state = update_rows(
        jnp.asarray(table),
        RowsState(jnp.asarray(total)),
        unique.ids,
        gradients,
        rate=jnp.float32(0.1),
        decay=0.01,
        apply=jnp.bool_(True),
    )
    expected, expected_total = dense_adagrad(table, total, ids, target, 0.1, 0.01)
    # Float32 rounding. A row moves by rate * step, of order 0.1, and has entries up to
    # 4: two roundings, 2.4e-7 each. Measured: 6e-8. A row's sum adds a mean of 4
    # squares of a gradient that up to 40 ids add to: a few units of 6e-8 relative.
    # Measured: 0.
    np.testing.assert_allclose(new, expected, atol=1e-6)
    np.testing.assert_allclose(state.sum, expected_total, rtol=1e-6)


@pytest.mark.parametrize("rows", [7, 500])
def test_a_refused_update_changes_no_bit(rows):
    ids = unique_ids(jnp.arange(40, dtype=jnp.int32) % rows, rows).ids
    table, total = jnp.ones((rows, 4)), jnp.full((rows,), 2.0)
    gradients = jnp.full((len(ids), 4), jnp.nan)
    new, state = update_rows(
        table,
        RowsState(total),
        ids,
        gradients,
        rate=jnp.float32(1),
        decay=0.1,
        apply=jnp.bool_(False),
    )
    assert np.array_equal(new, table)
    assert np.array_equal(state.sum, total)


def test_every_id_finds_its_row_again():
    ids = jnp.array([5, 300, 5, 0, 499], jnp.int32)
    table = jnp.arange(500.0)[:, None]
    unique = unique_ids(ids, 500)
    rows = gather_rows(table, unique.ids, 1, distinct=True)
    vectors = expand_rows(rows, unique.inverse)
    assert vectors[:, 0].tolist() == ids.tolist()


def test_tables_of_one_width_share_a_stack():
    stacks = build_stacks({"a": 3, "b": 4, "c": 5}, {"a": 8, "b": 16, "c": 8}, 10)
    assert {name: (s.rows, s.width, s.offsets) for name, s in stacks.items()} == {
        "width_8": (8, 8, {"a": 0, "c": 3}),
        "width_16": (4, 16, {"b": 0}),
    }
