"""Id dropout, and the rates of tables in later epochs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, place, random_batch, tiny
from tokenrec.config import TokensConfig
from tokenrec.data.schema import UNKNOWN, columns
from tokenrec.errors import InputError
from tokenrec.ops.layers import sample_keys
from tokenrec.state import build_model, init_state
from tokenrec.step import step_inputs, train_step
from tokenrec.tokens.id_dropout import drop_ids

PARTS = ("user", "state", "action", "target")
STEP = jax.jit(train_step, static_argnums=0)


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def small(**options):
    model = {"layers": 1, "windows": ()}
    return tiny(
        **{"model": model, "events": 6, "candidates": 2, "fused": True} | options
    )


def dropped(batch, tokens, mesh, samples=64):
    model = build_model(small(), SCHEMA, TASKS)

    def run(batch):
        keys = sample_keys(jax.random.key(3), samples)
        return drop_ids(batch, model.embedder.parts, tokens, keys)

    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(run)(place(batch, mesh)))


def test_known_values_of_the_named_tables_become_unknown_with_their_probability(mesh):
    batch = random_batch(small(events=12), 64)
    tokens = TokensConfig(id_dropout=0.25, id_dropouts={"tags": 0.5, "tab": 0.0})
    found, rates = dropped(batch, tokens, mesh), {}
    features = {"user": SCHEMA.group("user"), "action": SCHEMA.group("action")}
    for part in PARTS:
        old, new = getattr(batch, part), getattr(found, part)
        np.testing.assert_array_equal(new.dense, old.dense)
        for name, span in columns(features.get(part, SCHEMA.state)).ids.items():
            before, after = (ids.ids[..., slice(*span)] for ids in (old, new))
            changed = before != after
            assert (after[changed] == UNKNOWN).all()
            assert (before[changed] > UNKNOWN).all()
            if part == "state":
                rates[name] = changed.sum() / (before > UNKNOWN).sum()
    # 64 x 12 ids: a deviation of 0.016; three tags: 0.010.
    assert rates["video"] == pytest.approx(0.25, abs=0.06)
    assert rates["tags"] == pytest.approx(0.5, abs=0.04)
    # Codes of a semantic id are no values.
    assert rates["tab"] == rates["code"] == 0


def test_draws_depend_on_the_sample_and_neither_on_the_mesh_nor_the_batch(mesh):
    batch = random_batch(small(), 64)
    tokens = TokensConfig(id_dropout=0.5)
    whole, split = (
        dropped(batch, tokens, mesh),
        dropped(batch, tokens, mesh_of(4, 2, 1)),
    )
    part = dropped(jax.tree.map(lambda x: x[:8], batch), tokens, mesh, samples=8)
    for name in PARTS:
        ids = getattr(whole, name).ids
        np.testing.assert_array_equal(ids, getattr(split, name).ids)
        np.testing.assert_array_equal(ids[:8], getattr(part, name).ids)


def test_a_train_step_reads_the_rows_of_unknown(mesh):
    batch = random_batch(small(), 16)
    # A training split holds no unknown value.
    for name in PARTS:
        signals = getattr(batch, name)
        signals.ids[signals.ids == UNKNOWN] = 2
    read = []
    for tokens in ({}, {"id_dropout": 0.3}):
        model = build_model(small(tokens=tokens), SCHEMA, TASKS)
        inputs = jax.jit(step_inputs, static_argnums=0)(
            model, init_state(model, 0), place(batch, mesh)
        )
        read.append(
            [bool((getattr(inputs.batch, name).ids == UNKNOWN).any()) for name in PARTS]
        )
    assert read == [[False] * 4, [True] * 4]


def test_tables_stand_still_in_epochs_of_rate_zero(mesh):
    config = small(optim={"table_rates": (1.0, 0.0), "table_weight_decay": 0.1})
    model = build_model(config, SCHEMA, TASKS, epoch_steps=2)
    batch = place(random_batch(config), mesh)
    states = [init_state(model, 0)]
    for _ in range(4):
        states.append(STEP(model, states[-1], batch)[0])
    moved = [
        any(
            not np.array_equal(new.tables[name], old.tables[name])
            for name in new.tables
        )
        for old, new in itertools.pairwise(states)
    ]
    assert moved == [True, True, False, False]
    name = "head/kernel"
    assert not np.array_equal(states[4].params[name], states[3].params[name])


def test_rates_by_epoch_need_the_length_of_one(mesh):
    config = small(optim={"table_rates": (1.0, 0.0)})
    model = build_model(config, SCHEMA, TASKS)
    with pytest.raises(InputError, match="does not know their steps"):
        STEP(model, init_state(model, 0), place(random_batch(config), mesh))


@pytest.mark.parametrize("field", ["id_dropouts", "min_counts"])
@pytest.mark.parametrize("table", ["vidoe", "code"])
def test_options_of_ids_name_tables_of_values(field, table):
    config = small()
    setattr(config.tokens, field, {table: 0})
    with pytest.raises(InputError, match=f"tokens.{field} names the table '{table}'"):
        build_model(config, SCHEMA, TASKS)


def test_no_dropout_traces_no_random_numbers(mesh):
    batch = random_batch(small())
    model = build_model(small(), SCHEMA, TASKS)
    keys = jnp.zeros(0)
    assert drop_ids(batch, model.embedder.parts, TokensConfig(), keys) is batch
