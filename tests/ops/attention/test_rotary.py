"""Rotary positions: the matrix product of TPUs equals the halves of other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.models.backbones.stacking import apply_remat
from tokenrec.ops.attention import rotary
from tokenrec.ops.attention.rotary import (
    rotate_by_product,
    rotate_halves,
    rotation,
)
from tokenrec.planner.flops import product_flops


def values_and_gradient(rotate, x, by):
    def loss(x):
        return jnp.sum(jnp.sin(rotate(x, by).astype(jnp.float32)))

    return rotate(x, by), jax.grad(loss)(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lead", [(2, 9), (2, 3, 9)])
def test_the_product_equals_the_halves_in_values_and_gradients(dtype, lead):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(*lead, 2, 16)), dtype)
    by = rotation(jnp.asarray(random.integers(0, 3000, (2, 9))), 16, 1e4)
    shape = (2, *[1] * (len(lead) - 2), 9, 1, 16)
    by = jax.tree.map(lambda part: part.reshape(shape), by)
    wanted = values_and_gradient(rotate_halves, x, by)
    found = values_and_gradient(rotate_by_product, x, by)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(one, np.float64), np.asarray(other, np.float64)
        )


@pytest.mark.parametrize("on_tpu", [True, False])
def test_no_exchanged_halves_are_kept_nor_counted(monkeypatch, capsys, on_tpu):
    monkeypatch.setattr(rotary, "current_platform", lambda: "tpu" if on_tpu else "cpu")
    by = rotation(jnp.arange(9)[None], 16, 1e4)

    def layer(x, weight):
        projected = jnp.einsum("bshi,ij->bshj", x, weight)
        return jnp.sum(jnp.square(rotary.rotate(jnp.sin(projected), by)))

    x, weight = jnp.ones((1, 9, 2, 16)), jnp.eye(16)
    assert product_flops(jax.make_jaxpr(layer)(x, weight).jaxpr) == 2 * 18 * 16 * 16
    jax.ad_checkpoint.print_saved_residuals(apply_remat(layer, "dots"), x, weight)
    lines = capsys.readouterr().out.splitlines()
    assert sum("dot_general" in line for line in lines) == 1


def test_a_rotation_keeps_norms_and_depends_on_differences_of_positions():
    x, y = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def turned(vector, position):
        return rotate_halves(vector, rotation(jnp.array([[position]]), 8, 100.0))

    assert jnp.linalg.norm(turned(x, 5)) == pytest.approx(np.linalg.norm(x), rel=1e-6)
    near, far = (
        jnp.vdot(turned(x, 7 + shift), turned(y, 4 + shift)) for shift in (0, 11)
    )
    assert near == pytest.approx(float(far), abs=1e-5)
