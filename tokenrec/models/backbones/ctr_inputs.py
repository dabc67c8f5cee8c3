"""Inputs of click-through-rate models: user, events and targets instead of one stream.

DIN, DCN-V2 and RankMixer read a user, a history and a target side by side, not one
token sequence. `split_stream` takes the stream of a layout apart for them; SASRec and
LONGER read its events.

    NIO   targets are the candidates; all T events are earlier than each of them
    UC    targets are the states s_1 .. s_T; the events before t are earlier than s_t

Letters: B batch, M user tokens, T events, N targets (C candidates, or T in UC), d model
width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.ops.layers import Linear, dropout, split_keys
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout, select_positions


class CTRInputs(NamedTuple):
    """The tokens of a stream by what they represent.

    Attributes:
      user: `[B, 1, M d]`, the tokens of the user, concatenated.
      events: `[B, T, d]`; an event of two tokens is their sum.
      targets: `[B, N, d]`: the candidates, or in UC the state of each event, which is
        scored before its action is known.
      earlier: `[N or 1, T] bool`, events that precede a target; one line for all
        targets where they have the same history.
    """

    user: jax.Array
    events: jax.Array
    targets: jax.Array
    earlier: np.ndarray

    def concat_per_target(self, *parts: jax.Array) -> jax.Array:
        """Concatenate the user and other features for each target.

        Args:
          *parts: `[B, N or 1, .]` each.

        Returns:
          `[B, N, sum of the widths]`, the user first.
        """
        shape, spec = self.targets.shape[:2], RULES("batch", None, None)
        broadcast = [
            jnp.broadcast_to(x, (*shape, x.shape[2]), out_sharding=on_mesh(spec))
            for x in (self.user, *parts)
        ]
        return jnp.concatenate(broadcast, axis=2)


def split_stream(x: jax.Array, layout: Layout) -> CTRInputs:
    """Split a stream `x: [B, S, d]` into user, events and targets."""
    flat_user, events = split_prefix(x, layout)
    uc = not layout.candidates
    before = np.tri(layout.events, k=-1, dtype=bool)
    earlier = before if uc else np.ones((1, layout.events), bool)
    # The read-outs of ranking are the targets: candidates in NIO, states in UC.
    targets = select_positions(x, layout.readout, np.arange(layout.length))
    return CTRInputs(flat_user, events, targets, earlier)


def split_prefix(x: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Take the user and the events from a stream, or from its prefix alone.

    Args:
      x: `[B, n, d]`, all tokens of the layout or those of its prefix.
      layout: layout of the whole stream.

    Returns:
      `[B, 1, M d]` and `[B, T, d]`, as in `CTRInputs`.
    """
    stream_positions = np.arange(x.shape[1])
    user = layout.positions_of("user")
    # `select_positions` needs at least one position.
    user_tokens = select_positions(x, user, stream_positions) if len(user) else x[:, :0]
    flat_user = jnp.reshape(
        user_tokens,
        (x.shape[0], 1, len(user) * x.shape[2]),
        out_sharding=on_mesh(RULES("batch", None, None)),
    )
    states = layout.positions_of("state")
    # In serving a candidate may be a state, which is no event of the history.
    states = states[layout.candidate[states] < 0]
    if len(states):
        actions = layout.positions_of("action")
        # An interleaved event is the sum of its state and its action.
        events = select_positions(x, states, stream_positions) + select_positions(
            x, actions, stream_positions
        )
    else:
        events = select_positions(x, layout.positions_of("event"), stream_positions)
    return flat_user, events


def mean_pool_events(
    inputs: CTRInputs, valid: jax.Array, newest: int | None = None
) -> jax.Array:
    """Average the events that precede each target.

    Args:
      inputs: the stream, taken apart.
      valid: `[B, T] bool`, real events.
      newest: number of events to average, the newest ones; None for all.

    Returns:
      `[B, N or 1, d]`, zeros for a target without earlier events.
    """
    pooled = inputs.earlier
    if newest is not None:
        # Histories are right-aligned: the newest places hold the newest events. Counted
        # from the right, so that the limit is the same for streams of all lengths.
        rank_from_newest = np.cumsum(pooled[:, ::-1], axis=1)[:, ::-1]
        pooled = pooled & (rank_from_newest <= newest)
    weights = jnp.asarray(pooled) & valid[:, None, :]
    total = jnp.einsum(
        "bnt,btd->bnd", weights.astype(inputs.events.dtype), inputs.events
    )
    # A target without earlier events divides zeros by 1.
    count = jnp.maximum(jnp.sum(weights, axis=2, keepdims=True), 1)
    return total / count.astype(total.dtype)


class MLP(nnx.Module):
    """Layers of `silu(x W + b)`, each followed by dropout.

    Args:
      inputs: width of the input.
      widths: width of each layer.
      rate: dropout rate.
    """

    def __init__(
        self, inputs: int, widths: tuple[int, ...], rate: float, *, rngs: nnx.Rngs
    ):
        self.rate = rate
        sizes = zip((inputs, *widths), widths, strict=False)
        self.hidden = nnx.List([Linear(i, o, rngs=rngs) for i, o in sizes])

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map `[B, N, inputs]` to `[B, N, widths[-1]]`; `key` of dropout or None."""
        layer_keys = split_keys(key, len(self.hidden))
        for layer, layer_key in zip(self.hidden, layer_keys, strict=True):
            x = dropout(jax.nn.silu(layer(x)), self.rate, layer_key)
        return x
