"""The public API: its names, a run that is loaded, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

import tokenrec
from tests.checkpoint.test_warm_start import saved
from tokenrec import (
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.sharding import make_mesh


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("api") / "data"
    tokenrec.prepare("synthetic", out, rows=3_000, users=40, items=24)
    return out


def config_of(data: Path, **tokens: object) -> Config:
    return Config(
        data=DataConfig(
            path=str(data),
            paradigm="uc",
            events=16,
            overlap=4,
            batch_size=8,
            eval_batch_size=16,
        ),
        # It compiles in less time than the default.
        tokens=TokensConfig(embedding_dim=4, **{"maker": "linear"} | tokens),  # type: ignore[arg-type]
        model=ModelConfig(width=8, heads=1, layers=2, windows=(4,)),
        optim=OptimConfig(steps=4, warmup_steps=1),
        train=TrainConfig(log_every=2),
    )


@pytest.fixture(scope="module")
def workdir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    config = config_of(data)
    config.train.log_states = True
    summary = tokenrec.train(config, folder, progress=False)
    assert summary["step"] == 4
    return folder


def test_a_loaded_run_evaluates_predicts_and_steps(workdir: Path) -> None:
    run = tokenrec.load(workdir)
    assert run.config == tokenrec.load_config(str(workdir / "config.json"))
    report = run.evaluate("valid", baselines=True)
    whole = tokenrec.evaluate(workdir, "valid", baselines=True)
    assert report | {"checkpoint": "best"} == whole
    table = run.predict("valid")
    assert isinstance(table, pa.Table)
    assert table.num_rows == report["tasks"]["click"]["examples"] + sum(
        label is None for label in table["label_click"].to_pylist()
    )
    batch = next(run.batches("valid"))
    probabilities = run.step(batch)
    assert probabilities.shape == (*batch.weight.shape, 2)
    scored = probabilities[batch.weight > 0]
    assert np.isin(scored[:, 0], table["score_click"].to_numpy()).all()


def test_predict_writes_what_a_loaded_run_returns(
    workdir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.parquet"
    rows = tokenrec.predict(workdir, "valid", out)
    written = pa.parquet.read_table(out)
    assert written.num_rows == rows
    assert written.equals(tokenrec.load(workdir).predict("valid"))


@pytest.mark.parametrize("spread", [False, True])
def test_item_vectors_are_the_rows_of_the_items_whatever_their_order(
    data: Path, workdir: Path, tmp_path: Path, spread: bool
) -> None:
    """Spread tables are stored in another order; the vectors are those of one device."""
    if spread:
        workdir = tmp_path
        config = config_of(data, replicate_rows=1)
        # Fewer spread tables compile in less time.
        config.data.exclude = ("interests", "genre", "vector", "code", "place", "hour")
        # Its weights are random: nothing is trained.
        saved(workdir, config, make_mesh(config.mesh))
    run = tokenrec.load(workdir)
    vectors = run.item_vectors()
    assert vectors["item_id"].to_pylist() == run.dataset.catalogue.item_id.tolist()
    found = np.stack(vectors["vector"].to_numpy(zero_copy_only=False))
    assert found.shape == (24, 4)
    # Looked up as the model does, in a batch whose targets are the whole catalogue.
    batch = next(run.batches("valid"))
    with jax.set_mesh(run.mesh):
        expected = lookup_of_items(run, batch)
    np.testing.assert_array_equal(found, expected)


def lookup_of_items(run: tokenrec.LoadedRun, batch: object) -> np.ndarray:
    """`[V, d]`, embeddings of the item feature, looked up through state features."""
    from tokenrec.data.schema import columns
    from tokenrec.sharding import to_devices, to_host

    model, state = run._run.model, run._run.state
    schema = model.schema
    start, _ = columns(schema.state).ids["item"]
    catalogue_start, _ = columns(schema.group("catalogue")).ids["item"]
    ids = batch.state.ids.copy()  # type: ignore[attr-defined]
    flat = ids[..., start].reshape(-1)
    wanted = run.dataset.catalogue.ids[:, catalogue_start]
    flat[: len(wanted)] = wanted
    ids[..., start] = flat.reshape(ids.shape[:-1])
    changed = batch._replace(state=batch.state._replace(ids=ids))  # type: ignore[attr-defined]
    entities = model.embedder.look_up(state.tables, to_devices(changed, run.mesh))
    values = np.asarray(to_host(entities["state"].values["item"]))
    return values.reshape(-1, values.shape[-1])[: len(wanted)]


def test_a_source_is_named_or_an_object(tmp_path: Path) -> None:
    tokenrec.prepare(SyntheticSource(600), tmp_path / "object")
    with pytest.raises(
        InputError, match=r"source='synthetik'.*did you mean 'synthetic'"
    ):
        tokenrec.prepare("synthetik", tmp_path / "x")
    with pytest.raises(InputError, match=r"source='synthetic': .*row"):
        tokenrec.prepare("synthetic", tmp_path / "x", row=600)
    with pytest.raises(InputError, match="rows: arguments of a named source"):
        tokenrec.prepare(SyntheticSource(600), tmp_path / "x", rows=600)
    assert not (tmp_path / "x").exists()
    assert tokenrec.open_dataset(tmp_path / "object").splits


def test_every_public_name_is_there_and_importing_loads_no_jax() -> None:
    for name in tokenrec.__all__:
        assert getattr(tokenrec, name) is not None
        assert name in dir(tokenrec)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = tokenrec.tarin
    program = (
        "import sys, tokenrec; tokenrec.Config; tokenrec.load_config; "
        "print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_training_after_the_submodules_are_imported_is_still_a_function() -> None:
    import tokenrec.train_loop

    assert callable(tokenrec.train)
    assert callable(tokenrec.compile)
    assert callable(tokenrec.describe)
