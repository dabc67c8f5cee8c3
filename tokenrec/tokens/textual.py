"""The textualised rival of soft tokens: signals written as discrete tokens of one vocabulary (methods.md section 2).

A categorical value, a level of a semantic id, a tag and a word are each one token, a row of their table; a number is
one token too, its bucket. Nothing is hidden in the count: padding and missing values are tokens that are written.
"""

from __future__ import annotations

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import TokensConfig
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.ops.layers import Linear, weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.tokens.makers import Values
from tokenrec.tokens.transforms import normalize_dense, table_widths

BINS = 64  # buckets of a dense value, equally likely under a normal distribution
EDGES = np.array([NormalDist().inv_cdf(k / BINS) for k in range(1, BINS)], np.float32)


def describe_tokens(features: tuple[Feature, ...]) -> list[tuple[str, int]]:
    """Name and number of tokens of each feature, in the order in which they are written.

    Raises:
      InputError: a feature is an embedding, which no token can stand for.

    >>> describe_tokens((Feature("tab", "categorical", "context"), Feature("tags", "multi_valued", "item", length=3)))
    [('tab', 1), ('tags', 3)]
    """
    for f in features:
        if f.kind == "embedding":
            raise InputError(
                f"feature '{f.name}' is an embedding of {f.length} numbers, which cannot be written as text; name it "
                f"in data.exclude, or replace it by its semantic id"
            )
    return [(f.name, f.length) for f in features]


def token_count(features: tuple[Feature, ...]) -> int:
    """Tokens that the features of an entity take: one per categorical value and number, `length` per other feature.

    Raises:
      InputError: as `describe_tokens`.
    """
    return sum(tokens for _, tokens in describe_tokens(features))


def truncate(tokens: int, cap: int) -> slice:
    """The newest `cap` of a run of tokens that is ordered from old to new: "cut from the left" (Token Factory).

    The cut knows no events: one may lose its first tokens only.

    Raises:
      InputError: `cap` is negative.

    >>> truncate(5 * 12, 50), truncate(4 * 12, 50)
    (slice(10, 60, None), slice(0, 48, None))
    """
    if cap < 0:
        raise InputError(
            f"cap={cap} must not be negative; it is the number of tokens that are kept"
        )
    return slice(max(tokens - cap, 0), tokens)


def dense_buckets(values: jax.Array, feature: Feature) -> jax.Array:
    """`[..., 1]` raw numbers -> `[..., 1] int32`: the bucket of the normalised number, `BINS` where it is missing."""
    normalised = normalize_dense(values, feature)
    bucket = jnp.sum(
        normalised[..., :1] >= EDGES, axis=-1, keepdims=True, dtype=jnp.int32
    )
    return jnp.where(normalised[..., 1:] > 0, BINS, bucket)


class TextMaker(nnx.Module):
    """Features of an entity -> `[..., N, d]`, a token per discrete value, with N = `token_count(features)`.

    Called like `makers.Maker`. Rows of a table that are not d wide are brought to d by a linear map of that table,
    without a bias (factorised token embeddings; Lan et al. 2020). The buckets of every number have d-wide rows of
    their own.
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
                "a text maker has no features; keep at least one feature of its entity, or fewer in data.exclude"
            )
        self.features = features
        self.tokens = token_count(features)
        self.width = width
        narrow = {
            name: rows
            for name, rows in table_widths(features, config).items()
            if rows != width
        }
        self.widened = tuple(narrow)
        self.widen = nnx.List(
            [Linear(rows, width, bias=False, rngs=rngs) for rows in narrow.values()]
        )
        self.numbers = tuple(f for f in features if f.kind == "dense")
        shape = (len(self.numbers), BINS + 1, width)
        self.buckets = (
            weight(rngs, shape, None, None, None, inputs=width)
            if self.numbers
            else None
        )

    def __call__(self, values: Values, ids: Values, dtype: jnp.dtype) -> jax.Array:
        """`values`: rows `[..., length, w]` of an integer kind, otherwise numbers `[..., 1]`, by feature name.

        `ids` are not looked at: id 0 has a row too, which is the token of a missing value.
        """
        dense = self._dense_rows(values, dtype) if self.numbers else {}
        return jnp.concatenate(
            [
                self._rows(f, values, dtype) if f.is_integer else dense[f.name]
                for f in self.features
            ],
            axis=-2,
        )

    def _rows(self, feature: Feature, values: Values, dtype: jnp.dtype) -> jax.Array:
        rows = values[feature.name].astype(dtype)
        if feature.table_name not in self.widened:
            return rows
        return self.widen[self.widened.index(feature.table_name)](rows)

    def _dense_rows(self, values: Values, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """`[..., 1, d]` of every number, by feature name; one look-up for all of them."""
        assert self.buckets is not None
        table = self.buckets[...].astype(dtype)
        found = [
            dense_buckets(values[f.name], f) + i * (BINS + 1)
            for i, f in enumerate(self.numbers)
        ]
        rows = expand_rows(
            table.reshape(-1, self.width), jnp.concatenate(found, axis=-1)
        )
        return {f.name: rows[..., i : i + 1, :] for i, f in enumerate(self.numbers)}
