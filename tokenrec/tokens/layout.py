"""Layout of a token stream: roles, order, visibility, and the positions that matter.

A stream is one sequence of S tokens. Its first tokens, the prefix, depend on the
request alone; the tokens of C candidates follow. A layout describes each position of
that sequence. The stream of a request with two user tokens, two interleaved events and
two candidates of one token (TokenFormer, docs/methods.md section 3, "Layout"):

    position     0    1    2     3      4      5      6     7      8      9
    role       user user  sep  state action state action   sep target target
    event        -1   -1   -1     0      0      1      1    -1     -1     -1
    candidate    -1   -1   -1    -1     -1     -1     -1    -1      0      1
    index         0    1    2     3      4      5      6     7      8      8
    reach         0    1    2     3      4      5      6     7      8      8
    static        x    x    x     .      .      .      .     .      .      .
    readout       .    .    .     .      .      .      .     .      x      x
    RoPE          0    0    0     1      1      2      2     3      3      3
               `--- user ---'  `-- history, oldest first --'   `-candidates-'
               `------------------- prefix -------------------'

`index` is the order that attention sees: a query sees no key of a higher index, and
windows count indices. All candidates repeat the indices of candidate 0, so that each is
scored as if it were alone. `index` is not the RoPE position, which depends on the
number of valid events and is computed in the step (`Layout.rope_positions`).

Everything here is static NumPy that shapes the compiled program, except `valid`, `ages`
and `rope_positions`, which are traced.

Letters: B batch, S stream length, T events, C candidates, R read-outs, d model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.span_mask import visible_spans

# text: a word of the prompt; state: item and context of an event; action: feedback of
# an event; event: both in one token; title: a word of a candidate's text; code: one
# level of a semantic id.
Role = Literal[
    "text",
    "user",
    "sep",
    "state",
    "action",
    "event",
    "query",
    "title",
    "target",
    "code",
]
ROLES: tuple[Role, ...] = (
    "text",
    "user",
    "sep",
    "state",
    "action",
    "event",
    "query",
    "title",
    "target",
    "code",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The positions of a stream: a prefix, then the positions of each candidate.

    Visibility of key j for query i in layer l follows from these arrays
    (docs/methods.md section 3, BFTS; computed in `tokenrec.ops.attention.pattern`):

        see(i, j) = i == j  or  valid_j
                    and (index_j <= reach_i                       j is in the prefix
                         or candidate_j == candidate_i and index_j <= index_i)
                    and (l is full
                         or index_i - index_j < w_l and (static_i or not static_j)
                         or static_j and not discard)

    Attributes:
      roles: `[S]`, index into `ROLES`.
      index: `[S]`, order of the positions. It is the position itself, except that every
        candidate repeats the indices of candidate 0.
      reach: `[S]`, highest index of the prefix that a position sees: its own, or, where
        a candidate continues an event in the middle of the history, that of this event.
      candidate: `[S]`, candidate of a position, -1 in the prefix. Candidates come last.
      event: `[S]`, newest event that a position represents, -1 for none.
      offset: `[S]`, added to the RoPE position.
      static: `[S] bool`, positions before the history: user, separator, prompt text.
      readout: `[R]`, positions whose outputs the heads read.
      events: T.
      candidates: C.
      stride: RoPE positions that one event takes.
      prefix: positions with an index below this see each other both ways in full
        layers.
      discard: sliding layers hide static keys from all queries that are not static.
      fill: positions at the end that no other position sees (`with_fill`).
    """

    roles: np.ndarray
    index: np.ndarray
    reach: np.ndarray
    candidate: np.ndarray
    event: np.ndarray
    offset: np.ndarray
    static: np.ndarray
    readout: np.ndarray
    events: int
    candidates: int
    stride: int = 1
    prefix: int = 0
    discard: bool = True
    fill: int = 0

    @property
    def length(self) -> int:
        """S, the number of tokens of the stream."""
        return len(self.roles)

    def positions_of(self, *roles: Role) -> np.ndarray:
        """Positions with one of these roles, `[n]`, ascending."""
        return np.flatnonzero(
            np.isin(self.roles, [ROLES.index(role) for role in roles])
        )

    def pattern(
        self, query_positions: np.ndarray, key_positions: np.ndarray
    ) -> Pattern:
        """The attention pattern of `query_positions: [Q]` over `key_positions: [K]`."""
        return Pattern(
            query_positions,
            key_positions,
            self.index,
            self.static,
            self.candidate,
            self.prefix,
            self.reach,
            self.discard,
        )

    def with_fill(self, count: int) -> Layout:
        """Append positions that are padding in every stream.

        They continue the causal order, or are one more candidate behind the others, so
        that no other position sees them.
        """
        if count == 0:
            return self
        last = self.length - 1
        behind = np.arange(1, count + 1)
        candidate = -1 if self.candidate[last] < 0 else self.candidate[last] + 1

        def append(field: np.ndarray, values: Any) -> np.ndarray:
            values = np.broadcast_to(values, count).astype(field.dtype)
            return np.concatenate([field, values])

        index = append(self.index, self.index[last] + behind)
        return dataclasses.replace(
            self,
            roles=append(self.roles, self.roles[last]),
            index=index,
            reach=append(
                self.reach,
                index[-count:] if candidate < 0 else self.reach[last],
            ),
            candidate=append(self.candidate, candidate),
            event=append(self.event, -1),
            offset=append(self.offset, 0),
            static=append(self.static, False),
            fill=self.fill + count,
        )

    def valid(self, events: jax.Array, candidates: jax.Array | None) -> jax.Array:
        """Compute which positions are real, not padding.

        Args:
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.

        Returns:
          `[B, S] bool`. Positions of neither an event nor a candidate are always real.
        """
        # One gather from the columns [always, events, candidates].
        columns = jnp.pad(events, ((0, 0), (1, 0)), constant_values=True)
        event_column = np.where(self.event >= 0, 1 + self.event, 0)
        candidate_column = np.zeros_like(self.candidate)
        if candidates is not None:
            columns = jnp.concatenate([columns, candidates], axis=1)
            candidate_column = 1 + self.events + self.candidate
        # The candidate decides alone: codes may continue an event that is padding (a
        # request without history), and are real all the same.
        column = np.where(self.candidate >= 0, candidate_column, event_column)
        if not self.fill:
            return columns[:, column]
        real = columns[:, column[: -self.fill]]
        return jnp.pad(real, ((0, 0), (0, self.fill)))

    def ages(self, events: jax.Array) -> jax.Array:
        """Spread the ages of events over the positions.

        Args:
          events: `[B, T] int32`, seconds before the request (`Batch.ages`).

        Returns:
          `[B, S] int32`, 0 for positions that represent no event.
        """
        # Column 0 serves the positions without an event.
        columns = jnp.pad(events, ((0, 0), (1, 0)))
        return columns[:, np.where(self.event >= 0, 1 + self.event, 0)]

    def rope_positions(self, events: jax.Array) -> jax.Array:
        """Compute the positions for RoPE (docs/methods.md section 3, "Positions").

        Args:
          events: `[B, T] bool`, real events.

        Returns:
          `[B, S] int32`: 0 for static tokens, t for the t-th valid event, n + 1 for
          what follows the n valid events. The words of a text, and semantic-id codes
          behind the token that they continue, count on from there.
        """
        count = jnp.sum(events, axis=1, keepdims=True, dtype=jnp.int32)
        # Histories are right-aligned: of n valid events, event e of T is number
        # e - (T - n), counted from 0. Padding gets -1, and so position 0.
        valid_before = jnp.maximum(self.event[None, :] - self.events + count, -1)
        event_or_count = jnp.where(self.event[None, :] >= 0, valid_before, count)
        base = event_or_count * self.stride + 1
        base = jnp.where(self.static[None, :], 0, jnp.maximum(base, 0))
        return base + self.offset[None, :]

    @property
    def highest_rope_position(self) -> int:
        """Highest entry of `rope_positions`, whatever the history."""
        return self.events * self.stride + 1 + int(self.offset.max())


def live_positions(
    layout: Layout, windows: tuple[int | None, ...]
) -> tuple[np.ndarray, ...]:
    """Find the positions that can influence a read-out, layer by layer.

    A position is live at the input of layer l if a position that is live at the output
    of layer l may see it. All others need not be computed, which is exact
    (docs/methods.md section 3, "Needed rows").

    Args:
      layout: the stream.
      windows: window of each layer from the bottom, None for full attention.

    Returns:
      `len(windows) + 1` ascending arrays `[n]`: the positions at the input of each
      layer, and at the output of the last. For NIO with windows (None, None, 32, 16),
      one candidate and one target token their lengths are S, S, 47, 16, 1.
    """
    live = [np.sort(layout.readout)]
    all_positions = np.arange(layout.length)
    for window in reversed(windows):
        pattern = layout.pattern(live[0], all_positions)
        live.insert(0, np.flatnonzero(_seen_keys(pattern, window)))
    return tuple(live)


def _seen_keys(pattern: Pattern, window: int | None) -> np.ndarray:
    """Find the keys that any query sees or is, `[K] bool`.

    A position always reads itself, through the residual too.
    """
    spans = visible_spans(pattern, window, packable=False)
    if isinstance(spans, str) or pattern.keeps_static(window):
        return (pattern.visible(window) | pattern.diagonal()).any(axis=0)
    # From runs of keys: a matrix of all pairs of a long stream would not fit. A run
    # adds 1 at its first key and takes it away behind its last.
    change = np.zeros(len(pattern.key_positions) + 1, np.int64)
    itself = spans.itself, spans.itself + 1
    shared, own = (spans.start, spans.stop), (spans.own_start, spans.own_stop)
    for start, stop in (itself, shared, own):
        np.add.at(change, start, 1)
        np.add.at(change, stop, -1)
    return np.cumsum(change)[:-1] > 0


def select_positions(
    x: jax.Array, positions: np.ndarray, among: np.ndarray
) -> jax.Array:
    """Select stream positions of an array that holds only some of them.

    Args:
      x: `[B, n, ...]`, an entry for each position of `among`.
      positions: `[m]`, positions to select, all in `among`, ascending.
      among: `[n]`, positions that `x` holds, ascending.

    Returns:
      `[B, m, ...]`. Equally spaced positions are a strided slice, whose gradient is a
      pad and not a scatter.
    """
    entries = np.searchsorted(among, positions)
    # All of them: `positions` and `among` are ascending, so the order is the same.
    if len(entries) == x.shape[1]:
        return x
    # One step (or none, for a single position): a slice.
    steps = np.unique(np.diff(entries))
    if len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        return x[:, int(entries[0]) : int(entries[-1]) + 1 : step]
    return x[:, entries]
