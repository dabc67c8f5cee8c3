"""RankMixer against its equations in NumPy."""

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, gelu, rms
from tests.worlds import one_device, tiny

LAYERS, TOKENS = 2, 4


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def score(w, inputs):
    """Read-out of a target from its concatenated inputs."""
    part = -(-len(inputs) // TOKENS)
    cut = np.append(inputs, np.zeros(part * TOKENS - len(inputs))).reshape(TOKENS, part)
    x = np.stack(
        [
            cut[i] @ w["tokenize/kernel"][i] + w["tokenize/bias"][i]
            for i in range(TOKENS)
        ]
    )
    width = x.shape[1] // TOKENS
    for number in range(LAYERS):
        of = f"blocks/{number}"
        heads = [
            np.concatenate([x[i, h * width : (h + 1) * width] for i in range(TOKENS)])
            for h in range(TOKENS)
        ]
        s = rms(np.stack(heads) + x) * w[f"{of}/mix_norm/scale"]
        made = [
            gelu(s[i] @ w[f"{of}/inner/kernel"][i] + w[f"{of}/inner/bias"][i])
            @ w[f"{of}/output/kernel"][i]
            + w[f"{of}/output/bias"][i]
            for i in range(TOKENS)
        ]
        x = rms(np.stack(made) + s) * w[f"{of}/ffn_norm/scale"]
    return x.mean(axis=0)


def test_values_are_those_of_the_equations():
    model = {"kind": "rankmixer", "layers": LAYERS, "heads": TOKENS, "windows": ()}
    config = tiny(
        events=12, fused=True, candidates=2, model=model, tokens={"user_tokens": 2}
    )
    backbone = Backbone(config)
    layout, w = backbone.layout(), backbone.named()
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, config.model.width))
        .astype(np.float32)
    )
    read = backbone(x, np.arange(12) >= [[5], [0]], np.ones((2, 2), bool), layout)
    for sample, length in enumerate([7, 12]):
        user, events = (
            x[sample][layout.positions_of("user")],
            x[sample][layout.positions_of("event")][12 - length :],
        )
        pools = [events.mean(axis=0), events[-10:].mean(axis=0), events[-1]]
        for candidate, row in enumerate(layout.positions_of("target")):
            wanted = score(w, np.concatenate([user.ravel(), *pools, x[sample, row]]))
            # float32 against NumPy; values are of order 1. Measured: 2.9e-7.
            np.testing.assert_allclose(read[sample, candidate], wanted, atol=2e-5)
