"""Text tables of evaluation results."""

from __future__ import annotations

from tokenrec.runtime.result_table import (
    calibration_rows,
    format_results,
    format_table,
    result_rows,
)


def test_results_table_groups_models_and_aligns_tasks():
    report = {
        "auc": 0.75,
        "gauc": None,
        "log_loss": 0.5,
        "normalized_entropy": 0.9,
        "positives": 1200,
        "examples": 5000,
    }
    other = report | {"auc": 0.5, "positives": 7}
    table = format_table(
        result_rows(
            {
                "tokenrec": {"tasks": {"is_click": report, "is_like": other}},
                "rates": {"tasks": {"is_click": other}},
            }
        )
    )
    assert table.splitlines() == [
        "model     task         AUC  GAUC  log loss      NE  positives  examples",
        "--------  --------  ------  ----  --------  ------  ---------  --------",
        "tokenrec  is_click  0.7500     -    0.5000  0.9000      1,200     5,000",
        "          is_like   0.5000     -    0.5000  0.9000          7     5,000",
        "rates     is_click  0.5000     -    0.5000  0.9000          7     5,000",
    ]
    assert format_table([]) == ""


def test_frozen_values_stand_beside_the_live_ones():
    live = {"auc": 0.75, "gauc": 0.6, "positives": 3}
    frozen = {"auc": 0.7, "gauc": 0.625, "positives": 3}
    table = result_rows(
        {
            "ours": {
                "tasks": {"click": live},
                "frozen": {"tasks": {"click": frozen}},
            }
        }
    )
    assert list(table[0])[:6] == [
        "model",
        "task",
        "AUC",
        "frozen AUC",
        "GAUC",
        "frozen GAUC",
    ]
    assert list(table[0].values())[2:6] == [0.75, 0.7, 0.6, 0.625]


def test_calibration_has_a_table_of_its_own():
    of_click = {
        "expected_error": 0.01,
        "slope": 0.9,
        "intercept": None,
        "predicted": 0.3,
        "observed": 0.25,
        "top_decile": {"over_prediction": 0.05},
    }
    reports = {
        "ours": {"tasks": {"click": {"calibration": of_click}, "like": {"auc": 0.5}}},
        "rates": {"tasks": {"click": {"calibration": None}}},
        "retrieval": {"retrieval": {"mrr": 0.1}},
    }
    assert format_table(calibration_rows(reports)).splitlines() == [
        "model  task      ECE   slope  intercept  predicted  observed  top 10 % over",
        "-----  -----  ------  ------  ---------  ---------  --------  -------------",
        "ours   click  0.0100  0.9000          -     0.3000    0.2500         0.0500",
    ]


def test_each_kind_of_task_has_a_table():
    number = {
        "rmse": 2.0,
        "mae": 1.0,
        "xauc": 0.75,
        "rmse_of_mean": 3.0,
        "mae_of_mean": 1.5,
        "predicted": 4.0,
        "observed": 5.0,
        "examples": 9,
    }
    classes = {
        "accuracy": 0.5,
        "log_loss": 1.0,
        "normalized_entropy": 0.75,
        "ovr_auc": 0.625,
        "accuracy_of_commonest": 0.25,
        "examples": 8,
    }
    text = format_results(
        {
            "ours": {
                "tasks": {
                    "seconds": number | {"request_ndcg@3": 0.875, "requests": 4},
                    "stars": classes,
                },
                "frozen": {"tasks": {"seconds": number | {"rmse": 2.5}}},
            }
        }
    )
    numbers, of_classes, requests = text.split("\n\n")
    assert numbers.splitlines()[0].split()[:3] == ["model", "task", "RMSE"]
    assert "frozen RMSE" in numbers
    assert numbers.splitlines()[2].split()[:4] == [
        "ours",
        "seconds",
        "2.0000",
        "2.5000",
    ]
    assert "of commonest" in of_classes
    assert "frozen accuracy" not in of_classes
    assert requests.splitlines()[2].split() == ["ours", "seconds", "0.8750", "4"]
