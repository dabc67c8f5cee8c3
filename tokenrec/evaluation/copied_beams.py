"""Generated items united with copies of the history, ranked by the mixture.

With `head.copy` an item has the probability lambda P_copy + (1 - lambda) P_gen
(`tokenrec.models.copy_mixture`). The beams hold the items of high P_gen, and the items
of the history may have any. `unite` therefore takes both:

    beams         (1 - lambda) P_gen, without the items of the history
    history       lambda P_copy + (1 - lambda) P_gen, each item once, P_gen of its codes

and keeps the best W, so that the order of all these items is exact. An item that is in
neither cannot be copied: as without copies, it is lost only where the search cut it.

B requests, T events, L levels, W beams.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.evaluation.beam_search import NO_ITEM, Beams
from tokenrec.models.copy_mixture import NEVER, CopyMixture


def unite(
    beams: Beams,
    copied: CopyMixture,
    codes: jax.Array,
    log_generated: jax.Array,
    allowed: jax.Array | None = None,
) -> Beams:
    """Rank beams and items of the history together.

    Args:
      beams: W items by P_gen.
      copied: the copies at the end of the history, R = 1.
      codes: `[B, T, L] int32`, semantic ids of the events' items.
      log_generated: `[B, T] float32`, log P_gen of the same.
      allowed: `[B, T] bool`, events whose items may be answered; None for all. Beams
        hold no others.

    Returns:
      The best W items by the mixture; of equal ones the lower item is the better.
    """
    items, log_copied = copied.items, copied.log_copied[:, 0]
    # An item has its share at its first event.
    is_copied = log_copied > NEVER
    if allowed is not None:
        is_copied &= allowed
    history = jnp.logaddexp(log_copied, copied.log_generated + log_generated)
    history = jnp.where(is_copied, history, -jnp.inf)
    also_copied = jnp.any(
        (beams.items[:, :, None] == items[:, None, :]) & is_copied[:, None, :], axis=2
    )
    generated = copied.log_generated + beams.scores
    generated = jnp.where(also_copied, -jnp.inf, generated)

    all_items = jnp.concatenate([beams.items, items], axis=1)
    all_codes = jnp.concatenate([beams.codes, codes], axis=1)
    scores = jnp.concatenate([generated, history], axis=1)
    places = jnp.zeros_like(all_items) + jnp.arange(all_items.shape[1])
    negated, found, places = jax.lax.sort(
        (-scores, all_items, places), dimension=1, num_keys=2
    )
    width = beams.items.shape[1]
    scores, found, places = -negated[:, :width], found[:, :width], places[:, :width]
    found_codes = jnp.take_along_axis(all_codes, places[..., None], axis=1)
    exists = scores > -jnp.inf
    return Beams(
        jnp.where(exists, found, NO_ITEM),
        scores,
        jnp.where(exists[..., None], found_codes, NO_ITEM),
    )
