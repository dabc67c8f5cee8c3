"""DCNv2 against its equations in NumPy."""

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, silu
from tests.worlds import one_device, tiny

LAYERS = 3


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def score(w, first):
    crossed, deep = first, first
    for number in range(LAYERS):
        crossed = (
            first
            * (crossed @ w[f"blocks/{number}/kernel"] + w[f"blocks/{number}/bias"])
            + crossed
        )
        deep = silu(
            deep @ w[f"deep/hidden/{number}/kernel"] + w[f"deep/hidden/{number}/bias"]
        )
    return np.concatenate([crossed, deep]) @ w["output/kernel"] + w["output/bias"]


def test_values_are_those_of_the_equations():
    config = tiny(
        paradigm="uc",
        events=5,
        model={"kind": "dcnv2", "layers": LAYERS, "windows": ()},
    )
    backbone = Backbone(config)
    layout, w = backbone.layout(), backbone.named()
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, config.model.width))
        .astype(np.float32)
    )
    read = backbone(x, np.arange(5) >= [[2], [0]], None, layout)
    for sample, length in enumerate([3, 5]):
        user = x[sample][layout.positions_of("user")]
        states, actions = (
            x[sample][layout.positions_of(role)][5 - length :]
            for role in ("state", "action")
        )
        for t in range(length):
            earlier = (states + actions)[:t]
            mean = earlier.mean(axis=0) if t else np.zeros(config.model.width)
            wanted = score(w, np.concatenate([user.ravel(), mean, states[t]]))
            # float32 against NumPy in another order, relative to the largest value:
            # crossed three times, values reach thousands. Measured: 6.6e-7 of it.
            np.testing.assert_allclose(
                read[sample, 5 - length + t],
                wanted,
                rtol=0,
                atol=1e-5 * np.abs(wanted).max(),
            )
