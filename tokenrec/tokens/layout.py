"""The order of tokens in a stream: roles, positions, windows and which rows each layer must compute.

Everything here but `valid`, `ages` and `positions` is static NumPy: it shapes the compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import Pattern

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


class StreamPart(NamedTuple):
    """A run of rows. `event: [n]`, the newest event that each stands for, of the rows of a history; None elsewhere.

    `ordered` rows have positions one after another, as words do; `stride` is how many of them an event has.
    """

    roles: tuple[Role, ...]
    event: np.ndarray | None = None
    ordered: bool = False
    stride: int = 1

    @staticmethod
    def of(role: Role, rows: int, *, ordered: bool = False) -> StreamPart:
        return StreamPart((role,) * rows, ordered=ordered)

    @staticmethod
    def history(role: Role, event: np.ndarray, stride: int = 1) -> StreamPart:
        return StreamPart((role,) * len(event), event, stride=stride)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A stream of S rows (methods.md section 3): what a request shares, then the rows of each candidate.

    Attributes:
      roles: `[S]`, index into `ROLES`.
      index: `[S]`, row number, except that each candidate repeats the indices of candidate 0.
      reach: `[S]`, highest index that a row sees of rows without candidate: its own, or that of the row in the middle
        of the history that its candidate continues.
      candidate: `[S]`, candidate that a row belongs to, otherwise -1; such rows come last.
      event: `[S]`, newest event that a row stands for, otherwise -1.
      offset: `[S]`, added to the position of a row.
      static: `[S] bool`, rows before the history.
      readout: `[R]`, rows that the heads read.
      events, candidates: T and C.
      stride: positions that an event takes.
      prefix: rows of lower index see each other both ways in full layers.
      discard: sliding layers hide static rows from others.
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

    @property
    def rows(self) -> int:
        return len(self.roles)

    @property
    def shared(self) -> int:
        """Rows that depend on the request alone: the first ones."""
        return int(np.sum(self.candidate < 0))

    def rows_of(self, *roles: Role) -> np.ndarray:
        return np.flatnonzero(
            np.isin(self.roles, [ROLES.index(role) for role in roles])
        )

    def pattern(
        self, query_positions: np.ndarray, key_positions: np.ndarray
    ) -> Pattern:
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

    def valid(self, events: jax.Array, candidates: jax.Array | None) -> jax.Array:
        """`[B, S] bool` from `events: [B, T]` and `candidates: [B, C]` (or None); other rows are always valid."""
        known = jnp.pad(
            events, ((0, 0), (1, 0)), constant_values=True
        )  # column 0 stands for the other rows
        source = np.where(self.event >= 0, 1 + self.event, 0)
        own = np.zeros_like(self.candidate)
        if candidates is not None:
            known = jnp.concatenate([known, candidates], axis=1)
            own = 1 + self.events + self.candidate
        # The codes of a request without history stand at no event, and are valid all the same.
        return known[:, np.where(self.candidate >= 0, own, source)]

    def ages(self, events: jax.Array) -> jax.Array:
        """`[B, S]` from the ages of events, `[B, T]` (`Batch.ages`): 0 for rows of the request, and for static ones."""
        known = jnp.pad(events, ((0, 0), (1, 0)))
        return known[:, np.where(self.event >= 0, 1 + self.event, 0)]

    def positions(self, events: jax.Array) -> jax.Array:
        """`[B, S] int32` for RoPE: 0 for static rows, t for the t-th valid event, n + 1 for what follows the history.

        Words, and codes after the row that they continue, count on from there.
        """
        count = jnp.sum(events, axis=1, keepdims=True, dtype=jnp.int32)
        # Histories are right-aligned: event row e of T is the (e - (T - n) + 1)-th valid one.
        before = jnp.maximum(self.event[None, :] - self.events + count, -1)
        base = jnp.where(self.event[None, :] >= 0, before, count) * self.stride + 1
        base = jnp.where(self.static[None, :], 0, jnp.maximum(base, 0))
        return base + self.offset[None, :]

    @property
    def highest_position(self) -> int:
        """Of any row, whatever the history."""
        return self.events * self.stride + 1 + int(self.offset.max())


def lay_out(
    shared: Sequence[StreamPart],
    own: Sequence[StreamPart],
    *,
    events: int,
    candidates: int,
    read: Literal["own", "states", "last", "events"],
    prefix: bool = False,
    discard: bool = True,
) -> Layout:
    """The rows of `shared`, then those of `own` for each candidate.

    Args:
      events: T; candidates: C, repeats of `own`.
      read: what the heads read: the last row of each candidate ("own"); all state rows ("states"); or the last shared
        row ("last") or all event rows ("events"), and all rows of candidates, which continue that row: the c-th
        candidate the c-th of them where there are several.
      prefix: shared rows see each other both ways in full layers.
      discard: sliding layers hide static rows from others.
    """
    roles = [ROLES.index(role) for part in shared for role in part.roles]
    event = np.concatenate(
        [np.full(len(p.roles), -1) if p.event is None else p.event for p in shared]
    )
    past = np.flatnonzero(event >= 0)
    static = np.arange(len(roles)) < (past[0] if len(past) else len(roles))
    stride = max(part.stride for part in shared)
    offset = np.concatenate([_counted(part) for part in shared])
    index = np.arange(len(roles))
    candidate = np.full(len(roles), -1)

    anchors = (
        np.flatnonzero(np.array(roles) == ROLES.index("event"))
        if read == "events"
        else [len(roles) - 1]
    )
    of_candidate = np.asarray(anchors)[np.arange(candidates) % len(anchors)]
    own_roles = np.array(
        [ROLES.index(role) for part in own for role in part.roles], int
    )
    continues = read in ("last", "events")
    own_offset = np.cumsum(
        [continues, *([part.ordered for part in own for _ in part.roles])]
    )[: len(own_roles)]
    count = len(own_roles)

    def repeated(first: np.ndarray, step: np.ndarray) -> np.ndarray:
        return (first[:, None] + step[None, :]).ravel()

    none = np.zeros(count, int)
    own_event = event[of_candidate] if continues else np.full(candidates, -1)
    rows = len(roles) + np.arange(candidates * count)
    readout = {
        "own": rows[count - 1 :: count] if count else rows,
        "states": np.flatnonzero(np.array(roles) == ROLES.index("state")),
    }.get(read, np.concatenate([np.asarray(anchors), rows]))
    own_index = repeated(index[of_candidate] + 1, np.arange(count))
    # In the middle of a history, the next event is what the codes beside it have to say.
    own_reach = repeated(index[of_candidate], none) if read == "events" else own_index
    return Layout(
        roles=np.concatenate([roles, np.tile(own_roles, candidates)]).astype(int),
        index=np.concatenate([index, own_index]),
        reach=np.concatenate([index, own_reach]),
        candidate=np.concatenate([candidate, repeated(np.arange(candidates), none)]),
        event=np.concatenate([event, repeated(own_event, none)]),
        offset=np.concatenate(
            [offset, repeated(offset[of_candidate] * continues, own_offset)]
        ),
        static=np.concatenate([static, np.zeros(candidates * count, bool)]),
        readout=readout,
        events=events,
        candidates=candidates,
        stride=stride,
        prefix=len(roles) if prefix else 0,
        discard=discard,
    )


def _counted(part: StreamPart) -> np.ndarray:
    """Offsets within a part."""
    rows = np.arange(len(part.roles))
    if part.event is not None:
        # A history that was cut from the left may begin inside an event.
        return (rows - len(rows)) % part.stride
    return rows if part.ordered else np.zeros_like(rows)


def history_part(*, events: int, fused: bool) -> StreamPart:
    """Events as one row each, or as a state and an action."""
    if fused:
        return StreamPart.history("event", np.arange(events))
    pair: tuple[Role, ...] = ("state", "action")
    return StreamPart(pair * events, np.repeat(np.arange(events), 2))


def build_layout(
    *, user_tokens: int, events: int, fused: bool, candidates: int, target_tokens: int
) -> Layout:
    """TokenFormer's stream `[F.., sep, events.., sep, targets..]`; `candidates=0` is UC, which ends with the events."""
    shared = [
        StreamPart.of("user", user_tokens),
        StreamPart.of("sep", 1),
        history_part(events=events, fused=fused),
    ]
    if not candidates:
        return lay_out(shared, [], events=events, candidates=0, read="states")
    shared.append(StreamPart.of("sep", 1))
    own = [StreamPart.of("target", target_tokens)]
    return lay_out(shared, own, events=events, candidates=candidates, read="own")


def live_positions(
    layout: Layout, windows: tuple[int | None, ...]
) -> tuple[np.ndarray, ...]:
    """Rows whose values matter at the input of each layer and at the output: `len(windows) + 1` ascending arrays.

    A row matters at the input of layer l if a row that matters at its output may see it. For NIO with windows
    (None, None, 32, 16), one candidate and one target token that is S, S, 47, 16, 1 (methods.md, "needed rows").
    """
    needed = [np.sort(layout.readout)]
    every = np.arange(layout.rows)
    for window in reversed(windows):
        pattern = layout.pattern(needed[0], every)
        needed.insert(
            0,
            np.flatnonzero((pattern.visible(window) | pattern.diagonal()).any(axis=0)),
        )
    return tuple(needed)


def select_positions(x: jax.Array, rows: np.ndarray, among: np.ndarray) -> jax.Array:
    """Rows `rows` of `x: [B, len(among), ...]`, whose own rows are `among`; a strided slice where that can say it."""
    at = np.searchsorted(among, rows)
    if len(at) == x.shape[1]:
        return x
    steps = np.unique(np.diff(at))
    if len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        return x[:, int(at[0]) : int(at[-1]) + 1 : step]
    return x[:, at]
