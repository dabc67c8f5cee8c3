"""Tables of a study: metrics of every run, differences to the reference, curves.

The columns of the tables are the fields of the data classes of
`tokenrec/analysis/study_files.py`. In shapes, N is the number of scored impressions of
a split and K the number of tasks.
"""

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

from tokenrec.analysis.study_rows import columns_of
from tokenrec.errors import InputError
from tokenrec.metrics.binary import summarize
from tokenrec.metrics.groups import group_codes
from tokenrec.runtime.files import atomic_replace
from tokenrec.runtime.metric_writer import METRICS_FILE, read_log
from tokenrec.study.bootstrap import paired_bootstrap
from tokenrec.study.jobs import RUN_FOLDER
from tokenrec.study.plan import TrainingRun

METRICS = ("auc", "gauc", "log_loss", "normalized_entropy")
# Metrics of frozen histories, whose names have a prefix.
_FROZEN_METRICS = ("auc", "gauc")
_FROZEN = "frozen_"
# The seed in the tables of baselines and ensembles, which are no runs.
BASELINE_SEED = -1
# An impression of a data set is identified by user, item and time.
_KEY = ("user_id", "item_id", "time_ms")


class ScoredSplit(NamedTuple):
    """Scores of a model for the impressions of a split, sorted by user, item and time.

    Attributes:
      tasks: K names.
      key: the columns user, item and time, N rows.
      users: `[N] int64`, codes of the users.
      labels: `[N, K] int8`, 1, 0, or -1 where unknown.
      scores: `[N, K] float32` probabilities.
    """

    tasks: tuple[str, ...]
    key: pa.Table
    users: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def metrics(self, *, calibration: bool = False) -> dict[str, Any]:
        """Compute the report of `tokenrec.metrics.binary.summarize`."""
        return summarize(
            self.labels,
            self.scores,
            self.users,
            self.tasks,
            calibration=calibration,
        )


def read_scores(path: Path) -> ScoredSplit:
    """Read the scores of binary tasks that `tokenrec predict` wrote.

    Raises:
      InputError: there is no binary task, and studies compare no others.
    """
    table = pq.read_table(path)
    # Runs write their impressions in different orders. Sorted by key, which occurs once
    # in a data set, the scores of two runs can be compared row by row.
    table = table.sort_by([(name, "ascending") for name in _KEY])
    tasks = tuple(
        name.removeprefix("label_")
        for name in table.column_names
        # The labels of other kinds of tasks have other types.
        if name.startswith("label_") and table[name].type == pa.int8()
    )
    if not tasks:
        raise InputError(
            f"{path} has no scores of a binary task, and a study compares these only; "
            "add one to data.tasks, or compare the runs with `tokenrec evaluate`"
        )
    labels = [
        table[f"label_{task}"].fill_null(-1).to_numpy().astype(np.int8)
        for task in tasks
    ]
    scores = [table[f"score_{task}"].to_numpy() for task in tasks]
    # Ids may be strings; their codes are the same in every run.
    users = group_codes(table["user_id"].to_numpy())
    return ScoredSplit(
        tasks, table.select(_KEY), users, np.stack(labels, 1), np.stack(scores, 1)
    )


def sort_order(
    user_id: np.ndarray, item_id: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """Compute the order in which `read_scores` returns impressions.

    Args:
      user_id: `[N]`, ids of users.
      item_id: `[N]`, ids of items.
      time: `[N] int64`, milliseconds.

    Returns:
      `[N]`, indices that sort by user, item and time.
    """
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
    *,
    frozen: bool = False,
) -> Iterator[dict[str, Any]]:
    """Make the rows of `Result` of one model, without speed and number of parameters.

    Args:
      study: name of the study.
      model: name of the model, ensemble or baseline.
      seed: seed of the run; BASELINE_SEED for the others.
      rate: learning rate; None for the others.
      split: the split that was scored.
      report: report of `ScoredSplit.metrics`.
      frozen: it is of frozen scores, of which AUC and GAUC alone are listed.
    """
    metrics, prefix = (_FROZEN_METRICS, _FROZEN) if frozen else (METRICS, "")
    run = {
        "study": study,
        "model": model,
        "seed": seed,
        "learning_rate": rate,
        "split": split,
    }
    # The report holds Python floats, and None where a metric is undefined.
    for task, values in report["tasks"].items():
        for metric in metrics:
            value = values[metric]
            yield run | {"task": task, "metric": prefix + metric, "value": value}
    for metric in ("auc", "gauc"):
        value = report[f"macro_{metric}"]
        yield run | {"task": "macro", "metric": prefix + metric, "value": value}


def reliability_rows(
    study: str, run: TrainingRun, split: str, report: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Make the rows of `ReliabilityBin` of one run.

    Args:
      study: name of the study.
      run: model and seed.
      split: the split that was scored.
      report: report of `ScoredSplit.metrics` with calibration.
    """
    columns = {"study": study, "model": run.model, "seed": run.seed, "split": split}
    for task, values in report["tasks"].items():
        # A task without labels has no calibration.
        bins = (values["calibration"] or {"reliability": []})["reliability"]
        for number, of_bin in enumerate(bins):
            yield columns | {"task": task, "bin": number} | of_bin


def difference_rows(
    study: str,
    split: str,
    runs: Mapping[str, Mapping[int, ScoredSplit]],
    reference: str,
    draws: int,
    *,
    frozen: bool = False,
) -> Iterator[dict[str, Any]]:
    """Make the rows of `Difference` of a split, for tasks with labels of both classes.

    Args:
      study: name of the study.
      split: name of the split.
      runs: model -> seed -> scores.
      reference: the model that the others are compared with.
      draws: resamples of the bootstrap.
      frozen: the scores are frozen ones, of which AUC and GAUC alone are compared.

    Raises:
      InputError: two models did not score the same impressions.
    """
    first = next(iter(runs[reference].values()))
    for model, by_seed in runs.items():
        for scored in by_seed.values():
            same_key = scored.key.equals(first.key)
            if not same_key or not np.array_equal(scored.labels, first.labels):
                raise InputError(
                    f"'{model}' and '{reference}' did not score the same impressions "
                    f"of {split}; compare models on one data set"
                )
    for k, task in enumerate(first.tasks):
        known = first.labels[:, k] >= 0
        labels = first.labels[known, k]
        users = first.users[known]
        positives = int(labels.sum())
        # Without both classes there is no AUC.
        if positives in (0, len(labels)):
            continue
        scores = {
            model: {seed: scored.scores[known, k] for seed, scored in by_seed.items()}
            for model, by_seed in runs.items()
        }
        estimates = paired_bootstrap(labels, scores, users, reference, draws=draws)
        user_count = len(np.unique(users))
        for metric, by_model in estimates.items():
            if frozen and metric not in _FROZEN_METRICS:
                continue
            for model, estimate in by_model.items():
                yield {
                    "study": study,
                    "model": model,
                    "reference": reference,
                    "split": split,
                    "task": task,
                    "metric": f"{_FROZEN}{metric}" if frozen else metric,
                    "difference": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "p_value": estimate.p_value,
                    "users": user_count,
                    "positives": positives,
                    "undefined_draws": estimate.undefined_draws,
                }


def curve_rows(study: str, run: TrainingRun, folder: Path) -> Iterator[dict[str, Any]]:
    """Make the rows of `CurvePoint` from the log of a training run.

    Args:
      study: name of the study.
      run: model, learning rate and seed.
      folder: folder of the run.
    """
    columns = {
        "study": study,
        "model": run.model,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
    }
    for record in read_log(folder / RUN_FOLDER / METRICS_FILE):
        # One record per logged step; its other entries are values by name.
        for name, value in record.items():
            if name not in ("step", "time") and value is not None:
                point = {"step": record["step"], "name": name, "value": float(value)}
                yield columns | point


def median_speed(folder: Path) -> float | None:
    """Median of the logged examples per second of a run; None without any."""
    speeds = [
        record.get("train/examples_per_second")
        for record in read_log(folder / RUN_FOLDER / METRICS_FILE)
    ]
    # The median: other work on the machine slows single intervals.
    known = [speed for speed in speeds if speed is not None]
    return statistics.median(known) if known else None


def write_rows(
    path: Path, rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]], kind: type
) -> None:
    """Write a Parquet file in one piece: a failed write leaves the file as it was.

    Args:
      path: the file.
      rows: its rows, column -> value.
      kind: data class whose fields are the columns.
    """
    with atomic_replace(path) as partial:
        pq.write_table(
            pa.Table.from_pylist(list(rows), pa.schema(columns_of(kind))), partial
        )


def best_rates(values: Mapping[tuple[str, float], float | None]) -> dict[str, float]:
    """Choose the learning rate of each model.

    Args:
      values: (model, learning rate) -> value, larger is better; None if undefined.

    Returns:
      Model -> the rate with the highest value; of equal values the lowest rate. A model
      without any value is left out.
    """
    known = [
        (model, value, rate)
        for (model, rate), value in values.items()
        if value is not None
    ]
    # Sorted by model, value and rate: `max` takes the first of equal values, which is
    # the lowest rate.
    by_model = itertools.groupby(sorted(known), key=lambda entry: entry[0])
    return {
        model: max(entries, key=lambda entry: entry[1])[2]
        for model, entries in by_model
    }
