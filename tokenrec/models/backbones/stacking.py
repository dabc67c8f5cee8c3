"""Stacked blocks for a loop over layers, and rematerialisation of a block.

A loop over stacked weights (`model.scan`) has one layer in its program however many it
runs, so that compile time does not grow with depth. Rematerialisation (`model.remat`)
trades computation for memory: the backward pass computes activations again instead of
keeping them (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv
1604.06174, 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import Remat
from tokenrec.models.backbones.block import Block
from tokenrec.ops.attention.remat import SAVE_ATTENTION


def apply_remat[**P](
    compute: Callable[P, jax.Array], remat: Remat, *, loop: bool = False
) -> Callable[P, jax.Array]:
    """Wrap a block in `jax.checkpoint` with the policy of `model.remat`.

    Args:
      compute: the block as a function of its input, `[B, n, d]` to `[B, m, d]`.
      remat: "none" keeps every activation; "dots" keeps products with weights and the
        result of attention; "full" keeps the input only.
      loop: the block is the body of a loop, where XLA cannot merge the second
        computation with the first, so that no barrier is needed against it.

    Returns:
      The wrapped function; `compute` itself with "none".
    """
    if remat == "none":
        return compute
    policies = jax.checkpoint_policies
    # Attention is no product with weights; its result is kept by its name.
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, SAVE_ATTENTION
    )
    policy = dots if remat == "dots" else policies.nothing_saveable
    return jax.checkpoint(compute, policy=policy, prevent_cse=not loop)


def stack_blocks(blocks: Sequence[Block]) -> Block:
    """Stack n blocks of one shape to one block whose weights are `[n, ...]`."""
    # All blocks have the graph of the first: stacking changes shapes of weights only.
    graph, _ = nnx.split(blocks[0])
    weights = [nnx.split(block)[1] for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *layers: jnp.stack(layers), *weights))


def unstack_blocks(block: Block, count: int) -> list[Block]:
    """Take `count` stacked blocks apart; the inverse of `stack_blocks`.

    `jax.lax.split` instead of indexing: its gradient is one concatenation, and not a
    sum of `count` padded slices."""
    graph, weights = nnx.split(block)
    leaves, tree = jax.tree.flatten(weights)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [
        nnx.merge(graph, jax.tree.unflatten(tree, layer))
        for layer in zip(*parts, strict=True)
    ]
