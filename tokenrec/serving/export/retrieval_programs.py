"""The programs of a served retrieval model: from encoded requests to items.

    prefill            user, history, query    -> what a request keeps
    retrieve           what it keeps           -> items and scores [B, k], best first
    retrieve_allowed   the same, allowed       -> the best of the allowed items

B is symbolic; k is `max_k` of the export. Items are rows of the catalogue, -1 where there
are fewer. Weights are arguments (served_model.py), and so is what is known of all items
beforehand, the part "catalogue" of the weights:

    next item      keys [V, d] that read-outs are multiplied with; with a sampled softmax
                   also the vectors [V, d] of the events' items
    semantic id    the arrays of the trie, and with `head.copy` the codes [V, L]

A request of the next item keeps its scaled read-out, and with `head.copy` the bonuses of
its events; one of semantic ids keeps the keys and values of its prompt.

Letters: B requests, T events, V items, L levels, k items of an answer, d model width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.evaluation.catalogue import add_at_items
from tokenrec.evaluation.generate import Prompt, read_prompt, search
from tokenrec.evaluation.item_vectors import output_vectors
from tokenrec.evaluation.trie import Level, Trie, build_trie
from tokenrec.models.copy_mixture import CopyMixture
from tokenrec.models.heads import NextItemHead
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.serving.export.batches import VALID, Arrays, batch_of, signals_of
from tokenrec.serving.export.cache_arrays import (
    cache_from_arrays,
    cache_to_arrays,
)
from tokenrec.serving.export.served_model import (
    Program,
    Weights,
    history_length,
    look_up,
    reads_query,
    request_shapes,
    weight_shapes,
)
from tokenrec.state import ModelSpec, bind_params
from tokenrec.tokens.embed import EntityFeatures
from tokenrec.tokens.output_vectors import CATALOGUE_PARTS, ITEM_ROWS

CATALOGUE = "catalogue"
ALLOWED = "allowed"
_ITEMS = "items"
_KEYS = "keys"
_VECTORS = "vectors"
_CODES = "codes"


def catalogue_weights(run: OpenedRun) -> Arrays:
    """Compute what the programs read of all items, as NumPy arrays.

    Args:
      run: a retrieval run.
    """
    settings = run.model.config.head
    count = run.dataset.known_items
    if settings.retrieval == "semantic_id":
        assert run.dataset.catalogue.codes is not None
        codes = np.ascontiguousarray(run.dataset.catalogue.codes[:count], np.int32)
        trie = build_trie(codes)
        arrays: Arrays = {
            f"{name}_{number}": np.asarray(jax.device_get(array))
            for number, level in enumerate(trie.levels)
            for name, array in level._asdict().items()
        }
        return arrays | ({_CODES: codes} if settings.copy else {})
    head = bind_params(run.model, run.state.params).head
    assert isinstance(head, NextItemHead)
    vectors = output_vectors(run, count)
    arrays = {}
    if settings.cosine:
        arrays[_KEYS] = np.asarray(jax.jit(head.key)(vectors))
    # Of a full softmax they are a weight of the model.
    reads_vectors = settings.tied or settings.copy or not settings.cosine
    if head.items is None and reads_vectors:
        arrays[_VECTORS] = vectors
    return arrays


def make_retrieval_programs(
    model: ModelSpec, catalogue: Arrays, count: int, max_k: int
) -> dict[str, Program]:
    """Make the programs of a model of `serving_model`, by name.

    Args:
      model: the model.
      catalogue: of `catalogue_weights`.
      count: V.
      max_k: items of an answer.
    """
    kind = _NextItem if model.config.head.retrieval == "next_item" else _SemanticId
    parts = kind(model, catalogue, count, max_k)
    return {
        "prefill": Program(parts.prefill, parts.prefill_inputs),
        "retrieve": Program(parts.retrieve, parts.retrieve_inputs),
        "retrieve_allowed": Program(parts.retrieve, parts.allowed_inputs),
    }


class _Parts:
    """What the programs of both heads share."""

    def __init__(
        self, model: ModelSpec, catalogue: Arrays, count: int, max_k: int
    ) -> None:
        self._model = model
        self._count, self._max_k = count, max_k
        self._events = history_length(model)
        self._query = reads_query(model)
        self._shapes = weight_shapes(model) | {
            CATALOGUE: jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), catalogue
            )
        }

    # Inputs.

    def prefill_inputs(self, batch: Any, candidates: Any = None) -> Arrays:
        """Shapes of user, history and query."""
        inputs = request_shapes(self._model, self._events, batch, self._query)
        shape = jax.ShapeDtypeStruct((batch, self._events), jnp.int32)
        inputs[_ITEMS] = shape
        if reads_event_ages(self._model.config.model):
            inputs["ages"] = shape
        return inputs

    def retrieve_inputs(self, batch: Any, candidates: Any = None) -> Arrays:
        """Shapes of what a request keeps."""
        kept = jax.eval_shape(self.prefill, self._shapes, self.prefill_inputs(2))
        return {
            name: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in kept.items()
        }

    def allowed_inputs(self, batch: Any, candidates: Any = None) -> Arrays:
        """The same, and the items that are allowed."""
        shape = jax.ShapeDtypeStruct((batch, self._count), jnp.bool_)
        return self.retrieve_inputs(batch) | {ALLOWED: shape}

    # Programs.

    def prefill(self, weights: Weights, inputs: Arrays) -> Arrays:
        """Compute what a request keeps, `[B, ...]` each."""
        raise NotImplementedError

    def retrieve(self, weights: Weights, inputs: Arrays) -> Arrays:
        """Find the best items of requests."""
        raise NotImplementedError

    def _batch(self, inputs: Arrays) -> Batch:
        """A batch with one read-out, at the end of the history."""
        query = signals_of(inputs, "query") if self._query else None
        items = inputs[_ITEMS]
        no_goal = jnp.full((items.shape[0], 1, 1), -1, jnp.int32)
        return batch_of(inputs, target=query)._replace(items=items, goals=no_goal)


class _NextItem(_Parts):
    """A head that scores the vectors of all items."""

    def prefill(self, weights: Weights, inputs: Arrays) -> Arrays:
        module = bind_params(self._model, weights["params"])
        head = module.head
        assert isinstance(head, NextItemHead)
        batch = self._batch(inputs)
        entities = look_up(self._model, weights, batch)
        vectors = weights[CATALOGUE].get(_VECTORS)
        if vectors is not None:
            # `output_vectors` of them, which add nothing to the row of an item.
            of_events = expand_rows(vectors, jnp.maximum(batch.items, 0))
            entities[CATALOGUE_PARTS[0]] = EntityFeatures(
                {ITEM_ROWS.name: of_events[..., None, :]}, {}
            )
        h = module(entities, batch, None)
        kept = {"query": head.query(h)[:, 0]}
        if head.copy is not None:
            of_events = module.event_item_vectors(entities, batch)
            bonuses = head.copy(h, batch.items, of_events).bonuses[:, 0]
            kept |= {_ITEMS: batch.items, "bonuses": bonuses}
        return kept

    def retrieve(self, weights: Weights, inputs: Arrays) -> Arrays:
        scores = inputs["query"] @ self._keys(weights).T
        if "bonuses" in inputs:
            scores = add_at_items(scores, inputs[_ITEMS], inputs["bonuses"])
        if ALLOWED in inputs:
            scores = jnp.where(inputs[ALLOWED], scores, -jnp.inf)
        scores, items = jax.lax.top_k(scores, self._max_k)
        items = jnp.where(scores > -jnp.inf, items, -1)
        return {"items": items.astype(jnp.int32), "scores": scores}

    def _keys(self, weights: Weights) -> jax.Array:
        """What read-outs are multiplied with, `[V, d]`."""
        catalogue = weights[CATALOGUE]
        for name in (_KEYS, _VECTORS):
            if name in catalogue:
                found: jax.Array = catalogue[name]
                return found
        head = bind_params(self._model, weights["params"]).head
        assert isinstance(head, NextItemHead)
        return head.vectors()


class _SemanticId(_Parts):
    """A head whose codes are searched level by level."""

    def __init__(
        self, model: ModelSpec, catalogue: Arrays, count: int, max_k: int
    ) -> None:
        super().__init__(model, catalogue, count, max_k)
        # Lengths of axes are constants of the programs.
        counts = [
            catalogue[f"child_count_{level}"]
            for level in range(len(model.schema.levels))
        ]
        codes = [catalogue[f"code_{level}"] for level in range(len(counts))]
        self._most_children = tuple(int(np.max(of_level)) for of_level in counts)
        self._code_counts = tuple(int(np.max(of_level)) + 1 for of_level in codes)

    def prefill(self, weights: Weights, inputs: Arrays) -> Arrays:
        module = bind_params(self._model, weights["params"])
        batch = self._batch(inputs)
        entities = look_up(self._model, weights, batch)
        prompt = read_prompt(self._model, module, entities, batch)
        kept = {VALID: prompt.valid, "read_out": prompt.read_out}
        kept |= cache_to_arrays(prompt.cache)
        if prompt.copied is not None:
            items, log_copied, log_generated = prompt.copied
            kept |= {_ITEMS: items, "log_copied": log_copied[:, 0]}
            kept["log_generated"] = log_generated
        return kept

    def retrieve(self, weights: Weights, inputs: Arrays) -> Arrays:
        catalogue = weights[CATALOGUE]
        module = bind_params(self._model, weights["params"])
        levels = tuple(
            Level(*(catalogue[f"{name}_{level}"] for name in Level._fields))
            for level in range(len(self._code_counts))
        )
        beams = search(
            self._model,
            module,
            self._prompt(inputs),
            Trie(levels, self._most_children, self._code_counts),
            catalogue.get(_CODES),
            inputs.get(ALLOWED),
        )
        return {
            "items": beams.items[:, : self._max_k],
            "scores": beams.scores[:, : self._max_k],
        }

    def _prompt(self, inputs: Arrays) -> Prompt:
        cache = cache_from_arrays(inputs, self._model.config.model.layers)
        copied = None
        if "log_copied" in inputs:
            copied = CopyMixture(
                inputs[_ITEMS],
                inputs["log_copied"][:, None],
                inputs["log_generated"],
            )
        return Prompt(cache, inputs["read_out"], inputs[VALID], copied)
