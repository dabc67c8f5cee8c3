"""Copying beside generation: a mixture over whole items (`head.copy`, semantic ids).

The probability of an item v at read-out r is the pointer-generator mixture of a copy
distribution over the items of the history and of the generated codes (See et al., arXiv
1704.04368, 2017, equation 9; for recommendation RepeatNet: Ren et al., arXiv
1812.02646, 2019):

    P_r(v)      = lambda_r P_copy,r(v) + (1 - lambda_r) P_gen,r(v)
    P_gen,r(v)  = product_l p(c_l | c_1 .. c_{l-1}, r),  of the item's codes c
    P_copy,r(v) = W_r(v) / sum_{v' in the history} W_r(v')
    W_r(v)      = exp(B_r(v)) - 1 = (1 + sum_{t <= r, v_t = v} exp(c_rt))^g_r - 1
    lambda_r    = sigmoid(RMSNorm(h_r) . w + start),  0 without an event

B is the bonus of `tokenrec.models.copying`: attention to the event, how long ago it
was, and how much repeated events count. The key of an event is its token before the
backbone, of length sqrt(d), so that the head needs no vector per item of the catalogue.

Why a mixture, where the next-item head multiplies exp(B) with the odds of the item: the
product has a partition of its own, log(1 + sum_v P_gen(v) (exp(B(v)) - 1)), which needs
the codes of all T items of the history to be read at every step, and after every event
with one read-out each. The mixture is normalised as it is: the loss of a goal needs
P_gen of that goal alone, and only answers, not training, read the codes of the history.
What the product gains, that a repeated item must also be likely now, is left to the
attention. A mixture of each code instead of whole items would sum over the items that
share a prefix, and needs the history's weights again at every level of every beam.

Everything is in log space. An item that cannot be copied has the log-probability
`NEVER`, finite, so that no gradient is undefined.

Letters: B batch, R read-outs, T events, P goals of a read-out, d model width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.models.copying import CopyBonus
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import constant, rms_normalize
from tokenrec.sharding import RULES

# Log-probability of what cannot happen. Sums and differences of a few stay float32
# numbers, and exp of them is 0.
NEVER = -1e30
# Bonuses below are taken for 0: the slope of log(exp(B) - 1) at B is 1 / B.
SMALLEST_BONUS = 1e-30
# Initial logit of lambda.
GATE_START = 0.0


class CopyMixture(NamedTuple):
    """What the history adds to the distribution of the generated codes.

    Attributes:
      items: `[B, T] int32`, catalogue row of each event; -1 for none.
      log_copied: `[B, R, T] float32`, log(lambda P_copy) of an item at its first event;
        `NEVER` at its others and at events that are not before the read-out.
      log_generated: `[B, R] float32`, log(1 - lambda).
    """

    items: jax.Array
    log_copied: jax.Array
    log_generated: jax.Array

    def at(self, goals: jax.Array) -> jax.Array:
        """log(lambda P_copy) of each goal.

        Args:
          goals: `[B, R, P] int32`, catalogue rows; -1 fills up.

        Returns:
          `[B, R, P]`; `NEVER` for a goal that is not in the history.
        """
        copied = self.log_copied[:, :, None, :]
        is_goal = goals[..., None] == self.items[:, None, None, :]
        is_goal &= (goals >= 0)[..., None] & (copied > NEVER)
        # At most one event of an item has its log-probability.
        log_copied = jnp.sum(jnp.where(is_goal, copied, 0), axis=-1)
        return jnp.where(jnp.any(is_goal, axis=-1), log_copied, NEVER)

    def log_probs(self, goals: jax.Array, log_generated: jax.Array) -> jax.Array:
        """Mix the two distributions.

        Args:
          goals: `[B, R, P] int32`, catalogue rows; -1 fills up.
          log_generated: `[B, R, P]`, log P_gen of each goal.

        Returns:
          `[B, R, P]`, log P of each goal; without meaning where one fills up.
        """
        generated = self.log_generated[..., None] + log_generated
        return jnp.logaddexp(self.at(goals), generated)


class CopyGate(nnx.Module):
    """Compute the mixture's part that copies.

    Args:
      width: d.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.bonus = CopyBonus(width, rngs=rngs)
        # Every read-out starts from the same lambda.
        self.kernel = constant(0.0, (width, 1), None, None)
        self.bias = constant(0.0, (1,), None)

    def __call__(
        self, h: jax.Array, items: jax.Array, tokens: jax.Array
    ) -> CopyMixture:
        """Compute what a batch copies.

        Args:
          h: `[B, R, d]`, read-outs: R = T, one per event, which sees the events up to
            its own; or R = 1, at the end of the history.
          items: `[B, T] int32`, catalogue row of each event; -1 for none.
          tokens: `[B, T, d]`, the tokens of the events.
        """
        keys = rms_normalize(tokens.astype(jnp.float32))
        bonuses = self.bonus(h, items, keys).bonuses
        copyable = bonuses > SMALLEST_BONUS
        # log(exp(B) - 1) = B + log(1 - exp(-B)) overflows nowhere.
        bonuses = jnp.where(copyable, bonuses, 1)
        log_weights = jnp.where(
            copyable, bonuses + jnp.log(-jnp.expm1(-bonuses)), NEVER
        )
        log_shares = jax.nn.log_softmax(log_weights, axis=-1)

        spec = RULES("batch", None, None)
        unit = rms_normalize(h.astype(jnp.float32))
        gate = contract("brd,dk->brk", unit, self.kernel[...], spec)[..., 0]
        gate += self.bias[...] + GATE_START
        any_event = jnp.any(copyable, axis=-1)
        log_copied = jax.nn.log_sigmoid(gate)[..., None] + log_shares
        return CopyMixture(
            items,
            jnp.where(copyable, log_copied, NEVER),
            jnp.where(any_event, jax.nn.log_sigmoid(-gate), 0),
        )
