"""Bands in chunks compute what the reference computes, on every kind of platform."""

import jax
import numpy as np
import pytest

from benchmarks.attention_specs import STREAMS, causal_spec, stream_specs
from tests.ops.attention.compare import differences_from_dense
from tests.ops.attention.test_blocked import GRADIENTS, VALUES
from tokenrec.ops.attention import band_chunks, blocked, platform
from tokenrec.ops.attention.bands import plan_band
from tokenrec.ops.attention.blocked import blocked_attention
from tokenrec.ops.attention.pattern import causal_pattern

# Queries, keys and window: a loop between tiles at both borders, a last tile that is
# cut, queries that begin inside of the keys, and spans wider than a chunk.
LONG = [(700, 700, 64), (640, 640, 20), (500, 700, 40), (700, 700, 300)]


def assert_equals_dense(spec):
    def attend(q, k, v, valid):
        return blocked_attention(q, k, v, spec.pattern, spec.window, valid)

    differences = differences_from_dense(attend, spec)
    assert differences.values < VALUES
    assert differences.gradients < GRADIENTS


@pytest.fixture
def smallest_chunks(monkeypatch):
    monkeypatch.setattr(blocked, "GROUP_LOGITS", 1)


@pytest.fixture
def accelerator(monkeypatch):
    """Take the ways of a platform that is not a CPU; the portable ones run on both."""
    monkeypatch.setattr(platform, "current_platform", lambda: "gpu")
    monkeypatch.setattr(blocked, "current_platform", lambda: "gpu")


@pytest.mark.parametrize(("queries", "keys", "window"), LONG)
def test_the_smallest_chunks_equal_dense(queries, keys, window, smallest_chunks):
    assert_equals_dense(causal_spec(queries, keys, window))


@pytest.mark.parametrize(
    "every_token",
    [
        pytest.param(False, id="needed"),
        pytest.param(True, id="every token", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name",
    # "requests" has static tokens, candidates and a query as well as padding.
    [
        pytest.param(name, marks=[] if name == "requests" else pytest.mark.slow)
        for name in STREAMS
    ],
)
def test_padded_streams_in_the_smallest_chunks_equal_dense(
    name, every_token, smallest_chunks
):
    for spec in stream_specs(name, every_token=every_token):
        assert_equals_dense(spec)


@pytest.mark.parametrize(
    "sizes",
    [LONG[2], *(pytest.param(LONG[n], marks=pytest.mark.slow) for n in (0, 1, 3))],
)
def test_chunks_of_an_accelerator_equal_dense(sizes, smallest_chunks, accelerator):
    assert_equals_dense(causal_spec(*sizes))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "requests" else pytest.mark.slow)
        for name in STREAMS
    ],
)
def test_padded_streams_on_an_accelerator_equal_dense(name, accelerator):
    for spec in stream_specs(name):
        assert_equals_dense(spec)


@pytest.mark.parametrize(("queries", "keys", "window"), [*LONG, (2048, 2048, 64)])
@pytest.mark.parametrize("most", [1, 3, 8, 100])
def test_chunks_hold_every_tile_once_and_the_loop_stays_inside(
    queries, keys, window, most
):
    plan = plan_band(causal_pattern(queries, keys), window)
    cut = band_chunks.cut_tiles(plan, queries, keys, most)
    looped = [(first, cut.loop.step) for first in cut.loop]
    tiles = [
        tile
        for first, count in [*cut.before, *looped, *cut.behind]
        for tile in range(first, first + count)
    ]
    assert tiles == list(range(plan.tiles))
    for first, count in looped:
        chunk = band_chunks.Chunk(plan, 1, first, count)
        assert 0 <= chunk.key <= keys - chunk.keys
        assert chunk.query + chunk.queries <= queries
    assert bool(looped) == (most < plan.tiles)


def test_a_long_stream_is_never_copied_whole():
    def temporary_bytes(tokens):
        q = jax.ShapeDtypeStruct((1, tokens, 4, 32), np.float32)

        def loss(q, k, v):
            pattern = causal_pattern(tokens, tokens)
            return blocked_attention(q, k, v, pattern, 64, None).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
        return program.memory_analysis().temp_size_in_bytes

    # Of an array that grows with the stream, only the output is kept between the
    # passes, and the mask, of 2 x 64 keys a token: 4 x 32 x 4 + 2 x 64 = 640 bytes.
    grown = temporary_bytes(16384) - temporary_bytes(8192)
    assert grown < 8192 * 1.5 * 640
