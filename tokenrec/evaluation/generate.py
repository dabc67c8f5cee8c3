"""Generative retrieval: the semantic id of the next item by beam search.

The codes of a semantic id are generated level after level (docs/methods.md section 2,
"Tasks"). The prompt is computed once and its keys and values are cached; each level
then computes the tokens of the W beams alone, which see the prompt and themselves.

B requests, T events, L levels, W = `head.beams` beams, d model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch
from tokenrec.evaluation.beam_search import Beams, beam_search
from tokenrec.evaluation.retrieval_result import RetrievalResult
from tokenrec.evaluation.trie import Trie
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.heads import SemanticIdHead
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, TrainState, bind_params


def generate(model: ModelSpec, state: TrainState, batch: Batch, trie: Trie) -> Beams:
    """Find the items whose semantic ids are most probable after each history.

    Args:
      model: static half of the run, with a head "semantic_id".
      state: weights and tables.
      batch: B requests; `batch.valid: [B, T]`.
      trie: semantic ids of the catalogue.

    Returns:
      `head.beams` items of each request, best first.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    head, backbone = module.head, module.backbone
    assert isinstance(head, SemanticIdHead)
    assert isinstance(backbone, TokenFormer)
    events = batch.valid.shape[1]
    prompt = model.layout(events, serving=True, candidates=1)
    cache, read_out = backbone.prefill(
        module.prefix_tokens(entities, batch), prompt, batch.valid
    )

    def next_log_probs(codes: jax.Array, level: int) -> jax.Array:
        """Map prefixes `[B, w, l]` to `[B, w, C]`, as `beam_search` needs it."""
        # The first code is read at the end of the prompt, later ones at the last code.
        if level == 0:
            return head.log_probs(read_out, 0)
        requests, beams = codes.shape[:2]
        layout = model.layout(events, serving=True, candidates=beams, codes=level)
        all_valid = jnp.ones((requests, beams), bool, out_sharding=RULES("batch", None))
        out = backbone.extend(
            cache, module.code_tokens(codes), layout, batch.valid, all_valid
        )
        last_code = out.reshape(requests, beams, level, -1)[:, :, -1]
        return head.log_probs(last_code, level)

    return beam_search(
        next_log_probs, trie, batch=batch.valid.shape[0], width=model.config.head.beams
    )


def generate_step(
    model: ModelSpec, state: TrainState, batch: Batch, trie: Trie
) -> RetrievalResult:
    """Retrieve by beam search, for a head "semantic_id".

    Args:
      model: static half of the run.
      state: weights and tables.
      batch: B requests; `batch.goals: [B, 1, P]`, `batch.items: [B, T]`.
      trie: semantic ids of the catalogue.

    Returns:
      The best `head.top_k` of the beams; the ranks of the goals are among all beams,
      and a goal that is in none has rank `inf`.
    """
    beams = generate(model, state, batch, trie)
    items, scores = beams.items, beams.scores
    if model.config.head.drop_seen:
        seen = jnp.any(items[:, :, None] == batch.items[:, None, :], axis=2)
        # Seen items move to the end; a stable sort keeps the order of the others.
        order = jnp.argsort(jnp.where(seen, 1, 0), axis=1, stable=True)
        items = jnp.where(seen, -1, items)
        scores = jnp.where(seen, -jnp.inf, scores)
        items, scores = (jnp.take_along_axis(x, order, axis=1) for x in (items, scores))
    goals = batch.goals[:, 0]
    hit = items[:, :, None] == goals[:, None, :]
    place = jnp.argmax(hit, axis=1).astype(jnp.float32) + 1
    ranks = jnp.where(jnp.any(hit, axis=1), place, jnp.inf)
    ranks = jnp.where(goals < 0, 0.0, ranks)
    count = model.config.head.top_k
    return RetrievalResult(items[:, :count], scores[:, :count], ranks)


def jit_generate_step(
    model: ModelSpec, trie: Trie
) -> Callable[[TrainState, Batch], RetrievalResult]:
    """Compile `generate_step`; the trie is an argument, not a constant."""
    step = jax.jit(functools.partial(generate_step, model))
    return lambda state, batch: step(state, batch, trie)
