"""Heads of retrieval: the next item, and the semantic id of the next item.

docs/methods.md section 2, "Tasks". For a read-out h and the goal g, the item that
follows:

    next item, full softmax      -log softmax_v(s(h, v))[g]       over the V items
    next item, sampled softmax   over g and n uniform draws, with the log-Q correction
    semantic id                  -sum_l log softmax_c(h_l . o_{l,c})[c_l]

    s(h, v) = h . e_v / temperature, of unit vectors with `head.cosine`

With `head.copy` the items of the history have a bonus (`tokenrec.models.copying`), or,
with semantic ids, a share of the probability (`tokenrec.models.copy_mixture`).

h_0 is the read-out, and h_l the output at the code of level l - 1 of the goal, so that
the semantic id is predicted level by level (TIGER: Rajput et al., arXiv 2305.05065,
2023).

Ranking needs no class of its own: one linear layer scores its tasks.

Letters: B batch, R read-outs, T events, P goals of a read-out, V items, L levels, C_l
codes of level l, n sampled items, d model width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import HeadConfig
from tokenrec.data.schema import FIRST_KNOWN
from tokenrec.models.copy_mixture import CopyGate, CopyMixture
from tokenrec.models.copying import CopyBonus, CopyBonuses, add_to_partition
from tokenrec.ops.contract import contract, gather_over_fsdp
from tokenrec.ops.layers import flatten_tokens, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES


class CopiedItems(NamedTuple):
    """The items of the history as the losses need them, with `head.copy`.

    Attributes:
      bonuses: `CopyBonus` of the read-outs.
      vectors: `[B, T, d]`, item vectors of the events.
    """

    bonuses: CopyBonuses
    vectors: jax.Array


class NextItemHead(nnx.Module):
    """Score read-outs against the vectors of items.

    Args:
      config: `head` of the run's config.
      width: d.
      items: V.

    Attributes:
      items: item vectors `[V, d]` of a full softmax; None with a sampled softmax, whose
        vectors are rows of an embedding table.
      copy: bonus of the items of the history; None without `head.copy`.
    """

    def __init__(self, config: HeadConfig, width: int, items: int, *, rngs: nnx.Rngs):
        self.config = config
        self.count = items
        # A sampled softmax reads some rows of a table per step; a full softmax
        # multiplies with all of them, so that they are a dense weight.
        self.items = (
            None
            if config.negatives
            else weight(rngs, (items, width), None, "embed", inputs=width)
        )
        self.copy = CopyBonus(width, rngs=rngs) if config.copy else None

    def vectors(self) -> jax.Array:
        """All item vectors of a full softmax, `[V, d]`."""
        assert self.items is not None
        return gather_over_fsdp(self.items[...])

    def lookup(self, items: jax.Array) -> jax.Array:
        """Look up the vectors `[..., d]` of `items: [...]`; zeros for -1."""
        vectors = expand_rows(self.vectors(), jnp.maximum(items, 0))
        return jnp.where((items >= 0)[..., None], vectors, 0)

    def scores(self, h: jax.Array, vectors: jax.Array) -> jax.Array:
        """Score `h: [B, R, d]` against `vectors: [V, d]`: `[B, R, V] float32`."""
        return contract(
            "brd,vd->brv", self.query(h), self.key(vectors), RULES("batch", None, None)
        )

    def full_losses(
        self, h: jax.Array, goals: jax.Array, copied: CopiedItems | None = None
    ) -> jax.Array:
        """Compute the cross-entropy of each goal against the whole catalogue.

        Args:
          h: `[B, R, d]`, read-outs.
          goals: `[B, R, P] int32`, -1 fills up.
          copied: the items of the history, with `head.copy`.

        Returns:
          `[B] float32`, summed over the goals.
        """
        # One partition function per read-out serves all of its goals.
        partition = jax.nn.logsumexp(self.scores(h, self.vectors()), axis=-1)
        goal_scores = self._goal_scores(h, self.lookup(goals))
        if copied is not None:
            goal_scores += copied.bonuses.at(goals)
            partition = add_to_partition(
                partition, self._event_scores(h, copied), copied.bonuses.bonuses
            )
        losses = jnp.where(goals >= 0, partition[..., None] - goal_scores, 0)
        return jnp.sum(losses, axis=(1, 2))

    def sampled_losses(
        self,
        h: jax.Array,
        goals: jax.Array,
        goal_vectors: jax.Array,
        negatives: jax.Array,
        negative_vectors: jax.Array,
        copied: CopiedItems | None = None,
    ) -> jax.Array:
        """Compute the cross-entropy of each goal against sampled items.

        Of n uniform draws an item is expected n / V times, so the logit of a drawn item
        is lowered by log(n / V) (log-Q correction; Bengio and Senécal, *Adaptive
        Importance Sampling*, 2008). A draw that is the goal itself is left out.

        The draws estimate the partition of the scores without bonus. What the bonuses
        of `head.copy` add to it is exact, because all items of the history are at hand.

        Args:
          h: `[B, R, d]`, read-outs.
          goals: `[B, R, P] int32`, -1 fills up.
          goal_vectors: `[B, R, P, d]`.
          negatives: `[n] int32`, the drawn items.
          negative_vectors: `[n, d]`.
          copied: the items of the history, with `head.copy`.

        Returns:
          `[B] float32`, summed over the goals.
        """
        goal_scores = self._goal_scores(h, goal_vectors)
        # The goal itself is not drawn, so its logit is not corrected.
        log_expected = math.log(negatives.shape[0] / self.count)
        drawn = self.scores(h, negative_vectors) - log_expected
        is_goal = goals[..., None] == negatives
        others = jax.nn.logsumexp(
            jnp.where(is_goal, -jnp.inf, drawn[:, :, None]), axis=-1
        )
        partition = jnp.logaddexp(goal_scores, others)
        if copied is not None:
            goal_scores += copied.bonuses.at(goals)
            partition = add_to_partition(
                partition,
                self._event_scores(h, copied)[:, :, None],
                copied.bonuses.bonuses[:, :, None],
            )
        losses = jnp.where(goals >= 0, partition - goal_scores, 0)
        return jnp.sum(losses, axis=(1, 2))

    def _goal_scores(self, h: jax.Array, goal_vectors: jax.Array) -> jax.Array:
        """Score each goal, `[B, R, P]`."""
        # Item vectors of goals are gathered, not multiplied with the whole table.
        return jnp.einsum("brd,brpd->brp", self.query(h), self.key(goal_vectors))

    def _event_scores(self, h: jax.Array, copied: CopiedItems) -> jax.Array:
        """Score the item of each event, without bonus, `[B, R, T]`."""
        return jnp.einsum("brd,btd->brt", self.query(h), self.key(copied.vectors))

    def query(self, h: jax.Array) -> jax.Array:
        """Scale read-outs `[..., d]` for scoring, temperature included."""
        # Logits are float32 whatever the compute dtype.
        h = h.astype(jnp.float32)
        return (_unit(h) if self.config.cosine else h) / self.config.temperature

    def key(self, vectors: jax.Array) -> jax.Array:
        """Scale item vectors `[..., d]` for scoring."""
        return _unit(vectors) if self.config.cosine else vectors


class SemanticIdHead(nnx.Module):
    """The code vocabulary of semantic ids: input and output vectors of each level.

    Args:
      levels: number of codes of each level, C_l.
      width: d.
      tied: codes are read with the vectors that they are scored against.
      copy: mix with copies of the items of the history.
      scale: factor of a code's vector where it is read, as a word of a language model
        is (`tokenrec.models.words.word_scale`).

    Attributes:
      copy: the part of the mixture that copies; None without it.
    """

    def __init__(
        self,
        levels: tuple[int, ...],
        width: int,
        *,
        tied: bool,
        copy: bool = False,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.scale = scale
        self.levels = levels
        # Every level takes as many rows as the largest, so that a row is found by
        # multiplication.
        shape = (len(levels) * max(levels), width)
        self.outputs = weight(rngs, shape, None, "embed", inputs=width)
        self.inputs = None if tied else weight(rngs, shape, None, "embed", inputs=width)
        self.copy = CopyGate(width, rngs=rngs) if copy else None

    def tokens(self, codes: jax.Array) -> jax.Array:
        """Look up the tokens of codes.

        Args:
          codes: `[..., l] int32`, codes of the first l levels; -1, which fills up,
            reads code 0.

        Returns:
          `[..., l, d]`.
        """
        rows = jnp.arange(codes.shape[-1]) * max(self.levels) + jnp.maximum(codes, 0)
        return self._vectors(rows)

    def read(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Look up the vectors of ids of the feature `semantic_id`, `[..., L, d]`.

        Args:
          ids: `[..., L] int32`, as `semantic_columns` numbers them; a missing code, 0,
            is a vector of zeros.
          dtype: of the result.
        """
        vectors = self._vectors(jnp.maximum(ids - FIRST_KNOWN, 0)).astype(dtype)
        return jnp.where((ids >= FIRST_KNOWN)[..., None], vectors, 0)

    def _vectors(self, rows: jax.Array) -> jax.Array:
        table = self.outputs if self.inputs is None else self.inputs
        vectors = expand_rows(gather_over_fsdp(table[...]), rows)
        return vectors if self.scale == 1 else vectors * self.scale

    def log_probs(self, h: jax.Array, level: int) -> jax.Array:
        """Log-probabilities of a level's codes: `[B, n, d]` to `[B, n, C_l]`."""
        # Only the codes of this level compete, so the beam search is free of invalid
        # levels.
        first = level * max(self.levels)
        table = gather_over_fsdp(self.outputs[...])[first : first + self.levels[level]]
        logits = contract(
            "bnd,cd->bnc", h.astype(jnp.float32), table, RULES("batch", None, None)
        )
        return jax.nn.log_softmax(logits, axis=-1)

    def losses(self, h: jax.Array, codes: jax.Array) -> jax.Array:
        """Compute the cross-entropy of all levels of all goals.

        Args:
          h: `[B, R + R P (L - 1), d]`, as for `code_log_probs`.
          codes: `[B, R, P, L] int32`, -1 fills up.

        Returns:
          `[B] float32`, summed over the goals and levels.
        """
        total = jnp.zeros(codes.shape[0], out_sharding=RULES("batch"))
        for log_probs in self.code_log_probs(h, codes):
            total -= jnp.sum(log_probs, axis=1)
        return total

    def copy_losses(
        self, h: jax.Array, codes: jax.Array, goals: jax.Array, copied: CopyMixture
    ) -> jax.Array:
        """Compute -log of the mixture with the copies of each goal.

        Args:
          h: `[B, R + R P (L - 1), d]`, as for `code_log_probs`.
          codes: `[B, R, P, L] int32`, -1 fills up.
          goals: `[B, R, P] int32`, catalogue rows; -1 fills up.
          copied: the copies at the R read-outs.

        Returns:
          `[B] float32`, summed over the goals.
        """
        mixed = copied.log_probs(goals, self.item_log_probs(h, codes))
        return -jnp.sum(jnp.where(goals >= 0, mixed, 0), axis=(1, 2))

    def item_log_probs(self, h: jax.Array, codes: jax.Array) -> jax.Array:
        """Log-probabilities of the items with these codes, log P_gen.

        Args:
          h: `[B, R + R P (L - 1), d]`, as for `code_log_probs`.
          codes: `[B, R, P, L] int32`, -1 fills up.

        Returns:
          `[B, R, P] float32`; 0 where codes fill up.
        """
        by_level = jnp.stack(list(self.code_log_probs(h, codes)))
        return jnp.sum(by_level, axis=0).reshape(codes.shape[:3])

    def code_log_probs(self, h: jax.Array, codes: jax.Array) -> Iterator[jax.Array]:
        """Yield the log-probabilities of the codes of goals, level by level.

        Args:
          h: `[B, R + R P (L - 1), d]`: the read-outs, each of which predicts the first
            level of its goals, then the outputs at the goals' codes, each of which
            predicts the next level.
          codes: `[B, R, P, L] int32`, -1 fills up.

        Yields:
          `[B, R P] float32`; 0 where codes fill up.
        """
        reads, goals, levels = codes.shape[1:]
        flat_codes = flatten_tokens(codes)
        # Inputs of each level, `[B, R P, d]`. The codes of one goal lie side by side,
        # so that a level is every (L - 1)-th output.
        inputs = [jnp.repeat(h[:, :reads], goals, axis=1)] + [
            h[:, reads + k :: levels - 1] for k in range(levels - 1)
        ]
        for level in range(levels):
            log_probs = self.log_probs(inputs[level], level)
            code = flat_codes[..., level]
            # A comparison instead of a gather: levels are short, and its gradient is no
            # scatter.
            is_code = jnp.arange(log_probs.shape[-1]) == code[..., None]
            log_prob = jnp.sum(jnp.where(is_code, log_probs, 0), axis=-1)
            yield jnp.where(code >= 0, log_prob, 0)


def _unit(x: jax.Array) -> jax.Array:
    """Scale vectors `[..., d]` to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
