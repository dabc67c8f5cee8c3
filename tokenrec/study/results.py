"""What a study found, as tables: metrics of every run, differences to the reference, learning curves."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenrec.analysis.study_files import columns_of
from tokenrec.errors import InputError
from tokenrec.metrics.binary import summarize
from tokenrec.metrics.groups import group_codes
from tokenrec.runtime.files import atomic_replace
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log
from tokenrec.study.bootstrap import compare
from tokenrec.study.jobs import RUN
from tokenrec.study.plan import TrainingRun

METRICS = ("auc", "gauc", "log_loss", "normalized_entropy")
BASELINE_SEED = -1  # of rows that no seed made
_KEY = ("user_id", "item_id", "time_ms")


class Scored(NamedTuple):
    """Rows of a split in the order of their ids: `users: [N] int64`, `labels: [N, K] int8`, `scores: [N, K]`."""

    tasks: tuple[str, ...]
    key: pa.Table
    users: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def metrics(self) -> dict[str, Any]:
        """`metrics.summarize` of them."""
        return summarize(self.labels, self.scores, self.users, self.tasks)


def read_scores(path: Path) -> Scored:
    """The scores that `tokenrec predict` wrote. A data set holds a user, item and time once: they are the key."""
    table = pq.read_table(path)
    table = table.sort_by([(name, "ascending") for name in _KEY])
    tasks = tuple(
        name.removeprefix("label_")
        for name in table.column_names
        if name.startswith("label_")
    )
    labels = [
        table[f"label_{task}"].fill_null(-1).to_numpy().astype(np.int8)
        for task in tasks
    ]
    scores = [table[f"score_{task}"].to_numpy() for task in tasks]
    users = group_codes(table["user_id"].to_numpy())
    return Scored(
        tasks, table.select(_KEY), users, np.stack(labels, 1), np.stack(scores, 1)
    )


def sort_keys(user_id: np.ndarray, item_id: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Order of rows by user, item and time, as `read_scores` has them."""
    key = pa.table(
        {
            "user_id": pa.array(user_id),
            "item_id": pa.array(item_id),
            "time_ms": pa.array(time),
        }
    )
    return np.asarray(pc.sort_indices(key, [(name, "ascending") for name in _KEY]))


def result_rows(
    study: str,
    model: str,
    seed: int,
    rate: float | None,
    split: str,
    report: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Rows of `Result` from a report of `metrics.summarize`, without speed and size."""
    who = {
        "study": study,
        "model": model,
        "seed": seed,
        "learning_rate": rate,
        "split": split,
    }
    for task, values in report["tasks"].items():
        yield from (
            who | {"task": task, "metric": metric, "value": values[metric]}
            for metric in METRICS
        )
    for metric in ("auc", "gauc"):
        yield who | {
            "task": "macro",
            "metric": metric,
            "value": report[f"macro_{metric}"],
        }


def difference_rows(
    study: str,
    split: str,
    runs: Mapping[str, Mapping[int, Scored]],
    reference: str,
    draws: int,
) -> Iterator[dict[str, Any]]:
    """Rows of `Difference`, for tasks of which both classes occur. `runs`: model -> seed -> its scores.

    Raises:
      InputError: two models did not score the same rows.
    """
    first = next(iter(runs[reference].values()))
    for name, scored in runs.items():
        every = scored.values()
        if any(
            not one.key.equals(first.key)
            or not np.array_equal(one.labels, first.labels)
            for one in every
        ):
            raise InputError(
                f"'{name}' and '{reference}' did not score the same rows of {split}; compare equal ones"
            )
    for k, task in enumerate(first.tasks):
        known = first.labels[:, k] >= 0
        labels, users = first.labels[known, k], first.users[known]
        positives = int(labels.sum())
        if positives in (0, len(labels)):
            continue
        scores = {
            name: {of: one.scores[known, k] for of, one in scored.items()}
            for name, scored in runs.items()
        }
        for metric, models in compare(
            labels, scores, users, reference, draws=draws
        ).items():
            for model, (value, low, high, p_value) in models.items():
                yield {
                    **{
                        "study": study,
                        "model": model,
                        "reference": reference,
                        "split": split,
                        "task": task,
                    },
                    **{
                        "metric": metric,
                        "difference": value,
                        "low": low,
                        "high": high,
                        "p_value": p_value,
                    },
                    **{"users": len(np.unique(users)), "positives": positives},
                }


def curve_rows(study: str, job: TrainingRun, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of `CurvePoint` from the log of a run."""
    who = {
        "study": study,
        "model": job.model,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
    }
    for record in read_log(folder / RUN / METRICS_FILE):
        for name, value in record.items():
            if name not in ("step", "time") and value is not None:
                yield who | {
                    "step": record["step"],
                    "name": name,
                    "value": float(value),
                }


def rate_of(folder: Path) -> float | None:
    """Median of the examples a second that the run's log holds."""
    rates = [
        record.get("train/examples_per_second")
        for record in read_log(folder / RUN / METRICS_FILE)
    ]
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def write_rows(
    path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]], kind: type
) -> None:
    """A Parquet file of rows of `kind`, whole or not at all."""
    with atomic_replace(path) as partial:
        pq.write_table(
            pa.Table.from_pylist(list(rows), pa.schema(columns_of(kind))), partial
        )


def best_rates(values: Mapping[tuple[str, float], float | None]) -> dict[str, float]:
    """The learning rate of each model with the highest value; a model without any value is left out."""
    known = [
        (model, value, rate)
        for (model, rate), value in values.items()
        if value is not None
    ]
    models = itertools.groupby(sorted(known), key=lambda one: one[0])
    return {model: max(found, key=lambda one: one[1])[2] for model, found in models}
