"""Discrete tokens: the features of an entity written out, one token per value.

This is the textualised prompt that Token Factory compares soft tokens with (Chen et
al., arXiv 2606.19635, 2026; docs/methods.md section 2, "textualised prompt"):

    categorical              1 token      its row of the table
    semantic id              L tokens     a row for each level
    multi-valued, text       `length`     a row for each value or word
    dense                    1 token      its bucket: floor(64 Phi((g(x) - mu) / sigma))

Phi is the normal distribution function, so that the 64 buckets of a normal feature are
equally likely. Padding and missing values are tokens too: the count is that of the text
that would be written. An entity takes N tokens where one soft token would do, which is
what the comparison is about.

From the paper: the counts, such as 12 tokens for an item of ranking (8 semantic-id
levels, 1 channel, 3 dense values), and the cut from the left. The buckets are ours.

Letters: N tokens of an entity, d model width, w width of a table.
"""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import TokensConfig
from tokenrec.data.schema import MISSING, Feature
from tokenrec.errors import InputError
from tokenrec.ops.layers import Linear, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.tokens.feature_transforms import normalize_dense, table_widths
from tokenrec.tokens.makers import FeatureArrays

# Kinds of several values, of which an entity may have fewer than the feature's length:
# an item that is new has no semantic id.
FILLED_KINDS = ("text", "multi_valued", "semantic_id")
# Buckets of a dense value, equally likely under a normal distribution, and their
# limits.
BINS = 64
EDGES = np.array([NormalDist().inv_cdf(k / BINS) for k in range(1, BINS)], np.float32)


def tokens_per_feature(features: tuple[Feature, ...]) -> list[tuple[str, int]]:
    """Name and number of tokens of each feature, in the order of writing.

    Raises:
      InputError: a feature is an embedding, which no token can represent.

    >>> tags = Feature("tags", "multi_valued", "item", length=3)
    >>> tokens_per_feature((Feature("tab", "categorical", "context"), tags))
    [('tab', 1), ('tags', 3)]
    """
    for f in features:
        if f.kind == "embedding":
            raise InputError(
                f"feature '{f.name}' is an embedding of {f.length} numbers, which "
                "cannot be written as text; name it in data.exclude, or replace it by "
                "its semantic id"
            )
    return [(f.name, f.length) for f in features]


def token_count(features: tuple[Feature, ...]) -> int:
    """N, the number of tokens of an entity with these features.

    Raises:
      InputError: a feature is an embedding.
    """
    return sum(tokens for _, tokens in tokens_per_feature(features))


def truncate_left(tokens: int, cap: int) -> slice:
    """The newest `cap` of a run of tokens that is ordered from old to new.

    The cut does not respect events: the oldest one may lose its first tokens only, as
    in the paper's "cut from the left".

    Raises:
      InputError: `cap` is negative.

    >>> truncate_left(5 * 12, 50), truncate_left(4 * 12, 50)
    (slice(10, 60, None), slice(0, 48, None))
    """
    if cap < 0:
        raise InputError(
            f"cap={cap} must not be negative; it is the number of tokens that are kept"
        )
    return slice(max(tokens - cap, 0), tokens)


def dense_buckets(values: jax.Array, feature: Feature) -> jax.Array:
    """Bucket of a dense feature.

    Args:
      values: `[..., 1]` raw numbers, NaN where missing.
      feature: the feature, for its normalisation.

    Returns:
      `[..., 1] int32` in [0, BINS), and `BINS` where the number is missing.
    """
    normalised = normalize_dense(values, feature)
    bucket = jnp.sum(
        normalised[..., :1] >= EDGES, axis=-1, keepdims=True, dtype=jnp.int32
    )
    # The second entry is the missing flag.
    return jnp.where(normalised[..., 1:] > 0, BINS, bucket)


class DiscreteTokenMaker(nnx.Module):
    """Map the features of an entity to N discrete tokens of width d.

    It is called like `tokenrec.tokens.makers.Maker`. Tables that are not d wide share
    one bias-free linear map per table (factorised token embeddings; Lan et al.,
    *ALBERT*, arXiv 1909.11942, 2020). The buckets of dense features have rows of width
    d.

    Args:
      features: features of the entity, in the order of writing.
      width: d.
      config: `tokens` of the run's config.

    Raises:
      InputError: there are no features, or one is an embedding.
    """

    def __init__(
        self,
        features: tuple[Feature, ...],
        width: int,
        config: TokensConfig,
        *,
        rngs: nnx.Rngs,
    ):
        if not features:
            raise InputError(
                "a text maker has no features; keep at least one feature of its "
                "entity, or fewer in data.exclude"
            )
        self.features = features
        # Refuses embeddings.
        self.tokens = token_count(features)
        self.width = width
        other_widths = {
            name: table_width
            for name, table_width in table_widths(features, config).items()
            if table_width != width
        }
        # Tables that need a map, and their maps, in one order.
        self.widened = tuple(other_widths)
        self.widen = nnx.List(
            [Linear(w, width, bias=False, rngs=rngs) for w in other_widths.values()]
        )
        self.numbers = tuple(f for f in features if f.kind == "dense")
        # One bucket more, for missing.
        shape = (len(self.numbers), BINS + 1, width)
        self.buckets = (
            weight(rngs, shape, None, None, None, inputs=width)
            if self.numbers
            else None
        )

    def __call__(
        self, values: FeatureArrays, ids: FeatureArrays, dtype: jnp.dtype
    ) -> jax.Array:
        """Make the tokens of any number of entities.

        Args:
          values: feature name -> table rows `[..., length, w]` of an integer kind, or
            numbers `[..., 1]`.
          ids: not read: id 0 has a table row too, which is the token of a missing
            value.
          dtype: of the tokens.

        Returns:
          `[..., N, d]`.
        """
        # In the order of the features, whatever their kind.
        dense = self._dense_tokens(values, dtype) if self.numbers else {}
        return jnp.concatenate(
            [
                self._table_tokens(f, values, dtype) if f.is_integer else dense[f.name]
                for f in self.features
            ],
            axis=-2,
        )

    @property
    def fills_up(self) -> bool:
        """Whether some tokens fill a text or a list of values up to its length."""
        return any(f.kind in FILLED_KINDS for f in self.features)

    def present(self, ids: FeatureArrays) -> jax.Array:
        """Which tokens do not fill anything up, `[..., N] bool`, where `fills_up`.

        Args:
          ids: name of an integer feature -> `[..., length] int32`.
        """
        filled = [f.name for f in self.features if f.kind in FILLED_KINDS]
        # A missing value of another kind is a token of its own.
        real = jnp.ones_like(ids[filled[0]][..., :1], bool)
        parts = [
            ids[f.name] != MISSING if f.name in filled else real
            for f in self.features
            for _ in range(1 if f.name in filled else f.length)
        ]
        return jnp.concatenate(parts, axis=-1)

    def _table_tokens(
        self, feature: Feature, values: FeatureArrays, dtype: jnp.dtype
    ) -> jax.Array:
        """Tokens of an integer feature, `[..., length, d]`."""
        rows = values[feature.name].astype(dtype)
        if feature.table_name not in self.widened:
            return rows
        # Features of one table share its map.
        return self.widen[self.widened.index(feature.table_name)](rows)

    def _dense_tokens(
        self, values: FeatureArrays, dtype: jnp.dtype
    ) -> dict[str, jax.Array]:
        """Token `[..., 1, d]` of each dense feature, by name; one look-up for all."""
        assert self.buckets is not None
        table = self.buckets[...].astype(dtype)
        # The buckets of feature i follow those of feature i - 1 in one table.
        buckets = [
            dense_buckets(values[f.name], f) + i * (BINS + 1)
            for i, f in enumerate(self.numbers)
        ]
        rows = expand_rows(
            table.reshape(-1, self.width), jnp.concatenate(buckets, axis=-1)
        )
        return {f.name: rows[..., i : i + 1, :] for i, f in enumerate(self.numbers)}
