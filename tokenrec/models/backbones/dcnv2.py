"""DCN-V2: *DCN V2: Improved Deep & Cross Network* (Wang et al., arXiv 2008.13535, 2021), section 3, parallel form.

    x_0     = [user, mean of the earlier events, target]
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l                 cross layers, W_l a full matrix
    h       = [x_L, MLP(x_0)] W

The paper crosses the embeddings of all features; here x_0 is the tokens that makers made of them, so that
`tokens.user_tokens` decides its width: with one token per static field x_0 is wide, and W_l its square. The history is
mean-pooled (ours: the paper has none). `model.layers` is the number of cross layers and of layers of the MLP, whose
width is `model.ffn_width`. In UC every state is a target of the events before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.fields import Deep, fields_of, mean_events
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.layers import Linear, split_key
from tokenrec.tokens.layout import Layout


class DCNv2(Backbone):
    """A cross network beside an MLP."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        inputs = (len(longest.rows_of("user")) + 2) * d
        # Each a multiple of d wide, and so in shards where the width of the model is.
        self.blocks = nnx.List(
            [
                Linear(inputs, inputs, axis="embed", rngs=rngs)
                for _ in range(config.layers)
            ]
        )
        self.deep = Deep(inputs, (inner,) * config.layers, config.dropout, rngs=rngs)
        self.output = Linear(inputs + inner, d, axis="embed", rngs=rngs)

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What comes out of each cross layer, `[B, N, D]`, and what is read."""
        (one,) = split_key(key, 1)
        fields = fields_of(x, layout)
        first = fields.beside(mean_events(fields, events), fields.targets)
        made = [first]
        for cross in self.blocks:
            made.append(first * cross(made[-1]) + made[-1])
        read = self.output(jnp.concatenate([made[-1], self.deep(first, one)], axis=2))
        return [*made[1:], read]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: its products are seen where it is traced."""
        return ()
