"""HSTU against its equations in NumPy."""

import jax
import numpy as np
import pytest

from tests.models.rivals.machine import build, forward_layers, rms, silu
from tests.worlds import one_device, random_batch, tiny


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def layer(w, x, layout, valid, window, rows):
    """All rows of `x: [S, d]`, row by row."""
    normed = rms(x) * w["norm/scale"]
    u, v, q, k = (silu(np.einsum("sd,dhk->shk", normed, w[name])) for name in ("gate", "value", "query", "key"))
    out = np.empty_like(x)
    for i in range(layout.rows):
        total = np.zeros_like(u[i])
        for j in range(layout.rows):
            near = window is None or (
                layout.index[i] - layout.index[j] < window and (layout.static[i] or not layout.static[j])
            )
            mine = layout.candidate[j] in (-1, layout.candidate[i])
            if valid[j] and layout.index[j] <= layout.index[i] and mine and near:
                b = w["bias"][rows if layout.static[j] else layout.index[i] - layout.index[j]]
                total += silu(np.sum(q[i] * k[j], axis=-1) + b)[:, None] * v[j] / rows
        normal = total / np.sqrt(np.mean(total**2) + 1e-6) * w["scale"]
        out[i] = x[i] + np.einsum("hk,hkd->d", normal * u[i], w["output"])
    return out


@pytest.mark.parametrize(("shape", "windows"), [({"candidates": 2, "fused": True}, (6, 4)), ({"paradigm": "uc"}, ())])
def test_values_are_those_of_the_equations(shape, windows, mesh):
    config = tiny(**shape, events=5, model={"kind": "hstu", "layers": 3, "windows": windows})
    model, _, params = build(config)
    batch = random_batch(config, 2, lengths=[3, 5])
    x, layout, valid, read = forward_layers(model, params, batch, mesh)
    for sample in range(2):
        rows = x[sample]
        for number, window in enumerate((None,) * (3 - len(windows)) + windows):
            prefix = f"backbone/blocks/{number}/"
            w = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
            rows = layer(w, rows, layout, valid[sample], window, layout.rows)
        wanted = rms(rows[layout.readout]) * params["backbone/norm/scale"]
        real = valid[sample][layout.readout]
        np.testing.assert_allclose(read[sample][real], wanted[real], atol=2e-5)
