"""Report on a replayed step: where a bad number arose, and what is unusually large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenrec.data.batch import Batch, HostBatch, Signals
from tokenrec.data.dataset import Dataset
from tokenrec.data.schema import Feature, columns
from tokenrec.ops.tables.storage import from_storage_index
from tokenrec.state import ModelSpec

# Weights and samples in the report, and extreme numbers of each sample.
MAX_LISTED = 10
_MAX_EXTREMES = 3
# Log rows of a sample in the text.
_MAX_ROWS = 4


def table_gradients(
    model: ModelSpec, places: dict[str, np.ndarray], by_row: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Yield the norm of each table's gradient, and its bad numbers.

    Args:
      model: the model.
      places: stack -> `[n] int32`, where rows are stored; out of range for padding.
      by_row: stack -> `[n, w] float32`, gradients of these rows.
    """
    for name, stack in model.embedder.stacks.items():
        # 1. Drop the padding, and turn storage places into row numbers.
        rows = stack.stored_rows
        is_real = places[name] < rows
        row_numbers = places[name][is_real]
        if stack.spread:
            row_numbers = from_storage_index(row_numbers, rows)
        # 2. Sum the gradients of a row: each batch shard has one of its own.
        ids, inverse = np.unique(row_numbers, return_inverse=True)
        total = np.zeros((len(ids), stack.width))
        with np.errstate(all="ignore"):
            np.add.at(total, inverse, by_row[name][is_real])
            # 3. Tables are runs of the rows of their stack.
            for table, first in stack.offsets.items():
                end = first + model.embedder.tables[table]
                gradient = total[(ids >= first) & (ids < end)]
                yield {
                    "table": table,
                    "gradient_norm": to_json_number(
                        np.sqrt(np.sum(np.square(gradient)))
                    ),
                    "not_finite": int(np.sum(~np.isfinite(gradient))),
                    "rows": int(np.sum(np.any(gradient != 0, axis=1))),
                }


def first_not_finite(
    samples: dict[str, Any], weights: list[dict[str, Any]], tables: list[dict[str, Any]]
) -> dict[str, Any]:
    """Find the first stage with a bad number: forward, then backward.

    Args:
      samples: losses and counts of bad numbers per sample, in batch order.
      weights: reports of the dense weights.
      tables: reports of the tables.

    Returns:
      `{"where": [text, ...], "samples": [index in the batch, ...]}`; the samples are
      empty if the number arose in the backward pass.
    """
    # 1. The forward pass, stage by stage.
    # The last output is the read-out after the final norm.
    *layers, readout = samples["layers"]
    stages = [
        {
            f"feature '{name}' of {part}": bad
            for part, features in samples["features"].items()
            for name, bad in features.items()
        },
        {f"tokens of {role}": bad for role, bad in samples["tokens"].items()},
        *(
            {f"layer {number} (0 to {len(layers) - 1})": bad}
            for number, bad in enumerate(layers)
        ),
        {"the norm above the layers": readout},
        {"the head and its loss": ~np.isfinite(samples["losses"])},
    ]
    # The first stage decides: a bad number spreads to all later ones.
    for stage in stages:
        bad_samples = {
            name: np.flatnonzero(bad) for name, bad in stage.items() if np.any(bad)
        }
        if bad_samples:
            numbers = {int(n) for indices in bad_samples.values() for n in indices}
            return {"where": sorted(bad_samples), "samples": sorted(numbers)}
    # 2. The backward pass: gradients have no order.
    names = [
        f"gradient of {entry.get('weight', entry.get('table'))}"
        for entry in (*weights, *tables)
        if entry["not_finite"]
    ]
    if not names:
        names = ["the gradient norm, whose parts are finite: their squares are not"]
    return {"where": names, "samples": []}


def worst_samples(
    model: ModelSpec, dataset: Dataset, host: HostBatch, losses: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield the samples with the largest losses, those that are not finite first.

    Args:
      model: the model.
      dataset: the data set of the run.
      host: the batch, with the log rows of each sample.
      losses: `[B] float32`, in batch order.
    """
    chunk_ends = np.cumsum(dataset.chunk_lengths("train"))
    order = sorted(
        range(len(losses)), key=lambda n: descending_order(to_json_number(losses[n]))
    )
    for sample in order[:MAX_LISTED]:
        row_numbers = host.rows[sample]
        rows = np.unique(row_numbers[row_numbers >= 0]).tolist()
        user_id = None
        if rows:
            # All log rows of a sample are of one user, and so of one chunk's user.
            chunk = int(np.searchsorted(chunk_ends, rows[0], side="right"))
            user_id = dataset.load("train", chunk, chunk + 1).user_id[0]
            # NumPy integers are not JSON.
            user_id = user_id if isinstance(user_id, str) else int(user_id)
        yield {
            "sample": sample,
            "loss": to_json_number(losses[sample]),
            "user_id": user_id,
            "rows": rows,
            "extremes": _extremes(model, host.batch, sample),
        }


def _extremes(model: ModelSpec, batch: Batch, sample: int) -> list[dict[str, Any]]:
    """Numbers of a sample that are furthest from the mean of their feature.

    The distance is in standard deviations; for an embedding it is the absolute value.
    Each feature of each part has one entry at most.
    """
    extremes = []
    parts: dict[str, Signals | None] = {
        "user": batch.user,
        "state": batch.state,
        "action": batch.action,
        "target": batch.target,
    }
    for part, signals in parts.items():
        if signals is None:
            continue
        features = model.embedder.parts[part]
        for name, (start, stop) in columns(features).dense.items():
            # [columns], or [positions, columns] for events and candidates.
            values = signals.dense[sample, ..., start:stop]
            deviations = _deviations(values, model.schema.feature(name))
            # All numbers of the feature are missing.
            if np.all(np.isnan(deviations)):
                continue
            index = np.unravel_index(np.nanargmax(deviations), deviations.shape)
            entry: dict[str, Any] = {"feature": name, "part": part}
            if values.ndim > 1:
                entry["position"] = int(index[0])
            entry["value"] = to_json_number(values[index])
            entry["deviations"] = to_json_number(deviations[index])
            extremes.append(entry)
    extremes.sort(key=lambda entry: descending_order(entry["deviations"]))
    return extremes[:_MAX_EXTREMES]


def _deviations(values: np.ndarray, feature: Feature) -> np.ndarray:
    values = values.astype(np.float64)
    if feature.kind == "embedding":
        return np.abs(values)
    if feature.transform == "log1p":
        # Mean and deviation are those of the transformed values.
        values = np.sign(values) * np.log1p(np.abs(values))
    # As the model normalises it; the floor is for constant features.
    return np.abs(values - feature.mean) / max(feature.deviation, 1e-6)


def to_json_number(value: Any) -> float | str:
    """Convert a number to a float, or to text if JSON cannot represent it."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def descending_order(number: float | str) -> float:
    """Sort key: numbers that are not finite first, then from large to small."""
    # Texts are "nan" and "inf".
    return -math.inf if isinstance(number, str) else -number


def to_text(report: dict[str, Any]) -> str:
    """Format the report of `replay_run`."""
    lines = [
        f"step {report['step']}: loss {_number(report['loss'])}, "
        f"gradient norm {_number(report['gradient_norm'])}, "
        + ("finite" if report["finite"] else "not finite")
        + ("" if report["applied"] else "; the update was skipped")
    ]
    if report["skipped_before"]:
        lines.append(f"skipped steps before it: {report['skipped_before']}")
    bad = report["first_not_finite"]
    if bad:
        line = "first number that is not finite: "
        line += ", ".join(bad["where"][:MAX_LISTED])
        if bad["samples"]:
            listed = ", ".join(map(str, bad["samples"][:MAX_LISTED]))
            line += f", samples {listed} of the batch"
        lines.append(line)
    return "\n".join([*lines, *_gradient_lines(report), *_sample_lines(report)])


def _gradient_lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"  {'gradients, largest first':48} {'norm':>12} {'bad':>8}"
    entries = [
        (f"table {entry['table']}", entry, f"{entry['rows']:,} rows")
        for entry in report["tables"]
    ]
    entries += [
        (entry["weight"], entry, f"weight {_number(entry['weight_norm'])}")
        for entry in report["weights"]
    ]
    for name, entry, more in entries:
        norm = _number(entry["gradient_norm"])
        yield f"  {name:48} {norm:>12} {entry['not_finite']:8,}  {more}"


def _sample_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "samples, largest loss first"
    for sample in report["samples"]:
        rows = ", ".join(map(str, sample["rows"][:_MAX_ROWS]))
        if len(sample["rows"]) > _MAX_ROWS:
            rows += ", ..."
        yield (
            f"  sample {sample['sample']}: loss {_number(sample['loss'])}, "
            f"user {sample['user_id']}, log rows {rows or 'none'}"
        )
        for value in sample["extremes"]:
            where = value["part"]
            if "position" in value:
                where += f" {value['position']}"
            yield (
                f"    {value['feature']} ({where}) = {_number(value['value'])}, "
                f"{_number(value['deviations'])} deviations from the mean"
            )


def _number(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.6g}"
