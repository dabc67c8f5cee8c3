"""Rows of a weight in shards over `fsdp` are looked up without gathering it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import mesh_of
from tokenrec.ops.column_lookup import look_up_columns
from tokenrec.sharding import RULES

V, D = 640, 48


def arrays(shape, batch, mesh):
    random = np.random.default_rng(0)
    table = random.normal(size=(V, D)).astype(np.float32)
    # An id that occurs often, on several devices.
    ids = np.where(random.random(shape) < 0.3, 7, random.integers(0, V, shape))
    spec = RULES("batch" if batch else None, *[None] * (len(shape) - 1))
    return (
        jax.device_put(table, jax.NamedSharding(mesh, RULES(None, "embed"))),
        jax.device_put(ids.astype(np.int32), jax.NamedSharding(mesh, spec)),
    )


def weighted(table, ids):
    rows = look_up_columns(table, ids, jnp.float32)
    return jnp.sum(jnp.sin(rows) * jnp.arange(D)), rows


@pytest.mark.parametrize(
    ("shape", "batch"), [((8, 3), True), ((8, 2, 5), True), ((9,), False)]
)
def test_values_and_gradients(shape, batch):
    mesh = mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        table, ids = arrays(shape, batch, mesh)
        step = jax.jit(jax.value_and_grad(weighted, has_aux=True))
        (_, rows), gradient = step(table, ids)
        assert tuple(rows.sharding.spec) == (*jax.typeof(ids).sharding.spec, None)
        assert gradient.sharding.spec == RULES(None, "embed")
        compiled = step.lower(table, ids).compile().as_text()
    whole, plain = np.asarray(table), np.asarray(ids)
    np.testing.assert_array_equal(rows, whole[plain])
    wanted = np.zeros_like(whole)
    np.add.at(wanted, plain, np.cos(whole[plain]) * np.arange(D))
    np.testing.assert_allclose(gradient, wanted, rtol=2e-6, atol=1e-5)
    # No device ever holds the whole weight or its whole gradient.
    assert not re.findall(rf"f32\[{V},{D}\]", compiled)


def test_one_device_and_no_mesh():
    table = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    rows = look_up_columns(jnp.asarray(table), jnp.array([[3, 3, 9]]), jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows[0], table[[3, 3, 9]].astype(jnp.bfloat16))


def test_bfloat16_is_exchanged_and_its_gradient_summed_in_float32():
    mesh = mesh_of(2, 2, 2)

    def total(table, ids):
        return jnp.sum(look_up_columns(table, ids, jnp.bfloat16).astype(jnp.float32))

    with jax.set_mesh(mesh):
        table, _ = arrays((8, 3), True, mesh)
        # 520 ones, which bfloat16 would sum to 512 or less.
        ids = jnp.zeros((8, 65), jnp.int32, out_sharding=RULES("batch", None))
        gradient = jax.jit(jax.grad(total))(table, ids)
    np.testing.assert_array_equal(gradient[0], 520)
