"""Patterns of the layers of small models."""

import numpy as np

from benchmarks.stream_layouts import build_layout
from tokenrec.tokens.layout import live_positions

# Fused events, candidates, target tokens.
KINDS = (
    (True, 1, 1),
    (True, 4, 3),
    (False, 1, 3),
    (False, 4, 1),
    (False, 0, 0),
)


def many_patterns():
    """Patterns and windows of every layer of small models, needed tokens and all."""
    for user_tokens, (fused, candidates, target_tokens) in (
        (user_tokens, kind) for user_tokens in (0, 3) for kind in KINDS
    ):
        layout = build_layout(
            user_tokens=user_tokens,
            events=20,
            fused=fused,
            candidates=candidates,
            target_tokens=target_tokens,
        )
        every = np.arange(len(layout.index))
        for windows in (
            (None, None, 6, 5),
            (None, 9, 4, 1),
            (5, 5, 5, 5),
            (1, 1, 40, 3),
        ):
            needed = live_positions(layout, windows)
            for window, keys, queries in zip(windows, needed, needed[1:], strict=False):
                yield layout.pattern(queries, keys), window
                yield layout.pattern(every, every), window
