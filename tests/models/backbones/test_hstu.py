"""HSTU against its equations in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.backbones.machine import build, forward_layers, rms, silu
from tests.worlds import one_device, random_batch, tiny
from tokenrec.models.backbones.hstu import BUCKETS, time_buckets


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def token_ages(ages, layout):
    """Seconds before the request of each token; 0 for tokens of no event."""
    return [int(ages[event]) if event >= 0 else 0 for event in layout.event]


def layer(w, x, layout, valid, ages, window, rows):
    """One layer for all tokens of `x: [S, d]`, token by token."""
    normed = rms(x) * w["norm/scale"]
    u, v, q, k = (
        silu(np.einsum("sd,dhk->shk", normed, w[name]))
        for name in ("gate", "value", "query", "key")
    )
    out = np.empty_like(x)
    for i in range(layout.length):
        total = np.zeros_like(u[i])
        for j in range(layout.length):
            near = window is None or (
                layout.index[i] - layout.index[j] < window
                and (layout.static[i] or not layout.static[j])
            )
            mine = layout.candidate[j] in (-1, layout.candidate[i])
            if valid[j] and layout.index[j] <= layout.index[i] and mine and near:
                b = w["bias"][
                    rows if layout.static[j] else layout.index[i] - layout.index[j]
                ]
                if "time_bias" in w and not layout.static[j]:
                    b = (
                        b
                        + w["time_bias"][
                            math.floor(math.log(max(1, abs(ages[i] - ages[j]))) / 0.301)
                        ]
                    )
                total += silu(np.sum(q[i] * k[j], axis=-1) + b)[:, None] * v[j] / rows
        normal = total / np.sqrt(np.mean(total**2) + 1e-6) * w["scale"]
        out[i] = x[i] + np.einsum("hk,hkd->d", normal * u[i], w["output"])
    return out


@pytest.mark.parametrize(
    ("shape", "windows", "time_bias"),
    [
        ({"candidates": 2, "fused": True}, (6, 4), True),
        ({"paradigm": "uc"}, (), True),
        ({"paradigm": "uc"}, (), False),
    ],
)
def test_values_are_those_of_the_equations(shape, windows, time_bias, mesh):
    config = tiny(
        **shape,
        events=5,
        model={"kind": "hstu", "layers": 3, "windows": windows, "time_bias": time_bias},
    )
    model, _, params = build(config)
    batch = random_batch(config, 2, lengths=[3, 5])
    x, layout, valid, read = forward_layers(model, params, batch, mesh)
    for sample in range(2):
        rows, ages = (
            x[sample],
            token_ages(batch.ages[sample], layout) if time_bias else None,
        )
        for number, window in enumerate((None,) * (3 - len(windows)) + windows):
            prefix = f"backbone/blocks/{number}/"
            w = {
                name.removeprefix(prefix): value
                for name, value in params.items()
                if name.startswith(prefix)
            }
            rows = layer(w, rows, layout, valid[sample], ages, window, layout.length)
        wanted = rms(rows[layout.readout]) * params["backbone/norm/scale"]
        real = valid[sample][layout.readout]
        # float32 against NumPy token by token, through three layers; values are of
        # order 1. Measured: 2.6e-6.
        np.testing.assert_allclose(read[sample][real], wanted[real], atol=2e-5)


def test_every_distance_of_times_has_a_bucket():
    seconds = np.array([0, 1, 2, 59, 3600, 86_400, 31_536_000, 2**31 - 1], np.int32)
    ages, shown = jnp.zeros((1, 1), jnp.int32), jnp.asarray(seconds)[None]
    found = time_buckets(ages, shown, np.zeros(len(seconds), bool))[0, 0]
    assert found.tolist() == [
        math.floor(math.log(max(1, s)) / 0.301) for s in seconds.tolist()
    ]
    assert found[-1] == BUCKETS - 1
    assert time_buckets(shown[:, :1], shown, np.arange(len(seconds)) < 2)[
        0, 0, :3
    ].tolist() == [BUCKETS, BUCKETS, 2]
