"""DIN: *Deep Interest Network for Click-Through Rate Prediction* (Zhou et al., arXiv 1706.06978, 2018), section 4.3.

    a_t   = w_2 . f(W_1 [e_t, v, e_t - v, e_t * v] + b_1) + b_2       of each earlier event e_t and the target v
    u     = sum_t a_t e_t                                            no softmax: how much interest there is stays
    h     = MLP([user, u, v])

The paper's activation unit has 36 hidden units, ours too. Its f is Dice, which takes mean and variance of the batch;
without them (mean 0, variance 1, slope 0) Dice is SiLU, which f is here and in the MLP. The difference e - v is the
authors' code; the paper's figure has the product alone. The MLP has `model.layers` layers of `model.ffn_width`; their
number and width are ours. In UC every state is a target of the events before it.

B streams, N targets, T events, d width, k hidden units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.fields import Deep, Fields, fields_of
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import Linear, constant, split_key, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout

UNITS = 36  # of the activation unit


class ActivationUnit(nnx.Module):
    """`a` of the equation."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # Of the event, the target, their difference, their product.
        self.kernel = weight(
            rngs, (4, width, UNITS), None, None, None, inputs=4 * width
        )
        self.bias = constant(0.0, (UNITS,), None)
        self.output = weight(rngs, (UNITS,), None, inputs=UNITS)
        self.output_bias = constant(0.0, ())

    def __call__(self, events: jax.Array, targets: jax.Array) -> jax.Array:
        """`events: [B, T, d]`, `targets: [B, N, d]` -> `[B, N, T]`."""
        kernel, dtype = self.kernel[...], events.dtype
        rows, pairs = RULES("batch", None, None), RULES("batch", None, None, None)
        # The four parts of the product apart: nothing as large as N x T x 4 d is ever made.
        of_event = contract("btd,dk->btk", events, kernel[0] + kernel[2], rows)
        of_target = contract("bnd,dk->bnk", targets, kernel[1] - kernel[2], rows)
        turned = targets[..., None] * kernel[3].astype(dtype)
        of_both = jnp.einsum("btd,bndk->bntk", events, turned, out_sharding=pairs)
        hidden = (
            of_both
            + of_event[:, None]
            + of_target[:, :, None]
            + self.bias[...].astype(dtype)
        )
        made = jnp.einsum(
            "bntk,k->bnt", jax.nn.silu(hidden), self.output[...].astype(dtype)
        )
        return made + self.output_bias[...].astype(dtype)


class DIN(Backbone):
    """Target attention over events, and an MLP."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        self.unit = ActivationUnit(d, rngs=rngs)
        users = len(longest.rows_of("user"))
        self.deep = Deep(
            (users + 2) * d, (inner,) * config.layers, config.dropout, rngs=rngs
        )
        self.output = Linear(inner, d, axis="embed", rngs=rngs)

    def interests(self, fields: Fields, events: jax.Array) -> jax.Array:
        """u, `[B, N, d]`."""
        seen = jnp.asarray(fields.earlier) & events[:, None, :]
        weights = jnp.where(seen, self.unit(fields.events, fields.targets), 0)
        return jnp.einsum("bnt,btd->bnd", weights, fields.events)

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """The interests, the last hidden layer and what is read."""
        (one,) = split_key(key, 1)
        fields = fields_of(x, layout)
        interests = self.interests(fields, events)
        hidden = self.deep(fields.beside(interests, fields.targets), one)
        return [interests, hidden, self.output(hidden)]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: its products are seen where it is traced."""
        return ()
