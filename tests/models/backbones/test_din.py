"""DIN against its equations in NumPy."""

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, silu
from tests.worlds import one_device, tiny


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def interest(w, events, target):
    """u of `events: [n, d]` and `target: [d]`, event by event."""
    total = np.zeros_like(target)
    for event in events:
        pair = np.concatenate([event, target, event - target, event * target])
        hidden = silu(pair @ w["unit/kernel"].reshape(len(pair), -1) + w["unit/bias"])
        total += (hidden @ w["unit/output"] + w["unit/output_bias"]) * event
    return total


def score(w, user, events, target):
    x = np.concatenate([user.ravel(), interest(w, events, target), target])
    for number in range(2):
        x = silu(
            x @ w[f"deep/hidden/{number}/kernel"] + w[f"deep/hidden/{number}/bias"]
        )
    return x @ w["output/kernel"] + w["output/bias"]


@pytest.mark.parametrize(
    "shape", [{"candidates": 2, "fused": True}, {"paradigm": "uc"}]
)
def test_values_are_those_of_the_equations(shape):
    config = tiny(**shape, events=5, model={"kind": "din", "layers": 2, "windows": ()})
    backbone = Backbone(config)
    layout, w, nio = backbone.layout(), backbone.named(), config.data.paradigm == "nio"
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, config.model.width))
        .astype(np.float32)
    )
    read = backbone(
        x, np.arange(5) >= [[2], [0]], np.ones((2, 2), bool) if nio else None, layout
    )
    for sample, length in enumerate([3, 5]):
        user = x[sample][layout.positions_of("user")]
        if nio:
            events = x[sample][layout.positions_of("event")][5 - length :]
            for c, row in enumerate(layout.positions_of("target")):
                # float32 against NumPy in another order; values reach 60. Measured:
                # 2.3e-5, 0.07 of what is allowed.
                np.testing.assert_allclose(
                    read[sample, c],
                    score(w, user, events, x[sample, row]),
                    rtol=1e-4,
                    atol=1e-4,
                )
            continue
        states, actions = (
            x[sample][layout.positions_of(role)][5 - length :]
            for role in ("state", "action")
        )
        for t in range(length):
            wanted = score(w, user, (states + actions)[:t], states[t])
            np.testing.assert_allclose(
                read[sample, 5 - length + t], wanted, rtol=1e-4, atol=1e-4
            )
