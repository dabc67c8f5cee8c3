"""A warm start carries rows over by value and weights by name, on any mesh."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pytest

from tests.test_train_loop import small
from tests.worlds import mesh_of
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.run_folder import create_or_check_run
from tokenrec.checkpoint.warm_start import warm_start_state
from tokenrec.config import ModelConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import task_names
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import jit_eval_step, score_split
from tokenrec.ops.tables.storage import to_storage_index
from tokenrec.state import build_model, init_state
from tokenrec.train_loop import train

# Step of the checkpoint from which the runs start.
STEP = 5
EXCLUDED = ("age", "load", "price", "vector", "seconds")
VOCABULARIES = ("item", "genre", "hour", "segment", "place", "reaction", "clicked")


def prepared(out, rows, items, every):
    """Prepare a data set whose items are named by multiples of `every`.

    An item that two data sets share has another id in each of them.
    """
    source = SyntheticSource(rows, users=60, items=items)
    source._item_ids = pa.array([f"i{every * number:06d}" for number in range(items)])
    prepare(source, out)
    return out


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "old", 3_000, 40, every=2)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    # It has fewer hours and more items than the old data set.
    return prepared(tmp_path_factory.mktemp("data") / "new", 1_200, 50, every=3)


def plain(data, **changes):
    """Make a config that compiles quickly."""
    kept = {
        "data__exclude": EXCLUDED,
        "tokens__maker": "linear",
        "model__layers": 1,
        "model__windows": (),
    }
    return small(data, **kept | changes)


def opened(config):
    dataset = open_dataset(config.data.path, config.data.exclude)
    return dataset, build_model(
        config, dataset.schema, task_names(dataset.schema, config.data)
    )


def saved(workdir, config, mesh, change=lambda model, state: state):
    """Write a run with one checkpoint, whose state `change` modifies; return the state."""
    dataset, model = opened(config)
    with jax.set_mesh(mesh), Checkpointer(workdir, keep=1) as checkpoints:
        create_or_check_run(config, dataset, workdir)
        state = change(model, init_state(model, 7))
        checkpoints.save(STEP, state, Progress())
    return model, state


def warmed(config, source, mesh):
    """Return the model, its fresh state, the warm-started state and the report."""
    config.train.warm_start = str(source)
    with jax.set_mesh(mesh):
        _, model = opened(config)
        fresh = init_state(model, config.seed)
        state, report = warm_start_state(model)
    return model, fresh, state, report


def rows_of(model, state, table):
    """`[rows, width]` of a table by id, whatever its storage."""
    stack = next(
        stack for stack in model.embedder.stacks.values() if table in stack.offsets
    )
    rows = stack.offsets[table] + np.arange(model.embedder.tables[table])
    array = np.asarray(state.tables[stack.name]).reshape(-1, stack.width)
    return array[to_storage_index(rows, stack.stored_rows) if stack.spread else rows]


@pytest.mark.parametrize(
    ("source_mesh", "source_rows", "mesh", "rows"),
    [
        # What the cases below do, without tables that are spread.
        pytest.param((1, 1, 1), 100, (1, 1, 1), 100, marks=pytest.mark.slow),
        # The longer table of the target is spread; that of the source was not.
        ((1, 1, 1), 45, (8, 1, 1), 45),
        # The source was spread; the target is replicated.
        ((8, 1, 1), 20, (1, 1, 1), 100),
    ],
)
def test_each_row_is_carried_over_by_its_value(
    old, new, tmp_path, source_mesh, source_rows, mesh, rows
):
    there, before = saved(
        tmp_path, plain(old, tokens__replicate_rows=source_rows), mesh_of(*source_mesh)
    )
    here, fresh, state, report = warmed(
        plain(new, tokens__replicate_rows=rows), tmp_path, mesh_of(*mesh)
    )
    moved = 0
    for table in VOCABULARIES:
        known = [
            value if isinstance(value, str) else int(value)
            for value in load_vocabulary(old, table)
        ]
        wanted = rows_of(here, fresh, table).copy()
        wanted[:FIRST_KNOWN] = rows_of(there, before, table)[:FIRST_KNOWN]
        values = load_vocabulary(new, table).tolist()
        for row, value in enumerate(values, FIRST_KNOWN):
            if value in known:
                wanted[row] = rows_of(there, before, table)[
                    FIRST_KNOWN + known.index(value)
                ]
                moved += FIRST_KNOWN + known.index(value) != row
        np.testing.assert_array_equal(rows_of(here, state, table), wanted)
        carried = FIRST_KNOWN + len(set(known) & set(values))
        assert report["tables"][table] == {
            "carried": carried,
            "new": len(wanted) - carried,
            "dropped": FIRST_KNOWN + len(known) - carried,
        }
    assert moved > 5
    assert report["tables"]["item"]["new"] > 5 < report["tables"]["item"]["dropped"]
    np.testing.assert_array_equal(
        rows_of(here, state, "code"), rows_of(there, before, "code")
    )
    assert state.step == 0
    assert not any(np.any(rows.sum) for rows in state.opt_state["rows"].values())
    assert {name: state.tables[name].sharding for name in state.tables} == {
        name: fresh.tables[name].sharding for name in fresh.tables
    }


def test_predictions_equal_those_of_the_source_if_nothing_grew(old, tmp_path):
    config, mesh = plain(old, tokens__replicate_rows=20), mesh_of(4, 2, 1)
    _, before = saved(tmp_path, config, mesh)
    model, _, state, report = warmed(config, tmp_path, mesh)
    assert all(
        weight == {"carried": True} or weight["entries"]["new"] == 0
        for weight in report["weights"].values()
    )
    with jax.set_mesh(mesh):
        dataset, step = opened(config)[0], jit_eval_step(model)
        scores = [
            np.concatenate(
                [
                    s.probabilities
                    for s in score_split(
                        step, one, config, dataset, "valid", mesh, limit=32
                    )
                ]
            )
            for one in (before, state)
        ]
    assert scores[0].std() > 0
    np.testing.assert_array_equal(*scores)


def test_a_deeper_model_takes_the_layers_of_the_source_stacked_or_not(old, tmp_path):
    shape = {"width": 8, "heads": 1}
    config = plain(old)
    # The layers 0 and 1 of the source are stacked, and 0 to 2 of the target.
    config.model = ModelConfig(**shape, layers=4, windows=(4,), scan=3)
    _, before = saved(tmp_path, config, mesh_of(1, 2, 1))
    config.model = ModelConfig(**shape, layers=5, windows=(4,), scan=3)
    config.data.tasks = {"buy": 1.0}
    _, fresh, state, report = warmed(config, tmp_path, mesh_of(2, 2, 1))
    weights = report["weights"]
    for layer in range(5):
        weight = weights[f"backbone/layers/{layer}/ffn/up"]
        assert weight["carried"] == (layer < 4)
        assert weight.get("reason") == (None if layer < 4 else "not in the source run")
    assert (
        weights["backbone/layers/3/ffn/up"]["window"]
        == "window 4 in the source run, full attention in this run"
    )
    up = [f"backbone/blocks/{number}/ffn/up" for number in range(3)]
    np.testing.assert_array_equal(state.params[up[0]][:2], before.params[up[0]])
    np.testing.assert_array_equal(state.params[up[0]][2], before.params[up[1]])
    np.testing.assert_array_equal(state.params[up[1]], before.params[up[2]])
    np.testing.assert_array_equal(state.params[up[2]], fresh.params[up[2]])
    assert state.params[up[0]].sharding == fresh.params[up[0]].sharding
    # The entries of the head are matched by task: of click and buy, the second is left.
    np.testing.assert_array_equal(
        state.params["head/kernel"][:, 0], before.params["head/kernel"][:, 1]
    )
    assert weights["head/bias"]["entries"] == {"carried": 1, "new": 0, "dropped": 1}


def test_a_maker_of_other_features_starts_afresh_even_with_equal_shapes(old, tmp_path):
    def without(feature):
        return plain(old, data__exclude=(feature,), tokens__maker="mlp")

    saved(tmp_path, without("load"), mesh_of(1, 1, 1))
    _, _, _, report = warmed(without("price"), tmp_path, mesh_of(1, 1, 1))
    reason = report["weights"]["history/state/output/kernel"]["reason"]
    assert "only in the source run price (dense" in reason
    assert "only in this run load (dense" in reason
    assert report["weights"]["history/action/output/kernel"]["carried"]


def test_item_vectors_are_carried_over_by_item(old, new, tmp_path):
    config = plain(
        old, data__objective="retrieval", tokens__replicate_rows=20, tokens__fused=True
    )
    config.head.negatives = 16
    mesh = mesh_of(2, 2, 1)
    there, before = saved(tmp_path, config, mesh)
    config.data.path = str(new)
    here, fresh, state, _ = warmed(config, tmp_path, mesh)

    def vectors(model, one):
        return rows_of(model, one, "catalogue_item")

    names = [np.load(data / "items" / "item_id.npy").tolist() for data in (old, new)]
    wanted = vectors(here, fresh).copy()
    for row, name in enumerate(names[1]):
        if name in names[0]:
            wanted[row] = vectors(there, before)[names[0].index(name)]
    assert 5 < len(set(names[0]) & set(names[1])) < len(names[1]) - 5
    np.testing.assert_array_equal(vectors(here, state), wanted)


def test_features_of_item_vectors_are_carried_over_by_value(old, new, tmp_path):
    config = plain(old, data__objective="retrieval", tokens__fused=True)
    config.head.negatives = 16
    config.head.item_features = ("genre",)
    mesh = mesh_of(1, 1, 1)
    there, before = saved(tmp_path, config, mesh)
    config.data.path = str(new)
    here, fresh, state, _ = warmed(config, tmp_path, mesh)
    known, values = (
        ["missing", "unknown", *load_vocabulary(data, "genre").tolist()]
        for data in (old, new)
    )
    wanted = rows_of(here, fresh, "output_genre").copy()
    for row, value in enumerate(values):
        if value in known:
            wanted[row] = rows_of(there, before, "output_genre")[known.index(value)]
    np.testing.assert_array_equal(rows_of(here, state, "output_genre"), wanted)
    assert len(set(known) & set(values)) > 2


def test_a_source_that_does_not_fit_is_refused(old, new, tmp_path):
    mesh, run = mesh_of(1, 1, 1), tmp_path / "run"
    moved = tmp_path / "moved"
    shutil.copytree(old, moved)
    saved(run, plain(moved, data__tasks={"click": 1.0}), mesh)
    with pytest.raises(
        InputError, match=r"train\.warm_start='.*none': workdir '.*none' holds no run"
    ):
        warmed(plain(new), tmp_path / "none", mesh)
    with pytest.raises(
        InputError,
        match=r"checkpoint '3' does not exist; use best, latest, or one of \[5\]",
    ):
        warmed(plain(new, train__warm_start_checkpoint="3"), run, mesh)
    other = {
        "data__tasks": {"buy": 1.0},
        "tokens__embedding_dim": 6,
        "model__width": 16,
    }
    with pytest.raises(
        InputError,
        match=r"no weights of that run match this one: "
        r".*width 4 in the source run, 6 in this run",
    ):
        warmed(plain(new, **other), run, mesh)

    shutil.rmtree(moved)
    with pytest.raises(
        InputError, match=r"not a prepared data set.*train\.warm_start_data"
    ):
        warmed(plain(new), run, mesh)
    # The data set is prepared again in the same place.
    shutil.copytree(new, moved)
    with pytest.raises(
        InputError,
        match=r"not the data set that it was trained on.*train\.warm_start_data",
    ):
        warmed(plain(new), run, mesh)
    *_, report = warmed(plain(new, train__warm_start_data=str(old)), run, mesh)
    assert report["data"] == str(old)


def test_a_run_starts_warm_once_and_reports_it(old, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    saved(first, plain(old), mesh_of(1, 1, 1))
    config = plain(old, optim__steps=4, train__stop_at=1, train__eval_split="")
    config.train.warm_start = str(tmp_path / "own")
    with pytest.raises(InputError, match="is the --workdir itself"):
        train(config, tmp_path / "own", progress=False)
    config.train.warm_start = str(first)
    train(config, second, progress=False)
    report = json.loads((second / "warm_start.json").read_text())
    assert (report["step"], report["checkpoint"]) == (STEP, "best")
    errors = capsys.readouterr().err
    assert f"warm start from {first} at step {STEP} (best)" in errors
    assert "dense weights:" in errors

    shutil.rmtree(first)
    config.train.stop_at = 2
    assert train(config, second, progress=False)["step"] == 2
    assert "warm start" not in capsys.readouterr().err


def test_a_branch_begins_fresh_beside_weights_that_are_carried_over(old, tmp_path):
    mesh = mesh_of(1, 1, 1)
    _, before = saved(tmp_path / "plain", plain(old), mesh)
    # A branch of the same kind is carried over, and one of another kind is not, though
    # its weights have the same names.
    _, meant = saved(tmp_path / "mean", plain(old, model__branch="mean"), mesh)
    for source, branch, carried in (
        ("plain", "mean", False),
        ("mean", "mean", True),
        ("mean", "din", False),
    ):
        config = plain(old, model__branch=branch)
        _, fresh, state, _ = warmed(config, tmp_path / source, mesh)
        origin = before if source == "plain" else meant
        for name in ("backbone/norm/scale", "head/kernel"):
            assert np.array_equal(state.params[name], origin.params[name])
        kernel = "branch/deep/hidden/1/kernel"
        assert np.array_equal(
            state.params[kernel], (meant if carried else fresh).params[kernel]
        )
