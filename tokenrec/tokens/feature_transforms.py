"""Feature transforms t_i: the raw value of one feature to a vector of width d_i.

Token Factory (Chen et al., *Token Factory: Efficiently Integrating Diverse Signals into
Large Recommendation Models*, arXiv 2606.19635, 2026; docs/methods.md section 2):

    categorical    t(f) = E[id]                      a row of the feature's table
    multi-valued   t(f) = mean_k E[id_k]             over the values present; or the sum
    text           as multi-valued
    semantic id    t(f) = concat_l E[c_l]            or the sum; or E[hash(c_1 .. c_l)]
    dense          t(f) = [clip((g(x) - mu) / sigma, -5, 5), x is missing]
    embedding      t(f) = RMSNorm(x) W + b

g is the identity or the signed `log1p`, `sign(x) log(1 + |x|)`; mu and sigma come from
the training split. Id 0 of a table is a missing value and id 1 an unknown one.

From the paper: ids are looked up and dense features are normalised. The formulas, the
two reserved ids, the pooling and the missing flag are ours, where the paper gives none.
Table rows are not looked up here: `tokenrec.tokens.embed` gathers those of all features
of a step at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import TokensConfig
from tokenrec.data.schema import MISSING, Feature
from tokenrec.ops.layers import Linear, rms_normalize

# Normalised dense values are clipped to +- this, in standard deviations.
CLIP_LIMIT = 5.0


def table_widths(features: tuple[Feature, ...], config: TokensConfig) -> dict[str, int]:
    """Width of each table that these features read, by table name, sorted."""
    names = {f.table_name for f in features if f.is_integer}
    return {
        name: config.embedding_dims.get(name, config.embedding_dim)
        for name in sorted(names)
    }


def hashed_prefix_ids(ids: jax.Array, rows: int) -> jax.Array:
    """Hash the prefixes of a semantic id, `hash(c_1..c_l)` for level l, to table rows.

    Args:
      ids: `[..., L] int32`, one code per level, 0 where it is missing.
      rows: rows of the table.

    Returns:
      `[..., L] int32` in [2, rows). A missing code makes its own level and all later
      ones missing (0).
    """
    hashed = jnp.zeros(ids.shape[:-1], jnp.uint32)
    # `present` turns False at the first missing code and stays so.
    present = jnp.ones(ids.shape[:-1], bool)
    levels = []
    for level in range(ids.shape[-1]):
        code = ids[..., level]
        present &= code != MISSING
        # Multiplicative hashing by 2^32 / golden ratio, with one xor-shift per level.
        hashed = (hashed ^ code.astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
        # Ids 0 and 1 are reserved.
        row = 2 + (hashed % jnp.uint32(rows - 2)).astype(jnp.int32)
        levels.append(jnp.where(present, row, MISSING))
    return jnp.stack(levels, axis=-1)


class FeatureTransform(nnx.Module):
    """The transform t_i of one feature.

    Attributes:
      feature: the feature.
      pooling: "mean" or "sum" of the values of a multi-valued feature or a text.
      levels: "concat", "sum" or "prefix", for the levels of a semantic id.
      width: d_i, the length of the vector.
    """

    def __init__(self, feature: Feature, config: TokensConfig, *, rngs: nnx.Rngs):
        self.feature = feature
        self.pooling = config.multi_valued
        self.levels = config.semantic_id
        table_width = config.embedding_dims.get(
            feature.table_name, config.embedding_dim
        )
        if feature.kind == "dense":
            # The value and the missing flag.
            self.width = 2
        elif feature.kind == "embedding":
            self.width = config.embedding_dim
            self.project = Linear(feature.length, self.width, rngs=rngs)
        elif feature.kind == "semantic_id" and config.semantic_id == "concat":
            self.width = table_width * feature.length
        else:
            self.width = table_width

    def __call__(self, values: jax.Array, ids: jax.Array | None) -> jax.Array:
        """Transform a feature of any number of entities.

        Args:
          values: table rows `[..., length, w]` of an integer kind, otherwise the
            numbers themselves, `[..., length]`, NaN where missing.
          ids: `[..., length]`, from which the missing values of a multi-valued feature
            or a text are told apart; not read by other kinds.

        Returns:
          `[..., width]`.
        """
        kind = self.feature.kind
        if kind == "dense":
            return normalize_dense(values, self.feature)
        if kind == "embedding":
            # A missing embedding is zeros: RMSNorm keeps them, and the bias is its
            # vector.
            missing = jnp.isnan(values)
            return self.project(rms_normalize(jnp.where(missing, 0.0, values)))
        if kind == "categorical":
            return values[..., 0, :]
        if kind in ("multi_valued", "text"):
            assert ids is not None
            present = (ids != MISSING)[..., None]
            # Padding ids look up row 0, which is masked here.
            total = jnp.sum(jnp.where(present, values, 0), axis=-2)
            if self.pooling == "sum":
                return total
            return total / jnp.maximum(jnp.sum(present, axis=-2), 1)
        # Semantic id. With "prefix" the rows were looked up by `hashed_prefix_ids`.
        if self.levels == "concat":
            return values.reshape(*values.shape[:-2], self.width)
        return jnp.sum(values, axis=-2)


def normalize_dense(values: jax.Array, feature: Feature) -> jax.Array:
    """Normalise a dense feature: `clip((g(x) - mu) / sigma, -5, 5)`.

    Args:
      values: `[..., 1]`, NaN where missing.
      feature: the feature, for g, mu and sigma.

    Returns:
      `[..., 2]`: the normalised value, 0 where it is missing, and the missing flag.
    """
    missing = jnp.isnan(values)
    # NaN is replaced before any arithmetic: a NaN in a branch that `where` does not
    # take would still make the gradient NaN.
    x = jnp.where(missing, feature.mean, values)
    if feature.transform == "log1p":
        x = jnp.where(missing, x, jnp.sign(x) * jnp.log1p(jnp.abs(x)))
    # A constant feature has deviation 0.
    x = (x - feature.mean) / max(feature.deviation, 1e-6)
    x = jnp.clip(x, -CLIP_LIMIT, CLIP_LIMIT)
    return jnp.concatenate([x, missing.astype(x.dtype)], axis=-1)
