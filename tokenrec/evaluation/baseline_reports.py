"""Metrics of the baselines on the rows that a run was evaluated on.

For `tokenrec evaluate --baselines`: the baselines of `baselines.py`, where it is
installed the LightGBM of `boosted_trees.py`, and for synthetic data the ceiling of
`ceiling.py`; or, for retrieval, the most popular items.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config
from tokenrec.data.dataset import Dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.evaluation.baselines import goal_counts, split_baselines
from tokenrec.evaluation.boosted_trees import (
    INSTALL,
    LIGHTGBM,
    has_lightgbm,
    lightgbm_scores,
)
from tokenrec.evaluation.catalogue import rank_by_counts, rank_split, summarize
from tokenrec.evaluation.ceiling import CEILING, known_probabilities
from tokenrec.evaluation.task_store import TaskStore
from tokenrec.metrics.groups import group_codes
from tokenrec.runtime import distributed
from tokenrec.sharding import RULES
from tokenrec.task_plan import plan_tasks


def evaluate_baselines(
    dataset: Dataset,
    split: str,
    tasks: tuple[str, ...],
    rows: np.ndarray,
    *,
    freeze_at: int | None = None,
    ndcg: int = 0,
) -> dict[str, Any]:
    """Compute the metrics of the baselines on given rows of a split.

    Args:
      dataset: the prepared data set.
      split: split that the rows are of.
      tasks: K names of binary tasks; without any there are no baselines.
      rows: `[n] int64`, log rows of the split, all of them scored, in any order.
      freeze_at: milliseconds; earlier events and past rates end before this time.
      ndcg: also compute NDCG at this many places within requests; 0: not.

    Returns:
      Name -> metrics in the form of `TaskStore.summarize`, calibration included.
      "lightgbm" is among them if the library is installed, and otherwise a line on
      stderr says how to install it. A synthetic data set has a last entry "ceiling
      (known probabilities)", the metrics of the probabilities from which its labels
      were drawn.
    """
    if not tasks:
        return {}
    log = dataset.load(split)
    probabilities = split_baselines(dataset, split, tasks, freeze_at=freeze_at)
    if has_lightgbm():
        probabilities[LIGHTGBM] = lightgbm_scores(
            dataset, split, tasks, freeze_at=freeze_at
        )
    elif freeze_at is None and distributed.is_first_process():
        print(
            f"tokenrec: no baseline '{LIGHTGBM}', because the library is not "
            f"installed: {INSTALL}",
            file=sys.stderr,
        )
    ceiling = known_probabilities(dataset, split, log, tasks)
    if ceiling is not None:
        probabilities[CEILING] = ceiling
    # Baselines score all scored rows; `places` are those of the given rows among them.
    scored = np.flatnonzero(log.flags & SCORED)
    places = np.searchsorted(scored, np.sort(rows))
    task_names = [task.name for task in dataset.schema.tasks]
    columns = [task_names.index(task) for task in tasks]
    chunk_users = group_codes(log.user_id)
    users = np.repeat(chunk_users, np.diff(log.start))[scored[places]]
    at = scored[places]
    reports = {}
    for name, scores in probabilities.items():
        store = TaskStore(plan_tasks(dataset.schema, tasks, {}), ndcg=ndcg)
        store.append(
            log.labels[at][:, columns],
            scores[places].astype(np.float32),
            users,
            time=log.time[at],
            request=log.request[at],
        )
        reports[name] = store.summarize(calibration=True)
    return reports


def retrieval_baselines(
    config: Config, dataset: Dataset, split: str, mesh: Mesh, *, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """Compute the metrics of retrieval baselines on the requests of a split.

    Call it under the mesh.

    Args:
      config: of the run.
      dataset: the prepared data set.
      split: split to evaluate.
      mesh: mesh in use.
      limit: number of requests, spread evenly over the split; 0 is all of them.

    Returns:
      Metrics in the form of `catalogue.summarize` of "popularity", the items that most
      goals of the training split are, and of "repeat", the user's own items before the
      popular ones.
    """
    task_names = [task.name for task in dataset.schema.tasks]
    task = task_names.index(config.data.positive) if config.data.positive else None
    counts = goal_counts(dataset.load("train"), dataset.schema.items, task)
    learned = jax.device_put(counts, jax.NamedSharding(mesh, RULES(None)))
    reports = {}
    for name, repeat in (("popularity", False), ("repeat", True)):
        rank = jax.jit(functools.partial(rank_by_counts, config.head, repeat))
        step = functools.partial(rank, learned)
        answers = rank_split(step, config, dataset, split, mesh, limit=limit)
        reports[name] = summarize(answers, dataset.schema.items)
    return reports
