"""Prompts of Token Factory: text, query, title, compression, bidirectional prefix."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import (
    FEATURES,
    SCHEMA,
    TABLES,
    TASKS,
    TEXT_ROWS,
    mesh_of,
    one_device,
    place,
    random_batch,
    tiny,
)
from tokenrec.config import OptimConfig
from tokenrec.config.prompt import parse_prompt
from tokenrec.config.validate import validate
from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError
from tokenrec.planner.describe import describe, to_text
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, bind_params, build_model, init_state
from tokenrec.step import loss_fn, step_loss, train_step
from tokenrec.tokens.embed import inverses
from tokenrec.tokens.layout import ROLES

# Fewer features compile in less time.
LEFT_OUT = ("tags", "picture")
TITLED = Schema(
    (
        *(feature for feature in FEATURES if feature.name not in LEFT_OUT),
        Feature("title", "text", "item", length=3, codes=256),
    ),
    SCHEMA.tasks,
    {name: rows for name, rows in TABLES.items() if name not in LEFT_OUT}
    | {"text": TEXT_ROWS},
)
PAPER = (
    "text:What will be watched?",
    "user",
    "history",
    "query",
    "||",
    "text:Title:",
    "title",
    "candidate",
)
AS_TEXT = {
    "history": ("code", "tab", "watched"),
    "candidate": ("code", "rate"),
    "user": ("gender", "age"),
}


def lrm(**changes):
    """A config with two full layers; `changes` are to `tokens` and the rest of `tiny`."""
    # It compiles in less time than the default.
    tokens = {"prompt": PAPER, "maker": "linear"} | changes.pop("tokens", {})
    model = {"layers": 2, "windows": ()} | changes.pop("model", {})
    return tiny(fused=True, tokens=tokens, model=model, **changes)


CONFIGS = {
    "paper": lambda: lrm(candidates=3),
    "bidirectional": lambda: lrm(candidates=2, model={"prefix": "bidirectional"}),
    "text": lambda: lrm(candidates=2, tokens={"text": AS_TEXT, "prompt": ()}),
    "cut": lambda: lrm(tokens={"text": AS_TEXT, "prompt": (), "history_cap": 17}),
    "attention": lambda: lrm(
        tokens={"compression": "attention", "group": 4, "recent": 3}
    ),
    "mlp": lambda: lrm(tokens={"compression": "mlp", "compressed": 2, "recent": 5}),
    "sliding": lambda: lrm(candidates=2, model={"layers": 2, "windows": (9,)}),
    "linear": lambda: lrm(
        tokens={"maker": "linear", "output_scale": True, "user_tokens": 2}
    ),
    "transformer": lambda: lrm(
        tokens={"maker": "transformer", "target_tokens": 2}, candidates=2
    ),
}


def model_of(config, schema=TITLED) -> ModelSpec:
    """A model with made-up words as literal texts: there is no tokenizer here."""
    literals = tuple(
        (7, 3, 7)[: 1 + n]
        for n, s in enumerate(s for s in parse_prompt(config) if s.kind == "text")
    )
    plain = copy.deepcopy(config)
    plain.tokens.prompt = tuple(
        word for word in config.tokens.prompt if not word.startswith("text:")
    )
    return dataclasses.replace(
        build_model(plain, schema, TASKS), config=config, literals=literals
    )


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def shaken(params):
    return {
        name: x
        + 0.1
        * jax.random.normal(jax.random.key(n), x.shape, out_sharding=x.sharding.spec)
        for n, (name, x) in enumerate(params.items())
    }


@jax.jit
def _norms(tree):
    return jax.tree.map(lambda x: jnp.max(jnp.abs(x)), tree)


def value_and_gradients(model, params, tables, batch):
    @jax.jit
    def compute(params, tables, batch):
        found = model.embedder.find(batch)
        rows = model.embedder.gather(tables, found)
        reads = inverses(found)
        return jax.value_and_grad(loss_fn, argnums=(0, 1))(
            params, rows, model, reads, batch, jnp.ones(2), None
        )

    return compute(params, tables, batch)


@pytest.mark.parametrize(
    "name",
    [
        *("attention", "cut", "sliding"),
        # "sliding" has the prompt of the paper, "cut" is text.
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("paper", "text")),
    ],
)
def test_every_weight_and_table_learns_and_needed_rows_equal_all_rows(name, mesh):
    config = validate(CONFIGS[name]())
    model = model_of(config)
    state = init_state(model, 0)
    params = shaken(state.params)
    batch = place(
        random_batch(config, lengths=[1, 2, 5, 8, 11, 12, 12, 12], schema=TITLED), mesh
    )
    loss, (dense, rows) = value_and_gradients(model, params, state.tables, batch)
    assert np.isfinite(loss)
    norms = jax.device_get(_norms(dense))
    idle = {name for name, norm in norms.items() if not norm > 0}
    assert not idle
    assert all(norm > 0 for norm in jax.device_get(_norms(rows)).values())
    every = copy.deepcopy(config)
    every.model.needed_rows = False
    slow = value_and_gradients(
        dataclasses.replace(model, config=every), params, state.tables, batch
    )
    # Live positions against all of them: float32 sums in another order. Measured:
    # 1.5e-6 of the largest entry of an array, with AVX2 and AVX-512.
    for a, b in zip(
        jax.tree.leaves((loss, (dense, rows))), jax.tree.leaves(slow), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_the_prompt_of_the_paper_stands_in_its_order():
    config = lrm(candidates=2, tokens={"user_tokens": 1})
    layout = model_of(config).layout(2)
    names = [ROLES[role] for role in layout.roles]
    own = ["text", "text", "title", "title", "title", "target"]
    assert names == ["text", "user", "event", "event", "query", *own, *own]
    assert layout.candidate.tolist() == [-1] * 5 + [0] * 6 + [1] * 6
    assert layout.index.tolist() == [*range(11), *range(5, 11)]
    assert layout.static.tolist() == [True] * 2 + [False] * 15
    positions = layout.rope_positions(jnp.array([[False, True]]))[0].tolist()
    assert positions == [0, 0, 0, 1, 2, *[2, 3, 4, 5, 6, 7] * 2]
    assert layout.readout.tolist() == [10, 16]


def test_text_is_counted_exactly_and_cut_from_the_left():
    config = lrm(
        tokens={
            "text": {"history": ("code", "tab", "watched")},
            "prompt": (),
            "history_cap": 10,
        }
    )
    model = model_of(config, SCHEMA)
    layout = model.layout(12)
    events = layout.event[layout.event >= 0]
    assert events.tolist() == [
        9,
        9,
        10,
        10,
        10,
        10,
        11,
        11,
        11,
        11,
    ]  # two levels, a tab and a number each
    # Words of an event have places of their own, and what follows stands behind all of
    # them.
    valid = jnp.ones((1, 12), bool)
    positions = layout.rope_positions(valid)[0]
    assert positions[layout.event >= 0].tolist() == [
        39,
        40,
        41,
        42,
        43,
        44,
        45,
        46,
        47,
        48,
    ]
    assert positions[layout.readout].tolist() == [49]


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_only_a_bidirectional_prefix_looks_ahead_and_never_at_a_candidate(prefix, mesh):
    config = lrm(
        candidates=2, model={"prefix": prefix, "layers": 1}, tokens={"prompt": ()}
    )
    model = model_of(config, SCHEMA)
    layout = model.layout(12)
    module = bind_params(model, shaken(init_state(model, 0).params))
    rows = dataclasses.replace(layout, readout=np.arange(layout.length))

    def read(x):
        valid = jnp.ones((1, 12), bool, out_sharding=RULES("batch", None))
        both = jnp.ones((1, 2), bool, out_sharding=RULES("batch", None))
        return jax.sharding.reshard(
            jnp.sum(module.backbone(x, rows, valid, both, None), axis=-1),
            RULES(None, None),
        )[0]

    x = jax.random.normal(
        jax.random.key(2),
        (1, layout.length, 16),
        out_sharding=RULES("batch", None, None),
    )
    moved = np.abs(jax.jit(jax.jacobian(read))(x)[:, 0]).sum(-1) > 0
    shared = layout.candidate < 0
    assert not moved[np.ix_(shared, ~shared)].any()
    ahead = np.triu(moved[np.ix_(shared, shared)], 1)
    assert ahead.any() == (prefix == "bidirectional")


# A gradient would move a weight in the test below.
@pytest.mark.slow
def test_random_tokens_train_nothing_before_the_backbone(mesh):
    config = lrm(tokens={"random_tokens": True, "prompt": ()})
    model = model_of(config, SCHEMA)
    state = init_state(model, 0)
    _, (dense, rows) = value_and_gradients(
        model, state.params, state.tables, place(random_batch(config), mesh)
    )
    norms = jax.device_get(_norms(dense))
    trained = {name.split("/")[0] for name, norm in norms.items() if norm > 0}
    assert trained == {"backbone", "head"}
    assert all(norm == 0 for norm in jax.device_get(_norms(rows)).values())


def test_random_tokens_stay_as_they_are_made_under_weight_decay(mesh):
    config = lrm(tokens={"random_tokens": True, "prompt": ()})
    config.optim = OptimConfig(
        steps=10, warmup_steps=0, learning_rate=0.01, weight_decay=0.5
    )
    model = model_of(config, SCHEMA)
    before = init_state(model, 0)
    after, _ = jax.jit(train_step, static_argnums=0)(
        model, before, place(random_batch(config), mesh)
    )
    moved = {
        name
        for name, weight in before.params.items()
        if not np.array_equal(weight, after.params[name])
    }
    assert {name.split("/")[0] for name in moved} == {"backbone", "head"}
    assert all(
        np.array_equal(table, after.tables[name])
        for name, table in before.tables.items()
    )


def test_a_window_that_a_long_candidate_fills_is_refused(mesh):
    config = lrm(
        tokens={"prompt": ("history", "||", "title", "candidate")},
        model={"windows": (5,)},
    )
    with pytest.raises(
        InputError,
        match="holds no event: a candidate of this prompt has 4 tokens; use at least 6",
    ):
        build_model(config, TITLED, TASKS)


@pytest.mark.parametrize(
    "name", ["paper", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_a_mesh_of_eight_gives_the_same_loss(name):
    config = CONFIGS[name]()
    model = model_of(config)
    batch = random_batch(config, schema=TITLED)
    losses = []
    for mesh in (one_device(), mesh_of(2, 2, 2)):
        with jax.set_mesh(mesh):
            state = init_state(model, 0)
            losses.append(
                float(
                    jax.jit(step_loss, static_argnums=0)(
                        model, state, place(batch, mesh)
                    )
                )
            )
    # Means over the batch are sums of partial sums on a mesh. Measured: equal.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ("user", "history", "candidate")}, "right of"),
        ({"prompt": ("user", "||", "candidate")}, "no 'history'"),
        (
            {"prompt": ("user", "history", "histroy", "||", "candidate")},
            "did you mean 'history'",
        ),
        (
            {"prompt": ("history", "||", "candidate", "title")},
            "must end with 'candidate'",
        ),
        ({"prompt": ("history", "history", "||", "candidate")}, "2 times"),
        ({"prompt": ("history", "||", "query", "candidate")}, "move the others left"),
        ({"prompt": ("text:", "history", "||", "candidate")}, "literal text"),
        ({"text": {"histories": ("tab",)}}, "did you mean 'history'"),
        ({"text": {"history": ()}}, "is empty"),
        ({"compression": "mlp", "recent": 12}, "nothing of data.events=12"),
        (
            {"compression": "mlp", "recent": 5, "compressed": 8},
            "more than the 7 older events",
        ),
        ({"compression": "attention", "recent": 5, "history_cap": 3}, "history_cap"),
    ],
)
def test_a_wrong_prompt_is_named_with_its_remedy(change, words):
    with pytest.raises(InputError, match=words):
        validate(lrm(tokens={"prompt": ()} | change))


def test_a_text_feature_that_is_not_there_is_named():
    with pytest.raises(InputError, match="'codes'; did you mean 'code'"):
        model_of(lrm(tokens={"prompt": (), "text": {"history": ("codes",)}})).layout(12)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "attention",
            "12 events in, 6 tokens out: 9 older events into 3 by attention pooling in groups of 4, the newest 3 kept",
        ),
        (
            "mlp",
            "12 events in, 7 tokens out: 7 older events into 2 by an MLP over time, the newest 5 kept",
        ),
        ("cut", "12 events in, 17 tokens out: text, 4 tokens an event, cut from 48"),
    ],
)
def test_describe_shows_what_becomes_of_the_history(name, line):
    config = CONFIGS[name]()
    config.tokens.prompt = ()
    config.optim.steps = 10
    schema = dataclasses.replace(TITLED)
    assert line in to_text(describe(config, schema))
