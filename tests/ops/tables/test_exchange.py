import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.tables.test_lookup import dense_adagrad
from tests.worlds import mesh_of
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.tables import exchange, routing, storage
from tokenrec.ops.tables.api import storage_spec
from tokenrec.ops.tables.lookup import RowsState, build_stacks
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
# Two arrays of ids, as of two parts of a batch; some rows are read by several shards, some often by one.
IDS = [
    RANDOM.integers(0, 60, (BATCH,)).astype(np.int32),
    RANDOM.integers(0, ROWS, (BATCH, 3)).astype(np.int32),
]
TARGETS = [RANDOM.normal(size=(*ids.shape, WIDTH)).astype(np.float32) for ids in IDS]
# All on one device, whatever the mesh: the first places.
FIRST = np.asarray(from_storage_index(np.arange(40), ROWS)).astype(np.int32)
CROWDED = [
    FIRST[np.arange(BATCH) % 7],
    FIRST[np.arange(BATCH * 3) * 3 % 40].reshape(BATCH, 3),
]


def step(plan: ExchangePlan, table, total, ids, targets, apply):
    """The gradient of `sum(rows * targets)` and its update, by exchange: `(rows read, table, sums, norm^2, rounds)`."""
    route, inverses = routing.route_ids(plan, ids)
    rows = exchange.fetch_rows(plan, table, route)

    def loss(rows):
        read = [exchange.expand_rows(rows, inverse) for inverse in inverses]
        return sum(
            jnp.sum(some * target) for some, target in zip(read, targets, strict=True)
        ), read

    gradients, read = jax.grad(loss, has_aux=True)(rows)
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
    return read, table, state.sum, norm, route.rounds


def run(sizes, ids, *, capacity=None, apply=True):
    """`step` on a mesh, tables stored as they are to be; what comes back is in the order of row numbers."""
    order = np.asarray(to_storage_index(np.arange(ROWS), ROWS))
    storage_spec, sums = np.empty_like(TABLE), np.empty_like(TOTAL)
    storage_spec[order], sums[order] = TABLE, TOTAL
    mesh = mesh_of(*sizes)
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, RULES(*axes)))  # noqa: E731
    batch = lambda x: put(x, "batch", *[None] * (x.ndim - 1))  # noqa: E731
    with jax.set_mesh(mesh):
        plan = plan_exchange(ROWS, sum(part.size for part in ids))
        if capacity:
            plan = ExchangePlan(
                plan.rows, plan.batch_shards, plan.shard_devices, capacity
            )
        read, table, total, norm, rounds = jax.jit(step, static_argnums=0)(
            plan,
            put(storage_spec, "rows", None),
            put(sums, "rows"),
            [batch(part) for part in ids],
            [batch(target) for target in TARGETS],
            jnp.bool_(apply),
        )
    return (
        [np.asarray(part) for part in read],
        np.asarray(table)[order],
        np.asarray(total)[order],
        norm,
        int(rounds),
    )


def check(found, ids):
    read, table, total, norm, _ = found
    for part, rows in zip(ids, read, strict=True):
        assert np.array_equal(rows, TABLE[part])
    flat, targets = (
        np.concatenate([part.ravel() for part in ids]),
        np.concatenate([t.reshape(-1, 4) for t in TARGETS]),
    )
    expected, sums = dense_adagrad(TABLE, TOTAL, flat, targets, 0.1, 0.01)
    np.testing.assert_allclose(table, expected, atol=1e-6)
    np.testing.assert_allclose(total, sums, rtol=1e-5)
    gradient = np.zeros_like(TABLE)
    np.add.at(gradient, flat, targets)
    np.testing.assert_allclose(norm, np.sum(gradient**2), rtol=1e-5)


@pytest.mark.parametrize("sizes", MESHES)
def test_rows_and_updates_equal_those_of_the_whole_table(sizes):
    found = run(sizes, IDS)
    check(found, IDS)
    assert found[-1] == 1


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_an_overflow_takes_more_rounds_and_changes_nothing_else(sizes):
    found = run(sizes, CROWDED, capacity=2)
    check(found, CROWDED)
    assert found[-1] > 1
    assert run(sizes, IDS, capacity=1)[-1] > 1


def test_a_refused_update_changes_no_bit():
    _, table, total, _, _ = run((2, 2, 2), CROWDED, capacity=2, apply=False)
    assert np.array_equal(table, TABLE)
    assert np.array_equal(total, TOTAL)


def test_places_are_a_permutation_that_deals_neighbours_to_different_devices():
    rows = stored_rows(100_000)
    places = np.asarray(to_storage_index(np.arange(rows), rows))
    assert np.array_equal(np.sort(places), np.arange(rows))
    for devices in (8, 256, 768):
        owners = places // (rows // devices)
        assert np.array_equal(
            np.bincount(owners[:CYCLE]), np.full(devices, CYCLE // devices)
        )
        for first in (0, 777, 50_000):  # the first rows are often the most popular ones
            assert (
                np.bincount(
                    owners[first : first + 4 * devices], minlength=devices
                ).max()
                <= 6
            )
    assert np.array_equal(from_storage_index(places, rows), np.arange(rows))


def test_what_cannot_be_dealt_out_is_refused():
    with pytest.raises(InputError, match="5 devices"):
        storage.check_owners(5)
    with pytest.raises(InputError, match="embedding_dims"):
        stored_rows(2**31)


def test_devices_that_rows_cannot_be_dealt_to_are_refused_before_a_table_is_made():
    stack = build_stacks({"video": 5000}, {"video": 8}, 100)["width_8_spread"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:5])
    with (
        jax.set_mesh(mesh),
        pytest.raises(InputError, match=r"5 devices.*tokens.replicate_rows"),
    ):
        storage_spec(stack)
