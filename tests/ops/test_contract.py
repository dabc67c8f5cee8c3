"""Products with weights in shards have the values and gradients of whole weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from tests.worlds import mesh_of
from tokenrec.ops.contract import contract, contract_again
from tokenrec.sharding import RULES

# Equation: shapes of x and w, logical axes of x and w, and those of the last dimensions
# of the result; before them stand the batch and dimensions that are not split.
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


def gradients_and_output(equation, mesh, dtype):
    """Gradients of x and w of a sum of sines, and the output, as float32."""
    x_shape, w_shape, x_axes, w_axes, last_axes = CASES[equation]
    random = np.random.default_rng(0)
    x, w = (
        random.normal(size=shape).astype(np.float32) for shape in (x_shape, w_shape)
    )
    dimensions = len(equation.split("->")[1])
    lead = "batch", *[None] * (dimensions - 1 - len(last_axes))
    with jax.set_mesh(mesh):
        x = jax.device_put(
            jnp.asarray(x, dtype), jax.NamedSharding(mesh, RULES(*x_axes))
        )
        w = jax.device_put(w, jax.NamedSharding(mesh, RULES(*w_axes)))

        def loss(x, w):
            out = contract(equation, x, w, RULES(*lead, *last_axes)).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        (d_x, d_w), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, w)
        assert d_w.sharding.spec == w.sharding.spec
        assert d_w.dtype == jnp.float32
    return [np.asarray(array, np.float32) for array in (d_x, d_w, out)]


@pytest.mark.parametrize("equation", CASES)
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (2, 4, 1)])
def test_a_weight_in_shards_gives_what_a_whole_one_gives(equation, shape):
    for got, wanted in zip(
        gradients_and_output(equation, mesh_of(*shape), jnp.float32),
        gradients_and_output(equation, mesh_of(1, 1, 1), jnp.float32),
        strict=True,
    ):
        # Float32 rounding of sums over the batch (8 x 3 terms) and over shards, of
        # entries up to 13. Measured: 4.2e-6 absolute where entries are largest. The
        # margin is 5x.
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_are_summed_in_float32_however_the_product_is_made():
    """A batch over eight devices: bfloat16 parts would leave 8 bits in the sum."""
    d_w = gradients_and_output("bi,io->bo", mesh_of(1, 8, 1), jnp.bfloat16)[1]
    rounded = np.asarray(jnp.asarray(d_w, jnp.bfloat16), np.float32)
    assert not np.array_equal(d_w, rounded)


def test_a_product_that_is_computed_again_is_not_kept(capsys):
    """As large as the other one, of 8 x 3 x 32 numbers."""
    x, w = jnp.ones((8, 3, 16)), jnp.ones((16, 32))
    down, up = jnp.ones((16, 2)), jnp.ones((2, 32))
    spec = RULES("batch", None, None)

    def loss(product, x, w, down, up):
        narrow = contract("bsd,dr->bsr", x, down, spec)
        wide = product("bsr,rf->bsf", narrow, up, spec)
        return jnp.sum(jnp.sin(contract("bsd,df->bsf", x, w, spec) + wide))

    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    kept, gradients = [], []
    with jax.set_mesh(mesh_of(1, 1, 1)):
        for product in (contract, contract_again):
            whole = jax.checkpoint(functools.partial(loss, product), policy=policy)
            print_saved_residuals(whole, x, w, down, up)
            kept.append(capsys.readouterr().out.count(",3,32]"))
            gradients.append(jax.grad(whole, argnums=(0, 1, 2, 3))(x, w, down, up))
    assert kept == [2, 1]
    jax.tree.map(np.testing.assert_array_equal, *gradients)
