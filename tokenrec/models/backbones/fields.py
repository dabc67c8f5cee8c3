"""A stream as what rivals without one token sequence read: users, whole events, targets.

B streams, M tokens of the user, T events, N targets, d width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.ops.layers import Linear, dropout, split_key
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, select_positions


class Fields(NamedTuple):
    """Tokens by what they stand for.

    Attributes:
      user: `[B, 1, M d]`, all tokens of the user side by side.
      events: `[B, T, d]`; of an event in two tokens, their sum.
      targets: `[B, N, d]`: the candidates, or in UC the state of every event, whose score is asked before its action.
      earlier: `[N or 1, T] bool`, events that lie before a target; one row stands for all targets.
    """

    user: jax.Array
    events: jax.Array
    targets: jax.Array
    earlier: np.ndarray

    def beside(self, *parts: jax.Array) -> jax.Array:
        """The user and `parts: [B, N or 1, .]`, side by side for each target: `[B, N, .]`."""
        shape, spec = self.targets.shape[:2], RULES("batch", None, None)
        every = [
            jnp.broadcast_to(x, (*shape, x.shape[2]), out_sharding=spec)
            for x in (self.user, *parts)
        ]
        return jnp.concatenate(every, axis=2)


def fields_of(x: jax.Array, layout: Layout) -> Fields:
    """The parts of a stream `x: [B, S, d]`, separators left out."""
    every, user = np.arange(layout.rows), layout.rows_of("user")
    tokens = select_positions(x, user, every) if len(user) else x[:, :0]
    flat = jnp.reshape(
        tokens,
        (x.shape[0], 1, len(user) * x.shape[2]),
        out_sharding=RULES("batch", None, None),
    )
    states = layout.rows_of("state")
    if len(states):
        events = select_positions(x, states, every) + select_positions(
            x, layout.rows_of("action"), every
        )
    else:
        events = select_positions(x, layout.rows_of("event"), every)
    uc = not layout.candidates
    earlier = (
        np.tri(layout.events, k=-1, dtype=bool)
        if uc
        else np.ones((1, layout.events), bool)
    )
    return Fields(flat, events, select_positions(x, layout.readout, every), earlier)


def mean_events(
    fields: Fields, valid: jax.Array, newest: int | None = None
) -> jax.Array:
    """`[B, N or 1, d]`: mean of the events before each target, or of the `newest` ones of them; zeros without any.

    `valid: [B, T] bool`, real events. Histories are right-aligned, so that the newest rows are the newest events.
    """
    seen = fields.earlier
    if newest is not None:
        seen = seen & (np.cumsum(seen[:, ::-1], axis=1)[:, ::-1] <= newest)
    held = jnp.asarray(seen) & valid[:, None, :]
    total = jnp.einsum("bnt,btd->bnd", held.astype(fields.events.dtype), fields.events)
    return total / jnp.maximum(jnp.sum(held, axis=2, keepdims=True), 1).astype(
        total.dtype
    )


class Deep(nnx.Module):
    """`[B, N, i] -> [B, N, o]`: layers of `silu(x W + b)`, each followed by dropout, of the widths given."""

    def __init__(
        self, inputs: int, widths: tuple[int, ...], rate: float, *, rngs: nnx.Rngs
    ):
        self.rate = rate
        sizes = zip((inputs, *widths), widths, strict=False)
        self.hidden = nnx.List([Linear(i, o, rngs=rngs) for i, o in sizes])

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        for layer, one in zip(
            self.hidden, split_key(key, len(self.hidden)), strict=True
        ):
            x = dropout(jax.nn.silu(layer(x)), self.rate, one)
        return x
