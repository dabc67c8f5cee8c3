"""A study from its runs to its tables.

A script that writes scores at once replaces the commands of the runs. The real commands
have tests of their own, and `tokenrec study --config=synthetic` runs them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.memory_source import MemorySource
from tests.study.test_plan import STUDY
from tokenrec.analysis.model_styles import assign_styles
from tokenrec.analysis.result_tables import quality_table
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.summary import summarize_study
from tokenrec.data.dataset import Dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError, Stopped
from tokenrec.study import comparisons, jobs
from tokenrec.study.results import ScoredSplit, best_rates
from tokenrec.study.runner import run_study

SMALL = dataclasses.replace(
    STUDY,
    models={"tokenformer": {}, "bfts": {"model.gate": False}},
    seeds=(0, 1),
    draws=100,
)

# Replaces `tokenrec VERB ...`: makes scores from the labels of the data set, whose
# quality depends on model and learning rate.
COMMAND = """
import json, os, sys, time
from pathlib import Path
verb, *rest = sys.argv[1:]
flags = dict(flag.removeprefix("--").split("=", 1) for flag in rest if "=" in flag)
folder = Path(flags.get("workdir") or flags.get("config")).parent
with open(os.environ["CALLS"], "a") as calls:
    split = flags.get("split", "") + flags.get("freeze-at", "").replace("split", "*")
    print(verb, folder.relative_to(os.environ["OUT"]), split, file=calls)
if os.environ.get("FAILS", "nowhere") in str(folder) and verb == "train":
    sys.exit("no such luck")
if os.environ.get("DIVERGES", "nowhere") in str(folder) and verb == "train":
    sys.exit(4)
config = json.loads((folder / "config.json").read_text())
if verb == "describe":
    Path(flags["json"]).write_text(json.dumps({"parameters": {"dense": 5, "tables": 7}, "flops_per_example": 11}))
elif verb == "train":
    (folder / "run").mkdir(exist_ok=True)
    line = {"step": 1, "time": 0, "train/loss": 0.5, "train/examples_per_second": 9.0}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    end = time.process_time() + float(os.environ.get("BURNS", 0))
    while time.process_time() < end:
        pass
else:
    import numpy as np, pyarrow as pa, pyarrow.parquet as pq
    rows = pq.read_table(os.environ["ROWS"]).filter(pa.compute.field("split") == flags["split"]).drop(["split"])
    draw = np.random.default_rng(config["seed"])
    noise = 0.2 if config["optim"]["learning_rate"] == 3e-3 and not config["model"]["gate"] else 0.6
    noise += 0.2 * ("freeze-at" in flags)
    for task in ("click", "buy"):
        label = rows[f"label_{task}"].fill_null(0).to_numpy()
        score = np.clip((1 - noise) * label + noise * draw.uniform(size=len(label)), 0.01, 0.99)
        rows = rows.append_column(f"score_{task}", pa.array(score.astype(np.float32)))
    pq.write_table(rows.take(draw.permutation(rows.num_rows)), flags["out"])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(SyntheticSource(2_000, users=40, items=30), out)
    return out


@pytest.fixture
def out(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the study; its commands are replaced by COMMAND."""
    import numpy as np

    from tokenrec.data.dataset import open_dataset
    from tokenrec.data.interaction_log import SCORED

    dataset, tables = open_dataset(data), []
    for split in ("valid", "test"):
        log = dataset.load(split)
        rows = np.flatnonzero(log.flags & SCORED > 0)
        columns = {
            "user_id": np.repeat(log.user_id, np.diff(log.start))[rows],
            "item_id": dataset.catalogue.item_id[log.item[rows]],
            "time_ms": log.time[rows],
        }
        columns |= {
            f"label_{task.name}": pa.array(
                log.labels[rows, k], mask=log.labels[rows, k] < 0
            )
            for k, task in enumerate(dataset.schema.tasks)
        }
        tables.append(
            pa.table(columns).append_column("split", pa.array([split] * len(rows)))
        )
    pq.write_table(pa.concat_tables(tables), tmp_path / "rows.parquet")
    (tmp_path / "command.py").write_text(COMMAND)
    monkeypatch.setattr(
        jobs, "TOKENREC", [sys.executable, str(tmp_path / "command.py")]
    )
    for name, value in {"CALLS": "calls", "OUT": "out", "ROWS": "rows.parquet"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    return tmp_path / "out"


def calls(out: Path) -> list[str]:
    return (out.parent / "calls").read_text().splitlines()


def test_the_best_rate_gets_all_seeds_and_the_tables_say_so(
    data: Path, out: Path
) -> None:
    run_study(SMALL, "small", out, data, command="tokenrec study", side_by_side=2)
    study = json.loads((out / "study.json").read_text())
    assert study["chosen"]["bfts"] == 3e-3
    assert study["data"]["positives"]["valid"]["click"] > 50
    rows = pq.read_table(out / "results.parquet").to_pylist()
    found = {(r["model"], r["seed"], r["learning_rate"], r["split"]) for r in rows}
    assert {key for key in found if key[0] == "bfts" and key[3] == "test"} == {
        ("bfts", s, 3e-3, "test") for s in (0, 1)
    }
    assert ("bfts", 0, 1e-3, "valid") in found  # of the search
    assert ("item_rate", -1, None, "test") in found
    assert {
        (r["examples_per_second"], r["parameters"])
        for r in rows
        if r["model"] == "bfts"
    } == {(9.0, 12)}
    differences = pq.read_table(out / "differences.parquet").to_pylist()
    (one,) = (
        r
        for r in differences
        if (r["model"], r["split"], r["task"], r["metric"])
        == ("bfts", "test", "click", "auc")
    )
    assert one["reference"] == "tokenformer"
    assert 0 < one["low"] < one["difference"] < one["high"]
    assert json.loads((out / "flops.json").read_text()) == {
        "tokenformer": 11,
        "bfts": 11,
    }
    assert (
        pq.read_table(out / "curves.parquet")["name"].to_pylist().count("train/loss")
        == 6
    )
    bins = pq.read_table(out / "reliability.parquet").to_pylist()
    of_run: dict[tuple[str, int, str, str], int] = {}
    for row in bins:
        run = (row["model"], row["seed"], row["split"], row["task"])
        of_run[run] = of_run.get(run, 0) + row["examples"] * row["observed"]
    assert {key[:2] for key in of_run} == {
        (model, seed) for model in ("tokenformer", "bfts") for seed in (0, 1)
    }
    assert {round(of_run[key]) for key in of_run if key[2:] == ("valid", "click")} == {
        study["data"]["positives"]["valid"]["click"]
    }

    before = len(calls(out))
    run_study(SMALL, "small", out, data, command="tokenrec study")
    assert (
        len(calls(out)) == before == 6 * 1 + 2 + 6 + 4
    )  # train, describe, valid, test: nothing is made twice
    with pytest.raises(InputError, match=r"config\.json' is of other settings"):
        run_study(
            dataclasses.replace(SMALL, overrides={"optim.steps": 41}, seeds=(0, 2)),
            "small",
            out,
            data,
            command="",
        )


def test_frozen_scores_averages_and_lightgbm_have_rows_of_their_own(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    class Trees:
        def __init__(self, dataset: Dataset, tasks: tuple[str, ...]) -> None:
            trained.append(tasks)
            self.dataset = dataset

        def scores(self, split: str, *, freeze_at: int | None = None) -> np.ndarray:
            rows = self.dataset.metadata.counts[f"scored_{split}"]
            return np.full((rows, 2), 0.25 if freeze_at is None else 0.75)

    monkeypatch.setattr(comparisons, "BoostedTrees", Trees)
    monkeypatch.setattr(comparisons, "has_lightgbm", lambda: True)
    study = dataclasses.replace(
        SMALL,
        models={"tokenformer": {}},
        learning_rates=(1e-3,),
        splits=("valid",),
        freeze_at="split",
        ensembles={"both seeds": ("tokenformer",)},
    )
    run_study(study, "small", out, data, command="", side_by_side=2)
    done = calls(out)
    assert sum(call.endswith("valid*") for call in done) == 2
    rows = pq.read_table(out / "results.parquet").to_pylist()
    value = {
        (r["model"], r["seed"], r["task"], r["metric"]): r["value"]
        for r in rows
        if r["split"] == "valid"
    }
    for metric in ("auc", "gauc"):
        live = [value["tokenformer", s, "click", metric] for s in (0, 1)]
        frozen = [value["tokenformer", s, "click", f"frozen_{metric}"] for s in (0, 1)]
        assert max(frozen) < min(live)
    # Independent noise cancels in the mean.
    assert value["both seeds", -1, "click", "auc"] > max(live)
    assert value["lightgbm", -1, "click", "log_loss"] > 0
    assert value["lightgbm", -1, "click", "frozen_auc"] == 0.5
    assert ("tokenformer", 0, "click", "frozen_log_loss") not in value
    assert {
        (r["learning_rate"], r["seed"]) for r in rows if r["model"] == "both seeds"
    } == {(None, -1)}
    differences = pq.read_table(out / "differences.parquet").to_pylist()
    assert {
        r["metric"]
        for r in differences
        if r["model"] == "both seeds" and r["task"] == "buy"
    } == {"auc", "gauc", "log_loss", "frozen_auc", "frozen_gauc"}
    summary = summarize_study(read_study(out))
    assert summary.ensembles == ("both seeds",)
    assert summary.models == ("tokenformer",)
    assert "lightgbm" in summary.baselines
    assert "both seeds" not in summary.baselines
    table = quality_table(
        summary, "valid", "click", assign_styles(summary.models)
    ).markup
    assert "GAUC frozen" in table
    assert "ensembles" in table
    # LightGBM is trained once, and nothing is made again.
    run_study(study, "small", out, data, command="")
    assert calls(out) == done
    assert len(trained) == 1


def test_a_mean_of_log_odds_is_that_of_the_seeds_and_models() -> None:
    rng = np.random.default_rng(0)
    runs = [rng.uniform(0.01, 0.99, (5, 2)).astype(np.float32) for _ in range(4)]
    got = comparisons.mean_log_odds(runs)
    for i, j in np.ndindex(5, 2):
        odds = [float(p[i, j]) / (1 - float(p[i, j])) for p in runs]
        mean = np.prod(odds) ** (1 / len(odds))
        np.testing.assert_allclose(got[i, j], mean / (1 + mean), rtol=1e-6)
    sure = comparisons.mean_log_odds([np.float32([[0.0, 1.0]])])
    np.testing.assert_allclose(sure, [[1e-7, 1 - 1e-7]], rtol=1e-6)
    # Of two models with two seeds; without all seeds there is none.
    empty = ScoredSplit((), pa.table({}), np.zeros(5), np.zeros((5, 2)), runs[0])
    each = [empty._replace(scores=scores) for scores in runs]
    scores = {"a": {0: each[0], 1: each[1]}, "b": {0: each[2], 1: each[3]}}
    ((name, found),) = comparisons.average({"mix": ("a", "b")}, (0, 1), scores)
    assert name == "mix"
    np.testing.assert_array_equal(found.scores, got)
    assert not list(comparisons.average({"mix": ("a", "b")}, (0, 1, 2), scores))


def test_a_run_that_fails_is_named_with_its_words_and_what_is_done_stays(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "bfts")
    with pytest.raises(
        InputError,
        match=r"bfts.lr-0\.001.seed-0: train ended with code 1: no such luck",
    ):
        run_study(SMALL, "small", out, data, command="")
    monkeypatch.delenv("FAILS")
    run_study(SMALL, "small", out, data, command="")
    assert sum(call.startswith("train runs/tokenformer") for call in calls(out)) == 3


def test_a_run_that_diverges_is_left_out_and_the_others_go_on(
    data: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DIVERGES", "bfts/lr-0.003")  # the better rate
    run_study(SMALL, "small", out, data, command="")
    assert (
        "bfts/lr-0.003/seed-0 diverged, see train.log there" in capsys.readouterr().err
    )
    assert json.loads((out / "study.json").read_text())["chosen"]["bfts"] == 1e-3
    assert json.loads((out / "study.json").read_text())["diverged"] == [
        "bfts/lr-0.003/seed-0"
    ]
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {r["learning_rate"] for r in rows if r["model"] == "bfts"} == {1e-3}
    before = calls(out)
    run_study(SMALL, "small", out, data, command="")
    assert calls(out) == before  # nor is it tried again


def test_a_split_that_the_data_lacks_is_refused_before_any_run(
    out: Path, tmp_path: Path
) -> None:
    rows = {
        "user_id": [1, 1, 2],
        "time_ms": [0, 1, 2],
        "split": pa.array([0, 1, 1], pa.int8()),
    }
    prepare(MemorySource(rows), tmp_path / "short")
    with pytest.raises(
        InputError, match="the data set has no test, only train, valid; leave it out"
    ):
        run_study(SMALL, "small", out, tmp_path / "short", command="")
    assert not out.exists()


def test_a_spent_budget_ends_the_study_with_what_there_is(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNS", "0.5")
    poor = dataclasses.replace(SMALL, cpu_hours=0.6 / 3600)
    with pytest.raises(
        jobs.BudgetSpent,
        match=r"CPU-hours are spent of cpu_hours=.* runs are unfinished; raise cpu_hours",
    ):
        run_study(poor, "small", out, data, command="")
    assert pq.read_table(out / "results.parquet").num_rows
    trained = sum(call.startswith("train") for call in calls(out))
    with pytest.raises(jobs.BudgetSpent):  # what was spent is known after a restart
        run_study(poor, "small", out, data, command="")
    assert sum(call.startswith("train") for call in calls(out)) == trained < 4


def test_tables_of_what_is_done_are_written_without_a_run(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError,
        match=r"holds no finished run of 'small'; leave out --tables-only",
    ):
        run_study(SMALL, "small", out, data, command="", tables_only=True)
    assert not out.exists()
    monkeypatch.setenv("FAILS", "bfts")
    with pytest.raises(InputError, match="no such luck"):
        run_study(SMALL, "small", out, data, command="")
    before = calls(out)
    run_study(SMALL, "small", out, data, command="", tables_only=True)
    assert calls(out) == before
    assert {
        row["model"] for row in pq.read_table(out / "results.parquet").to_pylist()
    } >= {"tokenformer", "item_rate"}
    assert list(json.loads((out / "study.json").read_text())["chosen"]) == [
        "tokenformer"
    ]


def test_a_signal_ends_the_study_after_its_runs_were_told(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURNS", "600")
    begun = jobs._ChildProcesses._registered

    def told(self: jobs._ChildProcesses, child: object) -> object:
        if len(calls(out)) if (out.parent / "calls").exists() else 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun(self, child)

    monkeypatch.setattr(jobs._ChildProcesses, "_registered", told)
    with pytest.raises(Stopped, match="rerun the command to resume"):
        run_study(SMALL, "small", out, data, command="")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(out.glob("runs/*/*/*/trained.json"))


def test_a_study_and_its_tables_need_no_matplotlib() -> None:
    """Only the page draws: all other modules can be imported without it."""
    modules = [
        "tokenrec.study.runner",
        "tokenrec.study.study_tables",
        "tokenrec.analysis.study_files",
        "tokenrec.analysis.study_rows",
        "tokenrec.analysis.report",
        "tokenrec.analysis.summary",
        "tokenrec.analysis.result_tables",
        "tokenrec.analysis.wording",
    ]
    # An entry of None makes every import of the package fail.
    code = f"import sys; sys.modules['matplotlib'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_rate_of_the_highest_value_is_chosen_and_the_first_of_equals() -> None:
    values = {
        ("a", 1e-3): 0.5,
        ("a", 3e-3): 0.6,
        ("b", 1e-3): 0.7,
        ("b", 3e-3): 0.7,
        ("c", 1e-3): None,
    }
    assert best_rates(values) == {"a": 3e-3, "b": 1e-3}
