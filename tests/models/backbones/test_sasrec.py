"""SASRec against its equations in NumPy."""

import math

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, rms
from tests.worlds import one_device, tiny

LAYERS, HEADS = 2, 2


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def encoded(w, events):
    """h of each of `events: [n, d]`, oldest first."""
    x = events + w["positions"][: len(events)]
    for number in range(LAYERS):
        of = {
            name.removeprefix(f"blocks/{number}/"): value for name, value in w.items()
        }
        normed = rms(x) * of["attention_norm/scale"]
        q, k, v = (
            np.einsum("td,dhk->thk", normed, of[f"attention/{name}"])
            for name in ("query", "key", "value")
        )
        branch = np.zeros_like(x)
        for t in range(len(x)):
            for head in range(HEADS):
                logits = k[: t + 1, head] @ q[t, head] / math.sqrt(q.shape[2])
                share = np.exp(logits - logits.max())
                branch[t] += (
                    (share / share.sum())
                    @ v[: t + 1, head]
                    @ of["attention/output"][head]
                )
        x = x + branch
        inner = np.maximum(
            rms(x) * of["ffn_norm/scale"] @ of["inner"] + of["inner_bias"], 0
        )
        x = x + inner @ of["output"] + of["output_bias"]
    return rms(x) * w["norm/scale"]


def test_values_are_those_of_the_equations():
    model = {"kind": "sasrec", "layers": LAYERS, "heads": HEADS, "windows": ()}
    config = tiny(paradigm="uc", events=5, model=model)
    backbone = Backbone(config)
    layout, w = backbone.layout(), backbone.named()
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, config.model.width))
        .astype(np.float32)
    )
    read = backbone(x, np.arange(5) >= [[2], [0]], None, layout)
    for sample, length in enumerate([3, 5]):
        states, actions = (
            x[sample][layout.positions_of(role)][5 - length :]
            for role in ("state", "action")
        )
        # The target is the state of the event after the one that is read.
        wanted = (
            np.concatenate([w["start"][None], encoded(w, states + actions)[:-1]])
            * states
        )
        # float32 against NumPy; values are of order 1. Measured: 1.0e-6.
        np.testing.assert_allclose(read[sample, 5 - length :], wanted, atol=3e-5)
