"""A run with labels of every kind: it learns, and says so in the unit of the label."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenrec.cli.main import main
from tokenrec.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic_labels import LabelKindsSource
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import evaluate_run
from tokenrec.train_loop import train

# Devices are not the matter here.
pytestmark = pytest.mark.usefixtures("lone_device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "set"
    prepare(LabelKindsSource(20_000, users=40, items=30, requests=4), folder)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run that learns all four labels, one of them as an auxiliary task."""
    config = Config(
        data=DataConfig(
            path=str(data),
            events=4,
            candidates=4,
            batch_size=64,
            tasks={"dwell": 1.0, "click": 0.5, "buy": 0.5, "stars": 1.0},
            losses={"dwell": "weighted_logistic"},
            auxiliary=("click",),
            request_loss="pairwise",
            request_ndcg=3,
            # What carries no information only takes time to compile.
            exclude=(
                *("interests", "age", "hour", "load", "price", "vector", "code"),
                *("place", "clicked", "seconds"),
            ),
        ),
        tokens=TokensConfig(embedding_dim=8, maker="linear"),
        model=ModelConfig(width=16, heads=2, layers=1, windows=()),
        optim=OptimConfig(
            steps=120, warmup_steps=5, learning_rate=1e-2, table_learning_rate=0.1
        ),
        train=TrainConfig(best_metric="request_ndcg"),
    )
    workdir = tmp_path_factory.mktemp("run") / "run"
    summary = train(config, workdir, progress=False)
    return workdir, summary


def test_a_small_model_beats_the_constant_predictions(run, data):
    workdir, summary = run
    report = evaluate_run(workdir, "valid", "best", None)
    dwell, stars = report["tasks"]["dwell"], report["tasks"]["stars"]
    assert dwell["rmse"] < 0.95 * dwell["rmse_of_mean"]
    assert dwell["xauc"] > 0.6
    assert stars["normalized_entropy"] < 0.95
    assert stars["accuracy"] > stars["accuracy_of_commonest"]
    assert stars["ovr_auc"] > 0.6
    # In seconds, not in deviations.
    assert dwell["predicted"] == pytest.approx(dwell["observed"], rel=0.2)
    # What decides the best checkpoint.
    names = ["dwell", "buy"]
    ndcg = [report["tasks"][name]["request_ndcg@3"] for name in names]
    assert summary["best"] == pytest.approx(np.mean(ndcg))
    assert report["macro_request_ndcg@3"] == summary["best"]
    order = [dwell["xauc"], report["tasks"]["buy"]["auc"], stars["ovr_auc"]]
    assert report["macro_auc"] == pytest.approx(np.mean(order))


def test_auxiliary_tasks_are_in_no_report_and_tables_show_each_kind(run, capsys):
    workdir, _ = run
    command = ["evaluate", "--workdir", str(workdir), "--split", "valid"]
    assert main([*command, "--baselines", "--request-ndcg", "2"]) == 0
    out, err = capsys.readouterr()
    assert "click" not in out
    for heading in ("RMSE  of mean", "accuracy  of commonest", "NDCG@2  requests"):
        assert heading in out
    assert "score binary tasks only, and not dwell, stars" in err
    # In the tables of binary tasks, of calibration and of requests.
    assert out.count("\npopularity ") == 3


def test_predictions_have_the_unit_of_the_label(run, data, tmp_path):
    workdir, _ = run
    out = tmp_path / "scores.parquet"
    command = ["predict", "--workdir", str(workdir), "--split", "valid"]
    assert main([*command, "--out", str(out)]) == 0
    table = pq.read_table(out)
    classes = [f"score_stars_{name}" for name in "12345"]
    assert table.column_names == [
        *("user_id", "item_id", "time_ms", "label_dwell", "score_dwell"),
        *("label_buy", "score_buy", "label_stars", *classes),
    ]
    report = evaluate_run(workdir, "valid", "best", None)["tasks"]
    label, score = (table[f"{name}_dwell"].to_numpy() for name in ("label", "score"))
    known = ~np.isnan(label)
    rmse = np.sqrt(np.mean((label - score)[known] ** 2))
    assert rmse == pytest.approx(report["dwell"]["rmse"], rel=1e-5)
    total = sum(table[name].to_numpy() for name in classes)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert set(table["label_stars"].to_pylist()) == {*"12345", None}


def test_options_that_do_not_fit_the_data_are_refused(data, tmp_path):
    wrong = Config(
        data=DataConfig(path=str(data), losses={"dwell": "cross_entropy"}),
        optim=OptimConfig(steps=1, warmup_steps=1),
    )
    with pytest.raises(InputError, match=r"losses\['dwell'\].*from 0 to 1"):
        train(wrong, tmp_path / "run", progress=False)
