"""A branch beside the backbone: crosses of user, target, events and read-out.

A token that flows through a backbone is added to others; the branch multiplies them
(`model.branch`). For each target:

    x_0     = [user, target, mean of the earlier events, read-out, interests]
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l             cross layer; W_l a full matrix
    output  = read-out + [x_L, MLP(x_0)] W + b

`user` is the mean of the user's tokens, so that the width of x_0 does not depend on
their number. `interests` are DIN's weighted sum of the earlier events
(`tokenrec.models.backbones.din`), with `model.branch='din'` only. The crosses and the
parallel MLP are those of DCN-V2 (Wang et al., arXiv 2008.13535, 2021, section 3);
their combination with a transformer's read-out is ours.

Events and user are tokens as the makers made them, before the backbone, and all of
them: the positions that the backbone skips (`model.needed_rows`) are read here.

Letters: B batch, S stream length, T events, N targets (candidates, or T in UC), d model
width, D = 4 d or 5 d width of x_0 (d less without user tokens).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.ctr_inputs import (
    MLP,
    CTRInputs,
    mean_pool_events,
    split_stream,
)
from tokenrec.models.backbones.din import ActivationUnit, pool_interests
from tokenrec.ops.layers import Linear, split_keys
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout


class Branch(nnx.Module):
    """A cross network and an MLP over the tokens and the read-outs of a backbone.

    Args:
      config: `model` of the run's config.
      longest: layout of the longest stream, from which the user's tokens are counted.
    """

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        d, inner, layers = config.width, ffn_width(config), config.branch_layers
        self.unit = ActivationUnit(d, rngs=rngs) if config.branch == "din" else None
        has_user = len(longest.positions_of("user")) > 0
        inputs = (3 + has_user + (self.unit is not None)) * d
        # D is a multiple of d, so `mesh.fsdp` divides it where it divides the model
        # width.
        self.crosses = nnx.List(
            [Linear(inputs, inputs, axis="embed", rngs=rngs) for _ in range(layers)]
        )
        self.deep = MLP(inputs, (inner,) * layers, config.dropout, rngs=rngs)
        self.output = Linear(inputs + inner, d, axis="embed", rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        readouts: jax.Array,
        layout: Layout,
        events: jax.Array,
        key: jax.Array | None,
    ) -> jax.Array:
        """Compute what is added to the read-outs of the backbone.

        Args:
          x: `[B, S, d]`, tokens, as the backbone gets them.
          readouts: `[B, N, d]`, of the backbone, in any dtype.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, N, d]` in the dtype of `x`.
        """
        # A split key, so that the streams of random numbers differ from those of the
        # tokens.
        (mlp_key,) = split_keys(key, 1)
        inputs = mean_user(split_stream(x, layout), len(layout.positions_of("user")))
        history = mean_pool_events(inputs, events)
        interests = (
            None if self.unit is None else pool_interests(self.unit, inputs, events)
        )
        return self.cross(inputs, history, readouts, interests, mlp_key)

    def cross(
        self,
        inputs: CTRInputs,
        history: jax.Array,
        readouts: jax.Array,
        interests: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """Cross what belongs to the request with the targets and their read-outs.

        Args:
          inputs: its user, `mean_user`, and its targets `[B, N, d]` are read.
          history: mean of the earlier events, `[B, N or 1, d]`.
          readouts: `[B, N, d]`, of the backbone, in any dtype.
          interests: DIN's sum of the earlier events, `[B, N, d]`; None without.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, N, d]` in the dtype of the targets.
        """
        parts = [inputs.targets, history, readouts.astype(inputs.targets.dtype)]
        if interests is not None:
            parts.append(interests)
        x_0 = inputs.concat_per_target(*parts)
        crossed = x_0
        for cross in self.crosses:
            crossed = x_0 * cross(crossed) + crossed
        deep = self.deep(x_0, key)
        return self.output(jnp.concatenate([crossed, deep], axis=2))


def mean_user(inputs: CTRInputs, users: int) -> CTRInputs:
    """Replace the concatenated user tokens by their mean, `[B, 1, d]`."""
    if not users:
        return inputs
    batch, width = inputs.user.shape[0], inputs.targets.shape[2]
    shape, spec = (batch, 1, users, width), RULES("batch", *[None] * 3)
    tokens = jnp.reshape(inputs.user, shape, out_sharding=on_mesh(spec))
    return inputs._replace(user=jnp.mean(tokens, axis=2))
