"""Generative retrieval: the semantic id of the next item, level after level, by beam search over a cached prefix."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch
from tokenrec.evaluation.beam_search import Beams, Trie, beam_search
from tokenrec.evaluation.sharded_top_k import RetrievalResult
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.heads import SemanticIdHead
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, TrainState, bind_params


def generate(model: ModelSpec, state: TrainState, batch: Batch, trie: Trie) -> Beams:
    """The items whose semantic ids the model finds most probable after each history, `head.beams` of them.

    The prompt is computed once; a level computes the codes of the beams alone.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    head, backbone = module.head, module.backbone
    assert isinstance(head, SemanticIdHead)
    assert isinstance(backbone, TokenFormer)
    events = batch.valid.shape[1]
    prompt = model.layout(events, serving=True, candidates=1)
    cache, read = backbone.prefill(
        module.prefix_tokens(entities, batch), prompt, batch.valid
    )

    def next_log_probs(codes: jax.Array, level: int) -> jax.Array:
        if level == 0:
            return head.log_probs(read, 0)
        size, beams = codes.shape[:2]
        layout = model.layout(events, serving=True, candidates=beams, codes=level)
        every = jnp.ones((size, beams), bool, out_sharding=RULES("batch", None))
        out = backbone.extend(
            cache, module.code_tokens(codes), layout, batch.valid, every
        )
        return head.log_probs(out.reshape(size, beams, level, -1)[:, :, -1], level)

    return beam_search(
        next_log_probs, trie, batch=batch.valid.shape[0], width=model.config.head.beams
    )


def generate_step(
    model: ModelSpec, state: TrainState, batch: Batch, trie: Trie
) -> RetrievalResult:
    """Answers of a head "semantic_id": the beams, best first."""
    beams = generate(model, state, batch, trie)
    items, scores = beams.items, beams.scores
    if model.config.head.drop_seen:
        seen = jnp.any(items[:, :, None] == batch.items[:, None, :], axis=2)
        # A stable sort keeps the order of what stays.
        last = jnp.argsort(jnp.where(seen, 1, 0), axis=1, stable=True)
        items, scores = jnp.where(seen, -1, items), jnp.where(seen, -jnp.inf, scores)
        items, scores = (jnp.take_along_axis(x, last, axis=1) for x in (items, scores))
    goals = batch.goals[:, 0]
    hit = items[:, :, None] == goals[:, None, :]
    place = jnp.argmax(hit, axis=1).astype(jnp.float32) + 1
    ranks = jnp.where(goals < 0, 0.0, jnp.where(jnp.any(hit, axis=1), place, jnp.inf))
    count = model.config.head.top_k
    return RetrievalResult(items[:, :count], scores[:, :count], ranks)


def jit_generate_step(
    model: ModelSpec, trie: Trie
) -> Callable[[TrainState, Batch], RetrievalResult]:
    """The answers of a batch, as one program; the trie is an argument of it, not a constant in it."""
    step = jax.jit(functools.partial(generate_step, model))
    return lambda state, batch: step(state, batch, trie)
