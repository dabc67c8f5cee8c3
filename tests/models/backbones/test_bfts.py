"""Windows and stacks of layers; live positions that fill the lanes of a TPU."""

import jax
import numpy as np
import pytest

from tests.models.backbones.machine import Backbone, rival
from tokenrec.config import DecoderConfig, ModelConfig
from tokenrec.models.backbones import bfts
from tokenrec.models.backbones.bfts import (
    fill_lanes,
    layer_positions,
    layer_stacks,
    layer_windows,
    local_layers,
    stack_sizes,
)


def test_runs_go_on_to_whole_lanes_and_stay_parts_of_each_other():
    live = [np.arange(2047), np.arange(17, 2047), np.arange(17, 2047, 2)]
    whole, sliding, read = fill_lanes(live, 2048)
    assert (len(whole), len(sliding), len(read)) == (2048, 2048, 1015)
    assert set(read) <= set(sliding) <= set(whole)
    # The stream ends: the run begins earlier.
    (found,) = fill_lanes([np.arange(260, 500)], 500)
    assert (found[0], found[-1], len(found)) == (244, 499, 256)


@pytest.mark.parametrize(
    ("live", "length"),
    [
        (np.arange(5), 500),  # 123 rows for 5
        (np.arange(127), 127),  # the stream has no more
        (np.arange(0, 250, 2), 500),  # no run
    ],
)
def test_positions_stay_where_filling_would_cost_more(live, length):
    (found,) = fill_lanes([live], length)
    np.testing.assert_array_equal(found, live)


@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_dead_rows_change_no_read_out_and_no_gradient(monkeypatch, paradigm):
    config = rival("tokenformer", paradigm=paradigm, events=20)
    machine = Backbone(config)
    layout = machine.layout()
    random = np.random.default_rng(2)
    x = random.normal(size=(8, layout.length, config.model.width)).astype(np.float32)
    events = np.arange(20) >= random.integers(0, 18, (8, 1))
    candidates = np.ones((8, max(layout.candidates, 1)), bool)

    def loss(weights, x):
        found = machine.read(weights, x, events, candidates, layout)
        return jax.numpy.sum(
            jax.numpy.sin(found[-1] if isinstance(found, list) else found)
        )

    def value_and_gradients():
        # A function of its own each time: JAX keeps the trace of one that it knows.
        def traced(weights, x):
            return jax.value_and_grad(loss, (0, 1))(weights, x)

        return jax.jit(traced)(machine.weights, x)

    wanted = value_and_gradients()
    exact = layer_positions(config.model, layout)
    monkeypatch.setattr(bfts, "current_platform", lambda: "tpu")
    monkeypatch.setattr(bfts, "LANES", 4)
    monkeypatch.setattr(bfts, "MOST_FILL", 1)
    filled = layer_positions(config.model, layout)
    assert any(len(one) > len(other) for one, other in zip(filled, exact, strict=True))
    found = value_and_gradients()
    # Other shapes, so sums in another order. Measured: 2e-6 of the largest gradient.
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = float(np.abs(other).max()) + 1e-6
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("own", "bfts", "sizes", "first"),
    [
        # Gemma 3 1B: five local layers and a full one, four times, and two more.
        (
            ((512,) * 5 + (0,)) * 4 + (512, 512),
            (),
            (18, *[1] * 8),
            (512,) * 5 + (None,),
        ),
        # All alike: the top layer stays alone, as in TokenFormer.
        ((), (), (25, 1), (None,) * 6),
        # BFTS on top ends the run that repeats.
        ((), (64, 32), (23, 1, 1, 1), (None,) * 6),
    ],
)
def test_the_layers_of_a_language_model_are_stacked_by_their_period(
    own, bfts, sizes, first
):
    config = ModelConfig(
        kind="gemma3", layers=26, windows=bfts, decoder=DecoderConfig(windows=own)
    )
    assert stack_sizes(config) == sizes
    assert layer_windows(config)[:6] == first
    stack = layer_stacks(config)[0]
    kinds = layer_windows(config)[: stack.size]
    assert all(
        kinds[n] == kinds[n + stack.period] for n in range(stack.size - stack.period)
    )


def test_bfts_narrows_the_windows_of_a_language_model():
    config = ModelConfig(
        kind="gemma3",
        layers=4,
        windows=(6, 4),
        decoder=DecoderConfig(windows=(8, 0, 5, 0)),
    )
    assert layer_windows(config) == (8, None, 5, 4)
    # Rotary positions are those that each layer was trained with.
    assert local_layers(config) == (True, False, True, False)
