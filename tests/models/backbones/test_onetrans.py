"""OneTrans against its equations in NumPy."""

import math

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, gelu, rms, split, turned
from tests.worlds import one_device, tiny

HEADS, USERS, OWN, LAYERS = 2, 2, 2, 3


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def layer(w, rows, asked, top):
    """One layer, token by token.

    `rows` are dicts of x, position, weight set (`map`) and candidate in stream order;
    `asked` are the outputs.
    """

    def weights(name, row, of_top=False):
        if row["map"] is None:
            return w[f"{name}/shared"]
        return w[f"{name}/own"][0 if of_top else row["map"]]

    def bias(name, row):
        if row["map"] is None:
            return w[f"{name}/bias"][-1]
        return w[f"{name}/bias"][0 if top else row["map"]]

    out = []
    for i in asked:
        row = rows[i]
        q = np.einsum(
            "d,dhk->hk",
            rms(row["x"]) * w["attention_norm/scale"],
            weights("query", row, top),
        )
        seen = [
            j for j in range(i + 1) if rows[j]["candidate"] in (None, row["candidate"])
        ]
        branch = np.zeros_like(row["x"])
        for head in range(HEADS):
            keys, values = [], []
            for j in seen:
                normed = rms(rows[j]["x"]) * w["attention_norm/scale"]
                keys.append(
                    turned(
                        normed @ weights("key", rows[j])[:, head], rows[j]["position"]
                    )
                )
                values.append(normed @ weights("value", rows[j])[:, head])
            logits = (
                np.array(keys)
                @ turned(q[head], row["position"])
                / math.sqrt(q.shape[1])
            )
            share = np.exp(logits - logits.max())
            branch += (share / share.sum()) @ np.array(values) @ w["output"][head]
        x = row["x"] + branch
        inner = gelu(
            rms(x) * w["ffn_norm/scale"] @ weights("inner", row, top)
            + bias("inner_bias", row)
        )
        out.append(
            row
            | {"x": x + inner @ weights("outer", row, top) + bias("outer_bias", row)}
        )
    return out


def test_values_are_those_of_the_equations():
    model_config = {"kind": "onetrans", "layers": LAYERS, "windows": (), "heads": HEADS}
    tokens = {"user_tokens": USERS, "target_tokens": OWN}
    config = tiny(candidates=2, events=4, model=model_config, tokens=tokens)
    backbone = Backbone(config)
    layout, params = backbone.layout(), backbone.named()
    x = (
        np.random.default_rng(0)
        .normal(size=(2, layout.length, config.model.width))
        .astype(np.float32)
    )
    events, candidates = np.arange(4) >= [[2], [0]], np.ones((2, 2), bool)
    read, valid = (
        backbone(x, events, candidates, layout),
        np.asarray(layout.valid(*split(events, candidates))),
    )
    for sample, length in enumerate([2, 4]):

        def row(at, position, number, candidate=None, sample=sample):
            real = bool(valid[sample, at])
            return {
                "x": x[sample, at],
                "position": position,
                "map": number,
                "candidate": candidate,
                "real": real,
            }

        history = np.sort(
            np.concatenate(
                [layout.positions_of("state"), layout.positions_of("action")]
            )
        )
        rows = [
            row(at, max(number // 2 - (4 - length) + 1, 0), None)
            for number, at in enumerate(history)
        ]
        rows += [
            row(at, length + 1, number)
            for number, at in enumerate(layout.positions_of("user"))
        ]
        for number, at in enumerate(layout.positions_of("target")):
            rows.append(row(at, length + 1, USERS + number % OWN, number // OWN))
        rows = [
            r for r in rows if r.pop("real")
        ]  # what padding computes is seen by nobody
        for number in range(LAYERS):
            top = number == LAYERS - 1
            events = sum(r["map"] is None for r in rows)
            keep = math.ceil(len(history) * (LAYERS - number - 1) / LAYERS)
            asked = [
                i
                for i, r in enumerate(rows)
                if (r["map"] == USERS + OWN - 1 if top else i >= events - keep)
            ]
            prefix = f"blocks/{number}/"
            w = {
                name.removeprefix(prefix): value
                for name, value in params.items()
                if name.startswith(prefix)
            }
            rows = layer(w, rows, asked, top)
        wanted = np.array([rms(r["x"]) * params["norm/scale"] for r in rows])
        # float32 against NumPy token by token; values are of order 1. Measured: 1.1e-6.
        np.testing.assert_allclose(read[sample], wanted, atol=5e-5)
