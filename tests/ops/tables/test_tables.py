"""The interface of embedding tables: wrong arguments are named."""

import jax
import jax.numpy as jnp
import pytest

from tests.worlds import mesh_of
from tokenrec.errors import InputError
from tokenrec.ops.tables.api import (
    collect_gradients,
    find_unique_rows,
    gather_rows,
    storage_spec,
)
from tokenrec.ops.tables.lookup import build_stacks

STACKS = build_stacks({"day": 7, "video": 500}, {"day": 4, "video": 4}, 100)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (jnp.zeros((8, 2), jnp.float32), r"'state' \(8, 2\) float32: .*int32"),
        (jnp.zeros((8, 2), jnp.uint8), r"'state' \(8, 2\) uint8"),
        (jnp.zeros((), jnp.int32), r"'state' \(\) int32: .*\[B, \.\.\.\]"),
    ],
)
def test_ids_of_another_dtype_or_without_a_batch_are_an_error(name, ids, message):
    with (
        jax.set_mesh(mesh_of(2, 2, 2)),
        pytest.raises(InputError, match=message),
    ):
        find_unique_rows(STACKS[name], {"state": ids})


@pytest.mark.parametrize("name", STACKS)
def test_gradients_of_other_rows_are_an_error(name):
    stack = STACKS[name]
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        shape, spec = storage_spec(stack)
        table = jax.device_put(jnp.zeros(shape), jax.NamedSharding(mesh, spec))
        ids = jax.device_put(
            jnp.zeros((8, 2), jnp.int32),
            jax.NamedSharding(mesh, jax.P(("data", "fsdp"))),
        )
        unique = find_unique_rows(stack, {"state": ids})
        rows = gather_rows(stack, table, unique)
        message = rf"are not those of \d+ rows of stack '{name}'"
        with pytest.raises(InputError, match=message):
            collect_gradients(stack, unique, rows[:, :-1])
