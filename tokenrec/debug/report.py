"""What `replay` says of a step: where a bad number came from, which gradients and which samples are large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenrec.data.batch import Batch, HostBatch, Signals
from tokenrec.data.dataset import Dataset
from tokenrec.data.schema import Feature, columns
from tokenrec.ops.tables.storage import from_storage_index, stored_rows
from tokenrec.state import ModelSpec

LISTED = 10  # weights and samples in the report
EXTREMES = 3  # numbers of a sample


def table_gradients(
    model: ModelSpec, places: dict[str, np.ndarray], by_row: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Of each table: the norm of its rows' gradients, each row once, and how many numbers of them are not finite."""
    for name, stack in model.embedder.stacks.items():
        rows = stored_rows(stack.rows) if stack.spread else stack.rows
        real = places[name] < rows
        at = places[name][real]
        ids, inverse = np.unique(
            from_storage_index(at, rows) if stack.spread else at, return_inverse=True
        )
        total = np.zeros((len(ids), stack.width))
        with np.errstate(all="ignore"):
            np.add.at(
                total, inverse, by_row[name][real]
            )  # batch shards have gradients of one row each
            for table, first in stack.offsets.items():
                own = total[
                    (ids >= first) & (ids < first + model.embedder.tables[table])
                ]
                yield {
                    "table": table,
                    "gradient_norm": jsonable(np.sqrt(np.sum(np.square(own)))),
                    "not_finite": int(np.sum(~np.isfinite(own))),
                    "rows": int(np.sum(np.any(own != 0, axis=1))),
                }


def first_not_finite(
    samples: dict[str, Any], weights: list[dict[str, Any]], tables: list[dict[str, Any]]
) -> dict[str, Any]:
    """Where the first number that is not finite is, on the way forward and then back, and of which samples."""
    *layers, read = samples["layers"]
    stages = [
        {
            f"feature '{name}' of {part}": bad
            for part, of in samples["features"].items()
            for name, bad in of.items()
        },
        {f"tokens of {role}": bad for role, bad in samples["tokens"].items()},
        *(
            {f"layer {number} (0 to {len(layers) - 1})": bad}
            for number, bad in enumerate(layers)
        ),
        {"the norm above the layers": read},
        {"the head and its loss": ~np.isfinite(samples["losses"])},
    ]
    for stage in stages:
        found = {
            name: np.flatnonzero(bad) for name, bad in stage.items() if np.any(bad)
        }
        if found:
            return {
                "where": sorted(found),
                "samples": sorted({int(n) for of in found.values() for n in of}),
            }
    names = [
        f"gradient of {of.get('weight', of.get('table'))}"
        for of in (*weights, *tables)
        if of["not_finite"]
    ]
    return {
        "where": names
        or ["the gradient norm, whose parts are finite: their squares are not"],
        "samples": [],
    }


def worst_samples(
    model: ModelSpec, dataset: Dataset, host: HostBatch, losses: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The samples of the largest losses, those that are not finite first: whose they are, and their extreme numbers."""
    ends = np.cumsum(dataset.rows("train"))
    for sample in sorted(range(len(losses)), key=lambda n: rank(jsonable(losses[n])))[
        :LISTED
    ]:
        read = host.rows[sample]
        rows = np.unique(read[read >= 0]).tolist()
        user = None
        if rows:
            chunk = int(np.searchsorted(ends, rows[0], side="right"))
            user = dataset.load("train", chunk, chunk + 1).user_id[0]
        yield {
            "sample": sample,
            "loss": jsonable(losses[sample]),
            "user_id": user if user is None or isinstance(user, str) else int(user),
            "rows": rows,
            "extremes": _extremes(model, host.batch, sample),
        }


def _extremes(model: ModelSpec, batch: Batch, sample: int) -> list[dict[str, Any]]:
    """The numbers of a sample that lie furthest from the mean of their feature, in its deviations; of an embedding,
    from 0. One of each feature and part.
    """
    found = []
    parts: dict[str, Signals | None] = {
        "user": batch.user,
        "state": batch.state,
        "action": batch.action,
        "target": batch.target,
    }
    for part, signals in parts.items():
        features = model.embedder.parts[part]
        for name, (start, stop) in (
            columns(features).dense.items() if signals is not None else ()
        ):
            assert signals is not None
            values = signals.dense[sample, ..., start:stop]
            away = _distance(values, model.schema.feature(name))
            if np.all(np.isnan(away)):
                continue
            at = np.unravel_index(np.nanargmax(away), away.shape)
            place = {"position": int(at[0])} if values.ndim > 1 else {}
            far = {"value": jsonable(values[at]), "deviations": jsonable(away[at])}
            found.append({"feature": name, "part": part, **place, **far})
    return sorted(found, key=lambda of: rank(of["deviations"]))[:EXTREMES]


def _distance(values: np.ndarray, feature: Feature) -> np.ndarray:
    values = values.astype(np.float64)
    if feature.kind == "embedding":
        return np.abs(values)
    if feature.transform == "log1p":
        values = np.sign(values) * np.log1p(np.abs(values))
    return np.abs(values - feature.mean) / max(feature.deviation, 1e-6)


def jsonable(value: Any) -> float | str:
    """What JSON can hold."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def rank(number: float | str) -> float:
    """Sorts what is not finite first, then from the largest down."""
    return -math.inf if isinstance(number, str) else -number


def to_text(report: dict[str, Any]) -> str:
    """The report for a reader."""

    def shown(number: float | str) -> str:
        return number if isinstance(number, str) else f"{number:.6g}"

    lines = [
        f"step {report['step']}: loss {shown(report['loss'])}, gradient norm {shown(report['gradient_norm'])}, "
        + ("finite" if report["finite"] else "not finite")
        + ("" if report["applied"] else "; the update was not made")
    ]
    if report["skipped_before"]:
        lines.append(
            f"of the steps before it, these made no update: {report['skipped_before']}"
        )
    bad = report["first_not_finite"]
    if bad:
        whose = (
            f", samples {', '.join(map(str, bad['samples'][:LISTED]))} of the batch"
            if bad["samples"]
            else ""
        )
        lines.append(
            f"first number that is not finite: {', '.join(bad['where'][:LISTED])}{whose}"
        )
    lines.append(f"  {'gradients, largest first':48} {'norm':>12} {'bad':>8}")
    named = [
        (f"table {of['table']}", of, f"{of['rows']:,} rows") for of in report["tables"]
    ]
    named += [
        (of["weight"], of, f"weight {shown(of['weight_norm'])}")
        for of in report["weights"]
    ]
    lines += [
        f"  {name:48} {shown(of['gradient_norm']):>12} {of['not_finite']:8,}  {more}"
        for name, of, more in named
    ]
    lines.append("samples, largest loss first")
    for of in report["samples"]:
        rows = ", ".join(map(str, of["rows"][:4])) + (
            ", ..." if len(of["rows"]) > 4 else ""
        )
        lines.append(
            f"  sample {of['sample']}: loss {shown(of['loss'])}, user {of['user_id']}, rows {rows or 'none'}"
        )
        for value in of["extremes"]:
            where = (
                f"{value['part']} {value['position']}"
                if "position" in value
                else value["part"]
            )
            far = shown(value["deviations"])
            lines.append(
                f"    {value['feature']} ({where}) = {shown(value['value'])}, {far} deviations from the mean"
            )
    return "\n".join(lines)
