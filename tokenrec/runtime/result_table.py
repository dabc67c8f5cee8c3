"""Text tables of evaluation results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_RANKING_COLUMNS = {
    "AUC": "auc",
    "GAUC": "gauc",
    "log loss": "log_loss",
    "NE": "normalized_entropy",
    "positives": "positives",
    "examples": "examples",
}


_NUMBER_COLUMNS = {
    "RMSE": "rmse",
    "of mean": "rmse_of_mean",
    "MAE": "mae",
    "MAE of mean": "mae_of_mean",
    "XAUC": "xauc",
    "predicted": "predicted",
    "observed": "observed",
    "examples": "examples",
}
_CLASS_COLUMNS = {
    "accuracy": "accuracy",
    "of commonest": "accuracy_of_commonest",
    "log loss": "log_loss",
    "NE": "normalized_entropy",
    "OvR AUC": "ovr_auc",
    "examples": "examples",
}
# Columns that are shown for frozen histories too.
_FROZEN_COLUMNS = ("AUC", "GAUC", "RMSE", "XAUC", "accuracy", "OvR AUC")


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a text table with aligned columns.

    Columns are in order of first appearance; a value that is None or absent is "-".
    Consecutive rows with the same value in the first column show it once.

    >>> print(format_table([
    ...     {"model": "ours", "task": "click", "AUC": 0.75},
    ...     {"model": "ours", "task": "like"},
    ... ]))
    model  task      AUC
    -----  -----  ------
    ours   click  0.7500
           like        -
    """
    if not rows:
        return ""
    # 1. The text of every cell, and the layout of every column.
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[format_cell(row.get(name)) for name in names] for row in rows]
    is_number = [
        not any(isinstance(row.get(name), str) for row in rows) for name in names
    ]
    widths = [
        max(len(name), *(len(line[i]) for line in cells))
        for i, name in enumerate(names)
    ]
    # 2. Header, rule, and the rows with repeated first cells left blank.
    lines = [names, ["-" * width for width in widths]]
    for i, line in enumerate(cells):
        repeats = len(names) > 1 and i > 0 and line[0] == cells[i - 1][0]
        lines.append(["" if repeats else line[0], *line[1:]])
    # 3. Numbers to the right, text to the left.
    aligned = []
    for line in lines:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ]
        aligned.append("  ".join(padded).rstrip())
    return "\n".join(aligned)


def format_results(
    results: Mapping[str, Mapping[str, Any]], header: str = "model"
) -> str:
    """Format reports as the tables of their tasks and calibration, blank line between.

    Args:
      results: as in `result_rows`.
      header: name of the first column.
    """
    tables = [
        result_rows(results, header),
        calibration_rows(results),
        alignment_rows(results, header),
        *other_tables(results, header),
    ]
    return "\n\n".join(format_table(rows) for rows in tables if rows)


def result_rows(
    results: Mapping[str, Mapping[str, Any]], header: str = "model"
) -> list[dict[str, Any]]:
    """Rows for `format_table`: one per model and binary task, or of retrieval.

    `other_tables` has the other tasks.

    Args:
      results: model name -> summary as the evaluation returns it, `{"tasks": {TASK:
        report}}` or `{"retrieval": report}`; a report may lack metrics. A ranking
        summary may have a second one, "frozen".
      header: name of the first column, which holds the keys of `results`.

    Returns:
      Column name -> value, for each row.
    """
    retrieval = [
        {header: name} | summary["retrieval"]
        for name, summary in results.items()
        if "retrieval" in summary
    ]
    if retrieval:
        return retrieval
    rows = []
    for name, summary in results.items():
        frozen = summary.get("frozen", {}).get("tasks", {})
        for task, report in summary["tasks"].items():
            if "rmse" in report or "accuracy" in report:
                continue
            row: dict[str, Any] = {header: name, "task": task}
            cells = _metric_cells(report, frozen.get(task), _RANKING_COLUMNS)
            rows.append(row | cells)
    return rows


def _metric_cells(
    report: Mapping[str, Any],
    frozen: Mapping[str, Any] | None,
    columns: Mapping[str, str],
) -> dict[str, Any]:
    """Metrics of a task by column, those of frozen histories beside the live ones."""
    cells: dict[str, Any] = {}
    for column, key in columns.items():
        cells[column] = report.get(key)
        if frozen is not None and column in _FROZEN_COLUMNS:
            cells[f"frozen {column}"] = frozen.get(key)
    return cells


def other_tables(
    results: Mapping[str, Mapping[str, Any]], header: str = "model"
) -> list[list[dict[str, Any]]]:
    """Rows for `format_table` of tasks that are not binary, and of whole requests.

    Args:
      results: as in `result_rows`.
      header: name of the first column.

    Returns:
      The rows of a table for tasks of numbers, of one for tasks of classes, and of one
      for NDCG within requests, those that have any. A row has a model and a task.
    """
    kinds = (("rmse", _NUMBER_COLUMNS), ("accuracy", _CLASS_COLUMNS))
    tables: list[list[dict[str, Any]]] = [[], [], []]
    for name, summary in results.items():
        frozen = summary.get("frozen", {}).get("tasks", {})
        for task, report in summary.get("tasks", {}).items():
            row: dict[str, Any] = {header: name, "task": task}
            for table, (own, columns) in zip(tables, kinds, strict=False):
                if own in report:
                    table.append(row | _metric_cells(report, frozen.get(task), columns))
            ndcg = {
                key.removeprefix("request_").upper(): value
                for key, value in report.items()
                if key.startswith("request_ndcg@")
            }
            if ndcg:
                tables[2].append(row | ndcg | {"requests": report["requests"]})
    return [table for table in tables if table]


def alignment_rows(
    results: Mapping[str, Mapping[str, Any]], header: str = "model"
) -> list[dict[str, Any]]:
    """Rows for `format_table` of alignment tasks: one per model and task.

    Args:
      results: as in `result_rows`; reports without alignment tasks have no row.
      header: name of the first column.
    """
    return [
        {header: name, "alignment task": task} | found
        for name, summary in results.items()
        for task, found in summary.get("alignment", {}).items()
    ]


def calibration_rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `format_table` of the calibration: one per model and task.

    Args:
      results: as in `result_rows`; reports without calibration have no row.

    Returns:
      Column name -> value, for each row.
    """
    return [
        {
            "model": name,
            "task": task,
            "ECE": of["expected_error"],
            "slope": of["slope"],
            "intercept": of["intercept"],
            "predicted": of["predicted"],
            "observed": of["observed"],
            "top 10 % over": of["top_decile"]["over_prediction"],
        }
        for name, summary in results.items()
        for task, report in summary.get("tasks", {}).items()
        if (of := report.get("calibration"))
    ]


def format_cell(value: Any) -> str:
    """Format a value: integers with thousands separators, floats with four digits."""
    if value is None:
        return "-"
    # Counts; a metric is a float even if it is whole.
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
