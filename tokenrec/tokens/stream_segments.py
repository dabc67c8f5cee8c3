"""Segments of a stream, and the layout that they make.

A stream is assembled from segments, contiguous runs of positions:

    prefix      [user, user] [sep] [state, action, state, action] [sep]
    candidates  [target] [target]

`make_layout` concatenates those of the prefix and repeats those of a candidate. It
computes the arrays that `tokenrec.tokens.layout.Layout` describes.

Letters: S stream length, T events, C candidates, R read-outs, n positions of a segment
or of a candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from tokenrec.tokens.layout import ROLES, Layout, Role

# Positions that the heads read:
#   candidates: the last token of each candidate.
#   states: the state of every event (UC ranking).
#   last: the last token of the prefix (retrieval).
#   events: every event (retrieval in UC).
# With "last" and "events" the candidates are semantic-id codes that continue these
# positions, and all of them are read too.
Readout = Literal["candidates", "states", "last", "events"]


class StreamSegment(NamedTuple):
    """A contiguous run of n positions of a stream.

    Attributes:
      roles: role of each position.
      event: `[n]`, for a history the newest event that each position represents; None
        elsewhere.
      ordered: RoPE positions count up within the segment, as for the words of a text.
        Otherwise all of its positions share one.
      stride: tokens that one event takes and that need RoPE positions of their own.
    """

    roles: tuple[Role, ...]
    event: np.ndarray | None = None
    ordered: bool = False
    stride: int = 1

    @staticmethod
    def tokens(role: Role, count: int, *, ordered: bool = False) -> StreamSegment:
        """Create a segment of `count` positions of one role."""
        return StreamSegment((role,) * count, ordered=ordered)

    @staticmethod
    def history(role: Role, event: np.ndarray, stride: int = 1) -> StreamSegment:
        """Create a segment of history positions from their events, `event: [n]`."""
        # `stride` matters for text, whose words have RoPE positions of their own; state
        # and action share one.
        return StreamSegment((role,) * len(event), event, stride=stride)


@dataclasses.dataclass(frozen=True)
class _PositionArrays:
    """The arrays of `Layout` that have an entry per position."""

    roles: np.ndarray
    index: np.ndarray
    reach: np.ndarray
    candidate: np.ndarray
    event: np.ndarray
    offset: np.ndarray
    static: np.ndarray


def make_layout(
    prefix: Sequence[StreamSegment],
    candidate: Sequence[StreamSegment],
    *,
    events: int,
    candidates: int,
    readout: Readout,
    bidirectional: bool = False,
    discard_static: bool = True,
    marks_static: bool = True,
) -> Layout:
    """Lay out a stream: the segments of the prefix, then those of each candidate.

    Args:
      prefix: segments that depend on the request alone.
      candidate: segments of one candidate.
      events: T.
      candidates: C, how often the segments of `candidate` are repeated.
      readout: the positions that the heads read. With "last" and "events" the
        candidates continue these positions: where there are several, candidate c
        continues number c.
      bidirectional: the positions of the prefix see each other both ways in full
        layers.
      discard_static: sliding layers hide static keys from all other positions.
      marks_static: positions before the history are static; language models know no
        such positions.

    >>> user = StreamSegment.tokens("user", 2)
    >>> history = StreamSegment.history("event", np.arange(3))
    >>> layout = make_layout(
    ...     [user, history],
    ...     [StreamSegment.tokens("target", 1)],
    ...     events=3, candidates=2, readout="candidates",
    ... )
    >>> layout.index.tolist(), layout.readout.tolist()
    ([0, 1, 2, 3, 4, 5, 5], [5, 6])
    """
    # 1. The prefix.
    shared = _prefix_arrays(prefix, marks_static)
    length = len(shared.roles)
    # 2. Anchors: the positions behind which the candidates stand.
    event_positions = np.flatnonzero(shared.roles == ROLES.index("event"))
    anchors = event_positions if readout == "events" else np.array([length - 1])
    # 3. The candidates.
    repeated = _candidate_arrays(
        shared, candidate, anchors[np.arange(candidates) % len(anchors)], readout
    )
    # 4. The positions that are read.
    candidate_positions = length + np.arange(len(repeated.roles))
    if readout == "candidates":
        count = len(repeated.roles) // candidates if candidates else 0
        read = candidate_positions[count - 1 :: count] if count else candidate_positions
    elif readout == "states":
        read = np.flatnonzero(shared.roles == ROLES.index("state"))
    else:
        read = np.concatenate([anchors, candidate_positions])
    return Layout(
        roles=np.concatenate([shared.roles, repeated.roles]),
        index=np.concatenate([shared.index, repeated.index]),
        reach=np.concatenate([shared.reach, repeated.reach]),
        candidate=np.concatenate([shared.candidate, repeated.candidate]),
        event=np.concatenate([shared.event, repeated.event]),
        offset=np.concatenate([shared.offset, repeated.offset]),
        static=np.concatenate([shared.static, repeated.static]),
        readout=read,
        events=events,
        candidates=candidates,
        stride=max(segment.stride for segment in prefix),
        prefix=length if bidirectional else 0,
        discard=discard_static,
    )


def _prefix_arrays(
    segments: Sequence[StreamSegment], marks_static: bool
) -> _PositionArrays:
    """Concatenate the segments of a prefix."""
    # Roles are stored as numbers, for `np.isin` and for learned role vectors.
    roles = np.array([ROLES.index(role) for part in segments for role in part.roles])
    event = np.concatenate(
        [
            np.full(len(part.roles), -1) if part.event is None else part.event
            for part in segments
        ]
    )
    # All that precedes the first event is static; without a history, everything is.
    history = np.flatnonzero(event >= 0)
    first_event = history[0] if len(history) else len(roles)
    index = np.arange(len(roles))
    return _PositionArrays(
        roles=roles.astype(int),
        index=index,
        reach=index,
        candidate=np.full(len(roles), -1),
        event=event,
        offset=np.concatenate([_rope_offsets(segment) for segment in segments]),
        static=(index < first_event) & marks_static,
    )


def _candidate_arrays(
    prefix: _PositionArrays,
    segments: Sequence[StreamSegment],
    anchors: np.ndarray,
    readout: Readout,
) -> _PositionArrays:
    """Repeat the segments of a candidate behind each of its anchors.

    Args:
      prefix: arrays of the prefix.
      segments: segments of one candidate, n positions.
      anchors: `[C]`, the prefix position that each candidate follows.
      readout: as in `make_layout`.

    Returns:
      Arrays of C n positions, candidate by candidate.
    """
    candidates = len(anchors)
    roles = np.array(
        [ROLES.index(role) for part in segments for role in part.roles], int
    )
    count = len(roles)
    # Codes continue the token they follow: the same event, and RoPE positions that
    # count on from its own. Targets have the position behind the history.
    continues = readout in ("last", "events")
    ordered = [part.ordered for part in segments for _ in part.roles]
    steps = np.cumsum([continues, *ordered])[:count]

    def spread(first: np.ndarray, step: np.ndarray) -> np.ndarray:
        """`first: [C]` plus `step: [n]`, candidate by candidate: `[C n]`."""
        return (first[:, None] + step[None, :]).ravel()

    same = np.zeros(count, int)
    # Every candidate starts one index behind its anchor.
    index = spread(prefix.index[anchors] + 1, np.arange(count))
    event = prefix.event[anchors] if continues else np.full(candidates, -1)
    # In the middle of a history, the next event is what the codes beside it predict: a
    # code sees the prefix up to its anchor only.
    reach = spread(prefix.index[anchors], same) if readout == "events" else index
    return _PositionArrays(
        roles=np.tile(roles, candidates),
        index=index,
        reach=reach,
        candidate=spread(np.arange(candidates), same),
        event=spread(event, same),
        offset=spread(prefix.offset[anchors] * continues, steps),
        static=np.zeros(candidates * count, bool),
    )


def _rope_offsets(segment: StreamSegment) -> np.ndarray:
    """RoPE positions of a segment relative to its first token or event, `[n]`."""
    positions = np.arange(len(segment.roles))
    if segment.event is not None:
        # Counted from the right end: a history that was cut from the left may begin
        # inside an event.
        return (positions - len(positions)) % segment.stride
    return positions if segment.ordered else np.zeros_like(positions)
