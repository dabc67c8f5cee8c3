"""The order of tokens in a stream: roles, positions, windows and which rows each layer must compute.

Everything here but `valid` and `positions` is static NumPy: it shapes the compiled program.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.pattern import Pattern

Role = Literal["user", "sep_1", "state", "action", "event", "sep_2", "target"]
ROLES: tuple[Role, ...] = ("user", "sep_1", "state", "action", "event", "sep_2", "target")


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A stream of S rows (methods.md section 3).

    Attributes:
      roles: `[S]`, index into `ROLES`.
      index: `[S]`, row number, except that each candidate repeats the indices of candidate 0.
      candidate: `[S]`, candidate of a target row, otherwise -1.
      event: `[S]`, number of the event that a state, action or event row belongs to, otherwise -1.
      readout: `[R]`, rows that the heads read: every state row (UC), or the last row of every candidate (NIO).
      events, candidates: T and C.
    """

    roles: np.ndarray
    index: np.ndarray
    candidate: np.ndarray
    event: np.ndarray
    readout: np.ndarray
    events: int
    candidates: int

    @property
    def rows(self) -> int:
        return len(self.roles)

    @property
    def static(self) -> np.ndarray:
        """`[S] bool`: user rows and sep_1."""
        return self.roles <= ROLES.index("sep_1")

    def rows_of(self, *roles: Role) -> np.ndarray:
        return np.flatnonzero(np.isin(self.roles, [ROLES.index(role) for role in roles]))

    def pattern(self, query_rows: np.ndarray, key_rows: np.ndarray) -> Pattern:
        return Pattern(query_rows, key_rows, self.index, self.static, self.candidate)

    def valid(self, events: jax.Array, candidates: jax.Array | None) -> jax.Array:
        """`[B, S] bool` from `events: [B, T]` and `candidates: [B, C]` (None in UC); other rows are always valid."""
        known = jnp.pad(events, ((0, 0), (1, 0)), constant_values=True)  # column 0 stands for the other rows
        if candidates is not None:
            known = jnp.concatenate([known, candidates], axis=1)
        source = np.where(
            self.event >= 0, 1 + self.event, np.where(self.candidate >= 0, 1 + self.events + self.candidate, 0)
        )
        return known[:, source]

    def positions(self, events: jax.Array) -> jax.Array:
        """`[B, S] int32` for RoPE: 0 for static rows, t for the t-th valid event, n + 1 for sep_2 and targets."""
        count = jnp.sum(events, axis=1, keepdims=True, dtype=jnp.int32)
        # Histories are right-aligned: event row e of T is the (e - (T - n) + 1)-th valid one.
        of_event = self.event[None, :] - self.events + 1 + count
        positions = jnp.where(self.event[None, :] >= 0, of_event, jnp.where(self.static[None, :], 0, count + 1))
        return jnp.maximum(positions, 0)


def build_layout(*, user_tokens: int, events: int, fused: bool, candidates: int, target_tokens: int) -> Layout:
    """The stream `[F.., sep_1, events.., sep_2, targets..]`; `candidates=0` is UC, without sep_2 and targets."""
    roles: list[Role] = ["user" for _ in range(user_tokens)]
    roles.append("sep_1")
    event = [-1] * len(roles)
    for t in range(events):
        of_event: list[Role] = ["event"] if fused else ["state", "action"]
        roles += of_event
        event += [t] * len(of_event)
    index = list(range(len(roles)))
    candidate = [-1] * len(roles)
    if candidates:
        first = len(roles) + 1
        roles.append("sep_2")
        roles.extend("target" for _ in range(candidates * target_tokens))
        event += [-1] * (1 + candidates * target_tokens)
        index += [first - 1] + [first + k for _ in range(candidates) for k in range(target_tokens)]
        candidate += [-1] + [c for c in range(candidates) for _ in range(target_tokens)]
    codes = np.array([ROLES.index(role) for role in roles])
    if candidates:
        readout = np.arange(candidates) * target_tokens + len(roles) - candidates * target_tokens + target_tokens - 1
    else:
        readout = np.flatnonzero(codes == ROLES.index("state"))
    return Layout(codes, np.array(index), np.array(candidate), np.array(event), readout, events, candidates)


def needed_rows(layout: Layout, windows: tuple[int | None, ...]) -> tuple[np.ndarray, ...]:
    """Rows whose values matter at the input of each layer and at the output: `len(windows) + 1` ascending arrays.

    A row matters at the input of layer l if a row that matters at its output may see it. For NIO with windows
    (None, None, 32, 16), one candidate and one target token that is S, S, 47, 16, 1 (methods.md, "needed rows").
    """
    needed = [np.sort(layout.readout)]
    every = np.arange(layout.rows)
    for window in reversed(windows):
        pattern = layout.pattern(needed[0], every)
        needed.insert(0, np.flatnonzero((pattern.visible(window) | pattern.diagonal()).any(axis=0)))
    return tuple(needed)


def take_rows(x: jax.Array, rows: np.ndarray, among: np.ndarray) -> jax.Array:
    """Rows `rows` of `x: [B, len(among), ...]`, whose own rows are `among`; a strided slice where that can say it."""
    at = np.searchsorted(among, rows)
    if len(at) == x.shape[1]:
        return x
    steps = np.unique(np.diff(at))
    if len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        return x[:, int(at[0]) : int(at[-1]) + 1 : step]
    return x[:, at]
