"""Write the scores of a prepared split to a Parquet file."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.evaluation.catalogue import RankedItems, rank_split
from tokenrec.evaluation.evaluate import (
    Scores,
    jit_eval_step,
    make_retrieval_step,
    score_split,
)
from tokenrec.evaluation.freeze import check_freeze, freeze_time
from tokenrec.runtime import distributed
from tokenrec.runtime.table_file import write_tables
from tokenrec.sharding import make_run_mesh
from tokenrec.task_plan import TaskPlan


def predict_run(
    workdir: Path,
    split: str | None,
    checkpoint: str,
    data: Path | None,
    out: Path,
    *,
    freeze_at: str | None = None,
) -> int:
    """Write the scores of a split, as `tokenrec predict`, on all processes.

    Ranking: a table row per impression, with the columns `user_id, item_id, time_ms`,
    and per task `label_TASK` (null where unknown) and float32 scores. Of a binary task
    the label is an int8, and `score_TASK` a probability; of a task of numbers both are
    float32 numbers in the unit of the label; of a task of classes the label is the name
    of the class, and `score_TASK_CLASS` the probability of each. Retrieval:
    `head.top_k` table rows per request, with the columns `user_id, rank` (from 1),
    `item_id, score, time_ms` (of the request).

    Args:
      workdir: folder of the run.
      split: split to score; None is the only one of the data set.
      checkpoint: "best", "latest" or a step.
      data: the prepared data set; None is that of the run's config.
      out: Parquet file to write. It appears when it is complete, and a failure leaves
        an older file as it was. The first process writes it.
      freeze_at: ranking: histories and statistics of the past end at this time
        (`freeze.freeze_time`); None: they do not.

    Returns:
      The number of table rows.

    Raises:
      InputError: the run, the checkpoint, the split or the data set is missing or
        wrong.
    """
    with distributed.raise_on_all_processes():
        config = load_run_config(workdir, data)
        mesh = make_run_mesh(config)
    distributed.assert_same_on_all_processes(
        {"--split": split, "--freeze-at": freeze_at}
    )
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
        with distributed.raise_on_all_processes():
            split = run.dataset.choose_split(split)
            end = None
            if freeze_at is not None:
                check_freeze(run.model.config, 0)
                end = freeze_time(run.dataset, split, freeze_at)
        tables = prediction_tables(run, split, mesh, freeze_at=end)
        if distributed.is_first_process():
            return write_tables(tables, out)
        # The other processes take part in the computation and write nothing.
        return sum(table.num_rows for table in tables)


def prediction_tables(
    run: OpenedRun, split: str, mesh: Mesh, *, freeze_at: int | None = None
) -> Iterator[pa.Table]:
    """Yield the scores of a split, batch by batch, as tables of one schema.

    Args:
      run: the run and its weights.
      split: split to score.
      mesh: the mesh in use, which holds the weights.
      freeze_at: ranking: milliseconds at which histories end.
    """
    config = run.model.config
    if config.data.objective == "retrieval":
        yield from _retrieval_tables(run, config, split, mesh)
        return
    step = jit_eval_step(run.model)
    for scores in score_split(
        step, run.state, config, run.dataset, split, mesh, freeze_at=freeze_at
    ):
        yield _scores_table(scores, run.model.evaluated_plans)


def _retrieval_tables(
    run: OpenedRun, config: Config, split: str, mesh: Mesh
) -> Iterator[pa.Table]:
    """Yield the retrieved items of each request once."""
    step = functools.partial(make_retrieval_step(run.model, run.dataset), run.state)
    # A request with many goals takes several streams, whose answers are the same.
    written: set[tuple[object, int]] = set()
    for answers in rank_split(step, config, run.dataset, split, mesh):
        users, times = answers.user_id.tolist(), answers.time.tolist()
        new = []
        for n, request in enumerate(zip(users, times, strict=True)):
            if request not in written:
                written.add(request)
                new.append(n)
        if new:
            yield _items_table(RankedItems(*(part[new] for part in answers)))


def _items_table(answers: RankedItems) -> pa.Table:
    """A table row per retrieved item."""
    request, place = np.nonzero(answers.exists)
    return pa.table(
        {
            "user_id": pa.array(answers.user_id[request]),
            "rank": pa.array((place + 1).astype(np.int32)),
            "item_id": pa.array(answers.items[request, place]),
            "score": pa.array(answers.scores[request, place].astype(np.float32)),
            "time_ms": pa.array(answers.time[request]),
        }
    )


def _scores_table(scores: Scores, plans: Sequence[TaskPlan]) -> pa.Table:
    """A table row per impression."""
    columns = {
        "user_id": pa.array(scores.user_id),
        "item_id": pa.array(scores.item_id),
        "time_ms": pa.array(scores.time),
    }
    for k, plan in enumerate(plans):
        task, label = plan.task, scores.labels[:, k]
        values = pa.array(label, mask=label < 0)
        names = [f"score_{task.name}"]
        if task.kind == "real":
            assert scores.targets is not None
            values = pa.array(scores.targets[:, plan.target], mask=label < 0)
        elif task.kind == "classes":
            values = pa.array(task.classes, pa.string()).take(values)
            names = [f"score_{task.name}_{of_class}" for of_class in task.classes]
        columns[f"label_{task.name}"] = values
        for name, output in zip(names, range(plan.start, plan.stop), strict=True):
            columns[name] = pa.array(
                np.ascontiguousarray(scores.probabilities[:, output])
            )
    return pa.table(columns)
