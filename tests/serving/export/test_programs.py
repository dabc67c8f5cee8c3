"""Exported programs, of any number of requests, predict what the eval step predicts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import export

from tests.models.backbones.machine import noisy
from tests.models.test_language_models import LITERALS, TITLED, lm, model_of
from tests.worlds import SCHEMA, TASKS, one_device, place, random_batch, tiny
from tokenrec.serving.export.programs import has_prefix, make_programs
from tokenrec.serving.export.served_model import (
    served_weights,
    serving_model,
    weight_shapes,
)
from tokenrec.state import build_model, init_state
from tokenrec.step import eval_step

QUERY = ("user", "sep", "history", "query", "||", "candidate")
SHALLOW = {"layers": 2, "windows": (6,)}
LINEAR = {"maker": "linear"}  # It compiles in less time than the default.
CONFIGS = {
    "branch and spread table": tiny(
        candidates=3,
        fused=True,
        model=SHALLOW | {"branch": "mean"},
        tokens=LINEAR | {"replicate_rows": 10},
    ),
    "query and long targets": tiny(
        candidates=2,
        fused=True,
        model=SHALLOW,
        tokens=LINEAR | {"prompt": QUERY, "target_tokens": 2},
    ),
    "stream": tiny(paradigm="uc", model=SHALLOW | {"branch": "mean"}, tokens=LINEAR),
    "whole stream with ages": tiny(
        paradigm="uc",
        model={"kind": "hstu", "layers": 2, "windows": (), "time_bias": True},
        tokens=LINEAR,
    ),
    "whole request": tiny(
        candidates=3,
        fused=True,
        model={"kind": "din", "layers": 2, "windows": ()},
        tokens=LINEAR,
    ),
}
LENGTHS = [0, 1, 2, 5, 8, 11, 12, 12]


def predicted(config, batch, model=None):
    """The model, its weights for serving, and the predictions of the eval step."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        model = model or build_model(config, SCHEMA, TASKS)
        state = init_state(model, 0)
        params = {
            name: jax.device_put(value, state.params[name].sharding)
            for name, value in noisy(state.params, 0.1).items()
        }
        state = dataclasses.replace(state, params=params)
        step = jax.jit(functools.partial(eval_step, model))
        expected = np.asarray(step(state, place(batch, mesh)))
        return serving_model(model), served_weights(model, state), expected


def inputs_of(config, batch):
    """A batch as the programs read it; of a stream the newest event is the candidate."""
    uc = config.data.paradigm == "uc"
    past = slice(None, -1) if uc else slice(None)
    target = [part[:, -1:] for part in batch.state] if uc else [*batch.target]
    inputs = {
        "user_ids": batch.user.ids,
        "user_dense": batch.user.dense,
        "state_ids": batch.state.ids[:, past],
        "state_dense": batch.state.dense[:, past],
        "action_ids": batch.action.ids[:, past],
        "action_dense": batch.action.dense[:, past],
        "valid": batch.valid[:, past],
        "query_ids": target[0][:, :1],
        "query_dense": target[1][:, :1],
        "target_ids": target[0],
        "target_dense": target[1],
    }
    if batch.ages is not None:
        inputs["ages"] = np.where(
            batch.valid, batch.ages - batch.ages[:, -1:], 0
        ).astype(np.int32)[:, past]
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_programs_predict_what_the_eval_step_predicts(name):
    config = CONFIGS[name]
    batch = random_batch(config, lengths=LENGTHS)
    model, weights, expected = predicted(config, batch)
    assert has_prefix(model) == ("whole" not in name)
    check_predictions(model, weights, batch, expected)


# Fill lies behind the words of titles, in histories and in candidates.
LANGUAGE_MODELS = {
    "windows": lm(
        "gemma3",
        candidates=2,
        text={"history": ("title", "tab")},
    ),
    "adapters": lm(
        "llama3",
        candidates=3,
        tuning={"method": "lora", "rank": 2},
        model={"layers": 1},
    ),
    "branch": lm("qwen3", candidates=2, model={"layers": 1, "branch": "mean"}),
    "text behind": lm(
        "gemma3",
        candidates=2,
        prompt=("text:Seen:", "sep", "history", "||", "text:it", "candidate", "text:?"),
        # BFTS on top of the windows of the model.
        model={"windows": (4,)},
        text={"candidate": ("title",)},
    ),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_programs_of_language_models_predict_what_the_eval_step_predicts(name):
    config = LANGUAGE_MODELS[name]
    batch = random_batch(config, lengths=LENGTHS, schema=TITLED)
    model, weights, expected = predicted(config, batch, model_of(config))
    assert has_prefix(model)
    check_predictions(model, weights, batch, expected)


def test_a_stream_of_a_language_model_is_served_likewise():
    prompt = ("text:Seen:", "user", "text:then", "history")
    config = lm("gemma3", paradigm="uc", prompt=prompt)
    config.tokens.fused = False
    batch = random_batch(config, lengths=LENGTHS, schema=TITLED)
    model = dataclasses.replace(model_of(config), literals=LITERALS[:2])
    model, weights, expected = predicted(config, batch, model)
    assert has_prefix(model)
    check_predictions(model, weights, batch, expected)


def check_predictions(model, weights, batch, expected):
    """Export the programs, and compare what they predict."""
    config = model.config
    inputs = inputs_of(config, batch)
    found = inputs
    programs = make_programs(model)
    for program in programs.values():
        batch_size, candidates = export.symbolic_shape("b, c")
        shapes = program.inputs(batch_size, candidates)
        exported = export.export(jax.jit(program.function))(
            weight_shapes(model), shapes
        )
        found = exported.call(
            weights, {n: (found if n in found else inputs)[n] for n in shapes}
        )
    got = np.asarray(found["predictions"])
    if config.data.paradigm == "uc":
        # Streams without an event read nothing.
        read = batch.valid[:, -1]
        got, expected = got[read], expected[read, -1:]
    # float32 sums in another order. Measured: 1.3e-6, 2.4e-7 for language models.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
