"""LONGER against its equations in NumPy."""

import math

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, gelu, rms, silu, split, turned
from tests.worlds import one_device, tiny

HEADS, USERS, OWN, LAYERS, EVENTS, GROUP = 2, 2, 2, 3, 7, 2


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def softmax(x):
    share = np.exp(x - x.max())
    return share / share.sum()


def merged(w, group):
    """Merge the real events `group: [k', d]`: InnerTrans, then the learned query."""
    x = group
    normed = rms(x) * w["attention_norm/scale"] + w["place"][GROUP - len(x) :]
    q, k, v = (
        np.einsum("kd,dhe->hke", normed, w[name]) for name in ("query", "key", "value")
    )
    for head in range(HEADS):
        logits = q[head] @ k[head].T / math.sqrt(q.shape[2])
        x = x + np.array([softmax(row) for row in logits]) @ v[head] @ w["output"][head]
    x = x + gelu(rms(x) * w["ffn_norm/scale"] @ w["inner"]) @ w["outer"]
    weights = rms(x) @ w["reader"]
    parts = np.split(x, HEADS, axis=1)
    return np.concatenate(
        [softmax(weights[:, head]) @ part for head, part in enumerate(parts)]
    )


def layer(w, rows, asked):
    """One layer, token by token.

    `rows` are dicts of x, position and candidate in stream order; `asked` are the
    outputs."""
    out = []
    for i in asked:
        row = rows[i]
        seen = [
            j for j in range(i + 1) if rows[j]["candidate"] in (None, row["candidate"])
        ]
        normed = {j: rms(rows[j]["x"]) * w["attention_norm/scale"] for j in seen}
        branch = 0
        for head in range(HEADS):

            def project(j, name, head=head, normed=normed):
                made = normed[j] @ w[f"attention/{name}"][:, head]
                return made if name == "value" else turned(made, rows[j]["position"])

            q = project(i, "query")
            share = softmax(
                np.array([project(j, "key") @ q for j in seen]) / math.sqrt(len(q))
            )
            branch = (
                branch
                + share
                @ np.array([project(j, "value") for j in seen])
                @ w["attention/output"][head]
            )
        x = row["x"] + branch
        normed = rms(x) * w["ffn_norm/scale"]
        out.append(
            row
            | {
                "x": x
                + silu(normed @ w["ffn/gate"]) * (normed @ w["ffn/up"]) @ w["ffn/down"]
            }
        )
    return out


def of(w, prefix):
    return {
        name.removeprefix(prefix): value
        for name, value in w.items()
        if name.startswith(prefix)
    }


def test_values_are_those_of_the_equations():
    model = {
        "kind": "longer",
        "layers": LAYERS,
        "windows": (),
        "heads": HEADS,
        "merge": GROUP,
        "qk_norm": False,
    }
    tokens = {"user_tokens": USERS, "target_tokens": OWN}
    config = tiny(candidates=2, events=EVENTS, model=model, tokens=tokens)
    backbone = Backbone(config)
    layout, w = backbone.layout(), backbone.named()
    x = (
        np.random.default_rng(0)
        .normal(size=(3, layout.length, config.model.width))
        .astype(np.float32)
    )
    lengths, candidates = [2, 5, 7], np.ones((3, 2), bool)
    events = np.arange(EVENTS) >= [[EVENTS - n] for n in lengths]
    read, valid = (
        backbone(x, events, candidates, layout),
        np.asarray(layout.valid(*split(events, candidates))),
    )
    asking = math.ceil(EVENTS / GROUP) // 2
    for sample, length in enumerate(lengths):
        history = (
            x[sample][layout.positions_of("state")]
            + x[sample][layout.positions_of("action")]
        )[EVENTS - length :]
        ends = range(length, 0, -GROUP)
        rows = [
            {
                "x": merged(of(w, "pool/"), history[max(end - GROUP, 0) : end]),
                "position": end,
                "candidate": None,
            }
            for end in reversed(ends)
        ]
        tokens_of = [(at, None) for at in layout.positions_of("user")]
        tokens_of += [
            (at, number // OWN)
            for number, at in enumerate(layout.positions_of("target"))
        ]
        rows += [
            {"x": x[sample, at], "position": length + 1, "candidate": c}
            for at, c in tokens_of
            if valid[sample, at]
        ]
        groups = len(ends)
        for number in range(LAYERS):
            first = max(groups - asking, 0) if number == 0 else 0
            asked = range(first, len(rows))
            if number == LAYERS - 1:
                asked = [len(rows) - (2 - c) * OWN + OWN - 1 for c in range(2)]
            rows = layer(of(w, f"blocks/{number}/"), rows, asked)
        wanted = np.array([rms(row["x"]) * w["norm/scale"] for row in rows])
        # float32 against NumPy token by token; values are of order 1. Measured: 1.4e-6.
        np.testing.assert_allclose(read[sample], wanted, atol=5e-5)
