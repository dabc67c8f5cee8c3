"""The plan of a history compression: which events become which tokens.

    events   x_1  x_2  x_3  x_4  x_5  x_6 | x_7  x_8      T = 8, R = 2, groups of 3
    tokens         m_1           m_2      | x_7  x_8      token m_1 represents event x_3

The tokens are computed in `tokenrec.tokens.history_compression`. All lengths are
static.

Letters: T events, R recent events, k events of a group, M' compressed tokens.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np

from tokenrec.config import Compression
from tokenrec.errors import InputError, suggest


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """Static lengths of a compression: which events become which tokens.

    Attributes:
      events: T of the longest history.
      kind: "none", "mlp" or "attention".
      recent: R, the newest events, which stay as they are.
      group: k, for "attention". The oldest group may be shorter.
      compressed: M', for "mlp".
      absent: events at the old end that a shorter stream (`data.buckets`) lacks.

    Raises:
      InputError: a length does not fit.

    >>> CompressionPlan(10, "attention", recent=3, group=4).event.tolist()
    [2, 6, 7, 8, 9]
    >>> CompressionPlan(10, "mlp", recent=3, compressed=2).event.tolist()
    [2, 6, 7, 8, 9]
    """

    events: int
    kind: Compression = "none"
    recent: int = 0
    group: int = 1
    compressed: int = 1
    absent: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Compression):
            near = suggest(self.kind, get_args(Compression))
            raise InputError(f"compression={self.kind!r} is not known{near}")
        if not 0 <= self.absent <= self.events:
            raise InputError(
                f"a stream of {self.length} events is not within 0 to "
                f"events={self.events}"
            )
        if self.kind == "none":
            return
        if not 0 <= self.recent < self.events:
            raise InputError(
                f"recent={self.recent} of events={self.events} leaves nothing to "
                f"compress; use 0 to {self.events - 1}"
            )
        if self.kind == "mlp":
            older = self.events - self.recent
            if not 1 <= self.compressed <= older:
                raise InputError(
                    f"compressed={self.compressed} of compression='mlp' must be 1 to "
                    f"{older}, the number of older events"
                )
        elif self.group < 1:
            raise InputError(
                f"group={self.group} of compression='attention' must be at least 1"
            )

    def for_length(self, length: int) -> CompressionPlan:
        """The plan of a stream of `length` events, without the tokens of absent events.

        Raises:
          InputError: the stream is longer than `events`.
        """
        return dataclasses.replace(self, absent=self.events - length)

    @property
    def length(self) -> int:
        """Events of the stream."""
        return self.events - self.absent

    @property
    def older(self) -> int:
        """Events that are compressed: all but the newest `recent`."""
        return 0 if self.kind == "none" else max(self.length - self.recent, 0)

    @property
    def event(self) -> np.ndarray:
        """Newest event that each token represents, `[tokens]`, ascending.

        A token is valid if this event is. In a right-aligned history, that is the case
        exactly if any event of the token's group is valid. Each token of "mlp" reads
        all older events; they are spread evenly over these, the last at the newest."""
        events = np.arange(self.events)
        if self.kind == "none":
            newest = events
        else:
            older = self.events - self.recent
            if self.kind == "mlp":
                # Ends are exclusive: the newest event of a token is its end minus 1.
                ends = (np.arange(self.compressed) + 1) * older // self.compressed
            else:
                # Counted from the newest, so that the oldest group is the short one.
                groups = -(-older // self.group)
                ends = older - np.arange(groups)[::-1] * self.group
            newest = np.concatenate([ends - 1, events[older:]])
        # A shorter stream lacks the oldest events; what is left is numbered from its
        # own 0.
        return newest[newest >= self.absent] - self.absent

    @property
    def tokens(self) -> int:
        """Tokens that `length` events become."""
        return len(self.event)
