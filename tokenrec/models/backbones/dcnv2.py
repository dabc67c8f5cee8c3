"""DCN-V2: explicit feature crosses beside an MLP.

*DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to
Rank Systems* (Wang et al., arXiv 2008.13535, 2021), section 3, parallel structure:

    x_0     = [user, mean of the earlier events, target]
    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l             cross layer; W_l a full matrix
    output  = [x_L, MLP(x_0)] W + b

The paper crosses the embeddings of all features. Ours crosses the tokens that makers
made of them, so `tokens.user_tokens` decides the width of x_0: with one token per
static field it is wide, and W_l has its square. The paper has no history; ours is
mean-pooled. The MLP uses SiLU (paper: ReLU). `model.layers` is the number of cross
layers and of MLP layers, `model.ffn_width` the width of the MLP. In UC each state is a
target of the events before it.

Letters: B batch, M user tokens, N targets, d model width, D = (M + 2) d width of x_0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.ctr_inputs import MLP, mean_pool_events, split_stream
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.ops.layers import Linear, split_keys
from tokenrec.tokens.layout import Layout


class DCNv2(Backbone):
    """A cross network in parallel with an MLP."""

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        d, inner = config.width, ffn_width(config)
        inputs = (len(longest.positions_of("user")) + 2) * d
        # D is a multiple of d, so `mesh.fsdp` divides it where it divides the model
        # width.
        self.blocks = nnx.List(
            [
                Linear(inputs, inputs, axis="embed", rngs=rngs)
                for _ in range(config.layers)
            ]
        )
        self.deep = MLP(inputs, (inner,) * config.layers, config.dropout, rngs=rngs)
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
        """Compute the output of each cross layer and the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: not read: each target is computed by itself.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.

        Returns:
          `[B, N, D]` of each cross layer, then `[B, N, d]`.
        """
        (mlp_key,) = split_keys(key, 1)
        inputs = split_stream(x, layout)
        x_0 = inputs.concat_per_target(mean_pool_events(inputs, events), inputs.targets)
        # Each layer multiplies by x_0 once more: layer l holds crosses of degree l + 1.
        crossed = [x_0]
        for cross in self.blocks:
            crossed.append(x_0 * cross(crossed[-1]) + crossed[-1])
        # In parallel: cross network and MLP both read x_0.
        deep = self.deep(x_0, mlp_key)
        output = self.output(jnp.concatenate([crossed[-1], deep], axis=2))
        return [*crossed[1:], output]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """None: it has no attention; its other products are counted from the trace."""
        return ()
