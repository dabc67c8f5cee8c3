"""Tables on sparse cores, as far as a CPU can tell: both operations of the package are plain sums here, read from the
same buffers; the buffers are those that the package's own preprocessing makes; and the programs compile for a TPU.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.sparsecore_topology import PROGRAMS, topology_row
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops import sparsecore
from tokenrec.ops.tables import exchange
from tokenrec.ops.tables.lookup import RowsState, update_rows
from tokenrec.sharding import AXES, RULES, make_mesh

WIDTH, PLACES = 8, 42
RULES_ROWS = RULES("rows", None), RULES("rows")
ROWS = 768  # 8 rows for each of 8 x 4 cores, three times
MESHES = [(MeshConfig(), 4), (MeshConfig(fsdp=2, tensor=2), 2), (MeshConfig(tensor=8), 4)]

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("jax_tpu_embedding") is None, reason="jax-tpu-embedding is not installed"
)


def read_lists(plan, at):
    """Row, element and truth of every slot of the device's lists: ids for an owner begin at multiples of 8."""
    ends = at.ends.reshape(plan.cores, -1)[:, : plan.owners]
    starts = jnp.concatenate([jnp.zeros((plan.cores, 1), jnp.int32), (ends[:, :-1] + 7) // 8 * 8], axis=1)
    slot = jnp.arange(plan.buffer)[:, None]
    inside = (slot >= starts[:, None]) & (slot < ends[:, None])
    rows = jnp.argmax(inside, axis=2) * plan.own + at.ids.reshape(plan.cores, -1)
    elements = jnp.arange(plan.cores)[:, None] * plan.lane + at.samples.reshape(plan.cores, -1)
    real = jnp.any(inside, axis=2).reshape(-1)
    return jnp.where(real, rows.reshape(-1), plan.rows), jnp.where(real, elements.reshape(-1), plan.cores * plan.lane)


def look_up(plan, at, table):
    rows, elements = read_lists(plan, at)
    whole = jax.lax.all_gather(table, AXES, tiled=True)
    out = jnp.zeros((plan.cores * plan.lane, *table.shape[1:]))
    return out.at[elements].add(whole.at[rows].get(mode="fill", fill_value=0), mode="drop")


def add(plan, at, table, values, name):
    rows, elements = read_lists(plan, at)
    read = values.at[elements].get(mode="fill", fill_value=0)
    sums = jax.lax.psum(jnp.zeros((plan.rows, *table.shape[1:])).at[rows].add(read, mode="drop"), AXES)
    return table + jax.lax.dynamic_slice_in_dim(sums, jax.lax.axis_index(AXES) * table.shape[0], table.shape[0])


@pytest.fixture
def plain_sums(monkeypatch):
    monkeypatch.setattr(sparsecore, "_look_up", look_up)
    monkeypatch.setattr(sparsecore, "_add", add)


def draw_places(shards, rng, distinct=True):
    """Sorted places of every shard, of which the last five are padding; shards share some."""
    some = [rng.choice(ROWS // 4, PLACES - 5, replace=not distinct) * 4 for _ in range(shards)]
    return np.stack([np.append(np.sort(one), [ROWS] * 5) for one in some]).astype(np.int32)


def placed(value, spec):
    return jax.device_put(jnp.asarray(value), jax.NamedSharding(jax.sharding.get_mesh(), spec))


def stored(rng):
    table = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    sums = rng.uniform(size=ROWS).astype(np.float32)
    return table, sums


@pytest.mark.parametrize(("mesh", "cores"), MESHES)
@pytest.mark.usefixtures("plain_sums")
def test_rows_and_updates_are_those_of_a_plain_table(mesh, cores):
    rng = np.random.default_rng(0)
    table, sums = stored(rng)
    with jax.set_mesh(make_mesh(mesh)):
        plan = sparsecore.plan_cores(ROWS, PLACES, WIDTH, cores)
        places = draw_places(plan.shards, rng, distinct=False)
        gradients = rng.normal(size=(plan.shards, PLACES, WIDTH)).astype(np.float32)
        gradients[:, -5:] = 0

        @jax.jit
        def step(table, state, places, gradients, apply):
            at = sparsecore.partition(plan, places)
            summed = sparsecore.collect(plan, at, gradients)
            made = sparsecore.update(plan, table, state, at, summed, rate=jnp.float32(0.1), decay=0.01, apply=apply)
            return sparsecore.fetch(plan, table, at), made, summed.squares, at.dropped

        given = placed(table, RULES_ROWS[0]), RowsState(placed(sums, RULES_ROWS[1]))
        read = placed(places.reshape(-1), RULES("batch")), placed(gradients.reshape(-1, WIDTH), RULES("batch", None))
        rows, made, squares, dropped = step(*given, *read, True)
        _, same, _, _ = step(*given, *read, False)
    np.testing.assert_array_equal(rows, np.append(table, np.zeros((1, WIDTH), np.float32), axis=0)[places.reshape(-1)])
    whole = np.zeros((ROWS + 1, WIDTH))
    np.add.at(whole, places.reshape(-1), gradients.reshape(-1, WIDTH).astype(np.float64))
    whole = whole[:ROWS].astype(np.float32)
    wanted, wanted_state = update_rows(
        jnp.asarray(table), RowsState(jnp.asarray(sums)), jnp.arange(ROWS), whole, rate=0.1, decay=0.01, apply=True
    )
    # Measured: 2.4e-7, an ulp or two, since the parts of a step are added up.
    np.testing.assert_allclose(made[0], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(made[1].sum, wanted_state.sum, rtol=1e-6)
    np.testing.assert_allclose(squares, np.square(whole).sum(), rtol=1e-5)
    assert dropped == 0
    np.testing.assert_array_equal(same[0], table)
    np.testing.assert_array_equal(same[1].sum, sums)


@pytest.mark.usefixtures("plain_sums")
def test_the_places_and_the_table_of_the_exchange_serve_sparse_cores_too():
    rng, rows = np.random.default_rng(3), exchange.stored_rows(1)
    table, sums = rng.normal(size=(rows, WIDTH)).astype(np.float32), np.zeros(rows, np.float32)
    ids = rng.integers(0, rows, (16, 9)).astype(np.int32)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        plan = exchange.plan_exchange(rows, ids.size)
        cores = sparsecore.plan_cores(rows, ids.size // plan.shards, WIDTH, cores=2)
        options = {"rate": jnp.float32(0.1), "decay": 0.01, "apply": True}

        @jax.jit
        def step(table, state, ids):
            route, _ = exchange.route(plan, [ids])
            rows = exchange.fetch(plan, table, route)
            gradients = jnp.sin(rows)
            collected = exchange.collect(plan, route, gradients)
            wanted = rows, exchange.update_spread(plan, table, state, route, gradients, collected, **options)
            at = sparsecore.partition(cores, route.places)
            summed = sparsecore.collect(cores, at, gradients)
            made = sparsecore.update(cores, table, state, at, summed, **options)
            return wanted, (sparsecore.fetch(cores, table, at), made)

        given = placed(table, RULES_ROWS[0]), RowsState(placed(sums, RULES_ROWS[1])), placed(ids, RULES("batch", None))
        wanted, made = step(*given)
    np.testing.assert_array_equal(made[0], wanted[0])
    np.testing.assert_allclose(made[1][0], wanted[1][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made[1][1].sum, wanted[1][1].sum, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("plain_sums")
def test_ids_above_the_limit_are_counted_and_never_taken_for_zeros():
    table, sums = stored(np.random.default_rng(1))
    with jax.set_mesh(make_mesh(MeshConfig())):
        plan = sparsecore.plan_cores(ROWS, PLACES, WIDTH, 2, limit=8)
        places = np.tile(np.arange(PLACES, dtype=np.int32), plan.shards)  # 48 rows to an owner: 21 of a lane to one

        @jax.jit
        def step(table, state, places, gradients):
            at = sparsecore.partition(plan, places)
            summed = sparsecore.collect(plan, at, gradients)
            made = sparsecore.update(plan, table, state, at, summed, rate=jnp.float32(1), decay=0.0, apply=True)
            return sparsecore.fetch(plan, table, at), made, at.dropped

        given = placed(table, RULES_ROWS[0]), RowsState(placed(sums, RULES_ROWS[1])), placed(places, RULES("batch"))
        rows, made, dropped = step(*given, placed(np.ones((places.size, WIDTH), np.float32), RULES("batch", None)))
    assert dropped == plan.shards * 2 * (21 - 8)
    rows = np.asarray(rows)
    lost = np.isnan(rows).all(axis=1)
    assert lost.sum() == dropped
    np.testing.assert_array_equal(rows[~lost], table[places[~lost]])
    np.testing.assert_array_equal(made[0], table)
    np.testing.assert_array_equal(made[1].sum, sums)


def specification(plan, limit):
    """The package's description of the plan: ids of one per sample, rows dealt out by the remainder."""
    from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec

    devices = plan.shards * plan.shares
    samples = devices * plan.cores * plan.lane
    table = embedding_spec.TableSpec(
        name="table",
        vocabulary_size=plan.rows,
        embedding_dim=WIDTH,
        initializer=jax.nn.initializers.zeros,
        optimizer=embedding_spec.SGDOptimizerSpec(),
        combiner="sum",
        max_ids_per_partition=limit,
        max_unique_ids_per_partition=limit,
        suggested_coo_buffer_size_per_device=plan.cores * plan.buffer,
    )
    feature = embedding_spec.FeatureSpec(
        name="feature", table_spec=table, input_shape=(samples, 1), output_shape=(samples, WIDTH)
    )
    embedding.prepare_feature_specs_for_training([feature], devices, plan.cores)
    return feature


def preprocess(plan, lanes, limit):
    """What the package makes of `lanes: [D c lane]` of places, `plan.rows` for none."""
    from jax_tpu_embedding.sparsecore.lib.nn import embedding

    ids = lanes % plan.own * plan.owners + lanes // plan.own
    samples = np.empty(len(lanes), object)
    samples[:] = [np.array([one] if place < plan.rows else [], np.int32) for one, place in zip(ids, lanes, strict=True)]
    devices = plan.shards * plan.shares
    made, found = embedding.preprocess_sparse_dense_matmul_input(
        [samples],
        None,
        [specification(plan, limit)],
        devices,
        devices,
        num_sc_per_device=plan.cores,
        allow_id_dropping=True,
    )
    return made, found.id_drop_counters["table"]


@needs_package
@pytest.mark.parametrize(("cores", "limit"), [(4, None), (2, None), (2, 4)])
def test_lists_are_those_of_the_preprocessing_of_the_package(cores, limit):
    with jax.set_mesh(make_mesh(MeshConfig())):
        plan = sparsecore.plan_cores(ROWS, PLACES, WIDTH, cores, limit)
        places = draw_places(plan.shards, np.random.default_rng(2), distinct=False)
        if limit:
            places[:, : 4 * PLACES // 5] %= plan.own
            places.sort()
        at = jax.jit(lambda places: sparsecore.partition(plan, places))(placed(places.reshape(-1), RULES("batch")))
    padded = np.pad(places, [(0, 0), (0, cores * plan.lane - PLACES)], constant_values=ROWS)
    lanes = padded.reshape(plan.shards, plan.lane, cores).swapaxes(1, 2).reshape(-1)
    wanted, dropped = preprocess(plan, lanes, plan.limit)
    assert at.dropped == dropped
    assert (dropped > 0) == bool(limit)
    ends = np.asarray(at.ends).reshape(-1, max(plan.owners, 8))
    np.testing.assert_array_equal(ends.reshape(-1), wanted.lhs_row_pointers["table"])
    slot = np.arange(plan.buffer)[:, None]
    starts = np.append(np.zeros((len(ends), 1), int), (ends[:, :-1] + 7) // 8 * 8, axis=1)
    real = ((slot >= starts[:, None]) & (slot < ends[:, None])).any(axis=2).reshape(-1)
    assert real.sum() == (lanes < ROWS).sum() - dropped
    np.testing.assert_array_equal(np.asarray(at.ids)[real], wanted.lhs_embedding_ids["table"][real])
    np.testing.assert_array_equal(np.asarray(at.samples)[real], wanted.lhs_sample_ids["table"][real])
    assert (wanted.lhs_gains["table"][real] == 1).all()


@needs_package
def test_a_run_of_places_is_a_shard_of_the_package():
    from jax_tpu_embedding.sparsecore.utils import utils

    devices, cores = 8, 4
    table = np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)
    ids, owners = np.arange(ROWS), devices * cores
    sharded = utils.shard_emb_table(table, num_devices=devices, num_sc_per_device=cores)
    ours = np.empty_like(table)
    ours[ids % owners * (ROWS // owners) + ids // owners] = table
    np.testing.assert_array_equal(ours, sharded.reshape(ROWS, WIDTH))
    np.testing.assert_array_equal(utils.unshard_emb_table(sharded, cores), table)


@needs_package
def test_chips_with_sparse_cores_are_those_of_the_package():
    from jax_tpu_embedding.sparsecore.utils import utils

    assert utils.NUM_SC_PER_DEVICE_MAP == sparsecore.CORES


@needs_package
@pytest.mark.tpu_compiler
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compile_for_sparse_cores_and_change_the_table_in_place(program):
    row = topology_row("v5p:2x1x1", program, "rows", ROWS, WIDTH, places_per_chip=PLACES // 2, tensor=2)
    assert "problem" not in row
    assert row["cores"] == 8
    assert "SparseGather" in row["operations"]
    assert "AllToAllDynamic" in row["operations"]
    if program == "update":
        assert row["in_place"] >= row["table"]


def test_what_sparse_cores_cannot_hold_is_refused():
    with jax.set_mesh(make_mesh(MeshConfig())):
        with pytest.raises(InputError, match=r"width 12 .* use 16"):
            sparsecore.plan_cores(ROWS, PLACES, 12, 4)
        with pytest.raises(InputError, match=r"1,000 stored rows .* 32 sparse cores .* store 1,024"):
            sparsecore.plan_cores(1000, PLACES, WIDTH, 4)
    with pytest.raises(InputError, match=r"'TPU v5 lite' has no sparse cores"):
        sparsecore.cores_per_device("TPU v5 lite")


def test_a_missing_package_is_named(monkeypatch):
    sparsecore._primitives.cache_clear()
    monkeypatch.setitem(sys.modules, "jax_tpu_embedding", None)
    monkeypatch.setitem(sys.modules, "jax_tpu_embedding.sparsecore.lib.core.primitives", None)
    with pytest.raises(InputError, match=r"jax-tpu-embedding.*pip install 'tokenrec\[sparsecore\]'"):
        sparsecore._primitives()
