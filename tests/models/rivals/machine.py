"""What the tests of rivals share: a model with weights off their starting values, and what stands around it."""

import jax
import numpy as np

from tests.worlds import SCHEMA, TASKS, place
from tokenrec.models.recommender import candidate_mask
from tokenrec.state import build_model, init_state, merge


def noisy(params, scale=0.3):
    """Off zero and one, so that no bias and no norm hides anything; NumPy arrays."""
    random = np.random.default_rng(1)
    return {
        n: np.asarray(w) + np.float32(scale) * random.normal(size=w.shape).astype(np.float32) for n, w in params.items()
    }


def build(config):
    """The model, a fresh state, and weights to test with."""
    model = build_model(config, SCHEMA, TASKS)
    state = init_state(model, 0)
    return model, state, noisy(state.params)


def forward_layers(model, params, batch, mesh):
    """Tokens `[B, S, d]`, their layout, `[B, S]` which are real, and what the backbone reads out, `[B, R, d]`."""
    batch = place(batch, mesh)
    state = init_state(model, 0)

    @jax.jit
    def read(params, batch):
        module = merge(model, params)
        x, layout = module.stream(model.embedder.look_up(state.tables, batch), batch)
        mask = candidate_mask(batch)
        return x, layout.valid(batch.valid, mask), module.backbone(x, layout, batch.valid, mask, None)

    x, valid, out = (np.asarray(part) for part in read(params, batch))
    return x, model.layout(batch.valid.shape[1]), valid, out


def rms(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)


def silu(x):
    return 0.5 * x * (1 + np.tanh(0.5 * x))
