"""Alignment tasks: what a question and its answer cost, and which items are asked about."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language import reference
from tests.language.hf_models import CONFIGS, WORDS, random_tensors
from tests.models.backbones.language_models import decoder_weights, model_config
from tests.worlds import FEATURES, TABLES, mesh_of, one_device, place, random_batch
from tokenrec.alignment import draw_aligned, losses_by_task, plan_alignment
from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    OptimConfig,
    TokensConfig,
    TuningConfig,
)
from tokenrec.config.alignment import alignment_tasks
from tokenrec.config.validate import validate
from tokenrec.data.interaction_log import Catalogue
from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, Schema, columns
from tokenrec.errors import InputError
from tokenrec.state import ModelSpec, bind_params, init_state
from tokenrec.step import gradients, step_inputs
from tokenrec.tokens.embed import Embedder
from tokenrec.tuning import is_frozen

ASKS_ID, ASKS_TITLE = "Which is {title}? {sid}", "{sid} is {title}"
LEVELS = (3, 4)
TITLE = Feature("title", "text", "item", length=4, codes=256)
BRAND = Feature("brand", "text", "item", length=2, codes=256)
SCHEMA = Schema(
    (*FEATURES, TITLE, BRAND),
    (),
    TABLES | {"text": WORDS + FIRST_KNOWN},
    items=4,
    levels=LEVELS,
)
# Ids of the texts in front of and behind the question of either task.
LITERALS = (((9, 33), (70, 5)), ((), (12,)))
# Title of up to 4 words and brand of up to 2.
TEXTS = np.array(
    [
        [4, 8, 15, 0, 23, 42],
        [0, 0, 0, 0, 0, 0],  # no text
        [50, 0, 0, 0, 61, 0],
        [20, 21, 0, 0, 22, 0],
    ]
)
CODES = np.array([[0, 1], [0, 0], [2, 3], [-1, -1]])  # the last: no id
# Items with both.
WHOLE = (0, 2)
# One layer each: a local one in Gemma.
MODELS = {name: CONFIGS[name] | {"num_hidden_layers": 1} for name in CONFIGS}


def config_of(name="gemma3", alignment=None):
    if alignment is None:
        alignment = {ASKS_ID: 0.5, ASKS_TITLE: 2.0}
    return Config(
        data=DataConfig(
            path="-",
            semantic_ids="-",
            objective="retrieval",
            paradigm="nio",
            events=3,
            batch_size=8,
        ),
        tokens=TokensConfig(embedding_dim=4, fused=True, prompt=("history",)),
        model=model_config(MODELS[name]),
        head=HeadConfig(retrieval="semantic_id", alignment=alignment),
        optim=OptimConfig(steps=10, warmup_steps=2),
    )


def catalogue(texts=TEXTS, codes=CODES, known=None):
    spans = columns(SCHEMA.group("catalogue"))
    ids = np.ones((len(texts), spans.ids_width), np.int32)
    ids[:, slice(*spans.ids["title"])] = texts[:, :4]
    ids[:, slice(*spans.ids["brand"])] = texts[:, 4:]
    return Catalogue(
        np.arange(len(texts)), ids, np.zeros((len(texts), 0)), codes, known
    )


def model_of(config):
    tasks = alignment_tasks(config)
    plan = plan_alignment(tasks, LITERALS[: len(tasks)], SCHEMA, catalogue())
    return ModelSpec(config, SCHEMA, (), Embedder.build(SCHEMA, config), alignment=plan)


def batch_of(config, aligned=None):
    """A batch of retrieval with two levels of codes."""
    random = np.random.default_rng(1)
    batch = random_batch(config, schema=SCHEMA)
    goals = random.choice(WHOLE, (8, 1, 1)).astype(np.int32)
    return batch._replace(
        labels=None,
        weight=np.ones((8, 1), np.float32),
        target=batch.target._replace(
            ids=batch.target.ids[:, :1], dense=batch.target.dense[:, :1]
        ),
        items=np.where(batch.valid, 1, -1).astype(np.int32),
        goals=goals,
        codes=CODES[goals].astype(np.int32),
        aligned=aligned,
    )


def params_of(model, tensors):
    """The weights of a model, with those of a checkpoint in its backbone."""
    params = init_state(model, 0).params
    backbone = decoder_weights(model.config.model, tensors)
    given = {f"backbone/{name}": value for name, value in backbone.items()}
    for ours, theirs in (("inputs", "model.embed_tokens"), ("outputs", "lm_head")):
        if f"words/{ours}" in params:
            words = np.asarray(tensors[f"{theirs}.weight"])
            room = params[f"words/{ours}"].shape[0] - len(words)
            given[f"words/{ours}"] = np.pad(words, ((0, room), (0, 0)))
    assert given.keys() <= params.keys()
    return params | {
        name: jax.device_put(value, params[name].sharding)
        for name, value in given.items()
    }


def reference_loss(name, outputs, tensors, item, task):
    """-log P of an answer, over a stream that holds nothing else."""
    hf = MODELS[name]
    words = np.array([word for word in TEXTS[item] if word != MISSING])
    scale = reference.embed(tensors, hf, jnp.zeros((1, 1), int))[0, 0]
    scale = scale[0] / tensors["model.embed_tokens.weight"][0, 0]
    rows = np.arange(len(LEVELS)) * max(LEVELS) + CODES[item]
    code_vectors = outputs[rows] * scale

    def read(ids):
        ids = jnp.asarray([ids], int).reshape(1, -1) - FIRST_KNOWN
        return reference.embed(tensors, hf, ids)[0]

    before, between = LITERALS[task]
    question, answer = read(words), code_vectors
    if task == 1:
        question, answer = answer, question
    x = jnp.concatenate([read(before), question, read(between), answer[:-1]])[None]
    states = reference.hidden_states(tensors, hf, x, jnp.ones(x.shape[:2], bool))
    states = states[:, -len(answer) :]
    if task == 1:
        scores = reference.score(tensors, hf, states)[0]
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        return -sum(log_probs[n, w - FIRST_KNOWN] for n, w in enumerate(words))
    loss = 0.0
    for level, code in enumerate(CODES[item]):
        first = level * max(LEVELS)
        table = outputs[first : first + LEVELS[level]]
        loss -= jax.nn.log_softmax(table @ states[0, level])[code]
    return loss


def test_a_loss_is_that_of_a_stream_of_its_own():
    # Words are scaled and have vectors of their own to score; a window is shorter than
    # the streams.
    name = "gemma3_capped_untied"
    config = config_of(name)
    model = model_of(config)
    tensors = random_tensors(MODELS[name])
    assert len(model.alignment.titles) == len(WHOLE)
    # Rows of the plan, by sample and task.
    rows = np.array([[0, 1], [1, 0]] * 4, np.int32)
    batch = batch_of(config, rows)

    with jax.set_mesh(one_device()):
        params = params_of(model, tensors)

        def ours(params, batch):
            module = bind_params(model, params)
            losses = jnp.stack(losses_by_task(model.alignment, module, batch, None))
            return jnp.sum(losses), losses

        found, losses = jax.jit(jax.grad(ours, has_aux=True))(
            params, place(batch, one_device())
        )

    def theirs(outputs, tensors):
        each = jnp.stack(
            [
                jnp.stack(
                    [reference_loss(name, outputs, tensors, n, task) for n in WHOLE]
                )
                for task in (0, 1)
            ]
        )
        losses = jnp.stack([each[task][rows[:, task]] for task in (0, 1)])
        return jnp.sum(losses), losses

    outputs = np.asarray(params["head/outputs"])
    (of_codes, of_tensors), wanted = jax.jit(
        jax.grad(theirs, argnums=(0, 1), has_aux=True)
    )(outputs, tensors)
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    pairs = {
        "head/outputs": of_codes,
        "words/inputs": of_tensors["model.embed_tokens.weight"],
        "words/outputs": of_tensors["lm_head.weight"],
    }
    for weight, gradient in pairs.items():
        # Words fill up to a multiple of 128.
        own = found[weight][: len(gradient)]
        assert reference.relative_error(own, gradient) < 2e-5, weight


def test_a_step_adds_the_weighted_mean_of_the_tasks():
    config = config_of("qwen3")
    # Micro-batches of one sample for each device of the mesh below, and of one.
    config.optim.accumulate = 2
    model = model_of(config)

    @functools.partial(jax.jit, static_argnums=0)
    def step(model, state, batch):
        inputs = step_inputs(model, state, batch)
        return gradients(model, state.params, inputs)[0], inputs.batch.aligned

    @jax.jit
    def each_task(state, batch):
        module = bind_params(model, state.params)
        return jnp.mean(
            jnp.stack(losses_by_task(model.alignment, module, batch, None)), 1
        )

    def run(model, mesh):
        with jax.set_mesh(mesh):
            state, batch = init_state(model, 0), place(batch_of(config), mesh)
            loss, aligned = step(model, state, batch)
            if aligned is None:
                return float(loss), None
            tasks = each_task(state, batch._replace(aligned=aligned))
            return float(loss), np.asarray(tasks)

    without = run(dataclasses.replace(model, alignment=None), one_device())[0]
    # Samples on several devices, and weights in parts.
    loss, tasks = run(model, mesh_of(2, 2, 2))
    wanted = without + 0.5 * tasks[0] + 2.0 * tasks[1]
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_micro_batches_of_one_sample_with_dropout():
    """A slice of a batch of one loses its sharding."""
    config = config_of("qwen3")
    config.model.dropout = 0.2
    losses = []
    for count in (1, 8):
        config.optim.accumulate = count
        model = model_of(config)

        def loss(state, batch, model=model):
            inputs = step_inputs(model, state, batch)
            return gradients(model, state.params, inputs)[0]

        with jax.set_mesh(one_device()):
            state, batch = init_state(model, 0), place(batch_of(config), one_device())
            losses.append(float(jax.jit(loss)(state, batch)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_vectors_that_words_are_scored_with_may_be_frozen():
    config = config_of("llama3")
    config.tuning = TuningConfig(method="lora", rank=2)
    config.model.dtype = "bfloat16"
    shapes = model_of(config).param_shapes()
    assert shapes["words/outputs"].dtype == jnp.bfloat16
    assert is_frozen(config, "words/outputs")
    # Without a task that writes texts they stay in the checkpoint.
    config.head.alignment = {ASKS_ID: 1.0}
    assert "words/outputs" not in model_of(config).param_shapes()


def test_items_are_drawn_evenly_and_by_the_step():
    model = model_of(config_of())
    with jax.set_mesh(one_device()):
        one, again, other = (
            np.asarray(draw_aligned(model.alignment, jax.random.key(k), 4_000))
            for k in (0, 0, 1)
        )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[:, 0] != one[:, 1]).any()
    for task in (0, 1):
        counts = np.bincount(one[:, task])
        # Two items of 2,000 each, with a deviation of 32.
        assert len(counts) == len(WHOLE)
        assert abs(counts - 2_000).max() < 200


def test_items_without_text_or_id_are_left_out(monkeypatch):
    tasks = alignment_tasks(config_of())
    plan = plan_alignment(tasks, LITERALS, SCHEMA, catalogue())
    np.testing.assert_array_equal(plan.codes, CODES[list(WHOLE)])
    # Texts have no gaps, and no columns that no item needs.
    np.testing.assert_array_equal(plan.titles, [[4, 8, 15, 23, 42], [50, 61, 0, 0, 0]])
    assert len(plan_alignment(tasks, LITERALS, SCHEMA, catalogue(known=2)).codes) == 1

    with pytest.raises(InputError, match=r"none of the 4 items.* title or brand"):
        plan_alignment(tasks, LITERALS, SCHEMA, catalogue(np.zeros_like(TEXTS)))
    bare = Schema(FEATURES, (), TABLES, items=4, levels=LEVELS)
    with pytest.raises(InputError, match=r"head\.alignment.*kind 'text'"):
        plan_alignment(tasks, LITERALS, bare, catalogue())
    assert plan_alignment((), (), bare, None) is None
    monkeypatch.setattr("tokenrec.alignment.MOST_BYTES", 100)
    with pytest.raises(InputError, match=r"4 items are .* MiB of every compiled"):
        plan_alignment(tasks, LITERALS, SCHEMA, catalogue())


def test_templates():
    config = config_of(alignment={ASKS_ID: 0.5, "{sid}{title}": 1.0})
    assert alignment_tasks(config) == (
        ("title_to_sid", ASKS_ID, 0.5, "sid", "Which is ", "? "),
        ("sid_to_title", "{sid}{title}", 1.0, "title", "", ""),
    )
    # The order of the config does not matter, and names are unique.
    again = config_of(alignment={"{sid}{title}": 1.0, "{sid} {title}": 1, ASKS_ID: 0.5})
    names = [(task.name, task.template) for task in alignment_tasks(again)]
    assert names == [
        ("title_to_sid", ASKS_ID),
        ("sid_to_title", "{sid} {title}"),
        ("sid_to_title_2", "{sid}{title}"),
    ]
    config.tokens = TokensConfig(fused=True, template="{user}{history}{sid}", chat=True)
    chat = alignment_tasks(config)[0]
    assert chat.before == "<bos><start_of_turn>user\nWhich is "
    assert chat.between == "? <end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("alignment", "expected"),
    [
        ({"{title}": 1.0}, "must hold '{title}' and '{sid}' once each"),
        ({"{title}{title}{sid}": 1.0}, "once each"),
        ({"{sid} {title}.": 1.0}, "'.' stands behind '{title}'"),
        ({"{titel} {sid}": 1.0}, "head.alignment: '{titel}' is not a slot; did you"),
        ({"{title} {history}": 1.0}, "'{history}' is not a slot"),
        ({"{title} {sid": 1.0}, "has no partner; write a slot as '{title}'"),
        ({ASKS_ID: 0.0}, "above 0"),
    ],
)
def test_templates_that_do_not_fit(alignment, expected):
    with pytest.raises(InputError, match=expected.replace(".", r"\.").replace("?", "")):
        validate(config_of(alignment=alignment))


def test_models_and_heads_that_have_no_alignment():
    config = config_of()
    config.head.retrieval, config.data.semantic_ids = "next_item", ""
    with pytest.raises(InputError, match=r"head\.retrieval='next_item'"):
        validate(config)
    config = config_of()
    config.model = Config().model
    with pytest.raises(InputError, match=r"head\.alignment with model\.kind='tokenf"):
        validate(config)
