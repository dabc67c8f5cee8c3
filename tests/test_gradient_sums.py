"""`optim.gradient_sums`: gradients of the backbone's matrices in bfloat16.

XLA on a CPU adds in float32 all the same: tests/planner/test_fsdp_program.py reads what a
TPU sends, and benchmarks/gradient_sums.py measures what sums in bfloat16 lose.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import TASKS, mesh_of, place, random_batch, schema_of, tiny
from tokenrec.state import abstract_state, build_model, in_shards, init_state
from tokenrec.step import gradients, step_inputs

# Matrices of the backbone are compared: it needs some input.
FEATURES = schema_of("video", "clicked")


def model_of(sums: str, kind: str = "tokenformer"):
    config = tiny(
        tokens={"maker": "linear"},
        model={"kind": kind, "dtype": "bfloat16", "layers": 1, "windows": ()},
        optim={"gradient_sums": sums},
        batch_size=16,
    )
    return build_model(config, FEATURES, TASKS)


@functools.cache
def of_step(sums: str, kind: str = "tokenformer"):
    """Loss and gradients of the dense weights of a step on eight devices."""
    model, mesh = model_of(sums, kind), mesh_of(2, 4, 1)
    with jax.set_mesh(mesh):
        batch = place(random_batch(model.config, 16, schema=FEATURES), mesh)

        @jax.jit
        def step(state, batch):
            return gradients(model, state.params, step_inputs(model, state, batch))

        loss, (dense, _) = step(init_state(model, 0), batch)
        return jax.device_get((loss, dense))


@pytest.mark.parametrize(
    "kind", ["tokenformer", pytest.param("hstu", marks=pytest.mark.slow)]
)
def test_the_loss_is_bit_equal_and_gradients_of_matrices_are_rounded(kind):
    loss, rounded = of_step("bfloat16", kind)
    of_float32, exact = of_step("float32", kind)
    assert loss == of_float32
    with jax.set_mesh(mesh_of(2, 4, 1)):
        shapes = abstract_state(model_of("float32", kind)).params
    for name, gradient in exact.items():
        assert rounded[name].dtype == np.float32
        if in_shards(name, shapes[name].sharding.spec):
            # A CPU adds in float32 and rounds the sum to 8 bits: measured 0.0036 at most.
            assert np.array_equal(
                rounded[name], rounded[name].astype(jnp.bfloat16).astype(np.float32)
            ), name
            error = np.linalg.norm(rounded[name] - gradient)
            assert 0 < error < 2**-7 * np.linalg.norm(gradient), name
        else:
            assert np.array_equal(rounded[name], gradient), name
