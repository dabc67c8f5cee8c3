"""Grouped-query attention: fewer heads of keys and values than of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import mesh_of, one_device
from tokenrec.errors import InputError
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.grouped import head_axis, repeat_heads
from tokenrec.sharding import RULES


def arrays(groups, heads=4, batch=4):
    shapes = [(batch, 12, n, 8) for n in (heads, groups, groups)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_it_equals_attention_with_repeated_heads(groups, window):
    q, k, v = arrays(groups)

    def grouped(q, k, v):
        return attention(q, k, v, window=window)

    def repeated(q, k, v):
        k, v = (jnp.repeat(x, 4 // groups, axis=2) for x in (k, v))
        return attention(q, k, v, window=window)

    with jax.set_mesh(one_device()):
        for function in (lambda f: f, lambda f: jax.grad(_sum(f), argnums=(0, 1, 2))):
            got, expected = (function(f)(q, k, v) for f in (grouped, repeated))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected
            )


def _sum(function):
    return lambda *x: jnp.sum(jnp.sin(function(*x)))


@pytest.mark.parametrize(("groups", "axis"), [(1, None), (2, "heads")])
def test_heads_that_the_mesh_does_not_divide_are_on_every_device(groups, axis):
    q, k, v = arrays(groups)
    with jax.set_mesh(one_device()):
        expected = attention(q, k, v)
    mesh = mesh_of(1, 2, 2)
    with jax.set_mesh(mesh):
        assert head_axis(groups) == axis

        def put(x, axis):
            spec = RULES("batch", None, axis, None)
            return jax.device_put(x, jax.NamedSharding(mesh, spec))

        got = jax.jit(attention)(put(q, "heads"), put(k, axis), put(v, axis))
        assert jax.typeof(got).sharding.spec[2] == "tensor"
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_as_many_heads_stay_as_they_are():
    _, k, _ = arrays(4)
    assert repeat_heads(k, 4) is k


def test_groups_divide_heads():
    q, k, v = arrays(3)
    with pytest.raises(InputError, match=r"k \(4, 12, 3, 8\).*G a divisor of H"):
        attention(q, k, v)
