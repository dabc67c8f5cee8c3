"""Products with weights in shards: what comes out, and the gradients, are those of whole weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import mesh_of
from tokenrec.ops.contract import contract
from tokenrec.sharding import RULES

CASES = {
    "bsd,dhk->bshk": (
        (8, 3, 16),
        (16, 2, 4),
        ("batch", None, None),
        ("embed", "heads", None),
        ("heads", None),
    ),
    "bqhk,hkd->bqd": (
        (8, 3, 2, 4),
        (2, 4, 16),
        ("batch", None, "heads", None),
        ("heads", None, "embed"),
        (None,),
    ),
    "bi,io->bo": ((8, 6), (6, 16), ("batch", None), (None, "embed"), (None,)),
}


def gradients(equation, mesh, dtype):
    of_x, of_w, x_axes, w_axes, made = CASES[equation]
    random = np.random.default_rng(0)
    x, w = (random.normal(size=shape).astype(np.float32) for shape in (of_x, of_w))
    lead = "batch", *[None] * (len(equation.split("->")[1]) - 1 - len(made))
    with jax.set_mesh(mesh):
        x = jax.device_put(
            jnp.asarray(x, dtype), jax.NamedSharding(mesh, RULES(*x_axes))
        )
        w = jax.device_put(w, jax.NamedSharding(mesh, RULES(*w_axes)))

        def loss(x, w):
            out = contract(equation, x, w, RULES(*lead, *made)).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        found, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, w)
        assert found[1].sharding.spec == w.sharding.spec
        assert found[1].dtype == jnp.float32
    return [np.asarray(one, np.float32) for one in (*found, out)]


@pytest.mark.parametrize("equation", CASES)
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (2, 4, 1)])
def test_a_weight_in_shards_gives_what_a_whole_one_gives(equation, shape):
    for got, wanted in zip(
        gradients(equation, mesh_of(*shape), jnp.float32),
        gradients(equation, mesh_of(1, 1, 1), jnp.float32),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_summed_in_float32_however_the_product_is_made():
    """Equal parts of a batch on eight devices: rounding each part to bfloat16 would leave 8 bits in the sum."""
    found = gradients("bi,io->bo", mesh_of(1, 8, 1), jnp.bfloat16)[1]
    assert not np.array_equal(
        found, np.asarray(jnp.asarray(found, jnp.bfloat16), np.float32)
    )
