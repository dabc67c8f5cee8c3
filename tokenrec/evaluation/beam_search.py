"""Beam search over semantic ids, restricted to those that exist.

The caller's model gives the log-probabilities of a next code; the trie says which codes
can come next. Level by level, for each of B requests:

1. `[B, w]` prefixes (the beams) are expanded to their children in the trie, at most
   `most_children` each: `[B, w, children]`. Codes without an item are never scored.
2. The score of a child is the score of its prefix plus the log-probability of its code.
3. The best W of the `w * children` continuations become the beams of the next level.

The beams after the last level are items. Where not all items are allowed, a prefix with
no allowed item under it is no continuation either. The search is exact where W is at least the
number of nodes of every level but the last, since then no prefix is cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.evaluation.allowed_items import allowed_nodes, per_request
from tokenrec.evaluation.trie import Level, Trie
from tokenrec.sharding import RULES

NO_ITEM = -1
# Sorts behind every item.
_LAST_ORDER = np.iinfo(np.int32).max
# Log-probability of an item that exists and has probability 0: above -inf, which marks
# what does not exist.
_LOWEST = float(np.finfo(np.float32).min)

# `(codes so far [B, w, l], level l) -> log-probabilities of the next code [B, w, C]`.
NextLogProbs = Callable[[jax.Array, int], jax.Array]


class Beams(NamedTuple):
    """The best items of each request, best first.

    Attributes:
      items: `[B, W] int32`, row of the trie's `codes`; -1 where fewer items exist or
        are allowed.
      scores: `[B, W] float32`, log-probability; -inf where there is no item.
      codes: `[B, W, L] int32`; -1 where there is no item.
    """

    items: jax.Array
    scores: jax.Array
    codes: jax.Array


class _Paths(NamedTuple):
    """The best w prefixes of l codes of each request, between two levels.

    Attributes:
      scores: `[B, w] float32`, log-probability.
      nodes: `[B, w] int32`, node of the trie's last level searched.
      codes: `[B, w, l] int32`.
    """

    scores: jax.Array
    nodes: jax.Array
    codes: jax.Array


def beam_search(
    next_log_probs: NextLogProbs,
    trie: Trie,
    *,
    batch: int,
    width: int,
    renormalize: bool = False,
    allowed: jax.Array | None = None,
) -> Beams:
    """Find the items with the most probable codes.

    Of equal scores the item with the lower number is the better, and of equal prefixes
    the one with the lowest item under it. For use inside `jax.jit`: levels are
    unrolled, and on a mesh every device searches for its own requests.

    Args:
      next_log_probs: `(codes_so_far [B, w, l] int32, level l) -> [B, w, C]`, traced
        once a level. Level 0 has one empty prefix, w = 1; later w is the lesser of
        `width` and the number of nodes one level up. All prefixes exist and differ;
        with `allowed`, those that are left over where fewer are allowed may repeat.
      trie: semantic ids that exist.
      batch: B, number of requests.
      width: W, number of beams.
      renormalize: at each level, make the probabilities of the codes that exist there
        sum to 1. Without it, what the model gives to codes that do not exist is lost,
        and a score is the model's own log-probability of the codes.
      allowed: `[B, N] bool`, items that may be found; None for all. It changes no
        score.

    Returns:
      W items of each request, best first.

    Raises:
      InputError: `width` or `batch` is below 1, or `next_log_probs` returns another
        shape or too few codes.
    """
    for name, value in (("batch", batch), ("width", width)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    paths = _Paths(
        _zeros((batch, 1), jnp.float32),
        _zeros((batch, 1), jnp.int32),
        _zeros((batch, 1, 0), jnp.int32),
    )
    nodes = None if allowed is None else allowed_nodes(trie.levels, allowed)
    for number, level in enumerate(trie.levels):
        log_probs = next_log_probs(paths.codes, number)
        prefixes, codes = paths.nodes.shape, trie.code_counts[number]
        if (
            log_probs.shape[:2] != prefixes
            or log_probs.ndim != 3
            or log_probs.shape[2] < codes
        ):
            raise InputError(
                f"next_log_probs returns {list(log_probs.shape)} at level {number}: "
                f"expected {[*prefixes, codes]}, or more codes"
            )
        descend = functools.partial(
            _descend,
            most_children=trie.most_children[number],
            width=min(width, level.code.shape[0]),
            renormalize=renormalize,
        )
        of_level = None if nodes is None else nodes[number]
        paths = per_request(descend, (paths, log_probs, of_level), level)
    return per_request(functools.partial(_finish, width=width), paths, trie.levels[-1])


def _descend(
    requests: tuple[_Paths, jax.Array, jax.Array | None],
    level: Level,
    *,
    most_children: int,
    width: int,
    renormalize: bool,
) -> _Paths:
    """Continue the paths by one code, and keep the best.

    Args:
      requests: paths `[B, w]`, log-probabilities `[B, w, C]` of the next code, and the
        nodes of the next level that are allowed, `[B, n] bool`; None for all.
      level: nodes of the next level.
      most_children: most children of a node.
      width: paths to keep. So many continuations exist: each path has one at least, and
        `width` exceeds the paths only where they are all there are. Where fewer of
        them are allowed, the others have a score of -inf.
      renormalize: as in `beam_search`.

    Returns:
      Paths `[B, width]`.
    """
    paths, log_probs, allowed = requests
    batch, beams = paths.nodes.shape
    # 1. Children of each path, `[B, w, children]`; slots beyond the last child repeat
    # it and are masked by `exists`.
    slot = jnp.arange(most_children, dtype=jnp.int32)
    count = level.child_count[paths.nodes][..., None]
    exists = slot < count
    node = level.first_child[paths.nodes][..., None] + jnp.minimum(slot, count - 1)
    code = level.code[node]
    flat = (batch, beams * most_children)
    is_open = exists
    if allowed is not None:
        of_node = jnp.take_along_axis(allowed, node.reshape(flat), axis=1)
        # What is left over where fewer paths are allowed has no continuation.
        alive = (paths.scores > -jnp.inf)[..., None]
        is_open = exists & alive & of_node.reshape(node.shape)
    # 2. Scores. Bounded from below, so that what exists comes before what does not.
    gain = jnp.take_along_axis(log_probs.astype(jnp.float32), code, axis=2)
    gain = jnp.maximum(gain, _LOWEST)
    if renormalize:
        gain = gain - jax.nn.logsumexp(gain, axis=2, keepdims=True, where=exists)
    total = jnp.maximum(paths.scores[..., None] + gain, _LOWEST)
    score = jnp.where(is_open, total, -jnp.inf)
    # 3. The best of all continuations of a request; ties by the lowest item.
    order = jnp.where(exists, level.item[node], _LAST_ORDER)
    scores, places = _best(score.reshape(flat), order.reshape(flat), width)
    # 4. Codes of the path that each continues, and the new code.
    before = jnp.take_along_axis(
        paths.codes, (places // most_children)[..., None], axis=1
    )
    nodes = jnp.take_along_axis(node.reshape(flat), places, axis=1)
    added = jnp.take_along_axis(code.reshape(flat), places, axis=1)
    return _Paths(scores, nodes, jnp.concatenate([before, added[..., None]], axis=2))


def _best(
    scores: jax.Array, order: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Select the highest scores, equal ones by the lower order.

    Args:
      scores: `[B, n] float32`.
      order: `[B, n] int32`.
      count: scores to select.

    Returns:
      The scores `[B, count]`, best first, and their positions `[B, count]`.
    """
    positions = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def _sort(
        scores: jax.Array, order: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        negated, _, positions = jax.lax.sort((-scores, order, positions), num_keys=2)
        return -negated[:, :count], positions[:, :count]

    if scores.shape[1] == count:
        return _sort(scores, order, positions)
    top, at = jax.lax.top_k(scores, count + 1)

    def _sort_top() -> tuple[jax.Array, jax.Array]:
        top_order = jnp.take_along_axis(order, at[:, :count], axis=1)
        return _sort(top[:, :count], top_order, at[:, :count])

    # `top_k` breaks ties by position. All scores need to be sorted only where a tie
    # straddles the cut: that takes 100 ms for 32 x 12,800 scores on two cores, and
    # `top_k` takes 3 ms.
    cut = (top[:, count - 1] == top[:, count]) & (top[:, count] > -jnp.inf)
    return jax.lax.cond(
        jnp.any(cut), lambda: _sort(scores, order, positions), _sort_top
    )


def _finish(paths: _Paths, level: Level, *, width: int) -> Beams:
    """Convert the last nodes to items, filled up to `width` beams."""
    missing = (0, width - paths.nodes.shape[1])
    found = paths.scores > -jnp.inf
    items = jnp.where(found, level.item[paths.nodes], NO_ITEM)
    codes = jnp.where(found[..., None], paths.codes, NO_ITEM)
    scores = jnp.where(paths.scores == _LOWEST, -jnp.inf, paths.scores)
    return Beams(
        jnp.pad(items, ((0, 0), missing), constant_values=NO_ITEM),
        jnp.pad(scores, ((0, 0), missing), constant_values=-jnp.inf),
        jnp.pad(codes, ((0, 0), missing, (0, 0)), constant_values=NO_ITEM),
    )


def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros split over the devices along the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    spec = RULES("batch", *[None] * (len(shape) - 1))
    return jnp.zeros(shape, dtype, out_sharding=spec)
