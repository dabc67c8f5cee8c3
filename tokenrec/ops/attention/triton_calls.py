"""FlashAttention over runs of keys: the calls of the Triton kernels.

Each kernel of `tokenrec.ops.attention.triton_kernels` runs over a grid of (block, head,
stream). Arrays keep their layout `[B, S, H, h]`, since a kernel reads rows at any
stride.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tokenrec.ops.attention.key_runs import KeyRuns
from tokenrec.ops.attention.triton_kernels import (
    Sizes,
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Kernels:
    """The kernels of one attention.

    Attributes:
      runs: what each query sees.
      sizes: of the attention.
      interpret: run the kernels step by step on any platform, slowly.
    """

    runs: KeyRuns
    sizes: Sizes
    interpret: bool = False

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the output and the log of the softmax's denominator.

        Args:
          q: `[B, Q, H, h]`; h is a power of 2 from 16 on.
          k: `[B, K, H, h]`.
          v: `[B, K, H, h]`.
          valid: `[B, K] bool`, keys that are not padding; None: all.

        Returns:
          `[B, Q, H, h]` in the dtype of `q`, and `[B, H, Q] float32` in base 2.
        """
        streams, queries, heads, width = q.shape
        log_sum = jax.ShapeDtypeStruct((streams, heads, queries), jnp.float32)
        return self._call(
            forward_kernel,
            queries,
            self.sizes.block_q,
            inputs=(
                (q, _rows_of_block(self.sizes.block_q, width)),
                (k, _all_rows(self.sizes.keys, width)),
                (v, _all_rows(self.sizes.keys, width)),
            ),
            outputs=(
                (q, _rows_of_block(self.sizes.block_q, width)),
                (log_sum, _numbers_of_block(self.sizes.block_q)),
            ),
            valid=valid,
        )

    def query_gradient(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        valid: jax.Array | None,
        gradient: jax.Array,
        log_sum: jax.Array,
        output_dot_gradient: jax.Array,
    ) -> jax.Array:
        """Compute the gradient of q.

        Args:
          q: `[B, Q, H, h]`.
          k: `[B, K, H, h]`.
          v: `[B, K, H, h]`.
          valid: `[B, K] bool`, keys that are not padding; None: all.
          gradient: `[B, Q, H, h]`, of the output.
          log_sum: `[B, H, Q] float32`, of the forward pass.
          output_dot_gradient: `[B, H, Q] float32`.

        Returns:
          `[B, Q, H, h]` in the dtype of `q`.
        """
        width = q.shape[-1]
        (d_q,) = self._call(
            query_gradient_kernel,
            self.sizes.queries,
            self.sizes.block_q,
            inputs=(
                (q, _rows_of_block(self.sizes.block_q, width)),
                (k, _all_rows(self.sizes.keys, width)),
                (v, _all_rows(self.sizes.keys, width)),
                (gradient, _rows_of_block(self.sizes.block_q, width)),
                (log_sum, _numbers_of_block(self.sizes.block_q)),
                (output_dot_gradient, _numbers_of_block(self.sizes.block_q)),
            ),
            outputs=((q, _rows_of_block(self.sizes.block_q, width)),),
            valid=valid,
        )
        return d_q

    def key_value_gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        valid: jax.Array | None,
        gradient: jax.Array,
        log_sum: jax.Array,
        output_dot_gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Compute the gradients of k and v, with arguments as in `query_gradient`.

        Returns:
          Twice `[B, K, H, h]`, in the dtypes of `k` and `v`.
        """
        width = q.shape[-1]
        return self._call(
            key_value_gradient_kernel,
            self.sizes.keys,
            self.sizes.block_k,
            inputs=(
                (q, _all_rows(self.sizes.queries, width)),
                (k, _rows_of_block(self.sizes.block_k, width)),
                (v, _rows_of_block(self.sizes.block_k, width)),
                (gradient, _all_rows(self.sizes.queries, width)),
                (log_sum, _all_numbers(self.sizes.queries)),
                (output_dot_gradient, _all_numbers(self.sizes.queries)),
            ),
            outputs=(
                (k, _rows_of_block(self.sizes.block_k, width)),
                (v, _rows_of_block(self.sizes.block_k, width)),
            ),
            valid=valid,
        )

    def _call(
        self,
        kernel: Callable[..., None],
        tokens: int,
        block: int,
        inputs: tuple[tuple[Any, pl.BlockSpec], ...],
        outputs: tuple[tuple[Any, pl.BlockSpec], ...],
        valid: jax.Array | None,
    ) -> Any:
        """Call a kernel over blocks of `tokens`.

        Args:
          kernel: takes sizes, refs of `KeyRuns`, a tuple of the ref of `valid` or
            of nothing, and refs of the inputs and outputs.
          tokens: Q or K.
          block: queries or keys of a block.
          inputs: arrays and how the grid reads them.
          outputs: arrays of the same shape and dtype, and how the grid writes them.
          valid: `[B, K] bool`, keys that are not padding; None: all.
        """
        streams, _, heads, _ = inputs[0][0].shape
        runs = jax.tree.map(jnp.asarray, self.runs)
        # Triton has no booleans in memory.
        masks = () if valid is None else (valid.astype(jnp.int8),)
        mask_specs = tuple(
            pl.BlockSpec((None, self.sizes.keys), lambda i, head, stream: (stream, 0))
            for _ in masks
        )
        return pl.pallas_call(
            functools.partial(kernel, self.sizes),
            grid=(pl.cdiv(tokens, block), heads, streams),
            in_specs=(
                jax.tree.map(_whole, runs),
                mask_specs,
                *(spec for _, spec in inputs),
            ),
            out_specs=tuple(spec for _, spec in outputs),
            out_shape=tuple(
                jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in outputs
            ),
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=self.interpret,
        )(runs, masks, *(array for array, _ in inputs))


def _whole(array: jax.Array) -> pl.BlockSpec:
    """Every program sees the whole array."""
    return pl.BlockSpec(array.shape, lambda i, head, stream: (0,) * array.ndim)


def _rows_of_block(block: int, width: int) -> pl.BlockSpec:
    """A block of `[B, S, H, h]` per program."""
    return pl.BlockSpec(
        (None, block, None, width), lambda i, head, stream: (stream, i, head, 0)
    )


def _all_rows(tokens: int, width: int) -> pl.BlockSpec:
    """All tokens of `[B, S, H, h]`, of one stream and head."""
    return pl.BlockSpec(
        (None, tokens, None, width), lambda i, head, stream: (stream, 0, head, 0)
    )


def _numbers_of_block(block: int) -> pl.BlockSpec:
    """A block of `[B, H, S]` per program."""
    return pl.BlockSpec((None, None, block), lambda i, head, stream: (stream, head, i))


def _all_numbers(tokens: int) -> pl.BlockSpec:
    """All tokens of `[B, H, S]`, of one stream and head."""
    return pl.BlockSpec((None, None, tokens), lambda i, head, stream: (stream, head, 0))
