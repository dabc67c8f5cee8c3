"""Heads of retrieval: the next item, and the semantic id of the next item (methods.md section 2, "Tasks").

B streams, R read-outs, P goals of a read-out, V items, L levels, C codes of a level.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import HeadConfig
from tokenrec.ops.contract import contract, gather_over_fsdp
from tokenrec.ops.layers import flatten_tokens, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES


class ItemHead(nnx.Module):
    """Scores `h . e_item / temperature`. With a sampled softmax the vectors lie among the tables, not in here."""

    def __init__(self, config: HeadConfig, width: int, items: int, *, rngs: nnx.Rngs):
        self.config, self.count = config, items
        self.items = (
            None
            if config.negatives
            else weight(rngs, (items, width), None, "embed", inputs=width)
        )

    def vectors(self) -> jax.Array:
        """`[V, d]`, of the full softmax."""
        assert self.items is not None
        return gather_over_fsdp(self.items[...])

    def rows(self, items: jax.Array) -> jax.Array:
        """`[..., d]`, the vectors of `items: [...]`, zeros where -1."""
        rows = expand_rows(self.vectors(), jnp.maximum(items, 0))
        return jnp.where((items >= 0)[..., None], rows, 0)

    def scores(self, h: jax.Array, vectors: jax.Array) -> jax.Array:
        """`[B, R, V] float32` from read-outs `[B, R, d]` and `[V, d]`."""
        return contract(
            "brd,vd->brv", self.query(h), self.key(vectors), RULES("batch", None, None)
        )

    def full_losses(self, h: jax.Array, goals: jax.Array) -> jax.Array:
        """`[B]`, summed cross-entropy of the goals `[B, R, P]`, -1 fills, each against the whole catalogue."""
        partition = jax.nn.logsumexp(self.scores(h, self.vectors()), axis=-1)
        own = self._own_scores(h, self.rows(goals))
        return jnp.sum(
            jnp.where(goals >= 0, partition[..., None] - own, 0), axis=(1, 2)
        )

    def sampled_losses(
        self,
        h: jax.Array,
        goals: jax.Array,
        of_goals: jax.Array,
        negatives: jax.Array,
        of_negatives: jax.Array,
    ) -> jax.Array:
        """`[B]`, summed cross-entropy of each goal against itself and items drawn uniformly, with the log-Q correction.

        Of n draws each item is expected n / V times, so that a drawn item's logit is lowered by `log(n / V)` (Bengio
        and Senecal, 2008). A draw that is the goal itself does not count against it.

        Args:
          goals: `[B, R, P]`, -1 fills; of_goals: `[B, R, P, d]`, their vectors.
          negatives: `[n]`, rows of the catalogue; of_negatives: `[n, d]`.
        """
        own = self._own_scores(h, of_goals)
        drawn = self.scores(h, of_negatives) - math.log(negatives.shape[0] / self.count)
        hit = goals[..., None] == negatives
        others = jax.nn.logsumexp(jnp.where(hit, -jnp.inf, drawn[:, :, None]), axis=-1)
        return jnp.sum(
            jnp.where(goals >= 0, jnp.logaddexp(own, others) - own, 0), axis=(1, 2)
        )

    def _own_scores(self, h: jax.Array, of_goals: jax.Array) -> jax.Array:
        return jnp.einsum("brd,brpd->brp", self.query(h), self.key(of_goals))

    def query(self, h: jax.Array) -> jax.Array:
        """Read-outs as they are scored, temperature included."""
        h = h.astype(jnp.float32)
        return (_unit(h) if self.config.cosine else h) / self.config.temperature

    def key(self, vectors: jax.Array) -> jax.Array:
        """Item vectors as they are scored."""
        return _unit(vectors) if self.config.cosine else vectors


class CodeHead(nnx.Module):
    """The token vocabulary of semantic ids: a vector per level and code, read in and scored against."""

    def __init__(
        self, levels: tuple[int, ...], width: int, *, tied: bool, rngs: nnx.Rngs
    ):
        self.levels = levels
        shape = (len(levels) * max(levels), width)
        self.outputs = weight(rngs, shape, None, "embed", inputs=width)
        self.inputs = None if tied else weight(rngs, shape, None, "embed", inputs=width)

    def tokens(self, codes: jax.Array) -> jax.Array:
        """Codes of the first l levels, `[..., l] int32`, -1 fills -> `[..., l, d]`."""
        table = self.outputs if self.inputs is None else self.inputs
        rows = jnp.arange(codes.shape[-1]) * max(self.levels) + jnp.maximum(codes, 0)
        return expand_rows(gather_over_fsdp(table[...]), rows)

    def log_probs(self, h: jax.Array, level: int) -> jax.Array:
        """`[B, n, d]` -> `[B, n, C_level] float32`."""
        first = level * max(self.levels)
        table = gather_over_fsdp(self.outputs[...])[first : first + self.levels[level]]
        logits = contract(
            "bnd,cd->bnc", h.astype(jnp.float32), table, RULES("batch", None, None)
        )
        return jax.nn.log_softmax(logits, axis=-1)

    def losses(self, h: jax.Array, codes: jax.Array) -> jax.Array:
        """`[B]`, summed cross-entropy of all levels of all goals.

        Args:
          h: `[B, R + R P (L - 1), d]`: the read-outs, each of which says the first level of its goals, then the rows of
            the goals' codes, each of which says the next level.
          codes: `[B, R, P, L]`, -1 fills.
        """
        reads, goals, levels = codes.shape[1:]
        flat = flatten_tokens(codes)
        # Codes of one goal lie side by side, level after level.
        rows = [jnp.repeat(h[:, :reads], goals, axis=1)] + [
            h[:, reads + k :: levels - 1] for k in range(levels - 1)
        ]
        total = jnp.zeros(codes.shape[0], out_sharding=RULES("batch"))
        for level in range(levels):
            said, code = self.log_probs(rows[level], level), flat[..., level]
            # A comparison instead of a gather: the levels are short, and its gradient is no scatter.
            own = jnp.sum(
                jnp.where(jnp.arange(said.shape[-1]) == code[..., None], said, 0),
                axis=-1,
            )
            total -= jnp.sum(jnp.where(code >= 0, own, 0), axis=1)
        return total


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
