"""The row exchange computes what a look-up in the whole table computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.tables.test_lookup import dense_adagrad
from tests.worlds import mesh_of
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.tables import exchange, packed, routing, storage
from tokenrec.ops.tables.api import storage_spec
from tokenrec.ops.tables.lookup import RowsState, build_stacks
from tokenrec.ops.tables.packed import LANES
from tokenrec.ops.tables.routing import ExchangePlan, plan_exchange
from tokenrec.ops.tables.storage import (
    CYCLE,
    from_storage_index,
    stored_rows,
    to_storage_index,
)
from tokenrec.sharding import RULES, make_mesh

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)]
ROWS, WIDTH, BATCH = 2 * CYCLE, 4, 16
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.normal(size=(ROWS, WIDTH)).astype(np.float32)
TOTAL = RANDOM.random(ROWS).astype(np.float32)
# Two arrays of ids, as those of two parts of a batch. Some rows are read by several
# shards, some often by one.
IDS = [
    RANDOM.integers(0, 60, (BATCH,)).astype(np.int32),
    RANDOM.integers(0, ROWS, (BATCH, 3)).astype(np.int32),
]
TARGETS = [RANDOM.normal(size=(*ids.shape, WIDTH)).astype(np.float32) for ids in IDS]
# Rows of the first storage indices: on any mesh, all of them lie on one device.
FIRST = np.asarray(from_storage_index(np.arange(40), ROWS)).astype(np.int32)
CROWDED = [
    FIRST[np.arange(BATCH) % 7],
    FIRST[np.arange(BATCH * 3) * 3 % 40].reshape(BATCH, 3),
]


def step(plan: ExchangePlan, table, total, ids, targets, apply):
    """Look up, differentiate `sum(rows * targets)`, and update, by the row exchange.

    Returns:
      The rows of all ids, the new table and sums, the squared norm of the table's
      gradient, and the number of rounds.
    """
    route, inverses = routing.route_ids(plan, ids)
    rows = exchange.fetch_rows(plan, table, route)

    def loss(rows):
        vectors = [exchange.expand_rows(rows, inverse) for inverse in inverses]
        products = (
            jnp.sum(vector * target)
            for vector, target in zip(vectors, targets, strict=True)
        )
        return sum(products), vectors

    gradients, vectors = jax.grad(loss, has_aux=True)(rows)
    collected = exchange.collect_gradients(plan, route, gradients)
    norm = jnp.sum(jnp.square(collected.gradients)) + collected.squares
    table, state = exchange.update_owned_rows(
        plan,
        table,
        RowsState(total),
        route,
        gradients,
        collected,
        rate=jnp.float32(0.1),
        decay=0.01,
        apply=apply,
    )
    return vectors, table, state.sum, norm, route.rounds


def run(sizes, ids, *, capacity=None, apply=True, by_lines=False):
    """Run `step` on a mesh; table and sums come back in the order of row numbers.

    Args:
      sizes: devices along data, fsdp and tensor.
      ids: arrays of row numbers.
      capacity: of the plan, in place of the one that it would have.
      apply: False refuses the update.
      by_lines: the table is stored in lines of 128 lanes.
    """
    order = np.asarray(to_storage_index(np.arange(ROWS), ROWS))
    stored_table, stored_sums = np.empty_like(TABLE), np.empty_like(TOTAL)
    stored_table[order] = TABLE
    stored_sums[order] = TOTAL
    if by_lines:
        stored_table = stored_table.reshape(-1, LANES)
    mesh = mesh_of(*sizes)

    def put(x, *axes):
        return jax.device_put(x, jax.NamedSharding(mesh, RULES(*axes)))

    def put_batch(x):
        return put(x, "batch", *[None] * (x.ndim - 1))

    with jax.set_mesh(mesh):
        plan = plan_exchange(ROWS, sum(part.size for part in ids))
        if capacity:
            plan = ExchangePlan(
                plan.rows, plan.batch_shards, plan.shard_devices, capacity
            )
        # A function of its own: another test may compute on another platform's path.
        vectors, table, total, norm, rounds = jax.jit(functools.partial(step, plan))(
            put(stored_table, "rows", None),
            put(stored_sums, "rows"),
            [put_batch(array) for array in ids],
            [put_batch(target) for target in TARGETS],
            jnp.bool_(apply),
        )
    return (
        [np.asarray(vector) for vector in vectors],
        np.asarray(table).reshape(-1, WIDTH)[order],
        np.asarray(total)[order],
        norm,
        int(rounds),
    )


def check(result, ids):
    """Compare a result of `run` with the reference on the whole table."""
    vectors, table, total, norm, _ = result
    # A look-up copies rows: no rounding.
    for array, rows in zip(ids, vectors, strict=True):
        assert np.array_equal(rows, TABLE[array])
    flat = np.concatenate([array.ravel() for array in ids])
    targets = np.concatenate([target.reshape(-1, WIDTH) for target in TARGETS])
    expected, sums = dense_adagrad(TABLE, TOTAL, flat, targets, 0.1, 0.01)
    # Float32 rounding, as in test_lookup.py; shards add their gradients in another
    # order. Measured: table 1.2e-7, sums and norm 2.3e-7 relative. The margin is 8x or
    # more.
    np.testing.assert_allclose(table, expected, atol=1e-6)
    np.testing.assert_allclose(total, sums, rtol=1e-5)
    gradient = np.zeros_like(TABLE)
    np.add.at(gradient, flat, targets)
    np.testing.assert_allclose(norm, np.sum(gradient**2), rtol=1e-5)


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_and_updates_equal_those_of_the_whole_table(sizes):
    result = run(sizes, IDS)
    check(result, IDS)
    assert result[-1] == 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_an_overflow_takes_more_rounds_and_changes_nothing_else(sizes):
    result = run(sizes, CROWDED, capacity=2)
    check(result, CROWDED)
    assert result[-1] > 1
    assert run(sizes, IDS, capacity=1)[-1] > 1


def test_packed_lines_give_the_same_bits(monkeypatch):
    """As a TPU reads and writes them, in the first round and on overflow."""
    (vectors, *plain) = run((2, 2, 2), CROWDED, capacity=2)
    monkeypatch.setattr(packed, "current_platform", lambda: "tpu")
    (found, *lines) = run((2, 2, 2), CROWDED, capacity=2, by_lines=True)
    assert lines[-1] > 1
    pairs = zip([*vectors, *plain], [*found, *lines], strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def test_an_array_without_entries_changes_no_other():
    empty = np.zeros((BATCH, 0, 2), np.int32)
    mesh = mesh_of(2, 2, 2)

    def route(*ids):
        plan = plan_exchange(ROWS, sum(array.size for array in ids))
        return routing.route_ids(plan, ids)

    def put(array):
        spec = RULES("batch", *[None] * (array.ndim - 1))
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        expected, inverses = jax.jit(route)(*map(put, IDS))
        found, (first, none, second) = jax.jit(route)(
            *map(put, [IDS[0], empty, IDS[1]])
        )
    for one, other in zip((*expected, *inverses), (*found, first, second), strict=True):
        np.testing.assert_array_equal(one, other)
    assert none.shape == empty.shape
    assert none.dtype == np.int32


def test_a_refused_update_changes_no_bit():
    _, table, total, _, _ = run((2, 2, 2), CROWDED, capacity=2, apply=False)
    assert np.array_equal(table, TABLE)
    assert np.array_equal(total, TOTAL)


def test_storage_indices_are_a_permutation_that_spreads_neighbours():
    rows = stored_rows(100_000)
    indices = np.asarray(to_storage_index(np.arange(rows), rows))
    assert np.array_equal(np.sort(indices), np.arange(rows))
    for devices in (8, 256, 768):
        owners = indices // (rows // devices)
        assert np.array_equal(
            np.bincount(owners[:CYCLE]), np.full(devices, CYCLE // devices)
        )
        # Any run of rows is spread, such as the first ones, often the most popular.
        for first in (0, 777, 50_000):
            run_owners = owners[first : first + 4 * devices]
            assert np.bincount(run_owners, minlength=devices).max() <= 6
    assert np.array_equal(from_storage_index(indices, rows), np.arange(rows))


def test_rows_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(InputError, match="5 devices"):
        storage.check_owners(5)
    with pytest.raises(InputError, match="embedding_dims"):
        stored_rows(2**31)


def test_the_number_of_devices_is_checked_before_a_table_is_made():
    stack = build_stacks({"video": 5000}, {"video": 8}, 100)["width_8_spread"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:5])
    with (
        jax.set_mesh(mesh),
        pytest.raises(InputError, match=r"5 devices.*tokens.replicate_rows"),
    ):
        storage_spec(stack)
