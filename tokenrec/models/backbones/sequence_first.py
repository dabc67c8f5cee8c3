"""A stream in another order: history, then user, then candidates, without separators."""

from __future__ import annotations

import numpy as np

from tokenrec.tokens.layout import ROLES, Layout, StreamPart, lay_out


def history_of(layout: Layout) -> StreamPart:
    """The rows of the history as they stand."""
    rows = np.flatnonzero((layout.event >= 0) & (layout.candidate < 0))
    return StreamPart(
        tuple(ROLES[role] for role in layout.roles[rows]),
        layout.event[rows],
        stride=layout.stride,
    )


def other_positions(layout: Layout) -> np.ndarray:
    """Rows of the user and of the candidates, `[n]`, in the order in which they follow the history."""
    return np.concatenate(
        [layout.rows_of("user"), np.flatnonzero(layout.candidate >= 0)]
    )


def sequence_first(layout: Layout, history: StreamPart) -> Layout:
    """The stream `[history, user, candidates]` of the same tokens, for a history of other rows perhaps.

    The tokens of the user see the history, candidates see both and not each other, and all of them have the position
    behind the newest event.
    """
    user, own = len(layout.rows_of("user")), int(np.sum(layout.candidate == 0))
    return lay_out(
        [history, StreamPart.of("user", user)],
        [StreamPart.of("target", own)],
        events=layout.events,
        candidates=layout.candidates,
        read="own",
    )
