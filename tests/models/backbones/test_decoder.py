"""`Decoder` computes what the reference of `tests/language/reference.py` computes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.language import reference
from tests.language.hf_models import CONFIGS, random_tensors, random_text
from tests.language.reference import relative_error
from tests.models.backbones.language_models import (
    Machine,
    by_name,
    decoder_weights,
    make_decoder,
    model_config,
    no_events,
    place,
    text_layout,
)
from tests.worlds import mesh_of, one_device
from tokenrec.models.backbones.bfts import stack_sizes
from tokenrec.tokens.layout import Layout

# Two texts without padding; one longer than the window of 5, one shorter.
LENGTHS = (24, 9, 3, 24)
TOKENS, MASK = random_text(LENGTHS)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


class Wanted(NamedTuple):
    """What the reference computes for `TOKENS`, for a loss that reads every real token.

    Attributes:
      embeddings: `[B, S, d]`, inputs of the first layer.
      states: `[B, S, d]`, outputs behind the last norm.
      gradients: of the tensors of the checkpoint.
      embedding_gradients: of `embeddings`.
    """

    embeddings: np.ndarray
    states: np.ndarray
    gradients: dict[str, np.ndarray]
    embedding_gradients: np.ndarray


def loss_of(states: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask[..., None], jnp.sin(states), 0))


@functools.partial(jax.jit, static_argnums=0)
def reference_gradients(
    name: str, tensors: dict[str, jax.Array], x: jax.Array
) -> tuple[tuple[dict[str, jax.Array], jax.Array], jax.Array]:
    """Gradients of the loss by tensors and by inputs, and the outputs."""

    def loss(tensors: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = reference.hidden_states(tensors, CONFIGS[name], x, MASK)
        return loss_of(states, MASK), states

    return jax.grad(loss, (0, 1), has_aux=True)(tensors, x)


@functools.cache
def wanted(name: str, dtype: str = "float32") -> Wanted:
    """Compute in float32, whatever type weights and inputs were rounded to."""
    with jax.set_mesh(one_device()):
        tensors = jax.tree.map(
            lambda tensor: tensor.astype(jnp.float32),
            random_tensors(CONFIGS[name], dtype),
        )
        x = reference.embed(tensors, CONFIGS[name], TOKENS)
        x = x.astype(dtype).astype(jnp.float32)
        (gradients, of_x), states = reference_gradients(name, tensors, x)
    return Wanted(*jax.tree.map(np.asarray, (x, states, gradients, of_x)))


def decoder_of(name: str, dtype: str = "float32", **model: Any) -> Machine:
    """The decoder of a checkpoint on the mesh in use; weights are float32 arrays."""
    config = model_config(CONFIGS[name], **model)
    tensors = random_tensors(CONFIGS[name], dtype)
    return make_decoder(config, decoder_weights(config, tensors))


def run(
    machine: Machine, x: jax.Array, mask: jax.Array, layout: Layout
) -> tuple[jax.Array, dict[str, np.ndarray], jax.Array]:
    """Outputs of a decoder, and the gradients of the loss by weights and by `x`."""

    def loss(weights: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = machine.module(weights)
        out = module(x, layout, no_events(len(x)), None, None, present=mask)
        return loss_of(out.astype(jnp.float32), mask), out

    differentiate = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (gradients, of_x), out = differentiate(machine.weights, x)
    return out, by_name(gradients), of_x


def errors(
    name: str, dtype: str = "float32", **model: Any
) -> tuple[float, float, float]:
    """Errors of outputs, of the gradients of weights, the worst one, and of `x`."""
    truth = wanted(name, dtype)
    x, mask = place(truth.embeddings.astype(dtype), MASK)
    machine = decoder_of(name, dtype, **model)
    out, gradients, of_x = run(machine, x, mask, text_layout(max(LENGTHS)))
    assert out.dtype == dtype
    expected = decoder_weights(model_config(CONFIGS[name], **model), truth.gradients)
    assert gradients.keys() == expected.keys()
    return (
        relative_error(np.asarray(out)[MASK], truth.states[MASK]),
        max(relative_error(gradients[n], expected[n]) for n in expected),
        relative_error(of_x, truth.embedding_gradients),
    )


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_linear",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "gemma3",
                "gemma3_long_window",
                "qwen3",
                "qwen3_windows",
                "llama3",
                "llama3_linear",
            )
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_the_reference(name: str) -> None:
    # Measured: 1.1e-6 of outputs, 1.9e-6 of gradients, at most.
    assert max(errors(name)) < 1e-5


@pytest.mark.parametrize(
    ("name", "sizes", "model"),
    [
        pytest.param("gemma3_deep", (4, 1, 1), {}, marks=pytest.mark.slow),
        ("qwen3_deep", (3, 1), {"remat": "full"}),
    ],
)
def test_a_loop_over_stacked_layers_changes_nothing(
    name: str, sizes: tuple[int, ...], model: dict[str, Any]
) -> None:
    model = model | {"scan": 3}
    assert stack_sizes(model_config(CONFIGS[name], **model)) == sizes
    # Measured: 1.8e-6 and 1.4e-6, of gradients.
    assert max(errors(name, **model)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_linear",
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("llama3", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(name: str) -> None:
    """Two heads of keys and values split over `mesh.tensor`; one is on all devices."""
    with jax.set_mesh(mesh_of(1, 2, 2)):
        # Measured: at most 2.6e-6, of gradients.
        assert max(errors(name)) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        pytest.param("qwen3", marks=pytest.mark.slow),
        pytest.param("llama3", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_off_by_its_rounding(name: str) -> None:
    """As far as PyTorch is (`tests/language/test_reference.py`)."""
    out, of_weights, of_x = errors(name, "bfloat16")
    # Measured: 1.7e-2, 1.2e-2, 1.2e-2 of outputs, as much of the gradients of inputs,
    # and 4.6e-2, 2.6e-2, 1.9e-2 of those of the worst weight.
    assert 1e-4 < out < 3e-2
    assert of_weights < 8e-2
    assert of_x < 3e-2
