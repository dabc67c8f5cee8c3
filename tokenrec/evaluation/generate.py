"""Generative retrieval: the semantic id of the next item by beam search.

The codes of a semantic id are generated level after level (docs/methods.md section 2,
"Tasks"). The prompt is computed once and its keys and values are cached; each level
then computes the tokens of the W beams alone, which see the prompt and themselves.

With `head.copy` the items of the history join the beams. Their codes are known, so that
one pass over the same cache gives their probabilities.

B requests, T events, L levels, W = `head.beams` beams, d model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.data.batch import Batch
from tokenrec.evaluation.beam_search import Beams, beam_search
from tokenrec.evaluation.copied_beams import unite
from tokenrec.evaluation.retrieval_result import RetrievalResult
from tokenrec.evaluation.trie import Trie, build_trie, to_every_device
from tokenrec.models.backbones.tokenformer import PrefixCache, TokenFormer
from tokenrec.models.heads import SemanticIdHead
from tokenrec.models.recommender import Recommender
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, TrainState, bind_params

# Items of the history whose codes are read at once. Every code attends to the prompt
# and, masked, to all others of the slice: 32 items of 5 levels are 128 tokens.
HISTORY_SLICE = 32


def generate(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    trie: Trie,
    codes: jax.Array | None = None,
) -> Beams:
    """Find the items whose semantic ids are most probable after each history.

    Args:
      model: static half of the run, with a head "semantic_id".
      state: weights and tables.
      batch: B requests; `batch.valid: [B, T]`, with `head.copy` `batch.items: [B, T]`.
      trie: semantic ids of the catalogue.
      codes: `[N, L] int32`, the same; read with `head.copy` alone.

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
        out = _read_codes(model, module, cache, batch.valid, codes)
        last_code = out.reshape(requests, beams, level, -1)[:, :, -1]
        return head.log_probs(last_code, level)

    beams = beam_search(
        next_log_probs, trie, batch=batch.valid.shape[0], width=model.config.head.beams
    )
    if head.copy is None:
        return beams
    assert codes is not None
    copied = head.copy(read_out, batch.items, module.event_tokens(entities))
    event_codes = expand_rows(codes, jnp.maximum(batch.items, 0))

    def item_log_probs(codes: jax.Array) -> jax.Array:
        """Map semantic ids `[B, n, L]` to log P_gen, `[B, n]`."""
        out = _read_codes(model, module, cache, batch.valid, codes[..., :-1])
        h = jnp.concatenate([read_out, out], axis=1)
        return head.item_log_probs(h, codes[:, None])[:, 0]

    return unite(beams, copied, event_codes, _in_slices(item_log_probs, event_codes))


def _read_codes(
    model: ModelSpec,
    module: Recommender,
    cache: PrefixCache,
    valid: jax.Array,
    codes: jax.Array,
) -> jax.Array:
    """Compute the outputs at codes behind a cached prompt.

    Args:
      model: static half of the run.
      module: the model with its weights.
      cache: of the prompt.
      valid: `[B, T] bool`, real events.
      codes: `[B, n, l] int32`, the first l codes of n semantic ids.

    Returns:
      `[B, n l, d]`.
    """
    requests, count, levels = codes.shape
    backbone = module.backbone
    assert isinstance(backbone, TokenFormer)
    layout = model.layout(valid.shape[1], serving=True, candidates=count, codes=levels)
    all_valid = jnp.ones((requests, count), bool, out_sharding=RULES("batch", None))
    return backbone.extend(cache, module.code_tokens(codes), layout, valid, all_valid)


def _in_slices(
    compute: Callable[[jax.Array], jax.Array], codes: jax.Array
) -> jax.Array:
    """Map `codes: [B, T, L]` to `[B, T]`, `HISTORY_SLICE` events after another."""
    requests, events, levels = codes.shape
    count = -(-events // HISTORY_SLICE)
    size = -(-events // count)
    padded = jnp.pad(codes, ((0, 0), (0, count * size - events), (0, 0)))
    slices = jnp.moveaxis(padded.reshape(requests, count, size, levels), 1, 0)
    computed = jnp.moveaxis(jax.lax.map(compute, slices), 0, 1)
    return computed.reshape(requests, count * size)[:, :events]


def generate_step(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    trie: Trie,
    codes: jax.Array | None = None,
) -> RetrievalResult:
    """Retrieve by beam search, for a head "semantic_id".

    Args:
      model: static half of the run.
      state: weights and tables.
      batch: B requests; `batch.goals: [B, 1, P]`, `batch.items: [B, T]`.
      trie: semantic ids of the catalogue.
      codes: `[N, L] int32`, the same; read with `head.copy` alone.

    Returns:
      The best `head.top_k` of the beams; the ranks of the goals are among all beams,
      and a goal that is in none has rank `inf`.
    """
    beams = generate(model, state, batch, trie, codes)
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
    model: ModelSpec, codes: np.ndarray
) -> Callable[[TrainState, Batch], RetrievalResult]:
    """Compile `generate_step`; the semantic ids are arguments, not constants.

    Args:
      model: static half of the run.
      codes: `[N, L]`, semantic ids of the items that can be retrieved.
    """
    trie = build_trie(codes)
    by_item = (
        to_every_device(codes.astype(np.int32)) if model.config.head.copy else None
    )
    step = jax.jit(functools.partial(generate_step, model))
    return lambda state, batch: step(state, batch, trie, by_item)
