"""Which items an answer may hold: as `[B, N] bool`, and as nodes of a trie.

A prefix of codes is allowed if any allowed item lies under it. A search over allowed
prefixes alone finds the best of the allowed items, however few they are; one that
removes the others afterwards loses those that the beams had no place for.

B requests, N items, T events, L levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokenrec.evaluation.trie import Level
from tokenrec.sharding import RULES, on_each_device


def unseen_items(items: jax.Array, count: int) -> jax.Array:
    """The items that are in no event of a history, `[B, N] bool`.

    Args:
      items: `[B, T] int32`, item of each event; -1 for none.
      count: N.
    """

    def _unseen(items: jax.Array, _: None) -> jax.Array:
        request = jnp.arange(items.shape[0])[:, None]
        # -1, no event, would count from the end: it is sent out of range and dropped.
        columns = jnp.where(items < 0, count, items)
        unseen = jnp.ones((items.shape[0], count), bool)
        return unseen.at[request, columns].set(False, mode="drop")

    return per_request(_unseen, items, None)


def allowed_nodes(
    levels: tuple[Level, ...], allowed: jax.Array
) -> tuple[jax.Array, ...]:
    """The nodes of each level of a trie with an allowed item under them.

    Args:
      levels: levels of the trie.
      allowed: `[B, N] bool`.

    Returns:
      `[B, n] bool` of each level with n nodes.
    """

    def _nodes(allowed: jax.Array, levels: tuple[Level, ...]) -> tuple[jax.Array, ...]:
        # 1. Allowed items before each place of the lexicographic order.
        in_order = jnp.take(allowed, levels[-1].item, axis=1)
        before = jnp.pad(
            jnp.cumsum(in_order, axis=1, dtype=jnp.int32), ((0, 0), (1, 0))
        )
        # 2. From the bottom: the items under a node are the run from its first one to
        # the first one of the next node.
        count = allowed.shape[1]
        first = jnp.arange(count, dtype=jnp.int32)
        nodes = [in_order]
        for below in reversed(levels[1:]):
            first = first[below.first_child]
            stop = jnp.append(first[1:], count)
            nodes.append(before[:, stop] > before[:, first])
        return tuple(reversed(nodes))

    return per_request(_nodes, allowed, levels)


def per_request[T](compute: Callable[[Any, Any], T], requests: Any, shared: Any) -> T:
    """Run `compute(requests, shared)` on every device for its own requests.

    What does not mix requests needs no other ones, and explicit sharding would refuse
    some of it.

    Args:
      compute: a function of requests, `[B, ...]` each, and of what they share.
      requests: arrays or a tree of them.
      shared: likewise, whole on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return compute(requests, shared)
    requests = jax.tree.map(
        lambda x: jax.sharding.reshard(x, RULES("batch", *[None] * (x.ndim - 1))),
        requests,
    )
    shared = jax.tree.map(lambda x: jax.sharding.reshard(x, RULES(None)), shared)
    split, whole = RULES("batch"), RULES()
    return on_each_device(compute, (split, whole), split)(requests, shared)
