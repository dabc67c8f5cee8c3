"""Runs whose tables were stored as plain rows go on with packed lines, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.test_warm_start import opened, plain, prepared, rows_of, warmed
from tests.worlds import mesh_of
from tokenrec.checkpoint import table_layout
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_folder import create_or_check_run
from tokenrec.checkpoint.table_layout import to_model_layout, with_saved_layout
from tokenrec.ops.tables import packed
from tokenrec.sharding import RULES
from tokenrec.state import TrainState, abstract_state, init_state

STEP = 5


def leaves_with_rows(model, state):
    """All arrays of a state, tables as plain rows."""
    tables = {
        name: np.asarray(state.tables[name]).reshape(-1, stack.width)
        for name, stack in model.embedder.stacks.items()
    }
    rest = jax.tree.leaves((state.step, state.params, state.opt_state, tables))
    return [np.asarray(leaf) for leaf in rest]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "old", 1_200, 40, every=2)


@pytest.fixture(scope="module")
def earlier_run(data, tmp_path_factory):
    """A run on disk whose spread tables are stored as plain rows."""
    workdir = tmp_path_factory.mktemp("runs") / "earlier"
    config = plain(data, tokens__replicate_rows=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            packed, "packed_shape", lambda rows, width, devices: (rows, width)
        )
        dataset, model = opened(config)
        with jax.set_mesh(mesh_of(8, 1, 1)), Checkpointer(workdir, keep=1) as saved:
            create_or_check_run(config, dataset, workdir)
            state = init_state(model, 7)
            # AdaGrad sums that differ from row to row.
            state = jax.tree.map(
                lambda leaf: leaf + jnp.arange(leaf.size).reshape(leaf.shape), state
            )
            saved.save(STEP, state, Progress())
    spread = [s for s in model.embedder.stacks.values() if s.spread]
    assert all(state.tables[s.name].shape == (s.stored_rows, s.width) for s in spread)
    return workdir, config, model, state


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 4, 1)])
def test_an_earlier_run_is_resumed_and_read_bit_for_bit(earlier_run, sizes):
    workdir, _, model, earlier = earlier_run
    expected = leaves_with_rows(model, earlier)
    with jax.set_mesh(mesh_of(*sizes)):
        abstract = abstract_state(model)
        with Checkpointer(workdir, keep=1) as checkpoints:
            step, resumed, _ = checkpoints.restore(abstract)
        with CheckpointReader(workdir) as checkpoints:
            _, loaded = checkpoints.load_state("latest", abstract)
    assert step == STEP
    for state in (resumed, loaded):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding), state) == (
            jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding), abstract)
        )
        for found, wanted in zip(leaves_with_rows(model, state), expected, strict=True):
            assert np.array_equal(found, wanted)
    assert any(table.shape[1] == packed.LANES for table in resumed.tables.values())


def test_a_run_starts_warm_from_an_earlier_one(earlier_run):
    workdir, config, model, earlier = earlier_run
    here, _, state, _ = warmed(config, workdir, mesh_of(2, 4, 1))
    for table in model.embedder.tables:
        found, expected = rows_of(here, state, table), rows_of(model, earlier, table)
        assert np.array_equal(found, expected)


def test_lines_that_the_devices_cannot_share_are_read_too():
    """Twelve lines on eight devices: four parts, each on two devices, then eight."""
    saved, wanted = (12, 128), (96, 16)
    numbers = np.arange(96 * 16, dtype=np.float32)
    mesh = mesh_of(2, 2, 2)

    def state(table):
        return TrainState(jnp.int32(0), {}, {"t": table}, {})

    leaf = jax.ShapeDtypeStruct(
        wanted, jnp.float32, sharding=jax.NamedSharding(mesh, RULES("rows", None))
    )
    described = with_saved_layout(
        state(leaf), {"tables": {"t": jax.ShapeDtypeStruct(saved, jnp.float32)}}
    )
    sharding = described.tables["t"].sharding
    assert described.tables["t"].shape == saved
    loaded = state(jax.device_put(numbers.reshape(saved), sharding))
    table = to_model_layout(loaded, state(leaf)).tables["t"]
    assert table.sharding == leaf.sharding
    assert np.array_equal(np.asarray(table), numbers.reshape(wanted))


def test_another_table_is_not_taken_for_another_layout():
    assert not table_layout._is_other_layout((96, 16), (96, 16))
    assert not table_layout._is_other_layout((96, 16), (13, 128))
    assert not table_layout._is_other_layout((96, 16), (48, 32))
