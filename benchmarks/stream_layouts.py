"""TokenFormer streams without a config or a schema, for tests and benchmarks."""

from __future__ import annotations

import numpy as np

from tokenrec.tokens.layout import Layout, Role
from tokenrec.tokens.stream_segments import StreamSegment, make_layout


def history_part(*, events: int, fused: bool) -> StreamSegment:
    """Events as one token each, or as a state and an action token."""
    if fused:
        return StreamSegment.history("event", np.arange(events))
    pair: tuple[Role, ...] = ("state", "action")
    return StreamSegment(pair * events, np.repeat(np.arange(events), 2))


def build_layout(
    *, user_tokens: int, events: int, fused: bool, candidates: int, target_tokens: int
) -> Layout:
    """Lay out `[user.., sep, events.., sep, targets..]` (docs/methods.md section 3).

    `candidates=0` is UC, whose stream ends with the events.
    """
    prefix = [
        StreamSegment.tokens("user", user_tokens),
        StreamSegment.tokens("sep", 1),
        history_part(events=events, fused=fused),
    ]
    if not candidates:
        return make_layout(prefix, [], events=events, candidates=0, readout="states")
    return make_layout(
        [*prefix, StreamSegment.tokens("sep", 1)],
        [StreamSegment.tokens("target", target_tokens)],
        events=events,
        candidates=candidates,
        readout="candidates",
    )
