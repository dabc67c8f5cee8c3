"""The loop on real files: resume, best checkpoint, early stop, bad steps, and that it learns."""

import contextlib
import json
import os
import signal
import threading

import jax
import numpy as np
import pyarrow as pa
import pytest

from tests.counted import count_rows
from tests.lone_device import lone_device
from tokenrec import active_run, run_setup
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_folder import (
    create_or_check_run,
    load_run_config,
    open_model,
    open_run,
)
from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import steps_per_epoch
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError, NonFiniteError, Stopped
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.planner.mfu import GPU_PEAK_FLOPS
from tokenrec.sharding import make_mesh
from tokenrec.train_loop import train

# Features that are left out: four of ids remain.
FEW = (
    *("interests", "load", "price", "vector", "code", "seconds"),
    *("age", "genre", "place", "reaction"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "synthetic"
    prepare(SyntheticSource(6_000, users=60, items=40), out)
    return out


@pytest.fixture
def all_devices():
    """For tests that need more than one device."""


@pytest.fixture(autouse=True)
def devices(request):
    """One device, whose programs compile in less time than those of eight."""
    alone = "all_devices" not in request.fixturenames
    with lone_device() if alone else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def no_thread_stays():
    """However a run ends, its input, its checkpoints and its watchdog end with it."""
    before = set(threading.enumerate())
    yield
    started = [
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name != "tqdm_monitor"
    ]
    for thread in started:
        thread.join(
            timeout=30
        )  # the helpers of a closed event loop are told to end, and nobody waits until they have
    assert [thread.name for thread in started if thread.is_alive()] == []


def small(data, **changes) -> Config:
    """A config with few features, which compiles quickly."""
    config = Config(
        data=DataConfig(
            path=str(data),
            paradigm="uc",
            events=16,
            overlap=4,
            batch_size=8,
            eval_batch_size=64,
            exclude=FEW,
        ),
        tokens=TokensConfig(embedding_dim=4, maker="linear"),
        model=ModelConfig(width=8, heads=1, layers=1, windows=(), dropout=0.1),
        optim=OptimConfig(steps=8, warmup_steps=2),
        train=TrainConfig(log_every=4),
    )
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def leaves(workdir):
    config = load_run_config(workdir, None)
    with jax.set_mesh(make_mesh(config.mesh)):
        return [
            np.asarray(x)
            for x in jax.tree.leaves(open_run(workdir, "latest", None).state)
        ]


def losses_logged(workdir):
    lines = [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def steps_logged(workdir):
    return list(losses_logged(workdir))


# Six steps an epoch: the run has eight, and the tables stand still from the seventh.
TABLE_OPTIONS = {
    "data__batch_size": 64,
    "optim__steps": 0,
    "optim__epochs": 4 / 3,
    "tokens__id_dropout": 0.2,
    "tokens__min_count": 120,
    "tokens__rare_buckets": 2,
    "optim__table_rates": (1.0, 0.0),
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param(TABLE_OPTIONS, id="tables"),
    ],
)
def test_stop_and_resume_equals_an_undisturbed_run_bit_for_bit(
    options, data, tmp_path, all_devices
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small(data, **options), whole, progress=False)
    train(small(data, train__stop_at=4, **options), parts, progress=False)
    train(small(data, **options), parts, progress=False)
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        assert np.array_equal(a, b)
    assert steps_logged(parts) == steps_logged(whole) == [4, 8]
    if not options:
        return
    # Whoever opens the run maps the ids that it mapped.
    _, dataset = open_model(parts, None)
    read = dataset.rare_ids.values()
    assert sum((rows != np.arange(len(rows))).sum() for rows in read) > 5
    assert any(len(np.unique(rows[rows != np.arange(len(rows))])) > 1 for rows in read)
    (parts / "id_counts.npz").unlink()
    with pytest.raises(InputError, match=r"id_counts.npz' cannot be read"):
        open_model(parts, None)


# tests/test_elastic.py compares the rows of each step too, over fewer steps.
@pytest.mark.slow
def test_no_sample_is_lost_or_repeated_when_half_of_the_devices_go_on(
    data, tmp_path, monkeypatch, all_devices
):
    config = small(data, train__log_every=1)
    dataset = open_dataset(data)
    config.optim.steps = steps = steps_per_epoch(dataset, config.data)
    whole, parts = [], []
    monkeypatch.setattr(active_run, "train_batches", count_rows(whole.append))
    train(config, tmp_path / "whole", progress=False)
    monkeypatch.setattr(active_run, "train_batches", count_rows(parts.append))
    config.train.stop_at = steps // 2
    train(config, tmp_path / "parts", progress=False)
    config.train.stop_at = 0
    monkeypatch.setattr(
        run_setup,
        "make_run_mesh",
        lambda config: make_mesh(config.mesh, jax.devices()[:4]),
    )
    train(config, tmp_path / "parts", progress=False)
    assert len(parts) == steps > 20
    assert parts == whole  # step by step, whatever device reads which of them
    read = [row for rows in parts for row in rows]
    assert len(read) == len(set(read)) > 0.9 * dataset.chunk_lengths("train").sum()
    # Sums over devices have another order: measured 9.9e-8 over 52 steps.
    assert losses_logged(tmp_path / "parts") == pytest.approx(
        losses_logged(tmp_path / "whole"), rel=1e-6
    )


def test_sigterm_stops_after_the_step_saved_and_the_run_goes_on_bit_for_bit(
    data, tmp_path, monkeypatch
):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    taken = []

    def send_at_the_third(rows):
        taken.append(rows)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    # The signal comes while the loop waits for the batch of its third step. With as many steps as the other tests have,
    # the step is their compiled program.
    monkeypatch.setattr(active_run, "train_batches", count_rows(send_at_the_third))
    config = small(data, train__log_every=1)
    with pytest.raises(
        Stopped, match=r"SIGTERM: stopped at step 3; checkpoint saved; rerun"
    ):
        train(config, parts, progress=False)
    assert len(taken) == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with CheckpointReader(parts) as checkpoints:
        assert checkpoints.steps == [3]
    assert steps_logged(parts) == [1, 2, 3]
    monkeypatch.undo()
    for workdir in (parts, whole):
        train(
            small(data, train__log_every=1, train__stop_at=5), workdir, progress=False
        )
    assert steps_logged(parts) == [1, 2, 3, 4, 5]
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        assert np.array_equal(a, b)


def test_bad_steps_are_skipped_and_counted_up_to_a_limit_over_a_restart(
    data, tmp_path, capsys
):
    # With so low a bar some of eight steps are spikes.
    config = small(
        data,
        optim__spike_norm=1.0001,
        optim__max_skipped=100,
        train__stop_at=6,
        train__log_every=1,
    )
    # A seed whose gradients grow in some steps.
    config.seed = 5
    first = train(config, tmp_path, progress=False)["skipped"]
    config.train.stop_at = 0
    total = train(config, tmp_path, progress=False)["skipped"]
    assert 0 < first < total < 8
    assert f"{total} of optim.max_skipped=100" in capsys.readouterr().err
    config.optim.max_skipped = total - 1
    with pytest.raises(
        NonFiniteError,
        match=r"more than optim\.spike_norm=1\.0001 times its mean.*max_skipped",
    ):
        train(config, tmp_path / "again", progress=False)


def test_best_checkpoint_survives_later_ones_and_is_what_evaluate_takes(data, tmp_path):
    config = small(
        data, optim__steps=8, train__eval_every=2, train__save_every=2, train__keep=1
    )
    config.train.log_states = True
    with pytest.raises(
        ValueError, match=r"train\.log_states=True and make_state_logger"
    ):
        train(config, tmp_path, progress=False)

    def make_state_logger(*_):
        return lambda state: {"rank": {"layer_0": float(state.step)}}

    summary = train(
        config, tmp_path, progress=False, make_state_logger=make_state_logger
    )
    values, watched = {}, {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "valid/macro_auc" in record:
            values[record["step"]] = record["valid/macro_auc"]
        if "rank/layer_0" in record:
            watched[record["step"]] = record["rank/layer_0"]
    assert watched == {2: 2.0, 4: 4.0, 6: 6.0, 8: 8.0}
    best = max(values, key=lambda step: values[step])
    assert summary["best_step"] == best
    assert summary["best_evaluation"]["macro_auc"] == values[best]
    with CheckpointReader(tmp_path) as checkpoints:
        assert set(checkpoints.steps) == {best, 8}
    report = evaluate_run(tmp_path, "valid", "best", None)
    assert report["step"] == best
    assert report["macro_auc"] == pytest.approx(values[best], abs=1e-6)


def test_patience_stops_the_run(data, tmp_path):
    config = small(
        data,
        optim__steps=50,
        train__eval_every=1,
        train__patience=2,
        optim__learning_rate=1e-12,
    )
    config.optim.table_learning_rate = 1e-12
    summary = train(config, tmp_path, progress=False)
    assert summary["step"] < 50
    again = train(config, tmp_path, progress=False)
    assert again["step"] == summary["step"]  # a run that has ended stays as it is
    config.train.patience = 4
    assert summary["step"] < train(config, tmp_path, progress=False)["step"] < 50


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("vaild", "is no split of the data set .*; did you mean 'valid'"),
        ("none", "known: test, train, valid"),
    ],
)
def test_an_evaluation_on_a_split_that_does_not_exist_is_refused(
    split, reason, data, tmp_path
):
    config = small(data, train__eval_split=split)
    with pytest.raises(
        InputError, match=rf"train\.eval_split='{split}' .*{reason}.*eval_split=''"
    ):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_without_a_split_to_evaluate_a_run_has_no_best_and_once_finished_it_stays(
    data, tmp_path
):
    config = small(data, train__eval_split="", train__eval_every=2)
    summary = train(config, tmp_path, progress=False)
    assert (summary["step"], summary["best_step"], summary["evaluation"]) == (
        8,
        -1,
        None,
    )
    before = leaves(tmp_path)
    assert train(config, tmp_path, progress=False)["step"] == 8
    # A run may be resumed with evaluations, which change no step.
    assert train(small(data), tmp_path, progress=False)["step"] == 8
    assert all(
        np.array_equal(a, b) for a, b in zip(before, leaves(tmp_path), strict=True)
    )


def test_a_bad_step_stops_the_run_and_names_step_and_rows(data, tmp_path):
    config = small(
        data, optim__learning_rate=1e30, optim__clip_norm=0.0, train__save_every=1
    )
    config.optim.warmup_steps = 0
    with pytest.raises(NonFiniteError, match=r"step \d+: .* rows of train: \d+"):
        train(config, tmp_path, progress=False)
    assert all(np.isfinite(x).all() for x in leaves(tmp_path))


def test_a_stop_signal_ends_the_planning_of_the_input(data, tmp_path, monkeypatch):
    """It must not wait for the end: planning a large split takes minutes."""
    phases = []
    usual = active_run.Watchdog.enter_phase

    def enter_phase(watchdog, phase):
        phases.append(phase)
        usual(watchdog, phase)
        if "window 2 of" in phase:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(active_run.Watchdog, "enter_phase", enter_phase)
    config = small(data, data__window_rows=500)
    with pytest.raises(
        Stopped, match=r"SIGTERM: stopped at step 0; there was nothing to save yet"
    ) as stopped:
        train(config, tmp_path, progress=False)
    assert stopped.value.signal == signal.SIGTERM
    planning = [phase for phase in phases if phase.startswith("planning")]
    assert planning[-1].startswith("planning the split 'train': window 2 of ")
    assert not planning[-1].endswith(" of 2"), "there are windows left"
    monkeypatch.undo()
    assert train(config, tmp_path, progress=False)["step"] == 8


def test_another_config_in_the_same_folder_is_refused_with_the_difference(
    data, tmp_path
):
    train(small(data, train__stop_at=2), tmp_path, progress=False)
    other = small(data, train__stop_at=2, model__width=16)
    with pytest.raises(InputError, match=r"model\.width: 8 -> 16"):
        train(other, tmp_path, progress=False)


def test_half_a_config_and_a_workdir_that_is_a_file_are_refused(data, tmp_path):
    create_or_check_run(small(data), open_dataset(data), tmp_path)
    whole = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(
        InputError,
        match=r"config\.json': the config is not JSON.*each checkpoint has a copy",
    ):
        train(small(data), tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"--workdir .*file' cannot be created: File exists"
    ):
        train(small(data), tmp_path / "file", progress=False)


def test_another_data_set_is_refused(data, tmp_path):
    train(small(data, train__stop_at=2), tmp_path / "run", progress=False)
    other = tmp_path / "other"
    prepare(SyntheticSource(2_000, users=30, items=20), other)
    with pytest.raises(InputError, match="--data"):
        evaluate_run(tmp_path / "run", "valid", "latest", other)


def test_batch_sizes_that_the_devices_cannot_share_are_refused(
    data, tmp_path, all_devices
):
    with pytest.raises(InputError, match="8 devices"):
        train(small(data, data__batch_size=12), tmp_path, progress=False)


# tests/evaluation/test_label_kinds_run.py trains a small model that beats constants.
@pytest.mark.slow
def test_training_learns_most_of_what_can_be_known(tmp_path):
    source = SyntheticSource(40_000, users=200, items=100)
    prepare(source, tmp_path / "data")
    config = small(
        tmp_path / "data",
        optim__steps=150,
        data__events=32,
        data__overlap=8,
        data__batch_size=32,
    )
    config.data.exclude, config.tokens.maker = (), "mlp"
    config.model = ModelConfig(width=32, heads=2, layers=2, windows=(8,))
    (
        config.tokens.embedding_dim,
        config.optim.learning_rate,
        config.optim.table_learning_rate,
    ) = 16, 3e-3, 0.2
    report = train(config, tmp_path / "run", progress=False)["evaluation"]
    best = source.best_auc("click", "valid")
    # Nothing beats the true probabilities by more than sampling noise; measured .72 of .82.
    assert 0.5 + 0.6 * (best - 0.5) < report["tasks"]["click"]["auc"] < best + 0.01


def test_logs_hold_what_a_run_is_watched_by(data, tmp_path, monkeypatch):
    # No peak is known of a CPU: one is given, so that the path of a GPU or TPU runs.
    monkeypatch.setitem(GPU_PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    config = small(data, train__log_every=2, train__profile_steps=2)
    train(config, tmp_path, progress=False)
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    trained = [line for line in lines if "train/loss" in line]
    # The first line holds a step that compiled, which counts for no rate.
    for name in ("learning_rate", "grad_norm", "examples_per_second"):
        assert all(f"train/{name}" in line for line in trained)
    last = trained[-1]
    assert 0 <= last["train/input_seconds"] <= last["train/step_seconds"]
    assert 0 < last["train/mfu"] < 1
    assert last["train/learning_rate"] < max(x["train/learning_rate"] for x in trained)
    tables = [line for line in lines if any(n.startswith("tables/") for n in line)]
    assert [line["step"] for line in tables] == [8]
    assert any(n.endswith("/trained_rows") and 0 < v <= 1 for n, v in tables[0].items())
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "tensorboard" / "result").glob("events.*"))


def test_a_line_of_skipped_steps_alone_says_how_many(data, tmp_path):
    config = small(
        data,
        optim__learning_rate=1e30,
        optim__clip_norm=0.0,
        optim__max_skipped=100,
        train__log_every=1,
    )
    config.optim.warmup_steps = 0
    config.train.eval_split = ""  # scores of such weights have no metrics
    skipped = train(config, tmp_path, progress=False)["skipped"]
    lines = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    empty = [x for x in lines if "train/learning_rate" in x and "train/loss" not in x]
    assert skipped
    assert [x["train/skipped"] for x in empty] == list(range(1, skipped + 1))


def test_an_undefined_metric_is_said_once(tmp_path, capsys):
    # The source of the other tests, and all of its tasks: the step is their compiled program.
    source = SyntheticSource(6_000, users=60, items=40)
    batches = []
    for batch in source.rows():
        for at, name in enumerate(batch.schema.names):
            if name.startswith("label_"):
                ones = pa.array([1] * batch.num_rows, batch.schema.field(at).type)
                batch = batch.set_column(at, name, ones)
        batches.append(batch)
    source.rows = lambda: iter(batches)
    prepare(source, tmp_path / "data")
    capsys.readouterr()
    config = small(tmp_path / "data", train__eval_every=4)
    summary = train(config, tmp_path / "run", progress=False)
    assert summary["best_step"] == -1
    said = capsys.readouterr().err
    assert said.count("macro_auc on valid is undefined") == 1
    assert "labels of one class alone" in said
