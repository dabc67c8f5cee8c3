"""Generative retrieval: a trie of the codes that exist, and a beam search that never leaves it.

The codes of an item are one row of `codes: [N, L]`, a semantic id (methods.md section 2, "Tasks"). The caller's model
gives the log-probabilities of a next code; the trie says which codes can come next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.sharding import RULES

NO_ITEM = -1
LAST = np.iinfo(np.int32).max  # an order behind every item
LOWEST = float(
    np.finfo(np.float32).min
)  # log-probability of what exists and cannot be: above what does not exist

# `(codes so far [B, w, l], level l) -> log-probabilities of the next code [B, w, C]`.
NextLogProbs = Callable[[jax.Array, int], jax.Array]


class Level(NamedTuple):
    """Nodes of a trie that are l + 1 codes deep, and where they hang.

    Attributes:
      first_child, child_count: `[n of the level above] int32`: the nodes of this level that continue each node of the
        level above are `first_child` and the next ones. The root is the one node above level 0.
      code: `[n] int32`, last code of each node.
      item: `[n] int32`, lowest row of `codes` under each node; at the last level its only one.
    """

    first_child: jax.Array
    child_count: jax.Array
    code: jax.Array
    item: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["levels"],
    meta_fields=["most_children", "code_counts"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """The rows of `codes` as a tree, level by level; a pytree, so that a jitted function takes it as an argument.

    Attributes:
      levels: L of them, at most 4 N int32 each.
      most_children: at each level, the most nodes that continue one node of the level above.
      code_counts: at each level, one more than its highest code.
    """

    levels: tuple[Level, ...]
    most_children: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    code_counts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


class Beams(NamedTuple):
    """The best items of each request, best first.

    Attributes:
      items: `[B, W] int32`, row of `codes`; -1 where fewer items exist.
      scores: `[B, W] float32`, log-probability; -inf where there is no item.
      codes: `[B, W, L] int32`; -1 where there is no item.
    """

    items: jax.Array
    scores: jax.Array
    codes: jax.Array


def build_trie(codes: np.ndarray) -> Trie:
    """The trie of `codes: [N, L]`, integers that are not negative; a row is an item, and no two rows are equal.

    Its arrays are whole on every device of the mesh in use.

    Raises:
      InputError: `codes` has another shape or type, a negative code, or two equal rows.
    """
    codes = np.asarray(codes)
    if (
        codes.ndim != 2
        or 0 in codes.shape
        or not np.issubdtype(codes.dtype, np.integer)
    ):
        raise InputError(
            f"codes is {codes.dtype} {list(codes.shape)}: expected integers [N, L], one row per item"
        )
    if codes.min() < 0 or codes.max() > LAST:
        row, level = np.argwhere((codes < 0) | (codes > LAST))[0]
        raise InputError(
            f"codes[{row}, {level}]={codes[row, level]} must lie between 0 and {LAST}; number codes from 0"
        )
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order].astype(np.int32)
    fresh = np.zeros(
        len(codes), bool
    )  # whether a row's codes up to a level differ from those of the row before
    fresh[0] = True
    above, levels = np.zeros(len(codes), np.int32), []
    for level in range(codes.shape[1]):
        fresh[1:] |= ordered[1:, level] != ordered[:-1, level]
        first = np.flatnonzero(fresh)
        child_count = np.bincount(above[first]).astype(np.int32)
        first_child = (np.cumsum(child_count) - child_count).astype(np.int32)
        item = np.minimum.reduceat(order, first).astype(np.int32)
        levels.append(
            Level(
                *(
                    jnp.asarray(part)
                    for part in (first_child, child_count, ordered[first, level], item)
                )
            )
        )
        above = (np.cumsum(fresh) - 1).astype(np.int32)
    if not fresh.all():
        second = int(np.flatnonzero(~fresh)[0])
        a, b = sorted(int(row) for row in order[second - 1 : second + 1])
        raise InputError(
            f"codes: items {a} and {b} both have {ordered[second].tolist()}, and only one could be found; "
            "add a last level that tells them apart"
        )
    most = tuple(int(np.max(level.child_count)) for level in levels)
    trie = Trie(tuple(levels), most, tuple(int(top) + 1 for top in codes.max(axis=0)))
    mesh = jax.sharding.get_mesh()
    return jax.device_put(
        trie, None if mesh.empty else jax.NamedSharding(mesh, RULES())
    )


class _Paths(NamedTuple):
    """Between levels: `scores, nodes: [B, w]` and `codes: [B, w, l]` of the w best code prefixes."""

    scores: jax.Array
    nodes: jax.Array
    codes: jax.Array


def _best(
    scores: jax.Array, order: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` highest `scores: [B, n]`, equal ones by lower `order: [B, n]`; and their places."""
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def sort(
        scores: jax.Array, order: jax.Array, places: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        negated, _, places = jax.lax.sort((-scores, order, places), num_keys=2)
        return -negated[:, :count], places[:, :count]

    if scores.shape[1] == count:
        return sort(scores, order, places)
    top, at = jax.lax.top_k(scores, count + 1)

    def of_top() -> tuple[jax.Array, jax.Array]:
        return sort(
            top[:, :count],
            jnp.take_along_axis(order, at[:, :count], axis=1),
            at[:, :count],
        )

    # A sort of all is needed only where a tie straddles the cut: it takes 100 ms for 32 x 12,800 scores on two cores,
    # and `top_k` takes 3 ms.
    cut = (top[:, count - 1] == top[:, count]) & (top[:, count] > -jnp.inf)
    return jax.lax.cond(jnp.any(cut), lambda: sort(scores, order, places), of_top)


def _descend(
    paths_log_probs: tuple[_Paths, jax.Array],
    level: Level,
    *,
    most_children: int,
    width: int,
    renormalize: bool,
) -> _Paths:
    """The best `width` continuations of the paths by one code, those that exist only.

    There are so many: each path has one at least, and `width` exceeds the paths only where they are all there are.
    """
    paths, log_probs = paths_log_probs
    batch, beams = paths.nodes.shape
    slot = jnp.arange(most_children, dtype=jnp.int32)
    count = level.child_count[paths.nodes][..., None]
    exists = slot < count
    node = level.first_child[paths.nodes][..., None] + jnp.minimum(slot, count - 1)
    code = level.code[node]
    # Bounded from below, so that what exists comes before what does not.
    gain = jnp.maximum(
        jnp.take_along_axis(log_probs.astype(jnp.float32), code, axis=2), LOWEST
    )
    if renormalize:
        gain = gain - jax.nn.logsumexp(gain, axis=2, keepdims=True, where=exists)
    score = jnp.where(
        exists, jnp.maximum(paths.scores[..., None] + gain, LOWEST), -jnp.inf
    )
    order = jnp.where(exists, level.item[node], LAST)
    flat = (batch, beams * most_children)
    scores, at = _best(score.reshape(flat), order.reshape(flat), width)
    before = jnp.take_along_axis(paths.codes, (at // most_children)[..., None], axis=1)
    nodes, added = (
        jnp.take_along_axis(part.reshape(flat), at, axis=1) for part in (node, code)
    )
    return _Paths(scores, nodes, jnp.concatenate([before, added[..., None]], axis=2))


def _finish(paths: _Paths, level: Level, *, width: int) -> Beams:
    """Items of the last nodes, filled up to `width` beams."""
    more = (0, width - paths.nodes.shape[1])
    scores = jnp.where(paths.scores == LOWEST, -jnp.inf, paths.scores)
    return Beams(
        jnp.pad(level.item[paths.nodes], ((0, 0), more), constant_values=NO_ITEM),
        jnp.pad(scores, ((0, 0), more), constant_values=-jnp.inf),
        jnp.pad(paths.codes, ((0, 0), more, (0, 0)), constant_values=NO_ITEM),
    )


def _per_request[T](
    compute: Callable[[Any, Level], T], of_requests: Any, level: Level
) -> T:
    """`compute` on every device for its own requests: sorting along beams needs no others."""
    if jax.sharding.get_abstract_mesh().empty:
        return compute(of_requests, level)
    of_requests = jax.tree.map(
        lambda x: jax.sharding.reshard(x, RULES("batch", *[None] * (x.ndim - 1))),
        of_requests,
    )
    level = jax.tree.map(lambda x: jax.sharding.reshard(x, RULES(None)), level)
    split, whole = RULES("batch"), RULES()
    return jax.shard_map(
        compute, in_specs=(split, whole), out_specs=split, check_vma=False
    )(of_requests, level)


def beam_search(
    next_log_probs: NextLogProbs,
    trie: Trie,
    *,
    batch: int,
    width: int,
    renormalize: bool = False,
) -> Beams:
    """The items with the most probable codes, found by keeping the best `width` code prefixes at each level.

    Exact where `width` is at least the number of nodes of every level but the last. Of equal scores the lower row of
    `codes` is the better, and of equal prefixes the one with the lowest row under it. For use inside `jax.jit`: levels
    are unrolled, and on a mesh every device searches for its own requests.

    Args:
      next_log_probs: `(codes_so_far [B, w, l] int32, level l) -> [B, w, C]`, traced once a level. Level 0 has one
        empty prefix, w = 1; later w is the lesser of `width` and the number of nodes one level up. All prefixes
        exist and differ.
      batch: B; width: W.
      renormalize: at each level, make the probabilities of the codes that exist there sum to 1. Without it, what the
        model gives to codes that do not exist is lost, and a score is the model's own log-probability of the codes.

    Raises:
      InputError: `width` or `batch` is below 1, or `next_log_probs` returns another shape or too few codes.
    """
    for name, value in (("batch", batch), ("width", width)):
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    mesh = jax.sharding.get_abstract_mesh()

    def start(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        spec = None if mesh.empty else RULES("batch", *[None] * (len(shape) - 1))
        return jnp.zeros(shape, dtype, out_sharding=spec)

    paths = _Paths(
        start((batch, 1), jnp.float32),
        start((batch, 1), jnp.int32),
        start((batch, 1, 0), jnp.int32),
    )
    for number, level in enumerate(trie.levels):
        log_probs = next_log_probs(paths.codes, number)
        wanted, codes = paths.nodes.shape, trie.code_counts[number]
        if (
            log_probs.shape[:2] != wanted
            or log_probs.ndim != 3
            or log_probs.shape[2] < codes
        ):
            raise InputError(
                f"next_log_probs returns {list(log_probs.shape)} at level {number}: expected {[*wanted, codes]}, or "
                "more codes"
            )
        descend = functools.partial(
            _descend,
            most_children=trie.most_children[number],
            width=min(width, level.code.shape[0]),
            renormalize=renormalize,
        )
        paths = _per_request(descend, (paths, log_probs), level)
    return _per_request(functools.partial(_finish, width=width), paths, trie.levels[-1])
