"""Exact retrieval from the whole catalogue: top-k items, ranks of the goals, metrics.

Every item is scored for every request; the catalogue is never sampled, because metrics
on a sample need not order models as the full metrics do (Krichene and Rendle, On
sampled metrics for item recommendation, KDD 2020). The flow from a batch to a report:

1. `rank_catalogue` (or a baseline, or beam search) computes a `RetrievalResult` on the
   devices: k items and the rank of each goal.
2. `rank_split` runs it over the requests of a split, and brings the answers to the
   host.
3. `summarize` groups the goals by request, and computes Recall@k, NDCG@k and MRR.

B requests, V items, T events, P goals of a request, k items of an answer. A catalogue
held whole takes `[B, V]` scores on each batch shard; one sharded over all devices is
searched by `sharded_top_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, HeadConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.evaluation.retrieval_result import RetrievalResult, goal_ranks
from tokenrec.evaluation.sharded_top_k import sharded_top_k
from tokenrec.metrics.groups import group_codes
from tokenrec.metrics.ranking import mrr, ndcg_at, recall_at
from tokenrec.models.heads import NextItemHead
from tokenrec.ops.tables.lookup import Stack
from tokenrec.sharding import RULES, local_batch_indices, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.output_vectors import (
    CATALOGUE_PARTS,
    ITEM_ROWS,
    all_output_vectors,
)

CUTOFFS = (1, 5, 10, 50)


class RankedItems(NamedTuple):
    """Answers of n requests on the host.

    Attributes:
      user_id: `[n]`, original ids.
      time: `[n] int64`, milliseconds.
      items: `[n, k]`, original ids, best first.
      exists: `[n, k] bool`, False where there are fewer items.
      scores: `[n, k]`.
      ranks: `[n, P]` of the goals, as `RetrievalResult.ranks`.
      goals: `[n, P] int32`, catalogue rows; -1 fills.
    """

    user_id: np.ndarray
    time: np.ndarray
    items: np.ndarray
    exists: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    goals: np.ndarray


def rank_catalogue(
    model: ModelSpec, state: TrainState, batch: Batch
) -> RetrievalResult:
    """Score every item of the catalogue for a head "next_item".

    Args:
      model: static half of the run.
      state: weights and tables.
      batch: B requests; `batch.goals: [B, 1, P]`.

    Returns:
      `head.top_k` items of each request, and the ranks of its goals.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    assert isinstance(module.head, NextItemHead)
    h = module(entities, batch, None)
    settings = model.config.head
    goals = batch.goals[:, 0]
    added = _history_scores(settings, batch.items)
    if module.head.copy is not None:
        event_vectors = module.event_item_vectors(entities, batch)
        added = module.head.copy(h, batch.items, event_vectors).bonuses[:, 0]
    stack = _item_stack(model)
    if stack is not None and stack.spread:
        return sharded_top_k(
            module.head.query(h)[:, 0],
            state.tables[stack.name],
            goals,
            None if added is None else (batch.items, added),
            first=stack.offsets[ITEM_ROWS.name],
            items=model.schema.items,
            count=settings.top_k,
            key=module.head.key,
        )
    vectors = _item_vectors(model, module.head, state, stack)
    scores = module.head.scores(h, vectors)[:, 0]
    if added is not None:
        scores = add_at_items(scores, batch.items, added)
    return _top_items(scores, goals, settings.top_k)


def rank_by_counts(
    head: HeadConfig, repeat: bool, learned: jax.Array, batch: Batch
) -> RetrievalResult:
    """Retrieve the most popular items: a baseline without a model.

    Args:
      head: gives the number of items returned, and whether seen items are left out.
      repeat: put the items of the user's own history first, the most frequent of them
        before others.
      learned: `[V] float32`, how often each item is a goal of the training split.
      batch: B requests.

    Returns:
      `head.top_k` items of each request, and the ranks of its goals.
    """
    # Below 1, so that one event of the user's own outweighs any popularity.
    shares = learned / (jnp.max(learned) + 1)
    scores = jnp.broadcast_to(
        shares,
        (batch.items.shape[0], *shares.shape),
        out_sharding=RULES("batch", None),
    )
    if repeat:
        ones = jnp.ones_like(batch.items, scores.dtype)
        scores = add_at_items(scores, batch.items, ones)
    added = _history_scores(head, batch.items)
    if added is not None:
        scores = add_at_items(scores, batch.items, added)
    return _top_items(scores, batch.goals[:, 0], head.top_k)


def _history_scores(head: HeadConfig, items: jax.Array) -> jax.Array | None:
    """What `head.drop_seen` adds to the items of the history, `[B, T]`; None: nothing."""
    if not head.drop_seen:
        return None
    return jnp.full_like(items, -jnp.inf, jnp.float32)


def _top_items(scores: jax.Array, goals: jax.Array, count: int) -> RetrievalResult:
    """Top-k of `scores: [B, V]` and ranks of `goals: [B, P]`."""
    values, items = jax.lax.top_k(scores, min(count, scores.shape[1]))
    items = jnp.where(values > -jnp.inf, items, -1)
    ranks = goal_ranks(scores, jnp.arange(scores.shape[1]), goals)
    return RetrievalResult(items.astype(jnp.int32), values, ranks)


def _item_stack(model: ModelSpec) -> Stack | None:
    """Table stack that holds the item vectors; None if they are a dense weight."""
    stacks = model.embedder.stacks.values()
    return next((stack for stack in stacks if ITEM_ROWS.name in stack.offsets), None)


def _item_vectors(
    model: ModelSpec, head: NextItemHead, state: TrainState, stack: Stack | None
) -> jax.Array:
    """`[V, d]` of all items."""
    if stack is None:
        return head.vectors()
    embedder = model.embedder
    return all_output_vectors(
        state.tables[stack.name],
        stack,
        embedder.parts[CATALOGUE_PARTS[0]],
        embedder.item_ids,
        model.schema.items,
    )


def add_at_items(scores: jax.Array, items: jax.Array, added: jax.Array) -> jax.Array:
    """Add `added: [B, T]` to `scores: [B, V]` at the items of the history, `[B, T]`.

    It is added once per event.
    """

    def _per_request(
        scores: jax.Array, items: jax.Array, added: jax.Array
    ) -> jax.Array:
        request = jnp.arange(scores.shape[0])[:, None]
        # -1, no event, would count from the end: it is sent out of range and dropped.
        columns = jnp.where(items < 0, scores.shape[1], items)
        return scores.at[request, columns].add(added, mode="drop")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _per_request(scores, items, added)
    spec = RULES("batch", None)
    return jax.shard_map(_per_request, in_specs=(spec,) * 3, out_specs=spec)(
        scores, items, added
    )


def rank_split(
    step: Callable[[Batch], RetrievalResult],
    config: Config,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    *,
    limit: int = 0,
) -> Iterator[RankedItems]:
    """Yield the answers to every request of a split, batch by batch.

    As in `evaluate.score_split`, a process computes its own requests of a batch, and
    all processes get the answers of all.

    Args:
      step: computes the answers of a batch of B requests.
      config: of the run.
      dataset: the prepared data set.
      split: "train", "valid" or "test".
      mesh: mesh that `step` runs on.
      limit: number of requests, spread evenly over the split; 0 is all of them.

    Yields:
      The answers of n requests; fills of the last batch are left out.
    """
    local = local_batch_indices(
        mesh, config.data.eval_batch_size, "data.eval_batch_size"
    )
    for host, read_rows in eval_batches(
        dataset,
        config.data,
        split,
        limit=limit,
        own=local,
        ages=reads_event_ages(config.model),
    ):
        result = to_host(step(to_devices(host.batch, mesh)))
        # 1. Goals of each request, from the log rows that they stand in: `[B, P]`.
        rows = read_rows.rows[:, 0]
        goals = np.full(rows.shape, -1, np.int32)
        goals[rows >= 0] = read_rows.item
        # 2. Requests that are no fill. Goals fill from the left.
        is_request = rows[:, 0] >= 0
        # 3. `read_rows` names every goal; a request has the user and the time of its
        # first one.
        goal_count = (rows >= 0).sum(axis=1)[is_request]
        first_goal = np.cumsum(goal_count) - goal_count
        items = result.items[is_request]
        yield RankedItems(
            user_id=read_rows.user_id[first_goal],
            time=read_rows.time[first_goal],
            items=dataset.catalogue.item_id[np.maximum(items, 0)],
            exists=items >= 0,
            scores=result.scores[is_request],
            ranks=result.ranks[is_request],
            goals=goals[is_request],
        )


def summarize(
    answers: Iterator[RankedItems], catalogue: int, *, listed: int | None = None
) -> dict[str, Any]:
    """Compute Recall@k, NDCG@k and MRR of the answers, k in 1, 5, 10, 50.

    Goals of one user at one time are one request, however many streams they took, and
    an item counts once in it.

    Args:
      answers: parts of the answers, in any order.
      catalogue: number of items V.
      listed: items of an answer, where goals outside of the answer have no rank:
        Recall@k and NDCG@k with k > `listed` are None, and MRR takes an unlisted goal
        for 0. None: the ranks are those in the whole catalogue.

    Returns:
      `{"retrieval": {"recall@k", "ndcg@k", "mrr", "users", "requests", "catalogue"}}`;
      a metric is None if there is no request.
    """
    parts = [(a.user_id, a.time, a.ranks, a.goals) for a in answers]
    if not parts:
        empty = {f"{name}@{k}": None for k in CUTOFFS for name in ("recall", "ndcg")}
        return {
            "retrieval": empty
            | {"mrr": None, "users": 0, "requests": 0, "catalogue": catalogue}
        }
    user, time, ranks, goals = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    codes = group_codes(user)
    ranks = _by_request(codes, time, ranks, goals)
    metrics: dict[str, Any] = {}
    for k in CUTOFFS:
        known = listed is None or k <= listed
        metrics[f"recall@{k}"] = recall_at(ranks, k) if known else None
        metrics[f"ndcg@{k}"] = ndcg_at(ranks, k) if known else None
    counts = {
        "users": len(np.unique(codes)),
        "requests": len(ranks),
        "catalogue": catalogue,
    }
    return {"retrieval": metrics | {"mrr": mrr(ranks)} | counts}


def _by_request(
    user: np.ndarray, time: np.ndarray, ranks: np.ndarray, goals: np.ndarray
) -> np.ndarray:
    """Gather the goals of all streams of one request.

    Args:
      user: `[n] int64`, user codes of the streams.
      time: `[n] int64`.
      ranks: `[n, P]`, 0 fills.
      goals: `[n, P]`, catalogue rows.

    Returns:
      `[requests, D] float64`, the ranks of each request's distinct goals, D the most of
      any request; 0 fills.
    """
    # 1. Streams of one user at one time stand side by side, and get one request number.
    order = np.lexsort((time, user))
    user, time, ranks, goals = user[order], time[order], ranks[order], goals[order]
    opens_request = np.ones(len(user), bool)
    opens_request[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    request = np.cumsum(opens_request) - 1
    # 2. An item that two lines of a basket name is one goal.
    stream, column = np.nonzero(ranks)
    pairs, first = np.unique(
        np.stack([request[stream], goals[stream, column]]), axis=1, return_index=True
    )
    goal_request = pairs[0]
    stream, column = stream[first], column[first]
    # 3. Pairs are sorted by request: a goal's place is its distance to the first of
    # them.
    place = np.arange(len(goal_request)) - np.searchsorted(goal_request, goal_request)
    shape = (int(opens_request.sum()), int(place.max(initial=0)) + 1)
    by_request = np.zeros(shape, np.float64)
    by_request[goal_request, place] = ranks[stream, column]
    return by_request
