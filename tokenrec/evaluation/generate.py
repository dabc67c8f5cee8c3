"""Generative retrieval: the semantic id of the next item by beam search.

The codes of a semantic id are generated level after level (docs/methods.md section 2,
"Tasks"). The prompt is computed once and its keys and values are cached; each level
then computes the tokens of the W beams alone, which see the prompt and themselves.

With `head.copy` the items of the history join the beams. Their codes are known, so that
one pass over the same cache gives their probabilities.

A request may allow some items alone, such as those that it has not seen
(`head.drop_seen`): the search itself is restricted to them.

B requests, T events, L levels, W = `head.beams` beams, d model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.data.batch import Batch
from tokenrec.evaluation.allowed_items import per_request, unseen_items
from tokenrec.evaluation.beam_search import Beams, beam_search
from tokenrec.evaluation.copied_beams import unite
from tokenrec.evaluation.retrieval_result import RetrievalResult
from tokenrec.evaluation.trie import Trie, build_trie, to_every_device
from tokenrec.models.backbones.tokenformer import PrefixCache, TokenFormer
from tokenrec.models.copy_mixture import CopyMixture
from tokenrec.models.heads import SemanticIdHead
from tokenrec.models.recommender import Recommender
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES, on_mesh
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.embed import EntityFeatures

# Items of the history whose codes are read at once. Every code attends to the prompt
# and, masked, to all others of the slice: 32 items of 5 levels are 128 tokens.
HISTORY_SLICE = 32


class Prompt(NamedTuple):
    """What is computed of a request before its items are searched.

    Attributes:
      cache: keys and values of the prompt.
      read_out: `[B, 1, d]`, which predicts the first code.
      valid: `[B, T] bool`, real events.
      copied: the copies at the end of the history; None without `head.copy`.
    """

    cache: PrefixCache
    read_out: jax.Array
    valid: jax.Array
    copied: CopyMixture | None


def generate(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    trie: Trie,
    codes: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> Beams:
    """Find the items whose semantic ids are most probable after each history.

    Args:
      model: static half of the run, with a head "semantic_id".
      state: weights and tables.
      batch: B requests; `batch.valid: [B, T]`, with `head.copy` `batch.items: [B, T]`.
      trie: semantic ids of the catalogue.
      codes: `[N, L] int32`, the same; read with `head.copy` alone.
      allowed: `[B, N] bool`, items that may be found; None for all.

    Returns:
      `head.beams` items of each request, best first.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    prompt = read_prompt(model, module, entities, batch)
    return search(model, module, prompt, trie, codes, allowed)


def read_prompt(
    model: ModelSpec,
    module: Recommender,
    entities: dict[str, EntityFeatures],
    batch: Batch,
) -> Prompt:
    """Compute the prompts of a batch; arguments as in `generate`."""
    head, backbone = module.head, module.backbone
    assert isinstance(head, SemanticIdHead)
    assert isinstance(backbone, TokenFormer)
    layout = model.layout(batch.valid.shape[1], serving=True, candidates=1)
    cache, read_out = backbone.prefill(
        module.prefix_tokens(entities, batch),
        layout,
        batch.valid,
        module.present(entities, batch, layout, own=False),
    )
    copied = None
    if head.copy is not None:
        copied = head.copy(read_out, batch.items, module.event_tokens(entities))
    return Prompt(cache, read_out, batch.valid, copied)


def search(
    model: ModelSpec,
    module: Recommender,
    prompt: Prompt,
    trie: Trie,
    codes: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> Beams:
    """Find items behind prompts; arguments and result as in `generate`."""
    head, valid = module.head, prompt.valid
    assert isinstance(head, SemanticIdHead)

    def next_log_probs(codes: jax.Array, level: int) -> jax.Array:
        """Map prefixes `[B, w, l]` to `[B, w, C]`, as `beam_search` needs it."""
        # The first code is read at the end of the prompt, later ones at the last code.
        if level == 0:
            return head.log_probs(prompt.read_out, 0)
        requests, beams = codes.shape[:2]
        out = _read_codes(model, module, prompt.cache, valid, codes)
        last_code = out.reshape(requests, beams, level, -1)[:, :, -1]
        return head.log_probs(last_code, level)

    beams = beam_search(
        next_log_probs,
        trie,
        batch=valid.shape[0],
        width=model.config.head.beams,
        allowed=allowed,
    )
    copied = prompt.copied
    if copied is None:
        return beams
    assert codes is not None
    items = jnp.maximum(copied.items, 0)
    event_codes = expand_rows(codes, items)

    def item_log_probs(codes: jax.Array) -> jax.Array:
        """Map semantic ids `[B, n, L]` to log P_gen, `[B, n]`."""
        out = _read_codes(model, module, prompt.cache, valid, codes[..., :-1])
        h = jnp.concatenate([prompt.read_out, out], axis=1)
        return head.item_log_probs(h, codes[:, None])[:, 0]

    of_events = None
    if allowed is not None:
        of_events = per_request(
            lambda pair, _: jnp.take_along_axis(pair[0], pair[1], axis=1),
            (allowed, items),
            None,
        )
    log_generated = _in_slices(item_log_probs, event_codes)
    return unite(beams, copied, event_codes, log_generated, of_events)


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
    split = on_mesh(RULES("batch", None))
    all_valid = jnp.ones((requests, count), bool, out_sharding=split)
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
    allowed = None
    if model.config.head.drop_seen:
        allowed = unseen_items(batch.items, len(trie.levels[-1].item))
    beams = generate(model, state, batch, trie, codes, allowed)
    items, scores = beams.items, beams.scores
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
