"""Makers: the features of one entity to N soft tokens of width d.

Token Factory (Chen et al., *Token Factory: Efficiently Integrating Diverse Signals into
Large Recommendation Models*, arXiv 2606.19635, 2026; docs/methods.md section 2,
"Maker"):

    e_i = t_i(f_i)                    transform of feature i, e_i in R^{d_i}
    E   = concat_i e_i                all features of one entity
    Z   = G(E)                        reshaped to N tokens of width d

    G = linear        Z = E W + b
    G = mlp           Z = gelu(E W_1 + b_1) W_2 + b_2
    G = transformer   `FeatureCrossAttention`
    output_scale      Z <- s RMSNorm(Z), s learned and 1 at the start

An entity is the user, an event of the history, the query or a candidate. All of its
features enter one maker; TokenFormer's static fields are the exception, one token per
feature (`PerFieldMaker`). The paper leaves G open, "as simple as an MLP or as complex
as a Transformer": the three forms and the output scale are ours. Makers are trained end
to end with the backbone.

Letters: M features, N tokens, d model width. Leading axes `...` are the batch and, for
events or candidates, their number.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tokenrec.config import TokensConfig
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.ops.layers import (
    Linear,
    RMSNorm,
    constant,
    rms_normalize,
    spec_of,
    weight,
)
from tokenrec.sharding import on_mesh
from tokenrec.tokens.feature_transforms import FeatureTransform

# Feature name -> its values or its ids, for the entities of one part of a batch.
FeatureArrays = dict[str, jax.Array]


class FeatureTransforms(nnx.Module):
    """The transforms t_i of all features of one entity."""

    def __init__(
        self, features: tuple[Feature, ...], config: TokensConfig, *, rngs: nnx.Rngs
    ):
        self.names = tuple(f.name for f in features)
        self.items = nnx.List(
            [FeatureTransform(f, config, rngs=rngs) for f in features]
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width d_i of each transform."""
        return tuple(item.width for item in self.items)

    def __call__(self, values: FeatureArrays, ids: FeatureArrays) -> list[jax.Array]:
        """Transform `values` and `ids` (as in `Maker`) to M arrays `[..., d_i]`."""
        return [
            item(values[name], ids.get(name))
            for name, item in zip(self.names, self.items, strict=True)
        ]


class Maker(nnx.Module):
    """Map all features of an entity to N soft tokens.

    Args:
      features: features of the entity.
      tokens: N.
      width: d.
      config: `tokens` of the run's config: `maker` chooses G.

    Raises:
      InputError: there are no features.
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
                "a maker has no features; keep at least one feature of its entity, or "
                "fewer in data.exclude"
            )
        self.transforms = FeatureTransforms(features, config, rngs=rngs)
        self.tokens = tokens
        self.width = width
        self.kind = config.maker
        # E is the concatenation of the transforms.
        inputs = sum(self.transforms.widths)
        hidden = config.hidden or 2 * width
        if self.kind == "linear":
            self.output = Linear(inputs, tokens * width, axis="embed", rngs=rngs)
        elif self.kind == "mlp":
            # `mesh.fsdp` is checked against the model's width alone, so a hidden width
            # from the config is only split where it is a multiple of that.
            axis = None if hidden % width else "embed"
            self.inner = Linear(inputs, hidden, axis=axis, rngs=rngs)
            self.output = Linear(hidden, tokens * width, axis="embed", rngs=rngs)
        else:
            self.pool = FeatureCrossAttention(
                self.transforms.widths, tokens, width, rngs=rngs
            )
        self.scale = constant(1.0, ()) if config.output_scale else None

    def __call__(
        self, values: FeatureArrays, ids: FeatureArrays, dtype: jnp.dtype
    ) -> jax.Array:
        """Make the tokens of any number of entities.

        Args:
          values: feature name -> table rows `[..., length, w]` of an integer kind, or
            numbers `[..., length]`.
          ids: name of an integer feature -> `[..., length] int32`.
          dtype: of the computation and the tokens.

        Returns:
          `[..., N, d]`.
        """
        # Table rows, normalisation and pooling are float32 up to here.
        parts = [part.astype(dtype) for part in self.transforms(values, ids)]
        if self.kind == "transformer":
            tokens = self.pool(parts)
        else:
            x = jnp.concatenate(parts, axis=-1)
            if self.kind == "mlp":
                x = jax.nn.gelu(self.inner(x))
            x = self.output(x)
            shape = (*x.shape[:-1], self.tokens, self.width)
            # JAX cannot tell by itself over which axis a batch of one is split.
            spec = PartitionSpec(*spec_of(x)[:-1], None, None)
            tokens = jnp.reshape(x, shape, out_sharding=on_mesh(spec))
        if self.scale is None:
            return tokens
        return self.scale[...].astype(dtype) * rms_normalize(tokens)


class PerFieldMaker(nnx.Module):
    """Map each feature of an entity to a token of its own: `z_i = t_i(f_i) W_i + b_i`.

    These are the static fields of TokenFormer (docs/methods.md section 3, "Layout").
    The M maps are one einsum over vectors that are zero-padded to the widest."""

    def __init__(
        self,
        features: tuple[Feature, ...],
        width: int,
        config: TokensConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.transforms = FeatureTransforms(features, config, rngs=rngs)
        widest = max(self.transforms.widths)
        fields = len(features)
        self.kernel = weight(
            rngs, (fields, widest, width), None, None, None, inputs=widest
        )
        self.bias = constant(0.0, (fields, width), None, None)

    def __call__(
        self, values: FeatureArrays, ids: FeatureArrays, dtype: jnp.dtype
    ) -> jax.Array:
        """Make the tokens, `[..., M, d]`; arguments as in `Maker`."""
        parts = self.transforms(values, ids)
        widest = self.kernel.shape[1]
        # The kernel rows beyond d_i multiply zeros and get no gradient.
        padded = [
            jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, widest - part.shape[-1])])
            for part in parts
        ]
        stacked = jnp.stack(padded, axis=-2).astype(dtype)
        tokens = jnp.einsum("...me,med->...md", stacked, self.kernel[...].astype(dtype))
        return tokens + self.bias[...].astype(dtype)


class FeatureCrossAttention(nnx.Module):
    """Let N learned queries attend to the features of an entity, then an FFN.

        F = stack_i(e_i W_i + b_i)                               [M, d]
        Z = softmax(Q (RMSNorm(F) W_k)^T / sqrt(d)) RMSNorm(F) W_v    Q [N, d], learned
        Z = Z + gelu(RMSNorm(Z) W_1 + b_1) W_2 + b_2

    Args:
      widths: d_i of the M features.
      tokens: N.
      width: d.
    """

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
        """Pool M vectors `[..., d_i]` to `[..., N, d]`."""
        fields = jnp.stack(
            [project(part) for project, part in zip(self.inputs, parts, strict=True)],
            axis=-2,
        )
        normed = self.norm(fields)
        # Scaled before the product: N queries are fewer numbers than N x M logits.
        queries = self.queries[...].astype(fields.dtype) * fields.shape[-1] ** -0.5
        logits = jnp.einsum("nd,...fd->...nf", queries, self.keys(normed))
        # The softmax is float32 whatever the compute dtype.
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        pooled = jnp.einsum(
            "...nf,...fd->...nd", weights.astype(fields.dtype), self.values(normed)
        )
        ffn = self.output(jax.nn.gelu(self.inner(self.inner_norm(pooled))))
        return pooled + ffn
