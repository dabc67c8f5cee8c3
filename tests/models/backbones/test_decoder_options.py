"""`Decoder` with options of a run: live positions, windows, tiles, adapters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.language import reference
from tests.language.hf_models import CONFIGS, WINDOW, random_tensors, random_text
from tests.language.reference import relative_error
from tests.models.backbones.language_models import (
    decoder_weights,
    make_decoder,
    model_config,
    run_decoder,
    text_layout,
)
from tests.worlds import one_device
from tokenrec.config.tuning_config import PROJECTIONS, TuningConfig
from tokenrec.models.backbones.bfts import layer_positions

TOKENS, MASK = random_text((24, 9, 3, 24))


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


def wanted(
    config: dict, tokens: np.ndarray = TOKENS, mask: np.ndarray = MASK
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of the reference, `[B, S, d]` each."""
    tensors = random_tensors(config)
    x = reference.embed(tensors, config, tokens)
    run = jax.jit(lambda t, x: reference.hidden_states(t, config, x, mask))
    return np.asarray(x), np.asarray(run(tensors, x))


@pytest.mark.parametrize("needed_rows", [True, False])
def test_tokens_that_no_read_out_sees_can_be_left_out(needed_rows: bool) -> None:
    config = CONFIGS["qwen3_deep"]
    read, (x, states) = np.array([15, 23]), wanted(config)
    # Three of the layers are stacked, and taken apart where they need other positions.
    model = model_config(config, needed_rows=needed_rows, scan=3)
    layout = text_layout(24, read)
    counts = [len(positions) for positions in layer_positions(model, layout)]
    assert counts == ([24, 21, 17, 10, 2] if needed_rows else [24] * 5)
    weights = decoder_weights(model, random_tensors(config))
    out = run_decoder(make_decoder(model, weights), x, MASK, layout)
    real = MASK[:, read]
    # Measured: 6.3e-7 and 5.1e-7.
    assert relative_error(out[real], states[:, read][real]) < 1e-5


def test_windows_of_the_run_narrow_the_top_layers() -> None:
    config = CONFIGS["qwen3"]
    x, states = wanted(CONFIGS["qwen3_windows"])
    model = model_config(config, windows=(WINDOW,))
    weights = decoder_weights(model, random_tensors(config))
    out = run_decoder(make_decoder(model, weights), x, MASK, text_layout(24))
    # Measured: 6.8e-7.
    assert relative_error(out[MASK], states[MASK]) < 1e-5


def test_attention_in_tiles_computes_a_long_text() -> None:
    tokens, mask = random_text((200, 130))
    config = CONFIGS["gemma3"] | {"sliding_window": 40}
    x, states = wanted(config, tokens, mask)
    model = model_config(config, attention="blocked")
    weights = decoder_weights(model, random_tensors(config))
    out = run_decoder(make_decoder(model, weights), x, mask, text_layout(200))
    # The angles of rotary positions are float32 here, as in transformers, and float64
    # in the reference. Measured: 3.6e-6.
    assert relative_error(out[mask], states[mask]) < 2e-5


def test_adapters_add_their_product_to_the_projection() -> None:
    config, tuning = CONFIGS["qwen3"], TuningConfig(method="lora", rank=3, alpha=6.0)
    x, states = wanted(config)
    model = model_config(config)
    weights = decoder_weights(model, random_tensors(config))
    draw, adapted, merged = np.random.default_rng(5), dict(weights), dict(weights)
    for name, weight in weights.items():
        projection = name.rpartition("/")[2]
        if projection not in PROJECTIONS:
            continue
        # `[H, h, d]` of the output has two axes of inputs.
        inputs = 2 if projection == "output" else 1
        down = draw.normal(size=(*weight.shape[:inputs], 3)) / 7
        up = draw.normal(size=(3, *weight.shape[inputs:])) / 7
        adapted |= {
            f"{name}_adapter/down": down.astype(np.float32),
            f"{name}_adapter/up": up.astype(np.float32),
        }
        # alpha / r = 2.
        merged[name] = (weight + 2 * np.tensordot(down, up, 1)).astype(np.float32)
    assert len(adapted) == len(weights) + 2 * len(PROJECTIONS) * model.layers
    out, expected = (
        run_decoder(machine, x, MASK, text_layout(24))[MASK]
        for machine in (
            make_decoder(model, adapted, tuning),
            make_decoder(model, merged),
        )
    )
    # Measured: 7.7e-7; without the products the error is 1.3.
    assert relative_error(out, expected) < 1e-5
    assert relative_error(out, states[MASK]) > 0.1
