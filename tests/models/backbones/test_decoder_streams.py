"""`Decoder` on streams of a recommender: each candidate is the end of a text of its own.

A stream has padding in front of its history and behind its texts, and several
candidates. The reference reads, for each candidate, the real tokens before it and its
own, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language import reference
from tests.language.hf_models import CONFIGS, WIDTH, random_tensors
from tests.language.reference import relative_error
from tests.models.backbones.language_models import (
    decoder_weights,
    make_decoder,
    model_config,
    place,
)
from tests.worlds import mesh_of, one_device
from tokenrec.models.backbones.bfts import prefix_length
from tokenrec.models.backbones.decoder import Decoder
from tokenrec.models.backbones.decoder_extend import extend_decoder
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import Readout, StreamSegment, make_layout

EVENTS = 7
# Real events of each stream, real words of the text in front, and behind the history.
HISTORIES, FRONT, BEHIND = (7, 3, 0, 5), (4, 4, 2, 1), (3, 1, 3, 2)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(one_device()):
        yield


class Inputs(NamedTuple):
    """Tokens, real events, real candidates, and tokens that are no fill."""

    x: np.ndarray
    events: np.ndarray
    candidates: np.ndarray
    present: np.ndarray


def stream(candidates: int, words: int = 3, readout: Readout = "candidates") -> Layout:
    """`[4 words, 7 events, 3 words || words of a candidate, its target]`."""
    own = [
        StreamSegment.tokens("title", words, ordered=True),
        StreamSegment.tokens("target", 1),
    ]
    return make_layout(
        [
            StreamSegment.tokens("text", max(FRONT), ordered=True),
            StreamSegment.history("event", np.arange(EVENTS)),
            StreamSegment.tokens("query", max(BEHIND), ordered=True),
        ],
        own if readout == "candidates" else [],
        events=EVENTS,
        candidates=candidates if readout == "candidates" else 0,
        readout=readout,
        marks_static=False,
    )


def inputs(layout: Layout, *, padded_candidates: bool) -> Inputs:
    """Random tokens; texts are filled up behind their words."""
    draw = np.random.default_rng(3)
    batch = len(HISTORIES)
    x = draw.normal(size=(batch, layout.length, WIDTH)).astype(np.float32)
    events = np.arange(EVENTS) >= EVENTS - np.array(HISTORIES)[:, None]
    candidates = np.ones((batch, layout.candidates), bool)
    candidates[1, 1:] = False
    present = np.ones((batch, layout.length), bool)
    for role, lengths in (("text", FRONT), ("query", BEHIND)):
        positions = layout.positions_of(role)
        present[:, positions] = np.arange(len(positions)) < np.array(lengths)[:, None]
    if padded_candidates:
        for candidate in range(layout.candidates):
            title = layout.positions_of("title")
            title = title[layout.candidate[title] == candidate]
            kept = (np.arange(batch) + candidate) % (len(title) + 1)
            present[:, title] = np.arange(len(title)) < kept[:, None]
    return Inputs(x, events, candidates, present)


def texts(layout: Layout, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The text that ends with each candidate, `[B C, S, d]`, padded on the left."""
    real = np.ones((len(given.x), layout.length), bool) & given.present
    in_history = layout.event >= 0
    real[:, in_history] &= given.events[:, layout.event[in_history]]
    x = np.zeros((len(given.x), max(layout.candidates, 1), *given.x.shape[1:]))
    mask = np.zeros(x.shape[:-1], bool)
    for row, tokens in enumerate(given.x):
        for candidate in range(x.shape[1]):
            before = layout.candidate < 0
            own = layout.candidate == candidate
            kept = np.flatnonzero(real[row] & (before | own))
            x[row, candidate, layout.length - len(kept) :] = tokens[kept]
            mask[row, candidate, layout.length - len(kept) :] = True
    return (
        x.reshape(-1, *x.shape[2:]).astype(np.float32),
        mask.reshape(-1, mask.shape[-1]),
    )


def wanted(name: str, layout: Layout, given: Inputs) -> np.ndarray:
    """Outputs of the reference at the end of each text, `[B, C, d]`."""
    config, (x, mask) = CONFIGS[name], texts(layout, given)
    tensors = random_tensors(config)
    run = jax.jit(lambda t, x: reference.hidden_states(t, config, x, mask)[:, -1])
    return np.asarray(run(tensors, x)).reshape(len(given.x), -1, WIDTH)


def decoder_outputs(
    name: str,
    compute: Callable[..., jax.Array],
    given: Inputs,
    **model: Any,
) -> np.ndarray:
    """Result of `compute(decoder, *arrays of given)`."""
    config = model_config(CONFIGS[name], **model)
    tensors = random_tensors(CONFIGS[name])
    machine = make_decoder(config, decoder_weights(config, tensors))

    @jax.jit
    def run(weights, *arrays):
        return compute(machine.module(weights), *arrays)

    return np.asarray(run(machine.weights, *place(*given)))


def whole(layout: Layout) -> Callable[..., jax.Array]:
    def compute(module: Decoder, x, events, candidates, present):
        return module(x, layout, events, candidates, None, present=present)

    return compute


def cached(layout: Layout, prefilled: Layout) -> Callable[..., jax.Array]:
    """Prefill the prefix with the layout of other candidates, and continue it."""

    def compute(module: Decoder, x, events, candidates, present):
        count = prefix_length(layout)
        cache, _ = module.prefill(x[:, :count], prefilled, events, present[:, :count])
        return module.extend(
            cache, x[:, count:], layout, events, candidates, present[:, count:]
        )

    return compute


def folded(layout: Layout, prefilled: Layout) -> Callable[..., jax.Array]:
    """As `cached`, with the candidates beside each other."""

    def compute(module: Decoder, x, events, candidates, present):
        count = prefix_length(prefilled)
        cache, _ = module.prefill(x[:, :count], prefilled, events, present[:, :count])
        own, real = (
            jnp.reshape(
                part[:, count:],
                (len(part), layout.candidates, -1, *part.shape[2:]),
                out_sharding=RULES("batch", *[None] * part.ndim),
            )
            for part in (x, present)
        )
        read = extend_decoder(module, cache, own, prefilled, real)
        return read[:, :, -1]

    return compute


def assert_equal(found: np.ndarray, truth: np.ndarray, given: Inputs) -> None:
    # Measured: at most 6.4e-7, on one device and on four.
    error = relative_error(found[given.candidates], truth[given.candidates])
    assert error < 1e-5


# Fill within a candidate counts as distance in a layer with a window (decoder.py).
CASES = [
    ("gemma3", False),
    ("llama3", True),
    pytest.param("gemma3_linear", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "padded_candidates"), CASES)
@pytest.mark.parametrize(
    "needed_rows", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_a_candidate_is_the_end_of_its_text(
    name: str, padded_candidates: bool, needed_rows: bool
) -> None:
    layout = stream(3)
    given = inputs(layout, padded_candidates=padded_candidates)
    found = decoder_outputs(name, whole(layout), given, needed_rows=needed_rows)
    assert_equal(found, wanted(name, layout, given), given)


@pytest.mark.parametrize(("name", "padded_candidates"), CASES)
def test_a_cached_prefix_changes_nothing(name: str, padded_candidates: bool) -> None:
    layout = stream(3)
    given = inputs(layout, padded_candidates=padded_candidates)
    compute = cached(layout, stream(1, words=1))
    found = decoder_outputs(name, compute, given)
    assert_equal(found, wanted(name, layout, given), given)


# Heads of queries share keys: two by two (gemma3, llama3) or all four (gemma3_linear).
@pytest.mark.parametrize(("name", "padded_candidates"), CASES)
def test_candidates_beside_each_other_change_nothing(
    name: str, padded_candidates: bool
) -> None:
    layout = stream(3)
    given = inputs(layout, padded_candidates=padded_candidates)
    found = decoder_outputs(name, folded(layout, stream(1)), given)
    assert_equal(found, wanted(name, layout, given), given)


def test_fill_in_candidates_changes_no_score_beside_each_other() -> None:
    # The layers with windows see the fill, in a stream as here.
    layout = stream(3)
    given = inputs(layout, padded_candidates=True)
    truth = decoder_outputs("gemma3", whole(layout), given)
    found = decoder_outputs("gemma3", folded(layout, stream(1)), given)
    assert_equal(found, truth, given)


def test_the_end_of_a_prefix_is_the_end_of_its_text() -> None:
    layout = stream(0, readout="last")
    given = inputs(layout, padded_candidates=False)
    found = decoder_outputs("gemma3", whole(layout), given)
    # Measured: 6.0e-7.
    assert relative_error(found, wanted("gemma3", layout, given)) < 1e-5


@pytest.mark.parametrize(
    "name", ["gemma3_linear", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_a_mesh_changes_no_score(name: str) -> None:
    layout = stream(3)
    given = inputs(layout, padded_candidates=False)
    truth = wanted(name, layout, given)
    with jax.set_mesh(mesh_of(1, 2, 2)):
        found = decoder_outputs(name, cached(layout, layout), given)
        beside = decoder_outputs(name, folded(layout, stream(1)), given)
    assert_equal(found, truth, given)
    assert_equal(beside, truth, given)
