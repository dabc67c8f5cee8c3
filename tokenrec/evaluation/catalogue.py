"""Retrieval from the whole catalogue: the best items of every request, the ranks of its goals, and their metrics.

The full catalogue is ranked, never a sample of it (Krichene and Rendle, KDD 2020, show what samples do to metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, HeadConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.evaluation.sharded_top_k import RetrievalResult, sharded_top_k
from tokenrec.metrics.groups import group_codes
from tokenrec.metrics.ranking import mrr, ndcg_at, recall_at
from tokenrec.models.heads import ItemHead
from tokenrec.ops.tables.lookup import Stack
from tokenrec.sharding import RULES, local_batch_indices, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.embed import ITEM_ROWS

CUTOFFS = (1, 5, 10, 50)


class RankedItems(NamedTuple):
    """Answers on the host, n requests. `user_id: [n]`, `time: [n] int64` ms, `items: [n, k]`, original ids and
    `exists: [n, k]` which of them are there; `scores: [n, k]`; `ranks: [n, P]` of the goals, `goals: [n, P]`, which
    are rows of the catalogue.
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
    """Every item of the catalogue scored, for a head "next_item"."""
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    assert isinstance(module.head, ItemHead)
    h = module(entities, batch, None)
    settings, stack = model.config.head, _item_stack(model)
    if stack is not None and stack.spread:
        return sharded_top_k(
            module.head.query(h)[:, 0],
            state.tables[stack.name],
            batch.goals[:, 0],
            batch.items if settings.drop_seen else None,
            first=stack.offsets[ITEM_ROWS.name],
            items=model.schema.items,
            count=settings.top_k,
            key=module.head.key,
        )
    return _best(
        module.head.scores(h, _vectors(model, module.head, state, stack))[:, 0],
        batch,
        settings,
    )


def rank_by_counts(
    head: HeadConfig, repeat: bool, learned: jax.Array, batch: Batch
) -> RetrievalResult:
    """What a model has to beat: the items that most goals of train are, `learned: [V] float32`, for everyone; with
    `repeat`, those that are most often in the user's own history first.

    Needs no model: `head` says how many items are returned, and whether seen ones are left out.
    """
    shares = learned / (jnp.max(learned) + 1)  # below one event of the user's own
    spec = RULES("batch", None)
    scores = jnp.broadcast_to(
        shares, (batch.items.shape[0], *shares.shape), out_sharding=spec
    )
    return _best(
        _at_items(scores, batch.items, "add", 1.0) if repeat else scores, batch, head
    )


def _best(scores: jax.Array, batch: Batch, head: HeadConfig) -> RetrievalResult:
    if head.drop_seen:
        scores = _at_items(scores, batch.items, "set", -jnp.inf)
    values, items = jax.lax.top_k(scores, min(head.top_k, scores.shape[1]))
    items = jnp.where(values > -jnp.inf, items, -1)
    return RetrievalResult(
        items.astype(jnp.int32), values, _ranks(scores, batch.goals[:, 0])
    )


def _item_stack(model: ModelSpec) -> Stack | None:
    """Where the item vectors of a sampled softmax lie."""
    return next(
        (
            stack
            for stack in model.embedder.stacks.values()
            if ITEM_ROWS.name in stack.offsets
        ),
        None,
    )


def _vectors(
    model: ModelSpec, head: ItemHead, state: TrainState, stack: Stack | None
) -> jax.Array:
    """`[V, d]` of all items."""
    if stack is None:
        return head.vectors()
    first = stack.offsets[ITEM_ROWS.name]
    return state.tables[stack.name][first : first + model.schema.items]


def _at_items(
    scores: jax.Array, items: jax.Array, how: Literal["set", "add"], value: float
) -> jax.Array:
    """`[B, V]` with `value` set or added, once per event, at the items of the history, `[B, T]`."""

    def local(scores: jax.Array, items: jax.Array) -> jax.Array:
        row = jnp.arange(scores.shape[0])[:, None]
        # -1, no event, would count from the end.
        return getattr(
            scores.at[row, jnp.where(items < 0, scores.shape[1], items)], how
        )(value, mode="drop")

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(scores, items)
    spec = RULES("batch", None)
    return jax.shard_map(local, in_specs=(spec, spec), out_specs=spec)(scores, items)


def _ranks(scores: jax.Array, goals: jax.Array) -> jax.Array:
    """Ranks `[B, P]` of `goals: [B, P]` among `scores: [B, V]`; equal scores share the mean of their ranks, and what
    is left out (-inf) has none.
    """
    ranks = []
    for p in range(goals.shape[1]):  # one at a time: [B, P, V] need not fit in memory
        goal = goals[:, p : p + 1]
        # A comparison instead of a gather, which explicit sharding would make an exchange.
        own = jnp.sum(
            jnp.where(jnp.arange(scores.shape[1]) == goal, scores, 0),
            axis=1,
            keepdims=True,
        )
        higher = jnp.sum(scores > own, axis=1)
        rank = higher + (jnp.sum(scores == own, axis=1) + 1) / 2
        rank = jnp.where(own[:, 0] > -jnp.inf, rank, jnp.inf)
        ranks.append(jnp.where(goal[:, 0] < 0, 0.0, rank))
    return jnp.stack(ranks, axis=1)


def rank_split(
    step: Callable[[Batch], RetrievalResult],
    config: Config,
    dataset: Dataset,
    split: str,
    mesh: Mesh,
    *,
    limit: int = 0,
) -> Iterator[RankedItems]:
    """Answers to every request of a split, or to `limit` requests spread evenly over it, batch by batch.

    As in `evaluate.score_split`, all processes get the answers of all.
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
        found = to_host(step(to_devices(host.batch, mesh)))
        rows = who.rows[:, 0]
        goals = np.full(rows.shape, -1, np.int32)
        goals[rows >= 0] = who.item
        asked = rows[:, 0] >= 0  # goals fill from the left
        # `who` names every goal; a request has the user and time of its first.
        first = (
            np.cumsum((rows >= 0).sum(axis=1)[asked]) - (rows >= 0).sum(axis=1)[asked]
        )
        items = found.items[asked]
        yield RankedItems(
            who.user_id[first],
            who.time[first],
            dataset.catalogue.item_id[np.maximum(items, 0)],
            items >= 0,
            found.scores[asked],
            found.ranks[asked],
            goals[asked],
        )


def summarize(
    answers: Iterator[RankedItems], catalogue: int, *, listed: int | None = None
) -> dict[str, Any]:
    """`{"retrieval": {"recall@k", "ndcg@k", "mrr", "users", "requests", "catalogue"}}`, k in 1, 5, 10, 50.

    Goals of one user at one time are one request, however many streams they took, and an item counts once. None:
    metrics that no request has, or that look further than the `listed` items of an answer (None: the whole catalogue);
    the mean reciprocal rank takes what is not listed for 0.
    """
    parts = [(a.user_id, a.time, a.ranks, a.goals) for a in answers]
    if not parts:
        nothing = {f"{name}@{k}": None for k in CUTOFFS for name in ("recall", "ndcg")}
        return {
            "retrieval": nothing
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
    """`[n, P]` ranks of the goals of streams -> `[requests, most distinct goals]`, 0 fills."""
    order = np.lexsort((time, user))
    user, time, ranks, goals = user[order], time[order], ranks[order], goals[order]
    opens = np.ones(len(user), bool)
    opens[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    request = np.cumsum(opens) - 1
    row, column = np.nonzero(ranks)
    # An item that two lines of a basket name is one goal.
    of, first = np.unique(
        np.stack([request[row], goals[row, column]]), axis=1, return_index=True
    )
    of, row, column = of[0], row[first], column[first]
    place = np.arange(len(of)) - np.searchsorted(of, of)
    out = np.zeros((int(opens.sum()), int(place.max(initial=0)) + 1), np.float64)
    out[of, place] = ranks[row, column]
    return out
