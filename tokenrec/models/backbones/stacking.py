"""Blocks of one shape as one with stacked weights, and what the backward pass keeps of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import Remat
from tokenrec.models.backbones.block import Block
from tokenrec.ops.attention import ATTENTION_RESULT


def apply_remat[**P](
    compute: Callable[P, jax.Array], remat: Remat, *, loop: bool = False
) -> Callable[P, jax.Array]:
    """A block as a function of its input, of which the backward pass finds kept what `model.remat` says.

    `loop`: it is the body of one, where XLA cannot merge the second computation with the first anyhow.
    """
    if remat == "none":
        return compute
    keep = jax.checkpoint_policies
    dots = keep.save_from_both_policies(
        keep.dots_with_no_batch_dims_saveable,
        keep.save_only_these_names(ATTENTION_RESULT),
    )
    policy = dots if remat == "dots" else keep.nothing_saveable
    return jax.checkpoint(compute, policy=policy, prevent_cse=not loop)


def stack_blocks(blocks: Sequence[Block]) -> Block:
    """Blocks of one shape as one, each weight `[layers, ...]`."""
    graph, _ = nnx.split(blocks[0])
    weights = [nnx.split(block)[1] for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *layers: jnp.stack(layers), *weights))


def unstack_blocks(block: Block, count: int) -> list[Block]:
    """Inverse of `stack_blocks`. The gradient is one concatenation, not a sum of `count` padded slices."""
    graph, weights = nnx.split(block)
    leaves, tree = jax.tree.flatten(weights)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [
        nnx.merge(graph, jax.tree.unflatten(tree, layer))
        for layer in zip(*parts, strict=True)
    ]
