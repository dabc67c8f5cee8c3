"""Test machine of backbones: noisy weights, and NumPy forms of shared parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.worlds import SCHEMA, TASKS, place, tiny
from tokenrec.config import DecoderConfig
from tokenrec.config.backbones import BACKBONES
from tokenrec.config.validate import validate
from tokenrec.models.stream_layout import candidate_mask, stream_layout
from tokenrec.sharding import RULES
from tokenrec.state import bind_params, build_model, init_state


def rival(kind, **options):
    """A small config of a kind, with streams of up to 20 events."""
    model = {
        "kind": kind,
        "layers": 2,
        "windows": (6,) if BACKBONES[kind].windows else (),
    }
    if BACKBONES[kind].decoder:
        sizes = DecoderConfig(vocabulary=8, kv_heads=1, head_width=6, windows=(7, 0))
        model |= {"ffn_width": 24, "decoder": sizes}
    return validate(
        tiny(**{"events": 20, "model": model, "tokens": {"user_tokens": 2}} | options)
    )


class Backbone:
    """A backbone with weights off their starting values, jitted.

    Zero biases and unit norms would hide errors. Call it with arrays of a layout.
    """

    def __init__(self, config):
        self.config = config
        self.graph, weights = nnx.split(
            BACKBONES[config.model.kind].load()(
                config.model, self.layout(), rngs=nnx.Rngs(0)
            )
        )
        random = np.random.default_rng(1)
        self.weights = jax.tree.map(
            lambda w: w + 0.3 * random.normal(size=w.shape).astype(np.float32), weights
        )
        self.run = jax.jit(self.read, static_argnums=4)

    def layout(self, events=None):
        return stream_layout(
            self.config, SCHEMA, self.config.data.events if events is None else events
        )

    def named(self):
        """Weights by name, `"blocks/0/kernel"`."""
        return {
            "/".join(map(str, path)): np.asarray(w[...])
            for path, w in nnx.to_flat_state(self.weights)
        }

    def read(self, weights, x, valid, candidates, layout):
        return call(nnx.merge(self.graph, weights), x, layout, valid, candidates)

    def __call__(self, x, valid, candidates, layout):
        return np.asarray(self.run(self.weights, *split(x, valid, candidates), layout))


def call(module, x, layout, valid, candidates, key=None):
    """Read-outs of a backbone; the n-th newest event is 3^n seconds old."""
    ages = jnp.where(valid, 3 ** np.arange(layout.events, dtype=np.int32)[::-1], 0)
    return module(x, layout, valid, candidates, key, ages)


def split(*batch):
    """Arrays (or None) split over the mesh by their batch."""
    return [
        x if x is None else jax.device_put(x, RULES("batch", *[None] * (x.ndim - 1)))
        for x in batch
    ]


def noisy(params, scale=0.3):
    """Weights off their starting values, as NumPy arrays."""
    random = np.random.default_rng(1)
    return {
        n: np.asarray(w)
        + np.float32(scale) * random.normal(size=w.shape).astype(np.float32)
        for n, w in params.items()
    }


def build(config):
    """The model, a fresh state, and noisy weights."""
    model = build_model(config, SCHEMA, TASKS)
    state = init_state(model, 0)
    return model, state, noisy(state.params)


def forward_layers(model, params, batch, mesh):
    """Tokens `[B, S, d]`, their layout, validity `[B, S]` and read-outs `[B, R, d]`."""
    batch = place(batch, mesh)
    state = init_state(model, 0)

    @jax.jit
    def read(params, batch):
        module = bind_params(model, params)
        x, layout = module.make_stream(
            model.embedder.look_up(state.tables, batch), batch
        )
        mask = candidate_mask(batch)
        out = module.backbone(x, layout, batch.valid, mask, None, batch.ages)
        return x, layout.valid(batch.valid, mask), out

    x, valid, out = (np.asarray(part) for part in read(params, batch))
    return x, model.layout(batch.valid.shape[1]), valid, out


def rms(x):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6)


def silu(x):
    return 0.5 * x * (1 + np.tanh(0.5 * x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turned(x, position):
    """RoPE of one head, `x: [h]`."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-np.arange(half) * 2 / len(x))
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )
