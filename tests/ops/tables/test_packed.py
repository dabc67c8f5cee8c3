"""Packed lines: the same numbers as plain rows, whichever way they are reached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, mesh_of, one_device, tiny
from tokenrec.ops.layers import draw_uniform
from tokenrec.ops.tables import packed
from tokenrec.ops.tables.packed import (
    LANES,
    add_rows,
    gather_rows,
    packed_shape,
    set_rows,
)
from tokenrec.sharding import RULES
from tokenrec.state import TABLE_DEVIATION, build_model, init_state

ROWS = 256


@pytest.fixture(params=["cpu", "tpu"])
def platform(request, monkeypatch):
    """Compute on the rows in another shape, or by lines, as on that platform."""
    monkeypatch.setattr(packed, "current_platform", lambda: request.param)
    with jax.set_mesh(one_device()):
        yield request.param


@pytest.mark.parametrize("width", [16, 64])
def test_rows_are_read_added_to_and_replaced(platform, width):
    random = np.random.default_rng(width)
    table = random.normal(size=(ROWS, width)).astype(np.float32)
    # Rows with signed zeros, beside rows of one line that change.
    table[::3] = -0.0
    lines = jnp.asarray(table.reshape(-1, LANES))
    # Whole lines, parts of lines, single rows; the last ones are out of range.
    ids = np.concatenate(
        [np.arange(40), np.arange(40, ROWS, 7), [ROWS, ROWS + 9, ROWS + 300]]
    )
    real = ids < ROWS
    values = random.normal(size=(len(ids), width)).astype(np.float32)
    # A number that is not finite stays in its own row.
    values[5] = np.inf

    read = gather_rows(lines, jnp.asarray(ids, jnp.int32), width, distinct=True)
    expected = np.zeros_like(values)
    expected[real] = table[ids[real]]
    assert_same_bits(read, expected)
    unsorted = ids[::-1].reshape(2, -1).astype(np.int32)
    read = gather_rows(lines, jnp.asarray(unsorted), width)
    assert_same_bits(read, expected[::-1].reshape(2, -1, width))

    added = add_rows(lines, jnp.asarray(ids, jnp.int32), values)
    expected = table.copy()
    expected[ids[real]] += values[real]
    assert added.shape == lines.shape
    assert_same_bits(added, expected.reshape(-1, LANES))

    replaced = set_rows(lines, jnp.asarray(ids[::-1], jnp.int32), values[::-1])
    expected = table.copy()
    expected[ids[real]] = values[real]
    assert_same_bits(replaced, expected.reshape(-1, LANES))


def assert_same_bits(found, expected):
    """Equal numbers, and equal signs of zeros."""
    found = np.asarray(found)
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(
    ("rows", "width", "devices", "shape"),
    [
        (12_288, 16, 8, (1536, 128)),
        # 6,144 lines do not divide over 4,096 devices.
        (12_288, 64, 4096, (12_288, 64)),
        # 384 lines do not divide over 256 devices.
        (12_288, 4, 256, (12_288, 4)),
        (12_288, 20, 1, (12_288, 20)),
        (12_288, 128, 8, (12_288, 128)),
        (12_288, 256, 8, (12_288, 256)),
    ],
)
def test_lines_are_whole_and_divide_over_the_devices(rows, width, devices, shape):
    assert packed_shape(rows, width, devices) == shape


def test_a_fresh_table_starts_from_the_numbers_of_plain_rows():
    """A seed gives the same run as before tables were packed."""
    model = build_model(tiny(tokens={"replicate_rows": 8}), SCHEMA, TASKS)
    names = sorted(model.embedder.stacks)
    (name,) = (n for n in names if model.embedder.stacks[n].spread)
    stack = model.embedder.stacks[name]
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        state = init_state(model, 3)
        _, key = jax.random.split(jax.random.key(3))
        plain = draw_uniform(
            jax.random.fold_in(key, names.index(name)),
            (stack.stored_rows, stack.width),
            TABLE_DEVIATION,
            RULES("rows", None),
        )
    assert state.tables[name].shape == (stack.stored_rows * stack.width // 128, 128)
    assert np.array_equal(np.asarray(state.tables[name]).reshape(plain.shape), plain)
    assert state.opt_state["rows"][name].sum.shape == (stack.stored_rows,)
