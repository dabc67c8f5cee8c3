"""What holds for every rival: padding, candidates, causality, gradients, figures, meshes, refusals."""

import jax
import numpy as np
import pytest

from tests.models.rivals.machine import build, logits, value_and_gradients
from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, place, random_batch, tiny
from tokenrec.describe import describe, to_text
from tokenrec.errors import InputError
from tokenrec.kinds import RIVAL_KINDS
from tokenrec.models.rivals import RIVALS
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step
from tokenrec.validation import validate

UC = [name for name, kind in RIVAL_KINDS.items() if kind.uc]


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def rival(kind, **options):
    """A small config of a kind; its streams are longer than those that some tests feed it."""
    model = {"kind": kind, "layers": 2, "windows": (6,) if RIVAL_KINDS[kind].windows else ()}
    return validate(tiny(**{"events": 20, "model": model, "tokens": {"user_tokens": 2}} | options))


def cut(batch, events):
    """The same samples in streams of the newest `events` rows."""
    newest = jax.tree.map(lambda x: x[:, -events:], (batch.state, batch.action, batch.valid))
    return batch._replace(state=newest[0], action=newest[1], valid=newest[2])


@pytest.mark.parametrize("kind", RIVALS)
def test_neither_padding_nor_other_candidates_change_a_score(kind, mesh):
    config = rival(kind, candidates=3)
    model, state, params = build(config)
    batch = random_batch(config, lengths=[0, 1, 2, 3, 5, 9, 10, 10])
    scores = logits(model, params, state.tables, place(batch, mesh))
    assert np.abs(scores[:, 0] - scores[:, 1]).min() > 1e-6  # the target matters

    other = random_batch(config, seed=1)
    target = jax.tree.map(lambda a, b: np.concatenate([a[:, :2], b[:, 2:]], axis=1), batch.target, other.target)
    weight = batch.weight.copy()
    weight[::2, 2] = 0
    changed = logits(model, params, state.tables, place(batch._replace(target=target, weight=weight), mesh))
    np.testing.assert_allclose(changed[:, :2], scores[:, :2], atol=1e-5)
    assert np.abs(changed[:, 2] - scores[:, 2]).max() > 1e-3

    short = logits(model, params, state.tables, place(cut(batch, 10), mesh))
    np.testing.assert_allclose(short, scores, atol=1e-5)  # sums of another length


@pytest.mark.parametrize("kind", UC)
def test_no_event_changes_an_earlier_score_and_no_action_its_own(kind, mesh):
    config = rival(kind, paradigm="uc", events=12)
    model, state, params = build(config)
    batch, other = (random_batch(config, seed=seed, lengths=[12, 12, 9, 7, 12, 12, 4, 12]) for seed in (0, 1))
    scores = logits(model, params, state.tables, place(batch, mesh))

    def replaced(old, new, first):
        return jax.tree.map(lambda a, b: np.concatenate([a[:, :first], b[:, first:]], axis=1), old, new)

    later = batch._replace(state=replaced(batch.state, other.state, 9), action=replaced(batch.action, other.action, 8))
    changed = logits(model, params, state.tables, place(later, mesh))
    real = batch.valid[:, :9]
    np.testing.assert_allclose(np.asarray(changed)[:, :9][real], np.asarray(scores)[:, :9][real], atol=1e-5)
    assert np.abs(changed[:, 9:] - scores[:, 9:]).max() > 1e-3


@pytest.mark.parametrize("kind", RIVALS)
def test_gradients_reach_every_weight_and_figures_are_counted(kind, mesh):
    config = rival(kind, events=12)
    model, state, params = build(config)
    loss, dense = value_and_gradients(model, params, state.tables, place(random_batch(config, 16), mesh))
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in dense.values())
    assert not [name for name, g in dense.items() if not np.any(g)]

    figures = describe(config, SCHEMA)
    assert figures["parameters"]["dense"] == sum(w.size for w in params.values())
    backbone = sum(w.size for name, w in params.items() if name.startswith("backbone/"))
    # A weight is multiplied at least once with something of a sample, less what stands beside a product.
    assert figures["flops_per_example"] > backbone
    assert "MFLOP per sample" in to_text(figures)


@pytest.mark.parametrize(("kind", "shape"), [("hstu", (8, 1, 1))])
def test_a_step_on_a_mesh_is_the_step_on_one_device(kind, shape):
    config = rival(kind, events=4, fused=True, tokens={"user_tokens": 1, "maker": "linear"})
    schema, states = SCHEMA.without(("age", "tags", "picture", "code", "rate", "tab", "watched")), []
    for mesh in (one_device(), mesh_of(*shape)):
        with jax.set_mesh(mesh):
            model = build_model(config, schema, TASKS)
            step = jax.jit(train_step, static_argnums=0)
            state, metrics = step(model, init_state(model, 0), place(random_batch(config, schema=schema), mesh))
            assert metrics.applied
            states.append(state)
    for name, weight in states[0].params.items():
        # AdamW's first step divides a gradient by itself, which magnifies rounding.
        np.testing.assert_allclose(weight, states[1].params[name], rtol=1e-4, atol=5e-5, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (
            "hstu",
            "model.gate",
            False,
            "model.gate=False with model.kind='hstu', which does not read it; leave it at True",
        ),
        ("hstu", "model.remat", "full", "model.remat='full'"),
        ("hstu", "model.prefix", "bidirectional", "model.prefix='bidirectional'"),
    ],
)
def test_what_a_rival_cannot_do_is_refused(kind, field, value, message):
    config = rival(kind)
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(InputError) as caught:
        validate(config)
    assert message in str(caught.value)


def test_every_kind_has_a_class_and_its_limits():
    assert RIVALS.keys() == RIVAL_KINDS.keys()
