"""Copying from the history: a bonus for items that the user took before (`head.copy`).

The score of an item v at read-out r gets a bonus that grows with how often and how
recently v stands in the history:

    n_rt    = events from t to the read-out, 1 for the newest one
    c_rt    = q_r . k_t / sqrt(m) + a_r - b_r log n_rt       log-weight of an event
    B_r(v)  = g_r log(1 + sum_{t <= r, v_t = v} exp(c_rt))   0 for an item without event
    s'_r(v) = s_r(v) + B_r(v)

    q_r = RMSNorm(h_r) W_q,   k_t = e_{v_t} W_k,   m numbers each
    (a_r, b_r, g'_r) = RMSNorm(h_r) W + start,   g_r = softplus(g'_r)

so that exp(s') is the model's odds of the item, times the (1 + weighted count)^g_r of
the user's own events with it. The read-out attends to the events, a_r says how much one
event counts, b_r how fast events fade, and g_r how much more two count than one. The
sum over events is the copy distribution of a pointer network (See et al., arXiv
1704.04368, 2017; RepeatNet: Ren et al., arXiv 1812.02646, 2019). These mix it with
that of the vocabulary; we multiply the two, because what is taken again must also be a
likely item now. docs/methods.md section 2, "Tasks".

The softmax over the catalogue needs no `[B, R, V]` beside its own: with Z of the scores
without bonus,

    log Z' = log(Z + sum_{distinct v in the history} exp(s_v) (exp(B(v)) - 1))

Letters: B batch, R read-outs, T events, P goals of a read-out, d model width, m width
of the attention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.ops.contract import contract
from tokenrec.ops.layers import Linear, constant, rms_normalize
from tokenrec.sharding import RULES

# Initial a, b and softplus^-1(g), of g = 2: the newest event multiplies the odds of its
# item by 30, and counts twice as much as the fourth newest. Chosen on the valid split
# of Complete Journey, of a few values.
START = (1.5, 0.5, 1.8546)
# Width of queries and keys, m.
ATTENTION_WIDTH = 32
# Above it a log-weight stays as it is: exp(60) of a few thousand events is a float32.
LARGEST = 60.0


class CopyBonuses(NamedTuple):
    """What the scores of the history's items gain.

    Attributes:
      items: `[B, T] int32`, catalogue row of each event; -1 for none.
      bonuses: `[B, R, T] float32`, not negative. An item has its bonus at its first
        event and 0 at the others, so that a sum over events counts it once; 0 also
        where the event is not before the read-out.
    """

    items: jax.Array
    bonuses: jax.Array

    def at(self, goals: jax.Array) -> jax.Array:
        """Bonus of each goal: `[B, R, P] int32`, -1 fills up, to `[B, R, P]`."""
        is_goal = goals[..., None] == self.items[:, None, None, :]
        bonuses = jnp.where(is_goal, self.bonuses[:, :, None, :], 0)
        return jnp.where(goals >= 0, jnp.sum(bonuses, axis=-1), 0)


class CopyBonus(nnx.Module):
    """Compute the bonuses of the items of the history.

    Args:
      width: d.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.query = Linear(width, ATTENTION_WIDTH, bias=False, rngs=rngs)
        self.key = Linear(width, ATTENTION_WIDTH, bias=False, rngs=rngs)
        # Every read-out starts from the same `START`.
        self.kernel = constant(0.0, (width, len(START)), None, None)
        self.bias = constant(0.0, (len(START),), None)

    def __call__(
        self, h: jax.Array, items: jax.Array, vectors: jax.Array
    ) -> CopyBonuses:
        """Compute the bonuses of a batch.

        Args:
          h: `[B, R, d]`, read-outs: R = T, one per event, which sees the events up to
            its own; or R = 1, at the end of the history.
          items: `[B, T] int32`, catalogue row of each event; -1 for none.
          vectors: `[B, T, d]`, the item vectors of the events.
        """
        h = rms_normalize(h.astype(jnp.float32))
        spec = RULES("batch", None, None)
        coefficients = contract("brd,dk->brk", h, self.kernel[...], spec)
        coefficients += self.bias[...] + jnp.array(START)
        one_event, fading, repeated = (coefficients[..., k : k + 1] for k in range(3))
        attention = jnp.einsum("brm,btm->brt", self.query(h), self.key(vectors))
        distance = event_distances(h.shape[1], items.shape[1])
        visible = jnp.asarray(distance > 0) & (items >= 0)[:, None, :]
        log_weights = attention * ATTENTION_WIDTH**-0.5 + one_event
        log_weights -= fading * jnp.log(jnp.maximum(distance, 1.0))
        weights = jnp.where(visible, jnp.exp(jnp.minimum(log_weights, LARGEST)), 0)
        same = items[:, :, None] == items[:, None, :]
        totals = jnp.einsum("brt,btu->bru", weights, same.astype(jnp.float32))
        bonuses = jax.nn.softplus(repeated) * jnp.log1p(totals)
        # `argmax` finds the first of equal values. An item that is visible at all is so
        # at its first event.
        is_first = jnp.argmax(same, axis=1) == jnp.arange(items.shape[1])
        return CopyBonuses(items, jnp.where(visible & is_first[:, None, :], bonuses, 0))


def event_distances(readouts: int, events: int) -> np.ndarray:
    """Count the events from each event to each read-out.

    Args:
      readouts: R, which is T or 1.
      events: T.

    Returns:
      `[R, T] float32`; 1 is the newest event, and 0 or less is not before the read-out.
    """
    assert readouts in (1, events)
    # One read-out is at the newest event, the last of a right-aligned history.
    readout = np.arange(events - readouts, events)
    return (readout[:, None] - np.arange(events) + 1).astype(np.float32)


def add_to_partition(
    log_partition: jax.Array, scores: jax.Array, bonuses: jax.Array
) -> jax.Array:
    """Compute `log(Z + sum_t exp(s_t) (exp(B_t) - 1))`, the partition with bonuses.

    Args:
      log_partition: `[...]`, log Z.
      scores: `[..., T]`, s, without bonus.
      bonuses: `[..., T]`, B, of which every item has one.

    Returns:
      `[...]`.
    """
    relative = scores + bonuses - log_partition[..., None]
    # exp(s) (exp(B) - 1) as exp(s + B) (1 - exp(-B)) is finite, and so is its gradient,
    # at bonuses of 0 and at large ones.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(relative, axis=-1), 0))
    gains = jnp.exp(relative - largest[..., None]) * -jnp.expm1(-bonuses)
    total = jnp.exp(-largest) + jnp.sum(gains, axis=-1)
    return log_partition + largest + jnp.log(total)
