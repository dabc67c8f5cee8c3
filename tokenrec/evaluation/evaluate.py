"""Streaming evaluation over a pipeline: scores of a split, and exact metrics of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.config import Config
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset
from tokenrec.data.log import SCORED
from tokenrec.data.pipeline import eval_batches
from tokenrec.evaluation.baselines import baselines_of, goal_counts
from tokenrec.evaluation.beam_search import build_trie
from tokenrec.evaluation.catalogue import (
    rank_by_counts,
    rank_catalogue,
    rank_split,
    summarize,
)
from tokenrec.evaluation.generate import jit_generate_step
from tokenrec.evaluation.sharded_top_k import RetrievalResult
from tokenrec.metrics.groups import group_codes
from tokenrec.metrics.score_store import ScoreStore
from tokenrec.runtime import distributed
from tokenrec.sharding import RULES, local_batch_indices, make_mesh, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState
from tokenrec.step import eval_step


class Scores(NamedTuple):
    """Scored rows of one batch. n rows, K tasks.

    `row: [n] int64` in the split, `user_id, item_id: [n]` original ids, `time: [n] int64` ms, `labels: [n, K] int8`,
    `probabilities: [n, K] float32`.
    """

    row: np.ndarray
    user_id: np.ndarray
    item_id: np.ndarray
    time: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray


def jit_eval_step(model: ModelSpec) -> Callable[[TrainState, Batch], jax.Array]:
    return jax.jit(functools.partial(eval_step, model))


def make_retrieval_step(
    model: ModelSpec, dataset: Dataset
) -> Callable[[TrainState, Batch], RetrievalResult]:
    """The compiled step that answers a retrieval batch; make it under the mesh that it runs on."""
    if model.config.head.retrieval == "next_item":
        return jax.jit(functools.partial(rank_catalogue, model))
    assert dataset.catalogue.codes is not None
    return jit_generate_step(model, build_trie(dataset.catalogue.codes))


def make_evaluator(
    model: ModelSpec, dataset: Dataset, mesh: Mesh
) -> Callable[..., dict[str, Any]]:
    """`assess(state, split, limit=0, pulse=None) -> report`, of ranking or of retrieval; compiled once. Call it under
    the mesh. `pulse()` is called after every batch; what it raises ends the evaluation.
    """
    config = model.config
    if config.data.objective == "retrieval":
        find = make_retrieval_step(model, dataset)
        listed = config.head.beams if config.head.retrieval == "semantic_id" else None
        return lambda state, split, limit=0, pulse=None: summarize(
            _pulsed(
                rank_split(
                    functools.partial(find, state),
                    config,
                    dataset,
                    split,
                    mesh,
                    limit=limit,
                ),
                pulse,
            ),
            model.schema.items,
            listed=listed,
        )
    step = jit_eval_step(model)
    return lambda state, split, limit=0, pulse=None: evaluate(
        _pulsed(
            score_split(step, state, config, dataset, split, mesh, limit=limit), pulse
        ),
        model.tasks,
    )


def _pulsed[T](parts: Iterator[T], pulse: Callable[[], None] | None) -> Iterator[T]:
    for part in parts:
        yield part
        if pulse is not None:
            pulse()


def score_split(
    step: Callable[[TrainState, Batch], jax.Array],
    state: TrainState,
    config: Config,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    *,
    limit: int = 0,
) -> Iterator[Scores]:
    """Scores of every impression of a split, or of `limit` samples spread evenly over it, batch by batch.

    A process gathers and computes its own samples of a batch; all of them get the scores of all.
    """
    own = local_batch_indices(mesh, config.data.eval_batch_size, "data.eval_batch_size")
    for host, who in eval_batches(
        dataset,
        config.data,
        split,
        limit=limit,
        own=own,
        ages=reads_event_ages(config.model),
    ):
        read = who.rows >= 0
        probabilities = to_host(step(state, to_devices(host.batch, mesh)))
        yield Scores(
            who.rows[read],
            who.user_id,
            who.item_id,
            who.time,
            who.labels,
            probabilities[read],
        )


def evaluate(scores: Iterator[Scores], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of scored rows: `{"macro_auc", "macro_gauc", "tasks": {task: {...}}}` (see `metrics.summarize`)."""
    store = ScoreStore(tasks)
    for part in scores:
        store.append(part.labels, part.probabilities, group_codes(part.user_id))
    return store.summarize()


def evaluate_run(
    workdir: Path,
    split: str,
    checkpoint: str,
    data: Path | None,
    *,
    baselines: bool = False,
    limit: int = 0,
) -> dict[str, Any]:
    """`tokenrec evaluate`: the run's metrics on a split, with those of the baselines on the same rows if asked."""
    with distributed.raise_on_all_processes():
        config = load_run_config(workdir, data)
        mesh = make_mesh(config.mesh)
    distributed.assert_same_on_all_processes(
        {"--split": split, "--baselines": baselines, "--samples": limit}
    )
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
        if config.data.objective == "retrieval":
            found = make_evaluator(run.model, run.dataset, mesh)(
                run.state, split, limit
            )
            if baselines:
                found["baselines"] = retrieval_baselines(
                    run.model.config, run.dataset, split, mesh, limit=limit
                )
            return {"split": split, "step": run.step, "checkpoint": checkpoint} | found
        rows: list[np.ndarray] = []

        def noted() -> Iterator[Scores]:
            step = jit_eval_step(run.model)
            for part in score_split(
                step, run.state, config, run.dataset, split, mesh, limit=limit
            ):
                rows.append(part.row)
                yield part

        found = evaluate(noted(), run.model.tasks)
    report = {"split": split, "step": run.step, "checkpoint": checkpoint} | found
    if baselines:
        report["baselines"] = evaluate_baselines(
            run.dataset, split, run.model.tasks, np.concatenate(rows)
        )
    return report


def evaluate_baselines(
    dataset: Dataset, split: str, tasks: tuple[str, ...], rows: np.ndarray
) -> dict[str, Any]:
    """Metrics of the data set's baselines on the given rows of a split, by name."""
    names = [task.name for task in dataset.schema.tasks]
    columns = [names.index(task) for task in tasks]
    log = dataset.load(split)
    scored = np.flatnonzero(log.flags & SCORED)
    at = np.searchsorted(scored, np.sort(rows))
    users = np.repeat(group_codes(log.user_id), np.diff(log.start))[scored[at]]
    labels = log.labels[scored[at]][:, columns]
    found = {}
    for name, probabilities in baselines_of(dataset, split, tasks).items():
        store = ScoreStore(tasks)
        store.append(labels, probabilities[at].astype(np.float32), users)
        found[name] = store.summarize()
    return found


def retrieval_baselines(
    config: Config, dataset: Dataset, split: str, mesh: Mesh, *, limit: int = 0
) -> dict[str, dict[str, Any]]:
    """Metrics of "popularity", and of "repeat", the user's own items before the popular ones, on the requests of a
    split. Call it under the mesh.
    """
    known = [task.name for task in dataset.schema.tasks]
    task = known.index(config.data.positive) if config.data.positive else None
    counts = goal_counts(dataset.load("train"), dataset.schema.items, task)
    learned = jax.device_put(counts, jax.NamedSharding(mesh, RULES(None)))
    found = {}
    for name, repeat in (("popularity", False), ("repeat", True)):
        find = functools.partial(
            jax.jit(functools.partial(rank_by_counts, config.head, repeat)), learned
        )
        answers = rank_split(find, config, dataset, split, mesh, limit=limit)
        found[name] = summarize(answers, dataset.schema.items)
    return found
