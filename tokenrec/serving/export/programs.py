"""The programs of a served model: from weights and encoded requests to predictions.

    prefill   user and history                  -> what a request keeps: its prefix
    extend    prefix, candidates                -> predictions [B, C, O]
    score     user, history and candidates      -> predictions [B, C, O]

A backbone with a prefix cache has the first two, and any number of candidates; B and C
are symbolic in the exported programs. Another one has `score` alone, where C is
`data.candidates`: the stream of a request is that of training.

A model that was trained on streams (UC) is served on `[user, sep, history]` of T - 1
events, with each candidate as the state of the next event: that is what a row of a
stream sees in training.

Weights are arguments (served_model.py), so that new weights need no new program.

Letters: B requests, T events, C candidates, K tokens of a candidate, O predictions, d
model width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config.backbones import BACKBONES, reads_event_ages
from tokenrec.data.batch import Signals
from tokenrec.models.backbones.ctr_inputs import (
    CTRInputs,
    mean_pool_events,
    split_prefix,
)
from tokenrec.models.backbones.decoder import Decoder
from tokenrec.models.backbones.decoder_extend import extend_decoder
from tokenrec.models.backbones.folded_extend import extend_folded
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.branch import mean_user
from tokenrec.models.recommender import Recommender
from tokenrec.models.stream_layout import served_layout
from tokenrec.serving.export.batches import (
    VALID,
    Arrays,
    as_stream,
    batch_of,
    signal_shapes,
    signals_of,
    targets_alone,
)
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
from tokenrec.task_losses import predict_tasks
from tokenrec.task_plan import evaluated_tasks
from tokenrec.tokens.embed import EntityFeatures
from tokenrec.tokens.history import merge_entities

# Arrays that a request keeps for the branch between `prefill` and `extend`.
_USER = "branch_user"
_HISTORY = "branch_history"


def has_prefix(model: ModelSpec) -> bool:
    """Whether a request's history is computed once, whatever its candidates."""
    config = model.config.model
    spec = BACKBONES[config.kind]
    return spec.generates and config.branch in ("none", "mean")


def fixed_candidates(model: ModelSpec) -> int:
    """Candidates of a stream of the program `score`; 0 where there is none."""
    if has_prefix(model):
        return 0
    data = model.config.data
    return 1 if data.paradigm == "uc" else data.candidates


def make_programs(model: ModelSpec) -> dict[str, Program]:
    """Make the programs of a model of `serving_model`, by name."""
    parts = _Parts(model)
    if not has_prefix(model):
        return {"score": Program(parts.score, parts.score_inputs)}
    return {
        "prefill": Program(parts.prefill, parts.prefill_inputs),
        "extend": Program(parts.extend, parts.extend_inputs),
    }


class _Parts:
    """The functions of the programs of one model."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._uc = model.config.data.paradigm == "uc"
        self._events = history_length(model)
        self._outputs = list(
            evaluated_tasks(model.task_plans, model.config.data.auxiliary).outputs
        )
        self._ages = reads_event_ages(model.config.model)
        self._query = reads_query(model)
        self._layout = served_layout(
            model.config, model.schema, self._events, model.literals
        )

    # Inputs.

    def prefill_inputs(self, batch: Any, candidates: Any = None) -> Arrays:
        """Shapes of user, history and query."""
        return request_shapes(self._model, self._events, batch, self._query)

    def extend_inputs(self, batch: Any, candidates: Any) -> Arrays:
        """Shapes of a prefix and of candidates."""
        shapes = jax.eval_shape(
            self.prefill, weight_shapes(self._model), self.prefill_inputs(2)
        )
        prefix = {
            name: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in shapes.items()
        }
        return prefix | self._target_shapes(batch, candidates)

    def score_inputs(self, batch: Any, candidates: Any = None) -> Arrays:
        """Shapes of whole requests; the number of candidates is fixed."""
        count = fixed_candidates(self._model)
        inputs = self.prefill_inputs(batch) | self._target_shapes(batch, count)
        inputs.pop("query_ids", None)
        inputs.pop("query_dense", None)
        if self._ages:
            shape = (batch, self._events)
            inputs["ages"] = jax.ShapeDtypeStruct(shape, jnp.int32)
        return inputs

    def _target_shapes(self, batch: Any, candidates: Any) -> Arrays:
        return signal_shapes("target", self._model.schema.state, (batch, candidates))

    # Programs.

    def prefill(self, weights: Weights, inputs: Arrays) -> Arrays:
        """Compute what a request keeps, `[B, ...]` each."""
        module = bind_params(self._model, weights["params"])
        backbone = module.backbone
        assert isinstance(backbone, TokenFormer)
        query = signals_of(inputs, "query") if self._query else None
        batch = batch_of(inputs, target=query)
        entities = look_up(self._model, weights, batch)
        x = module.prefix_tokens(entities, batch)
        present = module.present(entities, batch, self._layout, own=False)
        cache, _ = backbone.prefill(x, self._layout, batch.valid, present)
        kept = {VALID: batch.valid} | cache_to_arrays(cache)
        if module.branch is not None:
            kept |= self._branch_inputs(x, batch.valid)
        return kept

    def extend(self, weights: Weights, inputs: Arrays) -> Arrays:
        """Compute predictions of candidates from what their request keeps."""
        module = bind_params(self._model, weights["params"])
        backbone = module.backbone
        assert isinstance(backbone, TokenFormer)
        target = signals_of(inputs, "target")
        entities = look_up(self._model, weights, targets_alone(target))
        x = self._candidate_tokens(module, entities, target)
        cache = cache_from_arrays(inputs, self._model.config.model.layers)
        if isinstance(backbone, Decoder):
            present = self._present_in_candidates(module, entities, target)
            readouts = extend_decoder(backbone, cache, x, self._layout, present)
        else:
            readouts = extend_folded(backbone, cache, x, self._layout, inputs[VALID])
        # Ranking reads the last token of a candidate.
        wide = readouts[:, :, 0].astype(jnp.float32)
        if module.branch is not None:
            request = CTRInputs(
                inputs[_USER], x[:, :0, 0], x[:, :, -1], np.zeros((1, 0), bool)
            )
            history = inputs[_HISTORY]
            added = module.branch.cross(request, history, wide, None, None)
            wide = wide + added.astype(jnp.float32)
        return self._predictions(module, wide)

    def score(self, weights: Weights, inputs: Arrays) -> Arrays:
        """Compute predictions of whole requests in one stream each."""
        module = bind_params(self._model, weights["params"])
        batch = batch_of(inputs, target=signals_of(inputs, "target"))
        if self._uc:
            batch = as_stream(batch)
        readouts = module(look_up(self._model, weights, batch), batch, None)
        # Of a stream, the last state is the candidate.
        return self._predictions(module, readouts[:, -1:] if self._uc else readouts)

    def _predictions(self, module: Recommender, readouts: jax.Array) -> Arrays:
        predictions = predict_tasks(self._model.task_plans, module.head(readouts))
        # Auxiliary tasks are learned and not predicted.
        return {"predictions": predictions[..., np.array(self._outputs)]}

    def _candidate_tokens(
        self, module: Recommender, entities: dict[str, EntityFeatures], target: Signals
    ) -> jax.Array:
        """Tokens of the candidates, `[B, C, K, d]`."""
        if self._uc:
            assert module.history.state is not None
            merged = merge_entities(module.with_words(entities)["target"])
            return module.history.state(*merged, module.dtype)
        (flat,) = module.candidate_tokens(entities, targets_alone(target))
        own = int(np.sum(self._layout.candidate >= 0))
        return flat.reshape(*target.ids.shape[:2], own, flat.shape[2])

    def _present_in_candidates(
        self, module: Recommender, entities: dict[str, EntityFeatures], target: Signals
    ) -> jax.Array | None:
        """Tokens of the candidates that fill no text up, `[B, C, K] bool`; None: all."""
        batch, candidates = target.ids.shape[:2]

        def rows(x: jax.Array) -> jax.Array:
            return jnp.reshape(x, (batch * candidates, 1, *x.shape[2:]))

        # `present` reads streams: here each candidate has one to itself.
        alone = targets_alone(Signals(*(rows(part) for part in target)))
        ids = {name: rows(values) for name, values in entities["target"].ids.items()}
        present = module.present(
            {"target": EntityFeatures({}, ids)}, alone, self._layout, own=True
        )
        return None if present is None else present.reshape(batch, candidates, -1)

    def _branch_inputs(self, x: jax.Array, valid: jax.Array) -> Arrays:
        """What the branch reads of a request: mean of the user and of the events."""
        layout = self._layout
        user, events = split_prefix(x, layout)
        every = np.ones((1, layout.events), bool)
        inputs = mean_user(
            CTRInputs(user, events, x[:, :1], every), len(layout.positions_of("user"))
        )
        return {_USER: inputs.user, _HISTORY: mean_pool_events(inputs, valid)}
