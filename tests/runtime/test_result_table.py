"""Text tables of evaluation results."""

from __future__ import annotations

from tokenrec.runtime.result_table import calibration_rows, format_table, result_rows


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
