"""DIN: attention from the target to each event, without a softmax.

*Deep Interest Network for Click-Through Rate Prediction* (Zhou et al., arXiv
1706.06978, 2018), section 4.3:

    a_t    = w_2 . f(W_1 [e_t, v, e_t - v, e_t * v] + b_1) + b_2     activation unit
    u      = sum_t a_t e_t               over the events e_t before the target v
    output = MLP([user, u, v]) W + b

There is no softmax over t: the sum of the weights tells how strong the interest is.

The activation unit has 36 hidden units, as in the paper. The paper's f is Dice, which
uses the mean and variance of the batch; with mean 0, variance 1 and slope 0 Dice is
SiLU, which is f here and in the MLP. The difference e - v comes from the authors' code;
the paper's figure has the product alone. The MLP has `model.layers` layers of
`model.ffn_width` (ours). In UC each state is a target of the events before it.

Letters: B batch, M user tokens, N targets, T events, d model width, k hidden units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.ctr_inputs import MLP, CTRInputs, split_stream
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import Linear, constant, split_keys, weight
from tokenrec.sharding import RULES, on_mesh
from tokenrec.tokens.layout import Layout

# Hidden units k of the activation unit.
UNITS = 36


class ActivationUnit(nnx.Module):
    """Weight of an event for a target: a_t of the module's equations."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # W_1 in four parts: for the event, the target, their difference, their product.
        self.kernel = weight(
            rngs, (4, width, UNITS), None, None, None, inputs=4 * width
        )
        self.bias = constant(0.0, (UNITS,), None)
        self.output = weight(rngs, (UNITS,), None, inputs=UNITS)
        self.output_bias = constant(0.0, ())

    def __call__(self, events: jax.Array, targets: jax.Array) -> jax.Array:
        """Weigh `events: [B, T, d]` for `targets: [B, N, d]`: `[B, N, T]`."""
        kernel, dtype = self.kernel[...], events.dtype
        tokens, pairs = RULES("batch", None, None), RULES("batch", None, None, None)
        # W_1 is linear, so that its parts are applied apart: W_e e + W_v v + W_d (e -
        # v) = (W_e + W_d) e + (W_v - W_d) v. The [B, N, T, 4 d] concatenation never
        # exists.
        from_events = contract("btd,dk->btk", events, kernel[0] + kernel[2], tokens)
        from_targets = contract("bnd,dk->bnk", targets, kernel[1] - kernel[2], tokens)
        scaled = targets[..., None] * kernel[3].astype(dtype)
        from_products = jnp.einsum(
            "btd,bndk->bntk", events, scaled, out_sharding=on_mesh(pairs)
        )
        hidden = (
            from_products
            + from_events[:, None]
            + from_targets[:, :, None]
            + self.bias[...].astype(dtype)
        )
        weights = jnp.einsum(
            "bntk,k->bnt", jax.nn.silu(hidden), self.output[...].astype(dtype)
        )
        return weights + self.output_bias[...].astype(dtype)


def pool_interests(
    unit: ActivationUnit, inputs: CTRInputs, events: jax.Array
) -> jax.Array:
    """Sum the events that precede each target, weighted for it.

    Args:
      unit: the activation unit.
      inputs: the stream, taken apart.
      events: `[B, T] bool`, real events.

    Returns:
      u of the module's equations, `[B, N, d]`; zeros without earlier events.
    """
    visible = jnp.asarray(inputs.earlier) & events[:, None, :]
    # Zero, not -inf: the weights are not normalised, so a hidden event adds nothing.
    weights = jnp.where(visible, unit(inputs.events, inputs.targets), 0)
    return jnp.einsum("bnt,btd->bnd", weights, inputs.events)


class DIN(Backbone):
    """Target attention over the events, then an MLP."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        self.unit = ActivationUnit(d, rngs=rngs)
        inputs = (len(longest.positions_of("user")) + 2) * d
        self.deep = MLP(inputs, (inner,) * config.layers, config.dropout, rngs=rngs)
        self.output = Linear(inner, d, axis="embed", rngs=rngs)

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Compute the interests, the last hidden layer and the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: not read: each target is computed by itself.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.

        Returns:
          `[B, N, d]`, `[B, N, f]` with f the width of the MLP, and `[B, N, d]`.
        """
        # A split key, so that the streams of random numbers differ from those of the
        # tokens.
        (mlp_key,) = split_keys(key, 1)
        inputs = split_stream(x, layout)
        interests = pool_interests(self.unit, inputs, events)
        features = inputs.concat_per_target(interests, inputs.targets)
        hidden = self.deep(features, mlp_key)
        return [interests, hidden, self.output(hidden)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: its products are counted from the trace."""
        return ()
