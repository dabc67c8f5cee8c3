"""Makers: features of an entity to soft tokens, `E = concat_i t_i(f_i)`, `Z = G(E)` (Token Factory; methods.md 2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import TokensConfig
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.ops.layers import Linear, RMSNorm, constant, rms_normalize, weight
from tokenrec.tokens.transforms import Transform

Values = dict[str, jax.Array]


class Transforms(nnx.Module):
    """`t_i` of every feature of one entity. Values and ids are dicts feature name -> `[..., length (, width)]`."""

    def __init__(
        self, features: tuple[Feature, ...], config: TokensConfig, *, rngs: nnx.Rngs
    ):
        self.names = tuple(f.name for f in features)
        self.items = nnx.List([Transform(f, config, rngs=rngs) for f in features])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(item.width for item in self.items)

    def __call__(self, values: Values, ids: Values) -> list[jax.Array]:
        return [
            item(values[name], ids.get(name))
            for name, item in zip(self.names, self.items, strict=True)
        ]


class Maker(nnx.Module):
    """All features of an entity -> N tokens: `[..., N, d]`.

    `kind` is G: "linear", "mlp" (linear, GELU, linear), or "transformer" (each feature a token, read by N
    learned queries).
    """

    def __init__(
        self,
        features: tuple[Feature, ...],
        tokens: int,
        width: int,
        config: TokensConfig,
        *,
        rngs: nnx.Rngs,
    ):
        if not features:
            raise InputError(
                "a maker has no features; keep at least one feature of its entity, or fewer in data.exclude"
            )
        self.transforms = Transforms(features, config, rngs=rngs)
        self.tokens, self.width, self.kind = tokens, width, config.maker
        inputs = sum(self.transforms.widths)
        hidden = config.hidden or 2 * width
        if self.kind == "linear":
            self.output = Linear(inputs, tokens * width, axis="embed", rngs=rngs)
        elif self.kind == "mlp":
            # A width that is given need not be a multiple of `fsdp`, as the model's is.
            self.inner = Linear(
                inputs, hidden, axis=None if hidden % width else "embed", rngs=rngs
            )
            self.output = Linear(hidden, tokens * width, axis="embed", rngs=rngs)
        else:
            self.pool = FeatureTransformer(
                self.transforms.widths, tokens, width, rngs=rngs
            )
        self.scale = constant(1.0, ()) if config.output_scale else None

    def __call__(self, values: Values, ids: Values, dtype: jnp.dtype) -> jax.Array:
        parts = [part.astype(dtype) for part in self.transforms(values, ids)]
        if self.kind == "transformer":
            made = self.pool(parts)
        else:
            x = jnp.concatenate(parts, axis=-1)
            if self.kind == "mlp":
                x = jax.nn.gelu(self.inner(x))
            x = self.output(x)
            made = x.reshape(*x.shape[:-1], self.tokens, self.width)
        return (
            made
            if self.scale is None
            else self.scale[...].astype(dtype) * rms_normalize(made)
        )


class FieldMakers(nnx.Module):
    """One token per feature, each with a linear map of its own: `[..., M, d]` (TokenFormer's static fields).

    The M maps are one einsum over features padded to the widest.
    """

    def __init__(
        self,
        features: tuple[Feature, ...],
        width: int,
        config: TokensConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.transforms = Transforms(features, config, rngs=rngs)
        widest, fields = max(self.transforms.widths), len(features)
        self.kernel = weight(
            rngs, (fields, widest, width), None, None, None, inputs=widest
        )
        self.bias = constant(0.0, (fields, width), None, None)

    def __call__(self, values: Values, ids: Values, dtype: jnp.dtype) -> jax.Array:
        parts = self.transforms(values, ids)
        widest = self.kernel.shape[1]
        padded = [
            jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, widest - p.shape[-1])])
            for p in parts
        ]
        stacked = jnp.stack(padded, axis=-2).astype(dtype)
        return jnp.einsum(
            "...me,med->...md", stacked, self.kernel[...].astype(dtype)
        ) + self.bias[...].astype(dtype)


class FeatureTransformer(nnx.Module):
    """Features as tokens, read by N learned queries and an FFN: list of `[..., e_i]` -> `[..., N, d]`."""

    def __init__(
        self, widths: tuple[int, ...], tokens: int, width: int, *, rngs: nnx.Rngs
    ):
        self.inputs = nnx.List([Linear(w, width, rngs=rngs) for w in widths])
        self.norm = RMSNorm(width)
        self.queries = weight(rngs, (tokens, width), None, None, inputs=1)
        self.keys = Linear(width, width, axis="embed", bias=False, rngs=rngs)
        self.values = Linear(width, width, axis="embed", bias=False, rngs=rngs)
        self.inner_norm = RMSNorm(width)
        self.inner = Linear(width, 2 * width, axis="embed", rngs=rngs)
        self.output = Linear(2 * width, width, axis="embed", rngs=rngs)

    def __call__(self, parts: list[jax.Array]) -> jax.Array:
        fields = jnp.stack(
            [project(part) for project, part in zip(self.inputs, parts, strict=True)],
            axis=-2,
        )
        normed = self.norm(fields)
        queries = self.queries[...].astype(fields.dtype) * fields.shape[-1] ** -0.5
        logits = jnp.einsum("nd,...fd->...nf", queries, self.keys(normed)).astype(
            jnp.float32
        )
        weights = jax.nn.softmax(logits, axis=-1).astype(fields.dtype)
        read = jnp.einsum("...nf,...fd->...nd", weights, self.values(normed))
        return read + self.output(jax.nn.gelu(self.inner(self.inner_norm(read))))
