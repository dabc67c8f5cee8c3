"""Weights and tables of another model are refused, not broadcast or ignored."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, one_device, place, random_batch, tiny
from tokenrec.errors import InputError
from tokenrec.ops.tables.api import storage_spec, stored_shape
from tokenrec.state import abstract_state, bind_params, build_model, init_state

REMEDY = "build the model with those of the run that they come from"


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def test_weights_of_the_model_are_bound_real_or_abstract():
    model = build_model(tiny(), SCHEMA, TASKS)
    params = init_state(model, 0).params
    module = bind_params(model, params)
    assert np.array_equal(module.head.kernel[...], params["head/kernel"])
    shapes = bind_params(model, abstract_state(model).params)
    assert shapes.head.kernel.get_value().shape == (16, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # A bias [1] would be broadcast to both tasks, and a scalar anywhere.
        (
            lambda p: p | {"head/bias": jnp.zeros(1)},
            "weight 'head/bias' is float32[1], and the model needs float32[2]",
        ),
        (
            lambda p: p | {"head/kernel": p["head/kernel"].T},
            "weight 'head/kernel' is float32[2,16], and the model needs float32[16,2]",
        ),
        (
            lambda p: p | {"head/bias": jnp.zeros(2, jnp.bfloat16)},
            "weight 'head/bias' is bfloat16[2], and the model needs float32[2]",
        ),
        (
            lambda p: {n: w for n, w in p.items() if n != "head/bias"},
            "weight 'head/bias' is missing, and the model needs float32[2]",
        ),
        (
            lambda p: p | {"head/skale": jnp.zeros(3)},
            "weight 'head/skale' float32[3] is not one of the model's",
        ),
    ],
)
def test_a_weight_that_does_not_fit_is_named_with_both_shapes(change, message):
    model = build_model(tiny(), SCHEMA, TASKS)
    params = change(init_state(model, 0).params)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        bind_params(model, params)
    assert REMEDY in str(error.value)
    assert "more)" not in str(error.value)


def test_weights_of_another_config_are_refused_and_counted():
    params = init_state(build_model(tiny(), SCHEMA, TASKS), 0).params
    other = build_model(tiny(model={"width": 32}), SCHEMA, TASKS)
    with pytest.raises(InputError, match=r"needs .*\(and \d+ more\)"):
        bind_params(other, params)


@functools.cache
def model_and_tables(replicate_rows):
    """Of a state of one layer."""
    tokens, one_layer = {"replicate_rows": replicate_rows}, {"layers": 1, "windows": ()}
    model = build_model(tiny(tokens=tokens, model=one_layer), SCHEMA, TASKS)
    return model, init_state(model, 0).tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table[:-1],
            r"is float32\[\d+,\d+\], and the model needs float32",
        ),
        (lambda table: table[:, :4], r"is float32\[\d+,4\], and the model needs"),
        (lambda table: table.astype(jnp.bfloat16), r"is bfloat16\[\d+,\d+\], and"),
        (None, r"float32\[\d+,(8|128)\] is missing for the tables"),
    ],
)
@pytest.mark.parametrize("replicate_rows", [8, 100])
def test_a_table_that_does_not_fit_is_named(mesh, replicate_rows, change, message):
    """A gather from a shorter table would read another row."""
    model, tables = model_and_tables(replicate_rows)
    tables = dict(tables)
    name = sorted(tables)[-1]
    table = tables.pop(name)
    if change is not None:
        tables[name] = change(table)
    batch = place(random_batch(tiny()), mesh)
    with pytest.raises(InputError, match=f"stack '{name}' {message}") as error:
        model.embedder.look_up(tables, batch)
    assert REMEDY in str(error.value)


def test_the_stored_shape_is_that_of_the_state():
    model = build_model(tiny(tokens={"replicate_rows": 8}), SCHEMA, TASKS)
    tables = init_state(model, 0).tables
    for name, stack in model.embedder.stacks.items():
        assert tables[name].shape == stored_shape(stack) == storage_spec(stack)[0]
