"""Text tables of evaluation results."""

from __future__ import annotations

from tokenrec.runtime.result_table import format_table, result_rows


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
