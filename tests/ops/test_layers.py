"""Shapes at the edges of the shared layers."""

import jax
import jax.numpy as jnp
import pytest

from tests.worlds import mesh_of
from tokenrec.ops.layers import flatten_tokens


@pytest.mark.parametrize(
    ("shape", "flat"),
    [
        ((8, 2, 3, 4), (8, 6, 4)),
        ((8, 3, 4), (8, 3, 4)),
        # Codes of one level have no code before the last.
        ((8, 2, 3, 0), (8, 6, 0)),
        ((8, 0, 4), (8, 0, 4)),
    ],
)
def test_flatten_tokens_keeps_batch_and_width(shape, flat):
    with jax.set_mesh(mesh_of(8, 1, 1)):
        assert flatten_tokens(jnp.zeros(shape)).shape == flat
        assert jax.jit(flatten_tokens)(jnp.zeros(shape)).shape == flat
    # A program for one device, as serving exports them.
    assert flatten_tokens(jnp.zeros(shape)).shape == flat
