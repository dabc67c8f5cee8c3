"""Low-rank adapters of frozen projections (LoRA).

    y = x W + (alpha / r) dropout(x) A B        W frozen, A and B trained, B = 0 at first

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, 2021,
equation 3. A: `[inputs, r]`, B: `[r, outputs]`; heads keep their axis, so that B is
split over `mesh.tensor` as W is.

Letters: B batch, S stream length, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx

from tokenrec.config.tuning_config import TuningConfig
from tokenrec.ops.contract import contract, contract_again
from tokenrec.ops.layers import constant, dropout, spec_of, weight
from tokenrec.sharding import RULES, tokens_of


class Adapter(nnx.Module):
    """The product A B beside a projection.

    Args:
      tuning: `tuning` of the run's config: rank, alpha and dropout.
      inputs: shape of one input, such as `(d,)` or `(H, h)`.
      input_axes: logical axis of each dimension of it.
      outputs: shape of one output.
      output_axes: logical axis of each dimension of it.
    """

    def __init__(
        self,
        tuning: TuningConfig,
        inputs: Sequence[int],
        input_axes: Sequence[str | None],
        outputs: Sequence[int],
        output_axes: Sequence[str | None],
        *,
        rngs: nnx.Rngs,
    ):
        rank = tuning.rank
        self.scale = tuning.alpha / rank
        self.rate = tuning.dropout
        self.down = weight(
            rngs, (*inputs, rank), *input_axes, None, inputs=math.prod(inputs)
        )
        self.up = constant(0.0, (rank, *outputs), None, *output_axes)

    def __call__(
        self, x: jax.Array, out: jax.Array, keys: jax.Array | None
    ) -> jax.Array:
        """Add the product to the result of the projection.

        Args:
          x: `[B, S, inputs]`.
          out: `[B, S, outputs]`, `x W`.
          keys: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, S, outputs]`.
        """
        x = dropout(x, self.rate, keys)
        inputs, outputs = "dk"[: x.ndim - 2], "hi"[: out.ndim - 2]
        narrow = contract(
            f"bs{inputs},{inputs}r->bsr",
            x,
            self.down[...],
            RULES("batch", tokens_of(x), None),
        )
        # As large as the projection, which is kept: the sum is what is needed.
        wide = contract_again(
            f"bsr,r{outputs}->bs{outputs}", narrow, self.up[...], spec_of(out)
        )
        return out + self.scale * wide
