"""A stream in the order `[history, user, candidates]`, for OneTrans and LONGER.

    given      user user sep  s_1 a_1 s_2 a_2  sep  v_1 v_2
    reordered  s_1 a_1 s_2 a_2  user user  v_1 v_2

Separators are dropped. With a causal mask the history sees itself only, the user sees
the history, and a candidate sees both and no other candidate."""

from __future__ import annotations

import numpy as np

from tokenrec.tokens.layout import ROLES, Layout
from tokenrec.tokens.stream_segments import StreamSegment, make_layout


def history_positions(layout: Layout) -> np.ndarray:
    """Positions of the history, `[n]`, ascending."""
    return np.flatnonzero((layout.event >= 0) & (layout.candidate < 0))


def extract_history(layout: Layout) -> StreamSegment:
    """The history of a layout as a segment."""
    positions = history_positions(layout)
    return StreamSegment(
        tuple(ROLES[role] for role in layout.roles[positions]),
        layout.event[positions],
        stride=layout.stride,
    )


def user_and_candidate_positions(layout: Layout) -> np.ndarray:
    """Positions of the user, then of the candidates, `[n]`."""
    return np.concatenate(
        [layout.positions_of("user"), np.flatnonzero(layout.candidate >= 0)]
    )


def history_first_layout(layout: Layout, history: StreamSegment) -> Layout:
    """Lay out `[history, user, candidates]` for the tokens of a layout.

    Args:
      layout: the given order.
      history: the history; it may have other tokens than that of `layout`.

    Returns:
      The layout. User and candidates have the RoPE position behind the newest event.
    """
    user_tokens = len(layout.positions_of("user"))
    candidate_tokens = int(np.sum(layout.candidate == 0))
    return make_layout(
        [history, StreamSegment.tokens("user", user_tokens)],
        [StreamSegment.tokens("target", candidate_tokens)],
        events=layout.events,
        candidates=layout.candidates,
        readout="candidates",
    )
