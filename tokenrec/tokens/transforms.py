"""Feature transforms t_i: raw ids and numbers to vectors (methods.md section 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import TokensConfig
from tokenrec.data.schema import MISSING, Feature
from tokenrec.ops.layers import Linear, rms_normalize

LIMIT = 5.0  # normalised dense values are clipped to +- this


def table_widths(features: tuple[Feature, ...], config: TokensConfig) -> dict[str, int]:
    """Table name -> width of its rows."""
    names = {f.table_name for f in features if f.is_integer}
    return {
        name: config.embedding_dims.get(name, config.embedding_dim)
        for name in sorted(names)
    }


def prefix_ids(ids: jax.Array, rows: int) -> jax.Array:
    """Hashed n-grams of a code prefix: entry l of `[..., L]` becomes `hash(c_1..c_l)`, in [2, rows).

    A missing code (0) makes itself and what follows missing.
    """
    hashed = jnp.zeros(ids.shape[:-1], jnp.uint32)
    present = jnp.ones(ids.shape[:-1], bool)
    out = []
    for level in range(ids.shape[-1]):
        code = ids[..., level]
        present &= code != MISSING
        hashed = (hashed ^ code.astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hashed ^= hashed >> 15
        out.append(
            jnp.where(
                present, 2 + (hashed % jnp.uint32(rows - 2)).astype(jnp.int32), MISSING
            )
        )
    return jnp.stack(out, axis=-1)


class Transform(nnx.Module):
    """One feature's `t_i`. `width` is the length of its vector."""

    def __init__(self, feature: Feature, config: TokensConfig, *, rngs: nnx.Rngs):
        self.feature = feature
        self.pooling = config.multi_valued
        self.levels = config.semantic_id
        row = config.embedding_dims.get(feature.table_name, config.embedding_dim)
        if feature.kind == "dense":
            self.width = 2
        elif feature.kind == "embedding":
            self.width = config.embedding_dim
            self.project = Linear(feature.length, self.width, rngs=rngs)
        elif feature.kind == "semantic_id" and config.semantic_id == "concat":
            self.width = row * feature.length
        else:
            self.width = row

    def __call__(self, values: jax.Array, ids: jax.Array | None) -> jax.Array:
        """`[..., width]` from `values`: rows `[..., length, w]` of an integer kind, otherwise numbers `[..., length]`.

        `ids: [..., length]` says which rows of a multi-valued feature or a text are missing.
        """
        kind = self.feature.kind
        if kind == "dense":
            return normalize_dense(values, self.feature)
        if kind == "embedding":
            missing = jnp.isnan(values)
            return self.project(rms_normalize(jnp.where(missing, 0.0, values)))
        if kind == "categorical":
            return values[..., 0, :]
        if kind in ("multi_valued", "text"):
            assert ids is not None
            present = (ids != MISSING)[..., None]
            total = jnp.sum(jnp.where(present, values, 0), axis=-2)
            return (
                total / jnp.maximum(jnp.sum(present, axis=-2), 1)
                if self.pooling == "mean"
                else total
            )
        if self.levels == "concat":
            return values.reshape(*values.shape[:-2], self.width)
        return jnp.sum(values, axis=-2)


def normalize_dense(values: jax.Array, feature: Feature) -> jax.Array:
    """`[..., 1]` with NaN -> `[..., 2]`: `clip((g(x) - mu) / sigma, -5, 5)`, 0 where missing, and the missing flag."""
    missing = jnp.isnan(values)
    x = jnp.where(missing, feature.mean, values)
    if feature.transform == "log1p":
        x = jnp.where(missing, x, jnp.sign(x) * jnp.log1p(jnp.abs(x)))
    x = jnp.clip((x - feature.mean) / max(feature.deviation, 1e-6), -LIMIT, LIMIT)
    return jnp.concatenate([x, missing.astype(x.dtype)], axis=-1)
