"""Report what a warm start carries over: a JSON value and a text."""

from __future__ import annotations

from typing import Any

from tokenrec.checkpoint.run_weights import RunWeights
from tokenrec.checkpoint.warm_start_plan import WarmStartPlan, list_reasons
from tokenrec.checkpoint.weight_matching import MatchedRows, window_difference


def warm_start_report(
    source: RunWeights, target: RunWeights, plan: WarmStartPlan, step: int
) -> dict[str, Any]:
    """Make the report of a warm start as a JSON value.

    Args:
      source: the run that has been trained.
      target: the run that starts from it.
      plan: what is carried over.
      step: step of the source's checkpoint.

    Returns:
      `{"run", "checkpoint", "step", "data", "tables", "tables_left", "weights",
      "weights_left"}`. A table has its numbers of rows that are carried, new and
      dropped. A weight is carried or not; it has a reason if not, the numbers of its
      entries if they have keys, and the windows of its layer if they differ.
    """
    # 1. Tables by row.
    tables: dict[str, dict[str, Any]] = {}
    for name, match in plan.tables.items():
        rows = target.model.embedder.tables[name]
        # A table that is new in this run has no rows in the source.
        source_rows = source.model.embedder.tables.get(name, 0)
        carried = len(match.target) if isinstance(match, MatchedRows) else 0
        tables[name] = {
            "carried": carried,
            "new": rows - carried,
            "dropped": source_rows - carried,
        }
        if isinstance(match, str):
            tables[name]["reason"] = match
    # 2. Dense weights.
    weights = {
        name: _weight_report(name, source, target, match)
        for name, match in plan.weights.items()
    }
    # 3. What the source has besides.
    train = target.model.config.train
    return {
        "run": train.warm_start,
        "checkpoint": train.warm_start_checkpoint,
        "step": step,
        "data": str(source.data),
        "tables": tables,
        "tables_left": sorted(
            source.model.embedder.tables.keys() - target.model.embedder.tables.keys()
        ),
        "weights": weights,
        "weights_left": sorted(source.places.keys() - target.places.keys()),
    }


def _weight_report(
    name: str,
    source: RunWeights,
    target: RunWeights,
    match: MatchedRows | str | None,
) -> dict[str, Any]:
    if isinstance(match, str):
        return {"carried": False, "reason": match}
    report: dict[str, Any] = {"carried": True}
    # A weight that matches as a whole has no counts.
    if match is not None:
        axis = target.keys[name].axis
        carried = len(match.target)
        report["entries"] = {
            "carried": carried,
            "new": target.shape(name)[axis] - carried,
            "dropped": source.shape(name)[axis] - carried,
        }
    windows = window_difference(name, source, target)
    if windows:
        report["window"] = windows
    return report


def to_text(report: dict[str, Any]) -> str:
    """Format the report: every table, and dense weights by reason."""
    # 1. A line for each table.
    lines = [
        f"warm start from {report['run']} at step {report['step']:,} "
        f"({report['checkpoint']})",
        f"  {'table':24} {'carried':>12} {'new':>12} {'dropped':>12}",
    ]
    for name, rows in report["tables"].items():
        counts = " ".join(f"{rows[key]:12,}" for key in ("carried", "new", "dropped"))
        reason = f"  ({rows['reason']})" if "reason" in rows else ""
        lines.append(f"  {name:24} {counts}{reason}")
    # 2. Dense weights: those in part, those not at all, and those in other windows.
    weights = report["weights"]
    fresh = {
        name: weight["reason"]
        for name, weight in weights.items()
        if not weight["carried"]
    }
    lines.append(
        f"  dense weights: {len(weights) - len(fresh)} carried, {len(fresh)} fresh"
    )
    for name, weight in weights.items():
        if "entries" in weight:
            counts = ", ".join(
                f"{count:,} entries {key}" for key, count in weight["entries"].items()
            )
            lines.append(f"    {name}: {counts}")
    if fresh:
        lines.append(f"    fresh: {list_reasons(fresh.items())}")
    windows = {
        name: weight["window"] for name, weight in weights.items() if "window" in weight
    }
    if windows:
        listed = list_reasons(windows.items())
        lines.append(f"    in layers with another window: {listed}")
    # 3. What is left behind.
    for kind in ("tables", "weights"):
        left = report[f"{kind}_left"]
        if left:
            listed = list_reasons((name, "") for name in left)
            lines.append(f"  {kind} of the source run that this run lacks: {listed}")
    return "\n".join(lines)
