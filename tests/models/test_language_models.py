"""A language model as the backbone of a recommender: words, padding, tuning, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worlds import (
    FEATURES,
    SCHEMA,
    TABLES,
    TASKS,
    mesh_of,
    one_device,
    place,
    random_batch,
    tiny,
)
from tokenrec.config import DecoderConfig, TuningConfig
from tokenrec.config.validate import validate
from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, Schema, columns
from tokenrec.errors import InputError
from tokenrec.models.words import WordTable, word_rows
from tokenrec.state import ModelSpec, build_model, init_state
from tokenrec.step import eval_step, train_step
from tokenrec.tokens.embed import Embedder
from tokenrec.tuning import group_of, split_frozen, without_frozen

WORDS = 18
# Few features compile in less time.
FEW = ("gender", "video", "tab", "clicked", "watched")
TITLED = Schema(
    (
        *(feature for feature in FEATURES if feature.name in FEW),
        Feature("title", "text", "item", length=3, codes=256),
    ),
    SCHEMA.tasks,
    {name: rows for name, rows in TABLES.items() if name in FEW} | {"text": WORDS + 2},
)
SIZES = {
    "gemma3": {
        "layers": 2,
        "decoder": DecoderConfig(
            vocabulary=WORDS,
            kv_heads=1,
            head_width=6,
            windows=(3, 0),
            local_rope_base=100.0,
            query_scale=4.0,
        ),
    },
    "qwen3": {
        "layers": 2,
        "decoder": DecoderConfig(vocabulary=WORDS, kv_heads=2, head_width=8),
    },
    "llama3": {
        "layers": 2,
        "decoder": DecoderConfig(
            vocabulary=WORDS, kv_heads=2, head_width=8, tied=False
        ),
    },
}
LITERALS = ((5, 3, 9), (4, 7), (6,))
EVALUATE = jax.jit(eval_step, static_argnums=0)
TRAIN = jax.jit(train_step, static_argnums=0)


def lm(kind="gemma3", *, tuning=None, prompt=None, text=None, **changes):
    """A config of a small language model, and its model on `TITLED`."""
    sizes = {"kind": kind, "heads": 2, "ffn_width": 24, "windows": ()} | SIZES[kind]
    config = tiny(
        fused=True,
        model=sizes | changes.pop("model", {}),
        tokens={
            "prompt": prompt
            or (
                "text:Seen:",
                "user",
                "history",
                "query",
                "||",
                "text:Title:",
                "title",
                "candidate",
            ),
            "text": text or {},
            # It compiles in less time than the default.
            "maker": "linear",
        },
        **changes,
    )
    if tuning:
        config.tuning = TuningConfig(**tuning)
    return config


def model_of(config):
    return ModelSpec(config, TITLED, TASKS, Embedder.build(TITLED, config), LITERALS)


def test_the_config_is_valid():
    for kind in SIZES:
        config = lm(kind)
        assert validate(config).model == config.model


@pytest.mark.parametrize(
    ("kind", "tuning"),
    [
        ("llama3", {"method": "lora", "rank": 2, "dropout": 0.1}),
        # Gradients of all weights on a mesh: tests/models/backbones/test_decoder.py.
        *(
            pytest.param("gemma3", tuning, marks=pytest.mark.slow)
            for tuning in (None, {"method": "lora", "rank": 2, "dropout": 0.1})
        ),
        pytest.param("qwen3", {"method": "frozen"}, marks=pytest.mark.slow),
        pytest.param(
            "llama3",
            {"method": "lora", "rank": 2, "projections": ("query", "down")},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_is_the_same_on_any_mesh(kind, tuning):
    # The layers of a window have none here: one layer is a program like the others.
    layers = {} if kind == "gemma3" else {"layers": 1}
    config = lm(kind, tuning=tuning, candidates=2, model={"dropout": 0.1} | layers)
    model = model_of(config)
    batch = random_batch(config, schema=TITLED)
    states = []
    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            state = init_state(model, 0)
            for _ in range(2):
                state, metrics = TRAIN(model, state, place(batch, mesh))
            assert bool(metrics.applied)
            states.append(jax.device_get(state))
    for name, value in states[0].params.items():
        np.testing.assert_allclose(
            value, states[1].params[name], rtol=1e-4, atol=2e-6, err_msg=name
        )


def test_what_is_frozen_stays_and_has_no_optimizer_state():
    config = lm("llama3", tuning={"method": "lora", "rank": 2}, model={"layers": 1})
    model = model_of(config)
    with jax.set_mesh(one_device()):
        before = init_state(model, 0)
        batch = random_batch(config, schema=TITLED)
        after, _ = TRAIN(model, before, place(batch, one_device()))
    trained, frozen = split_frozen(config, after.params)
    assert {group_of(name) for name in frozen} == {"base", "words"}
    assert {group_of(name) for name in trained} == {
        "adapters",
        "makers",
        "head",
    }
    for name in frozen:
        np.testing.assert_array_equal(before.params[name], after.params[name])
    # Half of an adapter starts at zero, so that the other half has no gradient yet.
    still = {n for n in trained if np.array_equal(before.params[n], after.params[n])}
    assert all(n.endswith("_adapter/down") for n in still), still
    moments = after.opt_state["dense"][0].mu
    assert moments.keys() == trained.keys()
    assert without_frozen(config, after).params.keys() == trained.keys()


def test_a_frozen_weight_has_the_type_of_the_computation():
    config = lm("qwen3", tuning={"method": "frozen"}, model={"dtype": "bfloat16"})
    model = model_of(config)
    with jax.set_mesh(one_device()):
        state = init_state(model, 0)
    trained, frozen = split_frozen(config, state.params)
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in trained.values()} == {jnp.dtype("float32")}
    shapes = model.param_shapes()
    assert {n: s.dtype for n, s in shapes.items()} == {
        n: leaf.dtype for n, leaf in state.params.items()
    }


def test_rates_by_group():
    layer = {"layers": 1}
    rates = {"rates": {"base": 0.0, "words": 0.5}}
    config, plain = lm("qwen3", tuning=rates, model=layer), lm("qwen3", model=layer)
    moved = []
    for each in (config, plain):
        model = model_of(each)
        with jax.set_mesh(one_device()):
            before = init_state(model, 0)
            batch = random_batch(each, schema=TITLED)
            after, _ = TRAIN(model, before, place(batch, one_device()))
        moved.append({n: after.params[n] - w for n, w in before.params.items()})
    slow, fast = moved
    for name, change in slow.items():
        factor = {"base": 0.0, "words": 0.5}.get(group_of(name), 1.0)
        np.testing.assert_allclose(
            change, factor * fast[name], rtol=1e-3, atol=2e-7, err_msg=name
        )


def scores(config, batch, seed=0):
    model = model_of(config)
    with jax.set_mesh(one_device()):
        return np.asarray(
            EVALUATE(model, init_state(model, seed), place(batch, one_device()))
        )


# Layers of both windows are in the model that is not slow.
@pytest.mark.parametrize(
    "kind",
    ["gemma3", *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3", "llama3"))],
)
def test_padding_does_not_change_a_score(kind):
    """Neither more room in front of a history, nor behind the words of a title."""
    config = lm(kind, candidates=2, events=6, text={"history": ("title", "tab")})
    batch = random_batch(config, schema=TITLED, lengths=[0, 1, 3, 5, 6, 2, 4, 6])
    short = scores(config, batch)

    longer = dataclasses.replace(
        config, data=dataclasses.replace(config.data, events=9)
    )
    room = jax.tree.map(np.asarray, batch)

    def pad(x):
        return np.pad(x, [(0, 0), (3, 0)] + [(0, 0)] * (x.ndim - 2))

    room = room._replace(
        state=jax.tree.map(pad, room.state),
        action=jax.tree.map(pad, room.action),
        valid=pad(room.valid),
    )
    np.testing.assert_allclose(scores(longer, room), short, atol=2e-6)


def test_a_word_that_fills_up_is_not_seen():
    """It is read as word 0, which no text of the batch holds: it may be anything."""
    config = lm("qwen3", text={"history": ("title",)}, model={"layers": 1})
    model = model_of(config)
    batch = random_batch(config, schema=TITLED)
    for part in (batch.state, batch.target):
        title = part.ids[..., slice(*columns(TITLED.state).ids["title"])]
        # Word 0 is id 2; no text holds id 1.
        title[title <= FIRST_KNOWN] = MISSING
        assert (title == MISSING).any()
    with jax.set_mesh(one_device()):
        state = init_state(model, 0)
        words = state.params["words/inputs"]
        batch = place(batch, one_device())

        def scores_with(words):
            params = state.params | {"words/inputs": words}
            return EVALUATE(model, dataclasses.replace(state, params=params), batch)

        before = scores_with(words)
        np.testing.assert_allclose(scores_with(words.at[0].add(3.0)), before, atol=1e-6)
        assert not np.allclose(scores_with(words.at[7].add(3.0)), before, atol=1e-3)


def test_words_score_with_rows_of_the_model_alone():
    config = lm("llama3")
    with jax.set_mesh(one_device()):
        table = WordTable(config.model, scored=True, rngs=nnx.Rngs(0))
        h = jax.random.normal(jax.random.key(1), (2, 3, 16))
        logits = table.logits(h)
        vectors = table(jnp.array([[2, 3, 0]]), jnp.float32)
        # A recommender does not score words, and does not hold the vectors for it.
        with pytest.raises(InputError, match="scored=True"):
            WordTable(config.model, rngs=nnx.Rngs(0)).logits(h)
    assert "words/outputs" not in model_of(config).param_shapes()
    assert logits.shape == (2, 3, word_rows(config.model))
    assert np.isinf(logits[..., WORDS:]).all()
    assert np.isfinite(logits[..., :WORDS]).all()
    outputs = table.outputs[...]
    np.testing.assert_allclose(
        logits[..., :WORDS], (h @ outputs.T)[..., :WORDS], atol=1e-5
    )
    np.testing.assert_array_equal(vectors[0, 0], vectors[0, 2])
    np.testing.assert_allclose(vectors[0, 1], table.inputs[1], atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "tuning", "expected"),
    [
        ("hstu", {"method": "lora"}, "tuning.method='lora' with model.kind='hstu'"),
        ("qwen3", {"rates": {"bass": 0.1}}, "tuning.rates names 'bass'.*'base'"),
        ("qwen3", {"rank": 8}, "tuning.rank=8 with tuning.method='all'.*'lora'"),
        (
            "qwen3",
            {"method": "lora", "rates": {"words": 0.1}},
            "tuning.rates.'words'.=0.1 with tuning.method='lora'.*does not train",
        ),
        ("qwen3", {"method": "lora", "projections": ()}, "adapts nothing"),
    ],
)
def test_options_that_do_not_fit(kind, tuning, expected):
    config = lm(kind) if kind in SIZES else tiny(fused=True, model={"kind": kind})
    if kind == "hstu":
        config.model.windows = ()
    config.tuning = TuningConfig(**tuning)
    with pytest.raises(InputError, match=expected):
        validate(config)


def test_build_model_accepts_a_language_model():
    config = lm("qwen3", prompt=("user", "history", "||", "candidate"))
    assert build_model(config, TITLED, TASKS).param_shapes()["words/inputs"].shape == (
        word_rows(config.model),
        16,
    )


def test_a_batch_of_one_sample():
    """JAX loses the sharding of an axis of length 1 in slices and reshapes."""
    text = {"history": ("title", "tab")}
    config = lm("llama3", candidates=2, text=text, model={"layers": 1})
    batch = random_batch(config, batch=2, schema=TITLED)
    one = jax.tree.map(lambda x: x[:1], batch)
    np.testing.assert_allclose(
        scores(config, one), scores(config, batch)[:1], atol=1e-6
    )
