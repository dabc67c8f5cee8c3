"""Stacked blocks for a loop over layers, and rematerialisation of a block.

A loop over stacked weights (`model.scan`) has one layer in its program however many it
runs, so that compile time does not grow with depth. Rematerialisation (`model.remat`)
trades computation for memory: the backward pass computes activations again instead of
keeping them (Chen et al., *Training Deep Nets with Sublinear Memory Cost*, arXiv
1604.06174, 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import ModelConfig, Remat
from tokenrec.models.backbones.bfts import layer_stacks
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


def make_blocks(config: ModelConfig, make: Callable[[int], Any]) -> nnx.List:
    """Make the entries of `TokenFormer.blocks`, stacked as `layer_stacks` says.

    Layers are created from the bottom, stacked or not, so that both draw the same
    random numbers.

    Args:
      config: `model` of the run's config.
      make: makes the block of a layer from its number.
    """
    numbers = iter(range(config.layers))
    blocks = []
    for stack in layer_stacks(config):
        layers = [make(next(numbers)) for _ in range(stack.size)]
        blocks.append(stack_blocks(layers) if stack.size > 1 else layers[0])
    return nnx.List(blocks)


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
    return [nnx.merge(graph, layer) for layer in take_apart(weights, count)]


def split_first_axis[T](tree: T, count: int) -> T:
    """Split the first axis of all arrays: `[n, ...]` to `[n / count, count, ...]`."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), tree)


def take_apart[T](tree: T, count: int) -> list[T]:
    """Take arrays `[count, ...]` apart along their first axis."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
