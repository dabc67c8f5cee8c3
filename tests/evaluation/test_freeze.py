"""Evaluation with frozen histories: of a run, of the baselines, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import tokenrec
from tests.data.batches import NIO, UC, memory_data, replaced
from tokenrec import (
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.run_folder import create_or_check_run
from tokenrec.data.dataset import open_dataset
from tokenrec.data.frozen_heads import check_frozen_heads
from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.pipeline import eval_batches, task_names
from tokenrec.evaluation.baselines import split_baselines
from tokenrec.evaluation.freeze import check_freeze, freeze_time
from tokenrec.sharding import make_mesh
from tokenrec.state import build_model, init_state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("freeze") / "data"
    tokenrec.prepare("synthetic", out, rows=3_000, users=40, items=24)
    return out


@pytest.fixture(scope="module")
def workdir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("freeze") / "run"
    config = Config(
        data=DataConfig(
            path=str(data),
            paradigm="uc",
            events=8,
            overlap=4,
            batch_size=16,
            eval_batch_size=64,
        ),
        tokens=TokensConfig(embedding_dim=4, maker="linear"),
        model=ModelConfig(width=8, heads=1, layers=1, windows=()),
        optim=OptimConfig(steps=4, warmup_steps=1),
        train=TrainConfig(eval_split=""),
    )
    # A run that is not trained: frozen and live scores differ all the same.
    dataset = open_dataset(data)
    model = build_model(config, dataset.schema, task_names(dataset.schema, config.data))
    with jax.set_mesh(make_mesh(config.mesh)), Checkpointer(folder, keep=1) as saved:
        create_or_check_run(config, dataset, folder)
        saved.save(0, init_state(model, 0), Progress())
    return folder


def test_a_report_has_live_and_frozen_metrics_of_the_same_rows(
    workdir: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tokenrec.load(workdir, checkpoint="latest")
    live = run.evaluate("valid", baselines=True)
    both = run.evaluate("valid", baselines=True, freeze_at="split")
    dataset = open_dataset(data)
    log = dataset.load("valid")
    start = int(log.time[(log.flags & SCORED) != 0].min())
    frozen = both["frozen"]
    assert frozen.pop("history_ends_ms") == start
    # Live metrics do not change, and baselines have both as well.
    assert "frozen" not in live
    assert both["tasks"] == live["tasks"]
    for name, report in both["baselines"].items():
        assert report.pop("frozen")["history_ends_ms"] == start
        assert report == live["baselines"][name]
    for task, values in frozen["tasks"].items():
        assert values["examples"] == live["tasks"][task]["examples"]
        assert values["auc"] != live["tasks"][task]["auc"]
    # Where nothing would be frozen, both would be the same.
    with pytest.raises(
        InputError, match="later than every scored row of split 'valid'"
    ):
        run.evaluate("valid", freeze_at="2100-01-01")


@pytest.mark.parametrize("config", [NIO, UC], ids=["nio", "uc"])
def test_no_batch_holds_an_event_from_then_on_but_the_one_that_is_scored(
    config: DataConfig,
) -> None:
    data = memory_data()
    log = data.logs["valid"]
    row_of = {value: row for row, value in enumerate(log.action_dense[:, 0].tolist())}
    freeze_at, late = int(np.median(log.time)), 0
    for host, _ in eval_batches(data, config, "valid", freeze_at=freeze_at):
        for b in np.flatnonzero((host.rows >= 0).any(axis=1)):
            values = host.batch.action.dense[b, host.batch.valid[b], 0].tolist()
            events = {row_of[value] for value in values} - set(host.rows[b].tolist())
            assert all(log.time[row] < freeze_at for row in events)
            late += (log.time[host.rows[b].max()] >= freeze_at) and bool(events)
    assert late > 20


def test_repeats_and_rates_count_nothing_from_then_on(data: Path) -> None:
    dataset = open_dataset(data)
    log = dataset.load("valid")
    scored = (log.flags & SCORED) != 0
    start = int(log.time[scored].min())
    live = split_baselines(dataset, "valid", ["click"])
    frozen = split_baselines(dataset, "valid", ["click"], freeze_at=start)
    assert not np.array_equal(frozen["repeat"], live["repeat"])
    # The training rows are all earlier: their rates are the same.
    np.testing.assert_array_equal(frozen["rates"], live["rates"])
    np.testing.assert_array_equal(frozen["popularity"], live["popularity"])
    # With frozen histories a user's rows of one item have one count.
    chunk = np.repeat(np.arange(log.num_chunks), np.diff(log.start))[scored]
    pairs = chunk * 1000 + log.item[scored]
    for pair in np.unique(pairs):
        assert len(np.unique(frozen["repeat"][pairs == pair])) == 1
    # Half of the training days: rates change too.
    early = split_baselines(dataset, "valid", ["click"], freeze_at=start - 10**9)
    assert not np.array_equal(early["rates"], live["rates"])


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("1970-01-01T00:00:02", 2_000),
        ("1970-01-01T08:00:02+08:00", 2_000),
        ("2000", 2_000),
        ("split", None),
    ],
)
def test_a_time_is_read_in_utc_or_its_own_zone(text: str, time: int | None) -> None:
    data = memory_data()
    log = data.logs["valid"]
    data.logs["valid"] = dataclasses.replace(log, time=log.time * 10)
    first = data.logs["valid"].time[(log.flags & SCORED) != 0].min()
    assert freeze_time(data, "valid", text) == (first if time is None else time)  # type: ignore[arg-type]


def test_what_cannot_be_frozen_is_refused() -> None:
    config = Config(data=replaced(UC, path="-"))
    with pytest.raises(InputError, match="--samples=5 with --freeze-at"):
        check_freeze(config, 5)
    check_freeze(config, 0)
    config.data.objective = "retrieval"
    with pytest.raises(InputError, match="of frozen histories are those of ranking"):
        check_freeze(config, 0)
    with pytest.raises(InputError, match="neither an ISO date"):
        freeze_time(memory_data(), "valid", "yesterday")  # type: ignore[arg-type]


def test_chunks_that_do_not_reach_back_to_the_time_are_refused() -> None:
    log = memory_data(chunks=1).logs["valid"]
    rows = log.num_rows
    assert rows > 12
    flags = np.full(rows, EVENT, np.uint8)
    flags[8:] |= SCORED
    log = dataclasses.replace(log, flags=flags, time=np.arange(rows))
    # The first eight events may be the head of a chunk that continues the user.
    check_frozen_heads(log, 6, events=6, head=8)
    check_frozen_heads(log, 5, events=6, head=9)
    check_frozen_heads(log, 5, events=6, head=None)
    check_frozen_heads(log, rows, events=10**6, head=8)
    with pytest.raises(InputError, match=r"has 5 in a chunk .* larger --overlap"):
        check_frozen_heads(log, 5, events=6, head=8)
