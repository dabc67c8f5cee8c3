"""FLOPs and bytes of attention against the mask and hand-computed values."""

import dataclasses

import numpy as np
import pytest

from benchmarks.attention_specs import codes_layout
from benchmarks.stream_layouts import build_layout
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.planner.attention_cost import (
    attention_bytes,
    attention_flops,
    visible_pairs,
    visible_tiles,
)


def layouts():
    """Yield layouts of interleaved and fused events, candidates, and UC streams."""
    yield build_layout(
        user_tokens=3, events=10, fused=False, candidates=1, target_tokens=1
    )
    yield build_layout(
        user_tokens=2, events=9, fused=True, candidates=4, target_tokens=2
    )
    yield build_layout(
        user_tokens=0, events=12, fused=False, candidates=0, target_tokens=1
    )
    yield codes_layout(events=11)


def patterns():
    yield causal_pattern(7, 12)
    random = np.random.default_rng(0)
    for layout in layouts():
        every = np.arange(layout.length)
        some = np.sort(random.choice(layout.length, layout.length // 2, replace=False))
        yield layout.pattern(every, every)
        yield layout.pattern(some, every)
        yield dataclasses.replace(layout, discard=False).pattern(some, every)
        yield Pattern(
            every, every, layout.index, layout.static, layout.candidate, prefix=6
        )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window):
    for pattern in patterns():
        assert visible_pairs(pattern, window) == pattern.visible(window).sum()


@pytest.mark.parametrize("window", [None, 2, 5])
def test_tiles_are_those_with_a_visible_pair(window):
    for pattern in patterns():
        mask = pattern.visible(window)
        starts = [
            (q, k)
            for q in range(0, mask.shape[0], 4)
            for k in range(0, mask.shape[1], 3)
        ]
        assert visible_tiles(pattern, window, 4, 3) == sum(
            mask[q : q + 4, k : k + 3].any() for q, k in starts
        )


def test_pairs_of_a_long_window_need_no_square():
    window, rows = 64, 1 << 20
    assert (
        visible_pairs(causal_pattern(rows, rows), window)
        == window * rows - window * (window - 1) // 2
    )


def test_attention_costs_by_hand():
    # 10 pairs, 2 heads of 4 numbers: 2 products of 10 x 4 multiply-adds a head.
    assert attention_flops(10, 2, 4, products=2) == 2 * 2 * 10 * 2 * 4
    # One query, three keys, bfloat16: q, the output, and three vectors of k and of v,
    # of 8 bytes each; the logsumexp is 4 bytes.
    assert attention_bytes(1, 3, 1, 4, 2, backward=False) == 8 * 8 + 4
    assert attention_bytes(1, 3, 1, 4, 2, backward=True) == 16 * 8 + 4
