"""Evaluate a model on a split of a prepared data set: from batches to a report.

Ranking, `score_split` and `evaluate`:

1. `data.pipeline.eval_batches` yields every impression of the split once, in batches of
   one shape. A process gathers the samples of its own devices.
2. The eval step computes predictions `[B, N, O]` on the mesh; `to_host` brings those
   of all processes to each of them. Rows that only fill a batch are left out, and so
   are the tasks that `data.auxiliary` names.
3. `TaskStore` collects labels, predictions and users. Of binary tasks memory is
   bounded: further rows lie in temporary files.
4. After the last batch it computes exact AUC, GAUC, log loss and normalised entropy per
   binary task, and for `tokenrec evaluate` the calibration too; of other tasks the
   metrics of their kind. No metric is an average over batches.

Retrieval is the same with the steps of `catalogue.py`: items and ranks instead of
probabilities, Recall@k, NDCG@k and MRR instead of AUC.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches, task_names
from tokenrec.errors import InputError
from tokenrec.evaluation.alignment import make_alignment_evaluator
from tokenrec.evaluation.baseline_reports import (
    evaluate_baselines,
    retrieval_baselines,
)
from tokenrec.evaluation.catalogue import rank_catalogue, rank_split, summarize
from tokenrec.evaluation.freeze import add_frozen, check_freeze, freeze_time
from tokenrec.evaluation.generate import jit_generate_step
from tokenrec.evaluation.retrieval_result import RetrievalResult
from tokenrec.evaluation.task_store import TaskStore
from tokenrec.metrics.groups import group_codes
from tokenrec.runtime import distributed
from tokenrec.sharding import local_batch_indices, make_run_mesh, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState
from tokenrec.step import eval_step
from tokenrec.task_plan import evaluated_tasks, plan_tasks


class Scores(NamedTuple):
    """Scored impressions of one batch: n log rows, K tasks that are evaluated.

    Attributes:
      row: `[n] int64`, number of the log row in the split.
      user_id: `[n]`, original ids.
      item_id: `[n]`, original ids.
      time: `[n] int64`, milliseconds.
      labels: `[n, K] int8`, -1 where unknown, as in `Batch.labels`.
      probabilities: `[n, O] float32`, the predictions of `predict_tasks`: of binary
        tasks probabilities, `[n, K]` if all are.
      request: `[n] int64`, number of the request; -1 for a row on its own.
      targets: `[n, V] float32`, labels of tasks of numbers, NaN where unknown; None
        without such a task.
    """

    row: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    time: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    request: np.ndarray
    targets: np.ndarray | None = None


class Evaluator(Protocol):
    """A function that evaluates a state, made by `make_evaluator`."""

    def __call__(
        self,
        state: TrainState,
        split: str,
        limit: int = 0,
        between_batches: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a state on a split. Call it under the mesh.

        Args:
          state: weights and tables.
          split: split to evaluate.
          limit: number of samples or requests, spread evenly over the split; 0 is all.
          between_batches: called without arguments after every batch, to report
            progress or to stop: what it raises ends the evaluation.

        Returns:
          The report, in the form of `evaluate` for ranking and of `catalogue.summarize`
          for retrieval.
        """
        ...


def jit_eval_step(model: ModelSpec) -> Callable[[TrainState, Batch], jax.Array]:
    """Compile the step from a batch to predictions `[B, N, O] float32`."""
    return jax.jit(functools.partial(eval_step, model))


def make_retrieval_step(
    model: ModelSpec, dataset: Dataset
) -> Callable[[TrainState, Batch], RetrievalResult]:
    """Compile the step that answers a retrieval batch.

    Call it under the mesh that the step runs on: the semantic ids of a head
    "semantic_id" are put on its devices.
    """
    if model.config.head.retrieval == "next_item":
        return jax.jit(functools.partial(rank_catalogue, model))
    assert dataset.catalogue.codes is not None
    return jit_generate_step(model, dataset.catalogue.codes[: dataset.known_items])


def make_evaluator(model: ModelSpec, dataset: Dataset, mesh: Mesh) -> Evaluator:
    """Make the function that evaluates states of a model; the step is compiled once.

    Args:
      model: static half of the run.
      dataset: the prepared data set.
      mesh: mesh in use, here and at every call of the result.

    Returns:
      `evaluator(state, split, limit=0, between_batches=None) -> report`.
    """
    config = model.config
    if config.data.objective == "retrieval":
        retrieve = make_retrieval_step(model, dataset)
        # Beam search ranks its beams alone: Recall@k and NDCG@k with k > beams are
        # null.
        listed = config.head.beams if config.head.retrieval == "semantic_id" else None
        align = make_alignment_evaluator(model, mesh) if model.alignment else None

        def _evaluate_retrieval(
            state: TrainState,
            split: str,
            limit: int = 0,
            between_batches: Callable[[], None] | None = None,
        ) -> dict[str, Any]:
            step = functools.partial(retrieve, state)
            answers = rank_split(step, config, dataset, split, mesh, limit=limit)
            report = summarize(
                _calling(answers, between_batches), model.schema.items, listed=listed
            )
            return report | (
                {"alignment": align(state, between_batches)} if align else {}
            )

        return _evaluate_retrieval

    step = jit_eval_step(model)

    def _evaluate_ranking(
        state: TrainState,
        split: str,
        limit: int = 0,
        between_batches: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        scores = score_split(step, state, config, dataset, split, mesh, limit=limit)
        return evaluate(_calling(scores, between_batches), model)

    return _evaluate_ranking


def _calling[T](
    parts: Iterator[T], between_batches: Callable[[], None] | None
) -> Iterator[T]:
    """Yield the parts, and call `between_batches` after each."""
    for part in parts:
        yield part
        if between_batches is not None:
            between_batches()


def score_split(
    step: Callable[[TrainState, Batch], jax.Array],
    state: TrainState,
    config: Config,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    *,
    limit: int = 0,
    freeze_at: int | None = None,
) -> Iterator[Scores]:
    """Yield the scores of every impression of a split, batch by batch.

    A process gathers and computes its own samples of a batch; all processes get the
    scores of all.

    Args:
      step: maps a state and a batch to predictions `[B, N, O]`.
      state: weights and tables.
      config: of the run.
      dataset: the prepared data set.
      split: split to score.
      mesh: mesh that `step` runs on.
      limit: number of samples, spread evenly over the split; 0 is all of them.
      freeze_at: milliseconds; events from this time on enter no history.

    Yields:
      The scores of n impressions.
    """
    local = local_batch_indices(
        mesh, config.data.eval_batch_size, "data.eval_batch_size"
    )
    names = task_names(dataset.schema, config.data)
    plans = plan_tasks(dataset.schema, names, config.data.losses)
    kept = evaluated_tasks(plans, config.data.auxiliary)
    for host, read_rows in eval_batches(
        dataset,
        config.data,
        split,
        limit=limit,
        own=local,
        ages=reads_event_ages(config.model),
        freeze_at=freeze_at,
    ):
        predictions = to_host(step(state, to_devices(host.batch, mesh)))
        # Positions `[B, N]` that hold an impression; others fill the batch.
        is_read = read_rows.rows >= 0
        targets = read_rows.targets
        yield Scores(
            row=read_rows.rows[is_read],
            user_id=read_rows.user_id,
            item_id=read_rows.item_id,
            time=read_rows.time,
            labels=read_rows.labels[:, kept.labels],
            probabilities=predictions[is_read][:, kept.outputs],
            request=read_rows.request,
            targets=targets[:, kept.targets] if kept.targets else None,
        )


def evaluate(
    scores: Iterator[Scores], model: ModelSpec, *, calibration: bool = False
) -> dict[str, Any]:
    """Compute the exact metrics of scored impressions.

    Args:
      scores: the impressions, batch by batch.
      model: static half of the run.
      calibration: also compute the calibration of each task.

    Returns:
      `{"macro_auc", "macro_gauc", "tasks": {task: {...}}}`, in the form of
      `TaskStore.summarize`.
    """
    store = TaskStore(model.evaluated_plans, ndcg=model.config.data.request_ndcg)
    for part in scores:
        store.append(
            part.labels,
            part.probabilities,
            group_codes(part.user_id),
            targets=part.targets,
            time=part.time,
            request=part.request,
        )
    return store.summarize(calibration=calibration)


def evaluate_run(
    workdir: Path,
    split: str | None,
    checkpoint: str,
    data: Path | None,
    *,
    baselines: bool = False,
    limit: int = 0,
    freeze_at: str | None = None,
    request_ndcg: int | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run, as `tokenrec evaluate`, on all processes.

    Args:
      workdir: folder of the run.
      split: split to evaluate; None is the only one of the data set.
      checkpoint: "best", "latest" or a step.
      data: the prepared data set; None is that of the run's config.
      baselines: also compute the metrics of the baselines on the same rows.
      limit: number of samples or requests, spread evenly over the split; 0 is all.
      freeze_at: as in `evaluate_opened`.
      request_ndcg: takes the place of the run's `data.request_ndcg`.

    Returns:
      `{"split", "step", "checkpoint"}` and the report of `evaluate_opened`.

    Raises:
      InputError: the run, the checkpoint, the split or the data set is missing or
        wrong.
    """
    # 1. Errors in one process are raised in all, before any of them waits for the
    # others.
    with distributed.raise_on_all_processes():
        config = load_run_config(workdir, data)
        mesh = make_run_mesh(config)
    distributed.assert_same_on_all_processes(
        {
            "--split": split,
            "--baselines": baselines,
            "--samples": limit,
            "--freeze-at": freeze_at,
            "--request-ndcg": request_ndcg,
        }
    )
    # 2. The checkpoint, restored onto the mesh, and its metrics.
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
    if request_ndcg is not None:
        run = _with_request_ndcg(run, request_ndcg)
    with distributed.raise_on_all_processes():
        split = run.dataset.choose_split(split)
    report = evaluate_opened(
        run, mesh, split, baselines=baselines, limit=limit, freeze_at=freeze_at
    )
    return {"split": split, "step": run.step, "checkpoint": checkpoint} | report


def _with_request_ndcg(run: OpenedRun, places: int) -> OpenedRun:
    """Return the run with another `data.request_ndcg`.

    Raises:
      InputError: it retrieves, and so has no requests to order.
    """
    config = run.model.config
    if config.data.objective == "retrieval":
        raise InputError(
            f"--request-ndcg={places} orders the rows of a request, and the run has "
            "data.objective='retrieval', whose NDCG is that of the catalogue; leave it "
            "out"
        )
    data = dataclasses.replace(config.data, request_ndcg=places)
    config = dataclasses.replace(config, data=data)
    return run._replace(model=dataclasses.replace(run.model, config=config))


def _refuse_new_items(dataset: Dataset) -> None:
    """Refuse to measure retrieval where some goals cannot be retrieved."""
    new = dataset.schema.items - dataset.known_items
    if new:
        raise InputError(
            f"data '{dataset.directory}' has {new:,} items that the run was not trained "
            "with, and so cannot retrieve: recall would leave them out; train on a data "
            "set that has them, or use `tokenrec predict`"
        )


def evaluate_opened(
    run: OpenedRun,
    mesh: Mesh,
    split: str,
    *,
    baselines: bool = False,
    limit: int = 0,
    freeze_at: str | None = None,
) -> dict[str, Any]:
    """Evaluate an opened run, on all processes.

    Args:
      run: the run and its weights.
      mesh: mesh that holds the weights.
      split: split to evaluate.
      baselines: also compute the metrics of the baselines on the same rows.
      limit: number of samples or requests, spread evenly over the split; 0 is all.
      freeze_at: ranking: also evaluate with histories that end at this time, an ISO
        date or time or "split" (`freeze.freeze_time`); None: not.

    Returns:
      The report of `Evaluator`, for ranking with `"calibration"` of each task
      (`metrics.calibration`), and if asked `"baselines"`: reports by name. With
      `freeze_at` each report has `"frozen"`: `{"history_ends_ms"}` and the report with
      frozen histories, of the same rows.

    Raises:
      InputError: `freeze_at` is no time, freezes nothing, or does not go with the run
        or with `limit`.
    """
    config = run.model.config
    with distributed.raise_on_all_processes():
        if config.data.objective == "retrieval":
            _refuse_new_items(run.dataset)
        end = None
        if freeze_at is not None:
            check_freeze(config, limit)
            end = freeze_time(run.dataset, split, freeze_at)
    with jax.set_mesh(mesh):
        if config.data.objective == "retrieval":
            return _evaluate_retrieval_run(run, config, split, mesh, baselines, limit)
        report = _evaluate_ranking_run(run, split, mesh, baselines, limit, None)
        if end is not None:
            frozen = _evaluate_ranking_run(run, split, mesh, baselines, limit, end)
            add_frozen(report, frozen, end)
        return report


def _evaluate_retrieval_run(
    run: OpenedRun, config: Config, split: str, mesh: Mesh, baselines: bool, limit: int
) -> dict[str, Any]:
    """Report of a retrieval run."""
    report = make_evaluator(run.model, run.dataset, mesh)(run.state, split, limit)
    if baselines:
        report["baselines"] = retrieval_baselines(
            run.model.config, run.dataset, split, mesh, limit=limit
        )
    return report


def _binary_tasks(model: ModelSpec, freeze_at: int | None) -> tuple[str, ...]:
    """Evaluated tasks that the baselines score; say once which they do not."""
    tasks = [plan.task for plan in model.evaluated_plans]
    others = [task.name for task in tasks if task.kind != "binary"]
    if others and freeze_at is None and distributed.is_first_process():
        print(
            f"tokenrec: the baselines score binary tasks only, and not "
            f"{', '.join(others)}, whose reports hold the metrics of a constant",
            file=sys.stderr,
        )
    return tuple(task.name for task in tasks if task.kind == "binary")


def _evaluate_ranking_run(
    run: OpenedRun,
    split: str,
    mesh: Mesh,
    baselines: bool,
    limit: int,
    freeze_at: int | None,
) -> dict[str, Any]:
    """Report of a ranking run, with histories frozen at a time or not."""
    config = run.model.config
    rows: list[np.ndarray] = []

    def noting_rows(scores: Iterator[Scores]) -> Iterator[Scores]:
        """Yield the scores, and keep their log rows for the baselines."""
        for part in scores:
            rows.append(part.row)
            yield part

    step = jit_eval_step(run.model)
    scores = score_split(
        step,
        run.state,
        config,
        run.dataset,
        split,
        mesh,
        limit=limit,
        freeze_at=freeze_at,
    )
    report = evaluate(noting_rows(scores), run.model, calibration=True)
    if baselines:
        report["baselines"] = evaluate_baselines(
            run.dataset,
            split,
            _binary_tasks(run.model, freeze_at),
            np.concatenate(rows),
            freeze_at=freeze_at,
            ndcg=config.data.request_ndcg,
        )
    return report
