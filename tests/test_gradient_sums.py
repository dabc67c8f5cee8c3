"""`optim.gradient_sums`: what a gradient loses when it is summed in bfloat16."""

import functools

import jax
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, mesh_of, place, random_batch, tiny
from tokenrec.sharding import RULES
from tokenrec.state import abstract_state, build_model, init_state
from tokenrec.step import gradients, step_inputs


def model_of(sums: str, kind: str = "tokenformer"):
    config = tiny(
        model={"kind": kind, "dtype": "bfloat16", "layers": 2, "windows": ()},
        optim={"gradient_sums": sums},
        batch_size=16,
    )
    return build_model(config, SCHEMA, TASKS)


@functools.cache
def of_step(sums: str, kind: str = "tokenformer"):
    """Loss and gradients of the dense weights of a step on eight devices."""
    model, mesh = model_of(sums, kind), mesh_of(2, 4, 1)
    with jax.set_mesh(mesh):
        batch = place(random_batch(model.config, 16), mesh)

        @jax.jit
        def step(state, batch):
            return gradients(model, state.params, step_inputs(model, state, batch))

        loss, (dense, _) = step(init_state(model, 0), batch)
        return jax.device_get((loss, dense))


@pytest.mark.parametrize("kind", ["tokenformer", "hstu"])
def test_the_loss_is_bit_equal_and_gradients_are_rounded(kind):
    loss, rounded = of_step("bfloat16", kind)
    of_float32, exact = of_step("float32", kind)
    assert loss == of_float32
    with jax.set_mesh(mesh_of(2, 4, 1)):
        shapes = abstract_state(model_of("float32", kind)).params
    changed = 0
    for name, gradient in exact.items():
        assert rounded[name].dtype == np.float32
        if name.startswith("backbone/") and RULES.embed in shapes[name].sharding.spec:
            changed += not np.array_equal(rounded[name], gradient)
            error = np.linalg.norm(rounded[name] - gradient)
            assert error < 2**-7 * np.linalg.norm(gradient), name
        else:
            assert np.array_equal(rounded[name], gradient), name
    assert changed
