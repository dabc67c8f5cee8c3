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
from tokenrec.config.tuning_config import PROJECTIONS, TuningConfig
from tokenrec.models.backbones.bfts import stack_sizes
from tokenrec.tokens.layout import Layout

# Two texts without padding; one longer than the window of 5, one shorter.
LENGTHS = (24, 9, 3, 24)
TOKENS, MASK = random_text(LENGTHS)
MODELS = CONFIGS | {
    # Windows repeat after two layers: a loop over two turns of two, and three alone.
    "gemma3_deep": CONFIGS["gemma3"]
    | {"num_hidden_layers": 7, "sliding_window_pattern": 2},
    "qwen3_deep": CONFIGS["qwen3"] | {"num_hidden_layers": 4},
}


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


@functools.cache
def wanted(name: str, dtype: str = "float32") -> Wanted:
    config, tensors = MODELS[name], random_tensors(MODELS[name], dtype)

    def loss(tensors: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = reference.hidden_states(tensors, config, x, MASK)
        return loss_of(states, MASK), states

    with jax.set_mesh(one_device()):
        x = reference.embed(tensors, config, TOKENS).astype(dtype).astype(jnp.float32)
        # In float32, whatever the weights were rounded to.
        wide = {name: tensor.astype(jnp.float32) for name, tensor in tensors.items()}
        (gradients, of_x), states = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
            wide, x
        )
    return Wanted(*jax.tree.map(np.asarray, (x, states, gradients, of_x)))


def decoder_of(name: str, dtype: str = "float32", **model: Any) -> Machine:
    """The decoder of a checkpoint on the mesh in use; weights are float32 arrays."""
    config = model_config(MODELS[name], **model)
    tensors = random_tensors(MODELS[name], dtype)
    return make_decoder(config, decoder_weights(config, tensors))


def run(
    machine: Machine, x: jax.Array, mask: jax.Array, layout: Layout
) -> tuple[jax.Array, dict[str, np.ndarray], jax.Array]:
    """Outputs of a decoder, and the gradients of the loss by weights and by `x`."""

    def loss(weights: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        module = machine.module(weights)
        out = module(x, layout, no_events(len(x)), None, None, present=mask)
        return loss_of(out.astype(jnp.float32), mask), out

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (gradients, of_x), out = run(machine.weights, x)
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
    expected = decoder_weights(model_config(MODELS[name], **model), truth.gradients)
    assert gradients.keys() == expected.keys()
    return (
        relative_error(np.asarray(out)[MASK], truth.states[MASK]),
        max(relative_error(gradients[n], expected[n]) for n in expected),
        relative_error(of_x, truth.embedding_gradients),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_reference(name: str) -> None:
    # Measured: x.
    assert max(errors(name)) < 1e-5, print(errors(name))


@pytest.mark.parametrize(
    ("name", "sizes", "model"),
    [
        ("gemma3_deep", (4, 1, 1, 1), {"scan": 3}),
        ("qwen3_deep", (3, 1), {"scan": 3, "remat": "full"}),
        ("gemma3_deep", (4, 1, 1, 1), {"scan": 3, "scan_unroll": 2, "remat": "dots"}),
    ],
)
def test_a_loop_over_stacked_layers_changes_nothing(
    name: str, sizes: tuple[int, ...], model: dict[str, Any]
) -> None:
    assert stack_sizes(model_config(MODELS[name], **model)) == sizes
    e = errors(name, **model)
    print(e)
    assert max(e) < 1e-5


@pytest.mark.parametrize("needed_rows", [True, False])
@pytest.mark.parametrize("name", ["gemma3_deep", "qwen3_windows"])
def test_tokens_that_no_read_out_sees_can_be_left_out(
    name: str, needed_rows: bool
) -> None:
    read = np.array([15, 23])
    truth = wanted(name)
    x, mask = place(truth.embeddings, MASK)
    machine = decoder_of(name, needed_rows=needed_rows, scan=3)
    layout = text_layout(24, read)

    @jax.jit
    def compute(weights, x, mask):
        return machine.module(weights)(
            x, layout, no_events(4), None, None, present=mask
        )

    out = np.asarray(compute(machine.weights, x, mask))
    live = MASK[:, read]
    e = relative_error(out[live], truth.states[:, read][live])
    print(e)
    assert e < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gemma3_linear", "llama3"])
@pytest.mark.parametrize("axes", [(1, 2, 2), (1, 2, 1, 2)])
def test_a_mesh_changes_nothing(name: str, axes: tuple[int, ...]) -> None:
    with jax.set_mesh(mesh_of(*axes)):
        e = errors(name)
        print(e)
        assert max(e) < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "llama3"])
def test_bfloat16_is_off_by_its_rounding(name: str) -> None:
    e = errors(name, "bfloat16")
    print(e)
    assert max(e) < 1e-1
