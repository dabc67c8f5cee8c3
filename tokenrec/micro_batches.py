"""Split a batch into micro-batches, whose losses and gradients add up to its own.

Two reasons to split the batch of a step:

- `optim.accumulate`: activations of the whole batch do not fit in memory;
- caches: on a CPU, activations of a few streams stay in the cache of a core between one
  operation and the next, where those of the whole batch go through memory each time,
  and through fresh pages in each step. A step of 256 streams of 79 tokens, width 64,
  takes 190 ms of processor time in 8 parts against 246 ms whole, and 191 ms against
  415 ms without huge pages (two cores of an AMD EPYC). TPUs and GPUs want large
  operations instead.

Neither changes the result by more than rounding: losses are divided by the counts of
the whole step, every sample meets all negatives, and dropout draws by sample.

B samples of a step, M micro-batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch
from tokenrec.models.stream_layout import batch_layout
from tokenrec.ops.attention import current_platform
from tokenrec.sharding import RULES, batch_shards
from tokenrec.state import ModelSpec
from tokenrec.tokens.output_vectors import NEGATIVES_PART

# For each entity and stack, the index of every id of the batch into the unique rows.
Inverses = dict[str, dict[str, jax.Array]]

# Numbers of one activation `[tokens, width]` that a CPU computes at a time: 1 MB in
# float32. From a quarter to twice as many, steps take the same time within 5 %.
CACHED_NUMBERS = 1 << 18
# Fewer tokens would read the weights more often than they save.
LEAST_TOKENS = 512


def micro_batch_count(model: ModelSpec, batch: Batch) -> int:
    """Number of micro-batches of a step on the platform of the mesh in use.

    Args:
      model: the model.
      batch: the batch; only its shapes are read.

    Returns:
      `optim.accumulate`, times the parts that keep to the caches of a CPU.
    """
    count = model.config.optim.accumulate
    return count * cached_parts(model, batch, batch.valid.shape[0] // count)


def cached_parts(model: ModelSpec, batch: Batch, samples: int) -> int:
    """Number of parts that keep to the caches of a CPU; 1 on other platforms.

    Args:
      model: the model.
      batch: the batch; only the length of its streams is read.
      samples: samples that are computed together, over all devices.
    """
    if current_platform() != "cpu":
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    own = samples if mesh.empty else samples // batch_shards(mesh)
    length = batch_layout(model.config, model.schema, model.literals, batch).length
    tokens = max(CACHED_NUMBERS // model.config.model.width, LEAST_TOKENS)
    # The fewest parts of equal size that hold no more tokens; a stream stays whole.
    fits = (n for n in range(1, own) if own % n == 0 and own // n * length <= tokens)
    return next(fits, own)


def micro_batches(
    batch: Batch, row_indices: Inverses, keys: jax.Array | None, count: int
) -> tuple[Batch, Inverses, jax.Array | None]:
    """Split a batch into micro-batches: `[B, ...]` -> `[M, B / M, ...]`.

    A micro-batch takes every M-th sample, so that each device keeps its samples. The
    drawn negatives are not split but repeated, `[M, B, n]`: a sample is scored against
    those of all samples, and a softmax over fewer is another objective.

    Args:
      batch: the batch of the step, with drawn negatives if there are any.
      row_indices: which of the distinct rows each id of the batch is.
      keys: `[B]`, PRNG keys of dropout; None in evaluation.
      count: M.

    Returns:
      The batches, their indices, and their PRNG keys.
    """

    def repeat(leaf: jax.Array) -> jax.Array:
        spec = RULES(None, "batch", *[None] * (leaf.ndim - 1))
        return jnp.broadcast_to(leaf, (count, *leaf.shape), out_sharding=spec)

    parts = split_samples(batch, count)
    if batch.negatives is not None:
        parts = parts._replace(negatives=repeat(batch.negatives))
    part_indices = {
        stack: {
            part: repeat(ids) if part == NEGATIVES_PART else split_samples(ids, count)
            for part, ids in of_stack.items()
        }
        for stack, of_stack in row_indices.items()
    }
    return parts, part_indices, split_samples(keys, count)


def split_samples[Tree](tree: Tree, count: int) -> Tree:
    """Split the samples of arrays `[B, ...]` among M micro-batches.

    Returns:
      Arrays `[M, B / M, ...]`; entry i holds the samples i, i + M, ...
    """

    def split(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // count, count, *leaf.shape[1:])
        spec = RULES("batch", *[None] * (len(shape) - 1))
        return jnp.moveaxis(jnp.reshape(leaf, shape, out_sharding=spec), 1, 0)

    return jax.tree.map(split, tree)


def join_samples(leaf: jax.Array) -> jax.Array:
    """Undo `split_samples`: `[M, B / M, ...]` -> `[B, ...]`."""
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    spec = RULES("batch", *[None] * (len(shape) - 1))
    return jnp.reshape(jnp.moveaxis(leaf, 0, 1), shape, out_sharding=spec)
