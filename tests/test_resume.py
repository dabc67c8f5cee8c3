"""What a run keeps over a stop besides its weights, and what a stop may not cut short."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_train_loop import small
from tokenrec import active_run
from tokenrec.checkpoint import checkpointer
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError, Stopped
from tokenrec.runtime.watchdog import Watchdog
from tokenrec.train_loop import train

# As in test_train_loop, so that its compiled programs serve here too.
pytestmark = pytest.mark.usefixtures("lone_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synthetic"
    # As in test_train_loop, so that its compiled programs serve here too.
    prepare(SyntheticSource(6_000, users=60, items=40), out)
    return out


def evaluated(workdir: Path) -> list[int]:
    """Steps of the evaluations in the log."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["step"] for record in records if "valid/macro_auc" in record]


def test_patience_and_the_best_value_are_kept_over_a_restart(
    data: Path, tmp_path: Path
) -> None:
    # Nothing is learned, so that the first evaluation stays the best one.
    config = small(data, optim__steps=50, train__eval_every=1, train__patience=4)
    config.optim.learning_rate = config.optim.table_learning_rate = 1e-12
    whole = train(config, tmp_path / "whole", progress=False)
    assert 4 < whole["step"] < 50
    config.train.stop_at = whole["step"] - 1
    train(config, tmp_path / "parts", progress=False)
    config.train.stop_at = 0
    parts = train(config, tmp_path / "parts", progress=False)
    kept = ("step", "best", "best_step")
    assert {name: parts[name] for name in kept} == {name: whole[name] for name in kept}


def test_another_metric_begins_a_new_comparison_and_says_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(data, optim__steps=8, train__eval_every=2, train__keep=1)
    config.train.stop_at = 4
    train(config, tmp_path, progress=False)
    config.train.stop_at = 0
    config.train.best_metric = "loss"
    summary = train(config, tmp_path, progress=False)
    said = capsys.readouterr().err
    assert "chosen by macro_auc on valid, and is now chosen by loss on valid" in said
    # The step of the restart takes part.
    assert evaluated(tmp_path) == [2, 4, 6, 8]
    assert summary["best"] < 0
    with CheckpointReader(tmp_path) as checkpoints:
        assert summary["best_step"] == checkpoints.best_step
        assert checkpoints.steps == sorted({summary["best_step"], 8})


def test_sigterm_leaves_an_evaluation_which_the_next_start_makes_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_calls = []
    make = active_run.make_evaluator

    def make_stopped(*setup: Any) -> Callable[..., Any]:
        evaluate = make(*setup)

        def evaluate_and_stop(
            state: Any, split: str, samples: int, between: Callable[[], None]
        ) -> Any:
            def stop_at_the_second_batch() -> None:
                between_calls.append(1)
                if len(between_calls) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                between()

            return evaluate(state, split, samples, stop_at_the_second_batch)

        return evaluate_and_stop

    phases: list[str] = []
    enter_phase = Watchdog.enter_phase

    def observed(watchdog: Watchdog, phase: str) -> None:
        phases.append(phase)
        enter_phase(watchdog, phase)

    monkeypatch.setattr(Watchdog, "enter_phase", observed)
    monkeypatch.setattr(active_run, "make_evaluator", make_stopped)
    config = small(data, optim__steps=8, train__eval_every=4)
    with pytest.raises(Stopped, match="SIGTERM: stopped at step 4; checkpoint saved"):
        train(config, tmp_path, progress=False)
    assert len(between_calls) == 2
    # A long evaluation is no hang: each batch begins a new phase.
    assert phases.count("step 4: evaluation") == 2
    assert evaluated(tmp_path) == []
    with CheckpointReader(tmp_path) as checkpoints:
        assert not checkpoints.progress(4).assessed

    monkeypatch.setattr(active_run, "make_evaluator", make)
    train(config, tmp_path, progress=False)
    assert evaluated(tmp_path) == [4, 8]


def test_a_checkpoint_counts_the_skipped_steps_that_are_not_logged_yet(
    data: Path, tmp_path: Path
) -> None:
    config = small(
        data,
        optim__spike_norm=1.0001,
        optim__max_skipped=100,
        train__save_every=2,
    )
    config.train.keep = 9
    # A seed whose gradients grow in some steps.
    config.seed = 5
    skipped = {}
    for log_every in (1, 100):
        config.train.log_every = log_every
        workdir = tmp_path / str(log_every)
        train(config, workdir, progress=False)
        with CheckpointReader(workdir) as checkpoints:
            skipped[log_every] = [checkpoints.progress(s).skipped for s in (2, 4, 6, 8)]
    assert skipped[1] == skipped[100]
    assert skipped[1][1] > 0


def test_a_resumed_run_with_the_data_of_another_schema_is_refused(
    data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    prepare(SyntheticSource(4_000, users=60, items=41), other)
    config = small(data, train__stop_at=4)
    train(config, tmp_path / "run", progress=False)
    config.data.path = str(other)
    with pytest.raises(InputError, match="--data"):
        train(config, tmp_path / "run", progress=False)


def test_a_run_goes_on_when_a_save_fails_and_saves_at_the_next_step(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = checkpointer.ocp.save_checkpointables_async
    failing = [True]

    def save(*arguments: Any, **options: Any) -> Any:
        if failing and failing.pop():
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)

    monkeypatch.setattr(checkpointer.ocp, "save_checkpointables_async", save)
    monkeypatch.setattr(checkpointer, "_RETRY_SECONDS", 0.0)
    config = small(data, train__save_every=4, train__eval_every=0)
    config.train.keep = 9
    assert train(config, tmp_path, progress=False)["step"] == 8
    assert "checkpoint 4 could not be written" in capsys.readouterr().err
    with CheckpointReader(tmp_path) as checkpoints:
        assert checkpoints.steps == [5, 8]
